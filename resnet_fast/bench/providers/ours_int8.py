"""This package: the stock model, quantised with the workload's images, in PyTorch."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

TITLE = "resnet_fast int8 in PyTorch"
NEEDS = "onnxruntime"  # calibrates
DEVICES = ("cpu", "cuda")
ACCURATE = 0.5


def load(folder: Path, threads: int) -> Callable[[], np.ndarray]:
    import torch

    from resnet_fast import quantize
    from resnet_fast.bench.workload import eager, load_images, load_model

    torch.set_num_threads(threads)
    images = load_images(folder).contiguous(memory_format=torch.channels_last)
    return eager(quantize(load_model(folder), images), images)
