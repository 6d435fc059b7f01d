"""The ops on 8-bit numbers, ``torch.ops.resnet_fast.conv_quantised``, ``quantise`` and ``dequantise``.

``kernels/reference/quantised.py`` defines what each computes. They have no gradients.
"""

from typing import Any, Optional

import torch
from torch import Tensor

from resnet_fast.kernels.contract import Case, nhwc
from resnet_fast.kernels.reference.quantised import MOST_PRODUCTS, RANGE, REAL
from resnet_fast.ops.checks import check_images, check_shapes, empty_channels_last, geometry_of
from resnet_fast.ops.dispatch import QUANTISED, conv_case, implementation
from resnet_fast.ops.registry import register

# --- checks -----------------------------------------------------------------------------------------------------------

SMALLEST_SCALE = 2.0**-126  # of which a float32 holds the reciprocal
QUANTISED_NAMES = "torch.int8 or torch.float8_e4m3fn"


def check_scale(name: str, scale: float, error: type[Exception] = RuntimeError) -> None:
    if not SMALLEST_SCALE <= scale <= 1 / SMALLEST_SCALE:
        raise error(f"{name} is {scale}, expected from 2^-126 to 2^126")


def check_quantised(name: str, x: Tensor) -> None:
    if x.dtype not in RANGE:
        raise RuntimeError(f"{name} is {x.dtype}, expected {QUANTISED_NAMES}")


def _check_real(name: str, dtype: torch.dtype) -> None:
    if dtype not in REAL:
        raise RuntimeError(f"{name} is {dtype}, expected torch.float16, torch.bfloat16 or torch.float32")


# --- the ops ----------------------------------------------------------------------------------------------------------


def _conv_quantised(*operands: Any) -> Tensor:
    x, weight, scale, shift, residual, residual_scale, out_scale, *numbers, relu, out_dtype = operands
    geometry = geometry_of(*numbers)
    _conv_output(*operands)
    serving = implementation(conv_case("conv_quantised", x, weight, geometry), x, QUANTISED)
    return serving.conv_quantised(
        x, weight, scale, shift, residual, residual_scale, out_scale, *geometry, relu, out_dtype
    )


def _conv_output(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Optional[Tensor],
    residual_scale: float,
    out_scale: float,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
    relu: bool,
    out_dtype: torch.dtype,
) -> list[Any]:
    """Shape of the result, all operands checked."""
    out = check_shapes(x, weight, scale, shift, residual, geometry_of(stride, padding, dilation, groups))
    check_quantised("x", x)
    if weight.dtype is not x.dtype:
        raise RuntimeError(f"weight is {weight.dtype}, expected the dtype of x, {x.dtype}")
    for name, vector in (("scale", scale), ("shift", shift)):
        if vector.dtype is not torch.float32:
            raise RuntimeError(f"{name} is {vector.dtype}, expected torch.float32")
    products = weight.shape[1] * weight.shape[2] * weight.shape[3]
    if x.dtype is torch.int8 and products > MOST_PRODUCTS:
        raise RuntimeError(
            f"weight has shape {list(weight.shape)}, {products} products a sum, expected up to {MOST_PRODUCTS}, which "
            "always fit an int32"
        )
    if residual is not None:
        if residual.dtype is not x.dtype:
            _check_real(f"x is {x.dtype} and residual", residual.dtype)
        check_scale("residual_scale", residual_scale)
    if out_dtype is x.dtype:
        check_scale("out_scale", out_scale)
    else:
        _check_real(f"x is {x.dtype} and out_dtype", out_dtype)
    return out


def _conv_quantised_fake(*operands: Any) -> Tensor:
    return empty_channels_last(operands[0], _conv_output(*operands), operands[-1])


def _quantise(x: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    _check_quantise(x, scale, dtype)
    case = Case("quantise", x.device.type, dtype, x.shape[1], x.shape[1], gpu=x.device.index)
    return nhwc(implementation(case, x, QUANTISED).quantise(x, scale, dtype))


def _quantise_fake(x: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    _check_quantise(x, scale, dtype)
    return empty_channels_last(x, x.shape, dtype)


def _check_quantise(x: Tensor, scale: float, dtype: torch.dtype) -> None:
    check_images(x.shape)
    _check_real("x", x.dtype)
    check_scale("scale", scale)
    if dtype not in RANGE:
        raise RuntimeError(f"dtype is {dtype}, expected {QUANTISED_NAMES}")


def _dequantise(x: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    _check_dequantise(x, scale, dtype)
    case = Case("dequantise", x.device.type, x.dtype, x.shape[1], x.shape[1], gpu=x.device.index)
    return nhwc(implementation(case, x, QUANTISED).dequantise(x, scale, dtype))


def _dequantise_fake(x: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    _check_dequantise(x, scale, dtype)
    return empty_channels_last(x, x.shape, dtype)


def _check_dequantise(x: Tensor, scale: float, dtype: torch.dtype) -> None:
    check_images(x.shape)
    check_quantised("x", x)
    check_scale("scale", scale)
    _check_real("dtype", dtype)


def _no_gradient(ctx: Any, *grads: Any) -> Any:
    raise RuntimeError("8-bit ops have no gradient; call them under torch.no_grad() or on detached tensors")


register(
    "conv_quantised(Tensor x, Tensor weight, Tensor scale, Tensor shift, Tensor? residual, float residual_scale, "
    "float out_scale, int[2] stride, int[2] padding, int[2] dilation, int groups, bool relu, ScalarType out_dtype) "
    "-> Tensor",
    *(_conv_quantised, _conv_quantised_fake, None, _no_gradient),
)
register("quantise(Tensor x, float scale, ScalarType dtype) -> Tensor", _quantise, _quantise_fake, None, _no_gradient)
register(
    "dequantise(Tensor x, float scale, ScalarType dtype) -> Tensor",
    *(_dequantise, _dequantise_fake, None, _no_gradient),
)
