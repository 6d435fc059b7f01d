"""Which implementation runs an op: decided per call, inside the op.

Environment variables, for tests and for finding faults:

- ``RESNET_FAST_IMPLEMENTATION``: ``triton``, ``native``, ``onednn`` or ``reference``. That one is tried first; the
  reference still runs what it does not cover. Triton serves CPU tensors only so, and only in its interpreter.
- ``RESNET_FAST_ISA``: ``portable``, ``avx2``, ``avx2_vnni``, ``avx512``, ``avx512_vnni`` or ``avx512_bf16``. The
  instruction set of the native kernels, read when they are first used; without it, the best that the CPU runs.
"""

import os
from collections.abc import Callable
from types import ModuleType
from typing import Any, Optional

from torch import Tensor

from resnet_fast.kernels import onednn
from resnet_fast.kernels.contract import Case, Geometry
from resnet_fast.kernels.native import inference as native
from resnet_fast.kernels.native import quantised as native_quantised
from resnet_fast.kernels.native import training as native_training
from resnet_fast.kernels.reference import inference as reference
from resnet_fast.kernels.reference import quantised as reference_quantised
from resnet_fast.kernels.reference import training as reference_training
from resnet_fast.kernels.triton import prepared
from resnet_fast.kernels.triton import table as triton

IMPLEMENTATIONS: dict[str, ModuleType] = {
    "triton": triton,
    "native": native,
    "onednn": onednn,
    "reference": reference,
}
"""By name, best first. Each has the functions of ``reference``; ``supports(case)`` gives None, or the reason."""

TRAINING: dict[str, ModuleType] = {
    "triton": triton,
    "native": native_training,
    "reference": reference_training,
}
"""The same for training's primitives: each module has functions of ``reference_training``."""

BACK_TO_BACK: dict[str, ModuleType] = {"triton": triton, "reference": reference}
"""The same for two convolutions in one kernel: ``chain_pays`` and ``conv_chain``, which the definition does without."""

QUANTISED: dict[str, ModuleType] = {"triton": triton, "native": native_quantised, "reference": reference_quantised}
"""The same for the ops on 8-bit numbers: ``reference_quantised``."""

PREPARED: dict[str, Callable[..., Optional[Tensor]]] = {"cuda": prepared.run}
"""By device, what finds a convolution's call that was decided before: deciding may take longer than the kernel."""

# Triton's interpreter is a test instrument: it serves the CPU only on request.
_NOT_ON = {"cpu": "triton"}


def implementation_for(case: Case, among: dict[str, ModuleType] = IMPLEMENTATIONS) -> str:
    """Name of the implementation that serves ``case`` in this process."""
    preferred = os.environ.get("RESNET_FAST_IMPLEMENTATION") or None
    if preferred is not None and preferred not in IMPLEMENTATIONS:
        raise ValueError(
            f"RESNET_FAST_IMPLEMENTATION is {preferred!r}, expected one of {', '.join(IMPLEMENTATIONS)} or nothing"
        )
    excluded = _NOT_ON.get(case.device)
    names = (preferred, "reference") if preferred else [name for name in among if name != excluded]
    return next(name for name in names if name in among and among[name].supports(case) is None)


def implementation(case: Case, x: Tensor, among: dict[str, ModuleType] = IMPLEMENTATIONS) -> ModuleType:
    """The implementation that serves ``case``; of an empty ``x``, the definition makes nothing."""
    return among["reference"] if x.numel() == 0 else among[implementation_for(case, among)]


def chained(case: Case) -> bool:
    """Whether ``conv_chain`` has a kernel for ``case``; if not, it is two convolutions, and gains nothing."""
    return implementation_for(case, BACK_TO_BACK) != "reference"


def conv_case(op: str, x: Any, weight: Any, geometry: Geometry) -> Case:
    """A convolution's case: ``x`` and ``weight`` may be anything with shape, dtype and device."""
    kernel = weight.shape[2], weight.shape[3]
    stride, padding, dilation, groups = geometry
    channels = x.shape[1], weight.shape[0]
    return Case(op, x.device.type, x.dtype, *channels, kernel, stride, padding, dilation, groups, x.device.index)
