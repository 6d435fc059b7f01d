"""This package, the whole call one CUDA graph."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

TITLE = "resnet_fast, graphed"
DEVICES = ("cuda",)


def load(folder: Path, threads: int) -> Callable[[], np.ndarray]:
    import torch

    from resnet_fast import accelerate, graphed
    from resnet_fast.bench.workload import load_images, load_model, to_numpy

    torch.set_num_threads(threads)
    images = load_images(folder).contiguous(memory_format=torch.channels_last)
    call = graphed(accelerate(load_model(folder)), images)
    return lambda: to_numpy(call(images))
