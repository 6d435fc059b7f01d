"""From real numbers to 8-bit ones and back, where a quantised part of a network begins or ends.

Both only move data. Within such a part, and at its end, the convolutions do this in their own kernels (requantise.py).
"""

import triton
import triton.language as tl
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
