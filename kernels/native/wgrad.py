"""Weight gradients and covariances on the CPU, in float32: ``reference_training``'s ``wgrad`` and ``gram``.

``src/wgrad.h`` multiplies matrices, ``src/winograd_wgrad.h`` does 3x3 convolutions with fewer products.
"""

from typing import Optional

import torch
from torch import Tensor

from resnet_fast.kernels.contract import Affine, Case, Geometry, Pair, nhwc
from resnet_fast.kernels.native import inference as native
from resnet_fast.kernels.native import library, planner
from resnet_fast.kernels.native.abi import Shape
from resnet_fast.kernels.reference import training as reference_training

ALGORITHMS = ("gemm", "winograd2", "winograd4")

_SMALLEST_GROUP = 64  # channels: below it, little of a register tile is used, and PyTorch is up to four times as fast


def refusal(case: Case) -> Optional[str]:
    """None if this module covers the case, else the reason why not. ``case.op`` is ``"wgrad"`` or ``"gram"``."""
    if case.dtype != torch.float32:
        return f"no {case.dtype}"
    if case.groups > 1 and min(case.in_channels, case.out_channels) < _SMALLEST_GROUP * case.groups:
        return f"no groups of fewer than {_SMALLEST_GROUP} channels"
    return native.supports(case)


def wgrad(dy: Tensor, x: Tensor, prologue: Optional[Affine], weight: Tensor, geometry: Geometry) -> Tensor:
    """See ``reference_training.wgrad``. ``dy`` and ``x`` are float32; the result is in ``torch.channels_last``."""
    if max(x.shape) > native.LARGEST:
        return reference_training.wgrad(dy, x, prologue, weight, geometry)
    dw = torch.empty(weight.shape, dtype=torch.float32, device="cpu", memory_format=torch.channels_last)
    if dw.numel() == 0:
        return dw
    shape = native.conv_shape(x.shape, weight.shape, *geometry, False, False)
    library.wgrad(shape, choose(shape), nhwc(dy), nhwc(x), _vectors(prologue), dw, torch.get_num_threads())
    return dw


def gram(x: Tensor, prologue: Optional[Affine], stride: Pair) -> tuple[Tensor, Tensor]:
    """See ``reference_training.gram``. ``x`` is float32."""
    c = x.shape[1]
    if c == 0 or max(x.shape) > native.LARGEST:
        return reference_training.gram(x, prologue, stride)
    shape = native.conv_shape(x.shape, (c, c, 1, 1), stride, (0, 0), (1, 1), 1, False, False)
    mean, covariance = x.new_empty(c), x.new_empty(c, c)
    library.gram(shape, nhwc(x), _vectors(prologue), mean, covariance, torch.get_num_threads())
    return mean, covariance


def choose(shape: Shape) -> str:
    """The algorithm that ought to be the fastest for ``shape``, one of ``ALGORITHMS``."""
    able = (a for a in ALGORITHMS if planner.allows(a) and library.wgrad_supports(shape, a))
    return min(able, key=lambda a: _seconds(shape, a))


# Seconds of a core for a multiply-add, and for an element that is transformed, there or back. Fitted to the layers of
# ResNets at batch 16 on one thread of a Zen 4 core with AVX-512, which spends 15% of the products' time beside them.
_MULTIPLY_ADD, _TRANSFORM = 1 / 50e9, 0.2e-9
_SIDES = {"winograd2": 2, "winograd4": 4}  # of tiles of outputs
_CHUNK = 64  # tiles whose products are transformed back together


def _seconds(s: Shape, algorithm: str) -> float:
    weights = s.c * s.k / s.groups
    if algorithm == "gemm":
        return s.n * s.p * s.q * s.r * s.s * weights * _MULTIPLY_ADD
    side = _SIDES[algorithm]
    points, tiles = (side + 2) ** 2, s.n * -(-s.p // side) * -(-s.q // side)
    transformed = tiles * (s.c + s.k) + -(-tiles // _CHUNK) * weights
    return points * (tiles * weights * _MULTIPLY_ADD + transformed * _TRANSFORM)


def _vectors(prologue: Optional[Affine]) -> library.Vectors:
    if prologue is None:
        return None
    scale, shift = (v.detach().float().contiguous() for v in prologue)
    return scale, shift
