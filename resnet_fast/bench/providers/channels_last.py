"""PyTorch as it comes, weights and images in channels_last."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from resnet_fast.bench.training_step import Step

TITLE = "PyTorch eager, channels_last"
DEVICES = ("cpu", "cuda")


def load(folder: Path, threads: int) -> Callable[[], np.ndarray]:
    import torch

    from resnet_fast.bench.workload import eager, load_images, load_model

    torch.set_num_threads(threads)
    layout: Any = {"memory_format": torch.channels_last}
    return eager(load_model(folder).to(**layout), load_images(folder).to(**layout))


def train(folder: Path, threads: int) -> "Step":
    from resnet_fast.bench.workload import load_step

    return load_step(folder, threads)
