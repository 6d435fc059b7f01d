"""PyTorch as it comes."""

from collections.abc import Callable
from pathlib import Path
from typing import Optional

import numpy as np

TITLE = "PyTorch eager"
NEEDS = None
ONNX = False
APART = False
DEVICES = ("cpu", "cuda")


def unavailable() -> Optional[str]:
    return None


def load(folder: Path, threads: int) -> Callable[[], np.ndarray]:
    import torch

    from resnet_fast.bench.workload import eager, load_images, load_model

    torch.set_num_threads(threads)
    return eager(load_model(folder), load_images(folder))
