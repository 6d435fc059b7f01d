"""This package: the stock model, accelerated."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from resnet_fast.bench.training_step import Step

TITLE = "resnet_fast"
DEVICES = ("cpu", "cuda")


def load(folder: Path, threads: int) -> Callable[[], np.ndarray]:
    import torch

    from resnet_fast import accelerate
    from resnet_fast.bench.workload import eager, load_images, load_model

    torch.set_num_threads(threads)
    images = load_images(folder).contiguous(memory_format=torch.channels_last)
    return eager(accelerate(load_model(folder)), images)


def train(folder: Path, threads: int) -> "Step":
    from resnet_fast import accelerate
    from resnet_fast.bench.workload import load_step

    return load_step(folder, threads, accelerate)
