"""PyTorch's own convolutions on a GPU, as the planner's candidates: cuDNN's, or MIOpen's on AMD.

Where a ReLU comes last there is one fused op for convolution, bias, residual and ReLU: the scale goes into the weight
and the shift is the bias, both in the precision of the images. In every case there is the plain convolution, followed
by one pass for scale, shift, residual and ReLU, which is a kernel of ours (tail.py).
"""

from collections.abc import Callable
from typing import Any, Optional

import torch
import torch.nn.functional as F

from resnet_fast.kernels import streams
from resnet_fast.kernels.contract import Pair, nhwc
from resnet_fast.kernels.folding import fold

Call = Callable[[torch.Tensor, Optional[torch.Tensor], torch.Tensor, torch.Tensor], torch.Tensor]
"""Takes x, the residual, scale and shift, as a prepared call does (prepared.py)."""

LIBRARY = "miopen" if torch.version.hip else "cudnn"
FUSED, POINTWISE = f"{LIBRARY} fused", f"{LIBRARY} + pointwise"


def names(relu: bool) -> tuple[str, ...]:
    """Which of the two can compute a convolution with or without a ReLU."""
    return (FUSED, POINTWISE) if relu else (POINTWISE,)


def prepare(
    name: str,
    dtype: torch.dtype,
    weight: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    geometry: tuple[Pair, Pair, Pair, int],
    relu: bool,
    pointwise: Callable[[bool], Call],
) -> Optional[Call]:
    """``reference.conv_bn_act`` for images of ``dtype`` and these weights, as they are now.

    Args:
        name: ``FUSED``, for ``relu`` only, or ``POINTWISE``.
        geometry: stride, padding, dilation, groups.
        pointwise: ``pointwise(relu)(y, residual, scale, shift)`` is ``relu(y * scale + shift + residual)``.

    Returns:
        A prepared call (prepared.py); ``FUSED`` is bound to this scale and shift. None where float16 cannot hold the
        scaled weight, or where that cannot be found out: a capture cannot wait for the GPU.
    """
    if name == FUSED and dtype == torch.float16 and weight.is_cuda and streams.capturing(weight.device.index):
        return None
    weight = weight.detach()
    if name == FUSED:
        folded = fold(weight, scale.detach(), shift.detach(), dtype)
        return None if folded is None else _fused(*folded, geometry)
    plain = weight.to(dtype).contiguous(memory_format=torch.channels_last)
    finish = pointwise(relu)

    def call(
        x: torch.Tensor, residual: Optional[torch.Tensor], scale: torch.Tensor, shift: torch.Tensor
    ) -> torch.Tensor:
        return finish(F.conv2d(nhwc(x), plain, None, *geometry), residual, scale, shift)

    call.owners, call.bound = (plain,), False  # type: ignore[attr-defined]
    return call


def _fused(weight: torch.Tensor, bias: torch.Tensor, geometry: tuple[Pair, Pair, Pair, int]) -> Call:
    convolution_relu: Any = getattr(torch, f"{LIBRARY}_convolution_relu")
    convolution_add_relu: Any = getattr(torch, f"{LIBRARY}_convolution_add_relu")

    def call(
        x: torch.Tensor, residual: Optional[torch.Tensor], scale: torch.Tensor, shift: torch.Tensor
    ) -> torch.Tensor:
        if residual is None:
            return nhwc(convolution_relu(nhwc(x), weight, bias, *geometry))
        # Third comes the residual, then its factor.
        return nhwc(convolution_add_relu(nhwc(x), weight, nhwc(residual), 1.0, bias, *geometry))

    call.owners, call.bound = (weight, bias), True  # type: ignore[attr-defined]
    return call
