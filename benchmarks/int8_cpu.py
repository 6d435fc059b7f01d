"""int8 files in ONNX Runtime on a CPU: ours, those of its own static quantiser, and float32.

``python -m benchmarks.int8_cpu --json RESULT.json``, with nothing else running. Per model and batch size:

    fp32     the exported file
    static   onnxruntime.quantization.quantize_static of it: QDQ, per_channel, all else as it comes, min and max
    uint8    the same with activation_type=QUInt8, which its documentation advises for x86
    ours     export_onnx(precision="int8", target="cpu"), calibrated with the same images

Each runs in a process of its own, stopped while another is timed; they take turns for several rounds, every other round
in reverse order. A round gives the median of its calls; shown is the median of the rounds. The error is that of the
logits against PyTorch in float64, root mean square over root mean square, on eight photographs. The weights are random
and the batch norms' statistics those of the photographs, so errors say which file is closer, not what a trained
network would lose.
"""

import argparse
import logging
import os
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
from torch import Tensor, nn

from resnet_fast.bench.machine import describe, load
from resnet_fast.bench.runner import Worker
from resnet_fast.cli.console import console, table, write_json
from resnet_fast.cli.demo.photographs import photographs
from resnet_fast.export import export_onnx
from resnet_fast.models.named import build
from resnet_fast.utils.cpuinfo import available_cores

_FILES = ("fp32", "static", "uint8", "ours")
_PATIENCE = 300  # seconds for an answer
_SIZE = 224
_CALIBRATION = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", help="may be repeated; by default resnet18 and resnet50")
    parser.add_argument("--batch", action="append", type=int, help="may be repeated; by default 1 and 16")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=2.0, help="of a round")
    parser.add_argument("--threads", type=int, default=available_cores())
    parser.add_argument("--json", metavar="FILE", help="also write the result to FILE")
    options = parser.parse_args()
    before = load()
    results = []
    for name in options.model or ["resnet18", "resnet50"]:
        with tempfile.TemporaryDirectory(prefix="resnet-fast-int8-") as folder:
            model = with_statistics(build(name), crops(32, seed=0))
            paths = write(model, crops(_CALIBRATION, seed=1), Path(folder))
            for batch in options.batch or [1, 16]:
                print(f"{name}, batch {batch}", flush=True)
                measured = measure(model, paths, batch, options.threads, options.rounds, options.seconds)
                results.append({"model": name, "batch": batch, "files": measured})
    rows = [
        (
            result["model"],
            result["batch"],
            *(f"{result['files'][name]['median_ms']:.2f}" for name in _FILES),
            f"{result['files']['static']['median_ms'] / result['files']['ours']['median_ms']:.2f}",
            *(f"{result['files'][name]['error']:.2e}" for name in _FILES[1:]),
        )
        for result in results
    ]
    columns = ("model", "batch", *_FILES, "static / ours", *(f"{name} error" for name in _FILES[1:]))
    console().print(table("int8 in ONNX Runtime, milliseconds a batch", columns, rows, columns[1:]))
    busy = {"load_before": before, "load_after": load()}
    write_json({"machine": describe(), "threads": options.threads, **busy, "results": results}, options.json)


def crops(count: int, seed: int) -> Tensor:
    """``[count, 3, 224, 224]``: parts of photographs, normalised as for ImageNet."""
    pictures = photographs(_SIZE + 64).images
    corners = torch.randint(0, 65, (count, 2), generator=torch.Generator().manual_seed(seed)).tolist()
    parts = [
        pictures[index % len(pictures), :, top : top + _SIZE, left : left + _SIZE]
        for index, (top, left) in enumerate(corners)
    ]
    return torch.stack(parts)


def with_statistics(model: nn.Module, images: Tensor) -> nn.Module:
    """``model`` whose batch norms know the means and variances of ``images``."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None  # the mean over all batches
    with torch.no_grad():
        for batch in images.split(8):
            model.train()(batch)
    return model.eval()


def write(model: nn.Module, images: Tensor, folder: Path) -> dict[str, Path]:
    """The files, by name."""
    paths = {name: folder / f"{name}.onnx" for name in _FILES}
    size = tuple(images.shape[1:])
    export_onnx(model, paths["fp32"], input_size=size)
    # Not verified: that is on noise, which these images do not calibrate for. The error is shown anyhow.
    settings = {"precision": "int8", "target": "cpu", "calibration": images, "verify": False}
    export_onnx(model, paths["ours"], input_size=size, **settings)
    logging.disable(logging.WARNING)  # it advises to prepare the graph, which is prepared
    quantize_static(paths["fp32"], paths["static"], _Reader(images), per_channel=True)
    unsigned = QuantType.QUInt8
    quantize_static(paths["fp32"], paths["uint8"], _Reader(images), per_channel=True, activation_type=unsigned)
    logging.disable(logging.NOTSET)
    return paths


class _Reader(CalibrationDataReader):
    def __init__(self, images: Tensor) -> None:
        self._batches: Iterator[Tensor] = iter(images.split(8))

    def get_next(self) -> Optional[dict[str, np.ndarray]]:
        batch = next(self._batches, None)
        return None if batch is None else {"input": batch.numpy()}


def measure(
    model: nn.Module, paths: dict[str, Path], batch: int, threads: int, rounds: int, seconds: float
) -> dict[str, dict[str, Any]]:
    """Milliseconds of each round, their median, and the error, by file."""
    pictures = photographs(_SIZE).images
    images = pictures[torch.arange(max(batch, len(pictures))) % len(pictures)]
    with torch.inference_mode():
        reference = model.double()(pictures.double()).numpy()
    model.float()
    workers: dict[str, Worker] = {}
    times: dict[str, list[float]] = {name: [] for name in _FILES}
    with tempfile.TemporaryDirectory(prefix="resnet-fast-int8-") as root:
        try:
            for name, path in paths.items():
                folder = Path(root) / name
                folder.mkdir()
                os.symlink(path, folder / "model.onnx")
                workers[name] = Worker("onnxruntime", folder, threads)
            found = {name: _logits(worker, Path(root) / name, images) for name, worker in workers.items()}
            for name, worker in workers.items():  # from now on with the batch that is timed
                np.save(Path(root) / name / "images.npy", images[:batch].numpy())
                worker.ask(f"load {Path(root) / name}", _PATIENCE)
            for index in range(rounds):
                for name in _FILES if index % 2 == 0 else _FILES[::-1]:
                    answer = workers[name].ask(f"time {seconds}", _PATIENCE)
                    times[name].append(statistics.median(answer["times"]) * 1e3)
        finally:
            for worker in workers.values():
                worker.kill()
    return {
        name: {
            "median_ms": statistics.median(times[name]),
            "rounds_ms": times[name],
            "error": _relative(found[name][: len(reference)], reference),
            "bytes": paths[name].stat().st_size,
        }
        for name in _FILES
    }


def _logits(worker: Worker, folder: Path, images: Tensor) -> np.ndarray:
    np.save(folder / "images.npy", images.numpy())
    worker.ask(f"load {folder}", _PATIENCE)
    return np.load(folder / "onnxruntime.npy")


def _relative(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


if __name__ == "__main__":
    main()
