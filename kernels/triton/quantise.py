"""From real numbers to 8-bit ones and back, where a quantised part of a network begins or ends.

Both only move data. Within such a part, and at its end, the convolutions do this in their own kernels (requantise.py).
"""

from typing import Any

import torch
from torch import Tensor

import triton
import triton.language as tl
from resnet_fast.kernels.triton import operands, tiles
from resnet_fast.kernels.triton.plan import Launch, Plan, ceil_div
from resnet_fast.kernels.triton.requantise import requantise


@triton.jit
def quantise_kernel(x_ptr, y_ptr, inverse_scale, SIZE, INDEX64: tl.constexpr, BLOCK: tl.constexpr):
    """x [SIZE] float16, bfloat16 or float32 -> y [SIZE] int8 or float8_e4m3fn: ``saturate(round(x / scale))``."""
    at = _block(INDEX64, BLOCK)
    x = tl.load(x_ptr + at, mask=at < SIZE, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, requantise(x, inverse_scale, y_ptr), mask=at < SIZE)


@triton.jit
def dequantise_kernel(x_ptr, y_ptr, scale, SIZE, INDEX64: tl.constexpr, BLOCK: tl.constexpr):
    """x [SIZE] int8 or float8_e4m3fn -> y [SIZE] float16, bfloat16 or float32: ``x * scale``."""
    at = _block(INDEX64, BLOCK)
    x = tl.load(x_ptr + at, mask=at < SIZE, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, (x * scale).to(y_ptr.dtype.element_ty), mask=at < SIZE)


@triton.jit
def _block(INDEX64: tl.constexpr, BLOCK: tl.constexpr):
    """The positions of this program."""
    block = tl.program_id(0)
    if INDEX64:
        block = block.to(tl.int64)
    return block * BLOCK + tl.arange(0, BLOCK)


def plan_quantise(x: Tensor, scale: float, dtype: torch.dtype, target: str) -> Plan:
    """Of x ``[N, C, H, W]``, real."""
    return _plan(quantise_kernel, x, dtype, 1 / scale, target)


def plan_dequantise(x: Tensor, scale: float, dtype: torch.dtype, target: str) -> Plan:
    """Of x ``[N, C, H, W]``, quantised."""
    return _plan(dequantise_kernel, x, dtype, float(scale), target)


def _plan(kernel: Any, x: Tensor, dtype: torch.dtype, factor: float, target: str) -> Plan:
    x = operands.nhwc(x)
    y = operands.allocate(x, tuple(x.shape), dtype)
    block, warps = tiles.load(target)["quantise"]
    launch = Launch(
        kernel,
        (ceil_div(x.numel(), block),),
        (x, y, factor, x.numel()),
        {"INDEX64": operands.index64(x, y), "BLOCK": block, "num_warps": warps},
    )
    return Plan((launch,), y)
