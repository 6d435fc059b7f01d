"""torch.compile at its best on a CPU: weights frozen, so that Inductor folds batch norms and packs for oneDNN."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional

import numpy as np

TITLE = "torch.compile, freezing"
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
