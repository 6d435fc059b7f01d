"""The definition of the ops on 8-bit numbers, for inference, in plain PyTorch.

A quantised tensor holds ``q`` for the real numbers ``q * scale``. That is symmetric quantisation: the zero point is 0,
so padding is zero, and one scale serves a whole image or one output channel of a weight (explicit quantisation of
TensorRT; ONNX's ``QuantizeLinear`` with a zero point of 0). ``q`` is an int8, or a float8_e4m3fn:

    quantise:    q = saturate(round(r / scale))    half to even, to [-128, 127] or to +-448
    dequantise:  r = q * scale

A convolution multiplies the ``q`` of image and weight and adds the products up exactly (int8) or in float32 (fp8);
their scales belong to the result. ONNX's ``QLinearConv`` does the same, with a bias in units of that product, where
here ``shift`` is in real units, as batch norm gives it, and with neither residual nor ReLU:

    y = conv(x, weight) * scale + shift + residual * residual_scale
    result = y or relu(y), as it is or quantised by out_scale

with ``scale[k] = scale of x * scale of weight[k] * batch norm's scale[k]``. What follows the convolution is computed in
the dtype of ``scale``. Shapes and layout are those of ``reference/inference.py``.

An implementation may multiply by ``1 / scale`` where the definition divides. Results then differ by one step where
``r / scale`` lies within a few float32 roundings of the middle between two steps, and nowhere else.
"""

from typing import Optional, Union

import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_fast.kernels.contract import Case, Pair, nhwc

RANGE = {torch.int8: (-128.0, 127.0), torch.float8_e4m3fn: (-448.0, 448.0)}
"""The quantised dtypes, and their lowest and highest numbers."""

REAL = (torch.float16, torch.bfloat16, torch.float32)
"""The dtypes that are quantised, and dequantised to."""

MOST_PRODUCTS = 2**17 - 1
"""So many products of two int8, up to 2^14 each, always fit an int32."""


def supports(case: Case) -> Optional[str]:
    """None: the definition covers every case."""
    return None


def conv_quantised(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Optional[Tensor],
    residual_scale: float,
    out_scale: float,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    relu: bool,
    out_dtype: torch.dtype,
) -> Tensor:
    """``relu(conv2d(x, weight) * scale + shift + residual * residual_scale)``, quantised by ``out_scale`` or not.

    x ``[N, C, H, W]`` and weight ``[K, C/groups, R, S]``, both int8 or both float8_e4m3fn. scale, shift ``[K]``.
    residual ``[N, K, P, Q]``, of the dtype of x or real. out_dtype: that of x, or a real one, and then out_scale is not
    read.
    """
    sums = torch.float64 if x.dtype == torch.int8 else scale.dtype  # float64 adds up MOST_PRODUCTS exactly
    y = F.conv2d(x.to(sums), weight.to(sums), None, stride, padding, dilation, groups)
    y = y.to(scale.dtype) * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)
    if residual is not None:
        y = y + residual.to(scale.dtype) * residual_scale
    if relu:
        y = F.relu(y)
    y = quantise(y, out_scale, out_dtype) if out_dtype in RANGE else y.to(out_dtype)
    return nhwc(y)


def quantise(x: Tensor, scale: Union[float, Tensor], dtype: torch.dtype) -> Tensor:
    """``saturate(round(x / scale))`` as int8 or float8_e4m3fn, computed in float32 (float64 for a float64 ``x``).

    NaN stays NaN in float8_e4m3fn. int8 has none: there it becomes -128.
    """
    lowest, highest = RANGE[dtype]
    y = x.to(torch.promote_types(x.dtype, torch.float32)) / scale
    if dtype == torch.int8:
        y = torch.round(y.nan_to_num(lowest, torch.inf, -torch.inf))
    return y.clamp(lowest, highest).to(dtype)


def dequantise(x: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """``x * scale``, computed in float32 and rounded to ``dtype``."""
    return (x.to(torch.float32) * scale).to(dtype)
