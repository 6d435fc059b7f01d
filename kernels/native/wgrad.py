"""Weight gradients and covariances on the CPU, in float32: ``reference_training``'s ``wgrad`` and ``gram``.

``src/wgrad.h`` multiplies matrices, ``src/winograd_wgrad.h`` does 3x3 convolutions with fewer products.
"""

from typing import Optional

import torch
from torch import Tensor

from resnet_fast.kernels import native
from resnet_fast.kernels.case import Case
from resnet_fast.kernels.native import library
from resnet_fast.kernels.native.library import Shape
from resnet_fast.kernels.reference_training import Affine, Geometry, Pair, activate

ALGORITHMS = ("gemm", "winograd2", "winograd4")

_SMALLEST_GROUP = 8  # channels: below it, hardly a part of a register tile is used, and PyTorch is faster


def refusal(case: Case) -> Optional[str]:
    """None if this module covers the case, else the reason why not. ``case.op`` is ``"wgrad"`` or ``"gram"``."""
    if case.dtype != torch.float32:
        return f"no {case.dtype}"
    if case.groups > 1 and min(case.in_channels, case.out_channels) < _SMALLEST_GROUP * case.groups:
        return f"no groups of fewer than {_SMALLEST_GROUP} channels"
    return native.supports(case)


def wgrad(dy: Tensor, x: Tensor, prologue: Optional[Affine], weight: Tensor, geometry: Geometry) -> Tensor:
    """See ``reference_training.wgrad``. ``dy`` and ``x`` are float32; the result is in ``torch.channels_last``."""
    shape = native.conv_shape(x.shape, weight.shape, *geometry, False, False)
    return _wgrad(dy, x, prologue, shape, choose(shape, prologue is not None))


def gram(x: Tensor, prologue: Optional[Affine], stride: Pair) -> tuple[Tensor, Tensor]:
    """See ``reference_training.gram``. ``x`` is float32."""
    c = x.shape[1]
    shape = native.conv_shape(x.shape, (c, c, 1, 1), stride, (0, 0), (1, 1), 1, False, False)
    mean, covariance = x.new_empty(c), x.new_empty(c, c)
    x, prologue = _nhwc(x), _vectors(prologue)
    library.gram(shape, x, prologue, mean, covariance, torch.get_num_threads())
    return mean, covariance


def _wgrad(dy: Tensor, x: Tensor, prologue: Optional[Affine], shape: Shape, algorithm: str) -> Tensor:
    if not library.wgrad_supports(shape, algorithm, prologue is not None):
        x, prologue = activate(x, prologue), None
    dw = torch.empty(
        (shape.k, shape.c // shape.groups, shape.r, shape.s),
        dtype=torch.float32,
        device="cpu",
        memory_format=torch.channels_last,
    )
    dy, x, prologue = _nhwc(dy), _nhwc(x), _vectors(prologue)
    library.wgrad(shape, algorithm, dy, x, prologue, dw, torch.get_num_threads())
    return dw


def choose(shape: Shape, prologue: bool) -> str:
    """The algorithm that ought to be the fastest for ``shape``, one of ``ALGORITHMS``."""
    return min((name for name in ALGORITHMS if library.wgrad_supports(shape, name, False)), key=lambda name: 0)


def _nhwc(x: Tensor) -> Tensor:
    return x.detach().contiguous(memory_format=torch.channels_last)


def _vectors(prologue: Optional[Affine]) -> Optional[Affine]:
    return None if prologue is None else Affine(*(v.detach().float().contiguous() for v in prologue))
