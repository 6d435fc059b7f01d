"""Which GPU it is, what Triton can do on it, and in which precision.

Importing this module does not import Triton.
"""

import functools
import importlib.util
import os
from typing import Optional

import torch

from resnet_fast.utils import compat


def interpreted() -> bool:
    """Whether Triton runs its kernels in its interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def architecture(device: torch.device) -> str:
    """``"sm_90"``, ``"gfx942"``, or ``"interpreter"``."""
    if interpreted():
        return "interpreter"
    return _architecture(device.index if device.index is not None else torch.cuda.current_device())


@functools.cache
def _architecture(index: int) -> str:
    if torch.version.hip:
        return torch.cuda.get_device_properties(index).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm_{major}{minor}"


def refusal(device: str, index: Optional[int] = None) -> Optional[str]:
    """None if Triton runs on the device, else the reason why not. Asks a driver only about ``"cuda"``.

    device, index: of a ``torch.device``; without an index, the current one of its type.
    """
    if not _installed():
        return "Triton is not installed"
    if device != "cuda" and not (device == "cpu" and interpreted()):
        return f"Triton runs on a GPU, not on {device}"
    if device != "cuda" or not _nvidia():
        return None
    return _too_old(torch.cuda.current_device() if index is None else index)


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _nvidia() -> bool:
    return not torch.version.hip and torch.cuda.is_available()


@functools.cache
def _too_old(index: int) -> Optional[str]:
    """The reason why not, on an NVIDIA GPU older than the kernels' tiles were compiled for."""
    major, minor = torch.cuda.get_device_capability(index)
    return None if major >= 8 else f"needs compute capability 8.0, this GPU has {major}.{minor}"


def no_fp8(architecture: str) -> Optional[str]:
    """The reason why float8_e4m3fn is not covered there: without instructions for it, Triton's code is slow or none."""
    if architecture.startswith("sm_"):
        multiplies = int(architecture.removeprefix("sm_")) >= 89
    else:
        multiplies = architecture in ("gfx950", "interpreter")
    if multiplies:
        return None
    other = "; it multiplies float8_e4m3fnuz" if architecture == "gfx942" else ""
    return f"{architecture} does not multiply float8_e4m3fn{other}"


def precision_of(dtype: torch.dtype, target: str) -> str:
    """Which list of tiles: float32 goes through TF32 where PyTorch's own convolutions would."""
    if dtype != torch.float32:
        return "half"
    return "tf32" if target.startswith("sm_") and compat.convolutions_in_tf32() else "ieee"


def dot_precision(dtype: torch.dtype, target: str) -> str:
    """In which precision a kernel multiplies, as ``tl.dot`` names it."""
    return "tf32" if precision_of(dtype, target) == "tf32" else "ieee"
