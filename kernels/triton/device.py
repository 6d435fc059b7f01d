"""Which cases the Triton kernels cover."""

import functools
import importlib.util
import os
from typing import Optional

import torch

from resnet_fast.kernels.contract import Case
from resnet_fast.kernels.triton import tiles

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
    if case.device == "cuda" and _too_old():
        return _too_old()
    return _chain_refusal(case) if case.op == "conv_chain" else None


def chain_pays(case: Case, rows: int) -> bool:
    """Whether a ``conv_chain`` of so many pixels, which is covered, should run as one kernel rather than as two.

    A rule, not a measurement: there must be a program for every multiprocessor. Two kernels cut their columns too.
    """
    tile = _chain_tile(case)
    return tile is not None and -(-rows // tile.rows) >= tiles.load(_target(case))["multiprocessors"]


def _chain_refusal(case: Case) -> Optional[str]:
    if _chain_tile(case) is not None:
        return None
    return f"a chain from {case.in_channels} to {case.out_channels} channels in {case.dtype} does not fit a program"


def _chain_tile(case: Case) -> Optional[tiles.ChainTile]:
    from resnet_fast.kernels.triton import forward

    target = _target(case)
    return tiles.pick_chain(target, forward.precision_of(case.dtype, target), case.in_channels, case.out_channels)


def _target(case: Case) -> str:
    from resnet_fast.kernels.triton import forward

    return forward.architecture(torch.device(case.device))
