"""OpenVINO's CPU plugin, shapes fixed, tuned for latency, in float32 (on CPUs with AMX its default is bfloat16)."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

TITLE = "OpenVINO"
NEEDS = "openvino"
ONNX = True


def load(folder: Path, threads: int) -> Callable[[], np.ndarray]:
    import openvino

    images = np.load(folder / "images.npy")
    core = openvino.Core()
    model = core.read_model(folder / "model.onnx")
    model.reshape(list(images.shape))
    settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
    request = core.compile_model(model, "CPU", settings).create_infer_request()

    def run() -> np.ndarray:
        return request.infer({0: images}, share_inputs=True, share_outputs=True)[0]

    return run
