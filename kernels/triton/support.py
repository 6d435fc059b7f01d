"""Which cases the Triton kernels cover."""

import functools
import importlib.util
import os
from typing import Optional

import torch

from resnet_fast.kernels.case import Case

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
STEM_CHANNELS = 8  # what pack.pixels takes


def interpreted() -> bool:
    """Whether Triton runs its kernels in its interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _too_old() -> Optional[str]:
    """The reason why not, on an NVIDIA GPU older than the kernels' tiles were compiled for."""
    if torch.version.hip or not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return None if major >= 8 else f"needs compute capability 8.0, this GPU has {major}.{minor}"


def supports(case: Case, dtypes: tuple[torch.dtype, ...] = DTYPES) -> Optional[str]:
    """None if the kernels cover the case, else the reason why not. Asks a driver only about a case on a GPU."""
    if not _installed():
        return "Triton is not installed"
    if case.device != "cuda" and not (case.device == "cpu" and interpreted()):
        return f"Triton runs on a GPU, not on {case.device}"
    if case.dtype not in dtypes:
        return f"no {case.dtype}"
    if case.op == "stem" and case.in_channels > STEM_CHANNELS:
        return f"a stem of {case.in_channels} input channels; up to {STEM_CHANNELS} are covered"
    return _too_old() if case.device == "cuda" else None
