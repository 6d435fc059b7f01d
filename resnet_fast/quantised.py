"""Inference in 8 bits: convolution, batch norm, residual and ReLU on int8 or fp8 images, in one op.

Quantisation is symmetric: a tensor ``q`` and its scale stand for the real numbers ``q * scale``. An image has one
scale, from the largest magnitude that was seen there (``scale_from_amax``); a weight has one for every output channel.
``kernels/reference/quantised.py`` has the formulas, and where they come from.

A residual block, after its tensors' largest magnitudes have been observed (a first layer of 3 channels stays in half
precision, see ``kernels/triton/conv_quantised.py``):

    xq = quantise(x, x_scale)
    y1 = conv_bn_act(xq, x_scale, block.conv1, block.bn1, out_scale=y1_scale)
    y2 = conv_bn_act(y1, y1_scale, block.conv2, block.bn2, residual=xq, residual_scale=x_scale, out_scale=y2_scale)

The ops are ``torch.ops.resnet_fast.conv_quantised``, ``quantise`` and ``dequantise``. They have no gradients.
"""

import math
from typing import Optional, Union

import torch
from torch import Tensor, nn

from resnet_fast.graph import batch_norm, functional
from resnet_fast.kernels.packing import PackCache
from resnet_fast.kernels.reference import quantised as reference_quantised
from resnet_fast.kernels.reference.quantised import RANGE
from resnet_fast.ops.quantised import QUANTISED_NAMES, SMALLEST_SCALE, check_quantised, check_scale

_packs = PackCache()


def scale_from_amax(amax: Union[float, Tensor], dtype: torch.dtype = torch.int8) -> float:
    """The scale with which numbers of magnitudes up to ``amax`` just fit: ``amax / 127``, or ``amax / 448`` for fp8.

    1 for an ``amax`` of 0.

    Args:
        amax: a number, or a tensor of one.
        dtype: torch.int8 or torch.float8_e4m3fn.

    Raises:
        ValueError: ``amax`` is negative or not finite, or so small that a float32 cannot hold the scale's reciprocal.
    """
    amax = float(amax)
    if not (math.isfinite(amax) and amax >= 0):
        raise ValueError(f"amax is {amax}, expected a finite number, 0 or more")
    scale = amax / _range(dtype)[1] if amax else 1.0
    check_scale("amax divided by the highest number", scale, ValueError)
    return scale


def quantise(x: Tensor, scale: float, dtype: torch.dtype = torch.int8) -> Tensor:
    """``saturate(round(x / scale))``, half to even; see ``reference_quantised.quantise``.

    Args:
        x: ``[N, C, H, W]``, float16, bfloat16 or float32.
        scale: what a step of the result stands for.
        dtype: torch.int8 or torch.float8_e4m3fn.

    Returns:
        ``[N, C, H, W]`` of ``dtype``, in channels_last.

    Raises:
        RuntimeError: another shape or dtype, or a scale that is not positive.
    """
    return torch.ops.resnet_fast.quantise(x, scale, dtype)


def dequantise(x: Tensor, scale: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """``x * scale``, rounded to ``dtype``: the inverse of ``quantise``, with its arguments the other way round."""
    return torch.ops.resnet_fast.dequantise(x, scale, dtype)


def quantise_weight(weight: Tensor, dtype: torch.dtype = torch.int8) -> tuple[Tensor, Tensor]:
    """``[K, C/groups, R, S]`` to the same shape in ``dtype``, and the scales ``[K]`` float32, by each channel's amax.

    A batch norm that follows multiplies whole output channels. So it changes a channel's scale and not its quantised
    numbers (but for their sign), and is left to the scale.

    Raises:
        ValueError: ``weight`` holds NaN or Inf.
    """
    highest = _range(dtype)[1]
    wide = weight.detach().float()
    amax = wide.abs().amax((1, 2, 3)) if wide.numel() else wide.new_zeros(wide.shape[0])
    if not bool(amax.isfinite().all()):
        raise ValueError("weight holds NaN or Inf, expected finite numbers")
    # Below, a scale's reciprocal would not be finite. Such channels are 0 beside any other.
    scales = torch.where(amax < highest * SMALLEST_SCALE, 1.0, amax / highest)
    return reference_quantised.quantise(wide, scales.view(-1, 1, 1, 1), dtype), scales


@torch.no_grad()
def conv_bn_act(
    x: Tensor,
    x_scale: float,
    conv: nn.Conv2d,
    bn: batch_norm.BatchNorm,
    residual: Optional[Tensor] = None,
    residual_scale: float = 1.0,
    out_scale: float = 1.0,
    relu: bool = True,
    out_dtype: Optional[torch.dtype] = None,
) -> Tensor:
    """``relu(bn(conv(x)) + residual)`` in one op, on quantised tensors; ``bn`` normalises by its running statistics.

    The weight is quantised once, and again when it has changed.

    Args:
        x: ``[N, C, H, W]``, int8 or float8_e4m3fn; stands for ``x * x_scale``.
        conv: with numeric padding and ``padding_mode="zeros"``, in float32 or half precision.
        bn: its ``training`` flag is not read.
        residual: ``[N, K, P, Q]``, of the dtype of ``x``, float16, bfloat16 or float32; stands for ``residual *
            residual_scale``.
        out_scale: what a step of a quantised result stands for.
        relu: whether the ReLU is applied.
        out_dtype: that of ``x`` (the default): the result is quantised. Or float16, bfloat16 or float32: it is not, and
            ``out_scale`` is not read.

    Returns:
        ``[N, K, P, Q]`` of ``out_dtype``, in channels_last.

    Raises:
        RuntimeError: wrong shapes, dtypes, devices or scales.
        ValueError: the weight holds NaN or Inf.
    """
    check_quantised("x", x)
    weight, weight_scale = _packs.get((conv.weight,), x.dtype, lambda: quantise_weight(conv.weight, x.dtype))
    bn_scale, shift = batch_norm.fold_batch_norm(bn, conv.bias)
    scale, shift = _packs.get(
        (weight_scale, bn_scale, shift),
        x_scale,
        lambda: ((x_scale * weight_scale * bn_scale).float(), shift.float()),
    )
    return torch.ops.resnet_fast.conv_quantised(
        x, weight, scale, shift, residual, residual_scale, out_scale,
        *functional.geometry_of(conv), relu, x.dtype if out_dtype is None else out_dtype,
    )  # fmt: skip


def _range(dtype: torch.dtype) -> tuple[float, float]:
    if dtype not in RANGE:
        raise ValueError(f"dtype is {dtype}, expected {QUANTISED_NAMES}")
    return RANGE[dtype]
