"""The ops on 8-bit numbers (``reference/quantised.py``) as Triton kernels.

    quantised_launch.py    from tensors to launches
    conv_quantised.py, requantise.py, quantise.py    the kernels

Importing this module imports neither Triton nor a kernel; the first call of an op does.
"""

from typing import Any, Optional

import torch

from resnet_fast.kernels.contract import Case
from resnet_fast.kernels.reference.quantised import RANGE
from resnet_fast.kernels.triton import device, pack

_OPS = ("conv_quantised", "quantise", "dequantise")

CHANNELS = 16
"""Bytes of the widest load, so 8-bit channels: of what every pixel must have a multiple."""

__all__ = [*_OPS, "supports"]


def supports(case: Case) -> Optional[str]:
    """None if the kernels cover the case, else the reason why not; ``case.dtype`` is the 8-bit one in every op.

    Asks a driver only about a case on a GPU.
    """
    if case.op not in _OPS:
        return f"no kernel for {case.op}"
    reason = device.supports(case, tuple(RANGE))
    if reason is not None:
        return reason
    channels = case.in_channels // case.groups
    if case.op == "conv_quantised" and channels * pack.merged(case.groups, channels) % CHANNELS:
        groups = f" in {case.groups} groups" if case.groups > 1 else ""
        return f"{case.in_channels} input channels{groups}; multiples of {CHANNELS} are covered"
    if case.device == "cuda" and case.dtype == torch.float8_e4m3fn:
        from resnet_fast.kernels.triton import forward

        return no_fp8(forward.architecture(torch.device("cuda")))
    return None


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


def __getattr__(name: str) -> Any:
    if name not in _OPS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from resnet_fast.kernels.triton import quantised_launch

    globals().update({op: getattr(quantised_launch, op) for op in _OPS})
    return globals()[name]
