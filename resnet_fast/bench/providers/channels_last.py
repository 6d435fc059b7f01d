"""PyTorch as it comes, weights and images in channels_last."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from resnet_fast.bench.training_step import Step

TITLE = "PyTorch eager, channels_last"
DEVICES = ("cpu", "cuda")


def load(folder: Path, threads: int) -> Callable[[], np.ndarray]:
    from resnet_fast.bench.workload import eager, load_channels_last

    return eager(*load_channels_last(folder, threads))


def train(folder: Path, threads: int) -> "Step":
    from resnet_fast.bench.workload import load_step

    return load_step(folder, threads)
