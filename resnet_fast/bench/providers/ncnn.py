"""ncnn on the CPU, converted by pnnx, in float32: its half-precision storage and arithmetic are switched off.

Winograd, sgemm and packed layouts are on, its defaults. The images run one after the other, with all threads in each:
ResNet-50 on 16 of them took at best 604 ms so on two cores, 629 with an image a thread, and 731 as a batch (which ncnn
knows since 2026: ``Mat(..., batch_index=0)``).
"""

import importlib.util
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np

TITLE = "ncnn, image by image"
NEEDS = "ncnn"
ONNX = True
APART = True


def load(folder: Path, threads: int) -> Callable[[], np.ndarray]:
    import ncnn

    images = np.load(folder / "images.npy")
    shape = ",".join(map(str, (1, *images.shape[1:])))
    subprocess.run([pnnx(), "model.onnx", f"inputshape=[{shape}]", "fp16=0"], cwd=folder, check=True)
    net = ncnn.Net()
    net.opt.num_threads = threads
    for kind in ("fp16_packed", "fp16_storage", "fp16_arithmetic", "bf16_packed", "bf16_storage"):
        setattr(net.opt, f"use_{kind}", False)
    for read, name in ((net.load_param, "model.ncnn.param"), (net.load_model, "model.ncnn.bin")):
        if read(str(folder / name)) != 0:
            raise RuntimeError(f"ncnn cannot read {name}")

    def run_one(image: np.ndarray) -> np.ndarray:
        extractor = net.create_extractor()
        extractor.input("in0", ncnn.Mat(image))
        status, result = extractor.extract("out0")
        if status != 0:
            raise RuntimeError(f"ncnn failed with {status}")
        return np.array(result)

    return lambda: np.stack([run_one(image) for image in images])


def pnnx() -> str:
    """The converter's program, by its path. Its Python module is not imported: that needs PyTorch."""
    spec = importlib.util.find_spec("pnnx")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("No module named 'pnnx'")
    return str(Path(spec.origin).with_name("pnnx"))
