"""torch.compile at its best on a CPU: in inference, Inductor freezes weights, folds batch norms, packs for oneDNN."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

import numpy as np

if TYPE_CHECKING:
    from resnet_fast.bench.step import Step

TITLE = "torch.compile"
NEEDS = None
ONNX = False
APART = False


def unavailable() -> Optional[str]:
    compiler = os.environ.get("CXX", "g++")
    return None if shutil.which(compiler) else f"needs a C++ compiler, {compiler} is not there"


def load(folder: Path, threads: int) -> Callable[[], np.ndarray]:
    import torch
    import torch._inductor.config

    from resnet_fast.bench.workload import load_images, load_model

    torch.set_num_threads(threads)
    torch._inductor.config.freezing = True
    layout: Any = {"memory_format": torch.channels_last}
    model, images = torch.compile(load_model(folder).to(**layout)), load_images(folder).to(**layout)

    def run() -> np.ndarray:
        with torch.no_grad():  # freezing wants this, not inference_mode
            return model(images).numpy()

    return run


def train(folder: Path, threads: int) -> "Step":
    from resnet_fast.bench.step import load_step

    return load_step(folder, threads, lambda model: model.compile())
