"""The ops on 8-bit numbers (``reference/quantised.py``), from tensors to kernel launches, as in forward.py."""

from typing import Any, Optional

import torch
from torch import Tensor

from resnet_fast.kernels.contract import Pair, output_size
from resnet_fast.kernels.reference import quantised as reference_quantised
from resnet_fast.kernels.reference.quantised import RANGE
from resnet_fast.kernels.triton import forward, pack, tiles
from resnet_fast.kernels.triton.conv_quantised import conv_quantised_kernel
from resnet_fast.kernels.triton.forward import Plan
from resnet_fast.kernels.triton.quantise import dequantise_kernel, quantise_kernel

PRECISIONS = {torch.int8: "int8", torch.float8_e4m3fn: "fp8"}
"""The lists of tiles."""

_SHORTEST = 32  # elements of the inner dimension that an 8-bit instruction takes at least


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
    """See ``reference_quantised.conv_quantised``."""
    args = (x, weight, scale, shift, residual, residual_scale, out_scale)
    geometry = (stride, padding, dilation, groups, relu, out_dtype)
    if x.numel() == 0 or weight.numel() == 0:
        return reference_quantised.conv_quantised(*args, *geometry)
    return plan_conv_quantised(*args, *geometry, forward.architecture(x.device)).run()


def quantise(x: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """See ``reference_quantised.quantise``."""
    return plan_quantise(x, scale, dtype, forward.architecture(x.device)).run() if x.numel() else x.to(dtype)


def dequantise(x: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """See ``reference_quantised.dequantise``."""
    return plan_dequantise(x, scale, dtype, forward.architecture(x.device)).run() if x.numel() else x.to(dtype)


def plan_conv_quantised(
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
    target: str,
    tile: Optional[tiles.Tile] = None,
) -> Plan:
    """``target`` is the architecture to choose the tile for, unless one is given."""
    n, c, h, w = x.shape
    k, _, r, s = weight.shape
    p, q = output_size((h, w), (r, s), stride, padding, dilation)
    x, y = forward.nhwc(x), forward.allocate(x, (n, k, p, q), out_dtype)
    residual = None if residual is None else forward.nhwc(residual)
    merge = pack.merged(groups, c // groups)
    groups_before, groups = groups, groups // merge
    c, k = c // groups, k // groups
    tile = tile or tiles.pick(target, PRECISIONS[x.dtype], n * p * q, k, max(c, _SHORTEST), groups)
    packed = pack.weight(weight, x.dtype, groups_before, merge, tile.reduction)
    return Plan(
        conv_quantised_kernel,
        (forward.ceil_div(n * p * q, tile.rows) * forward.ceil_div(k, tile.columns), groups),
        (
            x, packed, forward.vector(scale), forward.vector(shift), y if residual is None else residual, y,
            float(residual_scale), 1 / out_scale, n, h, w, p, q,
        ),
        {
            "C": c,
            "K": k,
            "GROUPS": groups,
            "R": r,
            "S": s,
            "STRIDE_H": stride[0],
            "STRIDE_W": stride[1],
            "PAD_H": padding[0],
            "PAD_W": padding[1],
            "DILATION_H": dilation[0],
            "DILATION_W": dilation[1],
            "HAS_RESIDUAL": residual is not None,
            "RELU": relu,
            "REQUANTISE": out_dtype in RANGE,
            "INDEX64": forward.index64(x, y),
            **tile.constants(),
            "UNROLL": _unrolled(target),
        },
        y,
    )  # fmt: skip


def _unrolled(target: str) -> int:
    """How many steps of the loop are written out as one.

    In a loop of one product, for sm_8x, Triton 3.8 carries the first slice of both operands from step to step in
    registers, one for every 8-bit number: 254 registers and 442 instructions for 64 products of a tile of 128 x 128 x
    128. A loop of two products it leaves alone: 146 registers and 196 instructions for as many. On sm_120, whose
    instructions are the same, it saves some of what a step costs beside its products. The others have instructions that
    read shared memory themselves, and larger steps.
    """
    return 2 if target.startswith(("sm_8", "sm_12")) else 1


def plan_quantise(x: Tensor, scale: float, dtype: torch.dtype, target: str) -> Plan:
    """Of x ``[N, C, H, W]``, real."""
    return _plan_elementwise(quantise_kernel, x, dtype, 1 / scale, target)


def plan_dequantise(x: Tensor, scale: float, dtype: torch.dtype, target: str) -> Plan:
    """Of x ``[N, C, H, W]``, quantised."""
    return _plan_elementwise(dequantise_kernel, x, dtype, float(scale), target)


def _plan_elementwise(kernel: Any, x: Tensor, dtype: torch.dtype, factor: float, target: str) -> Plan:
    x = forward.nhwc(x)
    y = forward.allocate(x, tuple(x.shape), dtype)
    block, warps = tiles.load(target)["quantise"]
    return Plan(
        kernel,
        (forward.ceil_div(x.numel(), block),),
        (x, y, factor, x.numel()),
        {"INDEX64": forward.index64(x, y), "BLOCK": block, "num_warps": warps},
        y,
    )
