"""PyTorch as it comes."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

TITLE = "PyTorch eager"
DEVICES = ("cpu", "cuda")


def load(folder: Path, threads: int) -> Callable[[], np.ndarray]:
    import torch

    from resnet_fast.bench.workload import eager, load_images, load_model

    torch.set_num_threads(threads)
    return eager(load_model(folder), load_images(folder))
