"""torch.compile at its best: max-autotune on a GPU, with CUDA graphs; in inference Inductor freezes weights and folds
batch norms, and packs for oneDNN on a CPU."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Optional

import numpy as np

if TYPE_CHECKING:
    from resnet_fast.bench.training_step import Step

TITLE = "torch.compile"
DEVICES = ("cpu", "cuda")


def unavailable() -> Optional[str]:
    compiler = os.environ.get("CXX", "g++")
    return None if shutil.which(compiler) else f"needs a C++ compiler, {compiler} is not there"


def load(folder: Path, threads: int) -> Callable[[], np.ndarray]:
    import torch
    import torch._inductor.config

    from resnet_fast.bench.workload import load_channels_last, to_numpy

    torch._inductor.config.freezing = True
    stock, images = load_channels_last(folder, threads)
    model = torch.compile(stock, mode=_mode(images.device.type))

    def run() -> np.ndarray:
        with torch.no_grad():  # freezing wants this, not inference_mode
            return to_numpy(model(images))

    return run


def train(folder: Path, threads: int) -> "Step":
    from resnet_fast.bench.workload import load_setting, load_step

    mode = _mode(load_setting(folder).device)
    return load_step(folder, threads, lambda model: model.compile(mode=mode))


def _mode(device: str) -> Optional[str]:
    return "max-autotune" if device == "cuda" else None
