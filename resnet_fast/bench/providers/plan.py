"""This package's native program alone, for single layers: the checks before it would blur the time of a small one."""

from collections.abc import Callable
from pathlib import Path
from typing import Optional

import numpy as np

TITLE = "resnet_fast"


def unavailable() -> Optional[str]:
    from resnet_fast.kernels.native import library

    return library.unavailable()


def load(folder: Path, threads: int) -> Callable[[], np.ndarray]:
    import torch

    from resnet_fast import accelerate
    from resnet_fast.bench.workload import eager, load_images, load_model
    from resnet_fast.network.plan import Plan, last_plan

    torch.set_num_threads(threads)
    model = accelerate(load_model(folder))
    images = load_images(folder).contiguous(memory_format=torch.channels_last)
    eager(model, images)()
    plan = last_plan(model)
    if not isinstance(plan, Plan):
        raise RuntimeError(plan or "no part of it is fused")
    return lambda: plan.run(images).numpy()
