"""The two poolings of a ResNet, in NHWC: 3x3 stride-2 max after the stem, the global average before the classifier.

Both only move data. Programs take blocks of channels, which are contiguous, times blocks of pixels.
"""

from typing import Optional

from torch import Tensor

import triton
import triton.language as tl
from resnet_fast.kernels.contract import Affine
from resnet_fast.kernels.triton import operands, tiles
from resnet_fast.kernels.triton.plan import Launch, Plan, ceil_div
from resnet_fast.kernels.triton.prologue import load_affine


@triton.jit(do_not_specialize=["N", "H", "W", "P", "Q"])
def max_pool_kernel(
    x_ptr,
    scale_ptr,
    shift_ptr,
    y_ptr,
    N,
    H,
    W,
    P,
    Q,
    C: tl.constexpr,
    PROLOGUE: tl.constexpr,
    INDEX64: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """3x3, stride 2, padding 1: x [N, H, W, C] -> y [N, P, Q, C]. A NaN in the window makes the maximum NaN.

    With PROLOGUE, of ``relu(x * scale + shift)``, scale and shift [C] float32. The ReLU and the rounding keep the order
    of numbers, so they come once, after the maximum.

    Each program makes BM pooled pixels times BN channels, and reads the nine pixels of each window; neighbouring
    windows share pixels through the cache.
    """
    pixels = tl.program_id(0) * BM + tl.arange(0, BM)
    channels = tl.program_id(1) * BN + tl.arange(0, BN)
    pixel_mask = pixels < N * P * Q
    image = pixels // (P * Q)
    top = (pixels // Q) % P * 2 - 1
    left = pixels % Q * 2 - 1
    if INDEX64:
        image = image.to(tl.int64)
        pixels = pixels.to(tl.int64)
    window = ((image * H + top) * W + left) * C

    if PROLOGUE:
        scale, shift = load_affine(scale_ptr, shift_ptr, channels, C, C % BN != 0)
    best = tl.full((BM, BN), float("-inf"), tl.float32)
    for i in tl.static_range(3):
        for j in tl.static_range(3):
            h = top + i
            w = left + j
            mask = (pixel_mask & (h >= 0) & (h < H) & (w >= 0) & (w < W))[:, None] & (channels < C)[None, :]
            offsets = (window + (i * W + j) * C)[:, None] + channels[None, :]
            value = tl.load(x_ptr + offsets, mask=mask, other=float("-inf")).to(tl.float32)
            if PROLOGUE:
                value = tl.where(mask, value * scale[None, :] + shift[None, :], float("-inf"))
            best = tl.maximum(best, value, propagate_nan=tl.PropagateNan.ALL)
    if PROLOGUE:
        best = tl.maximum(best, 0.0, propagate_nan=tl.PropagateNan.ALL)
    mask = pixel_mask[:, None] & (channels < C)[None, :]
    tl.store(y_ptr + (pixels * C)[:, None] + channels[None, :], best.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["PIXELS"])
def average_pool_kernel(
    x_ptr, y_ptr, PIXELS, C: tl.constexpr, INDEX64: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr
):
    """x [N, PIXELS, C] -> y [N, C], summed in float32.

    Each program makes BN channels of one image: it adds BM pixels at a time to BM rows of partial sums, and adds the
    rows at the end. The order is fixed.
    """
    image = tl.program_id(0)
    channels = tl.program_id(1) * BN + tl.arange(0, BN)
    rows = tl.arange(0, BM)
    channel_mask = channels < C
    if INDEX64:
        image = image.to(tl.int64)
    x_tile = x_ptr + image * PIXELS * C + (rows * C)[:, None] + channels[None, :]
    total = tl.zeros((BM, BN), tl.float32)
    for first in range(0, PIXELS, BM):
        mask = (first + rows < PIXELS)[:, None] & channel_mask[None, :]
        total += tl.load(x_tile + first * C, mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(total, axis=0) / PIXELS
    tl.store(y_ptr + image * C + channels, mean.to(y_ptr.dtype.element_ty), mask=channel_mask)


def plan_tail_pool(y: Tensor, affine: Optional[Affine], target: str) -> Plan:
    """The max-pool of ``relu(y * scale + shift)``, or of y itself."""
    y = operands.nhwc(y)
    n, c, h, w = y.shape
    p, q = (h - 1) // 2 + 1, (w - 1) // 2 + 1
    pooled = operands.allocate(y, (n, c, p, q))
    bm, bn, warps = tiles.load(target)["max_pool"]
    launch = Launch(
        max_pool_kernel,
        (ceil_div(n * p * q, bm), ceil_div(c, bn)),
        (y, *operands.vectors(affine), pooled, n, h, w, p, q),
        {
            "C": c,
            "PROLOGUE": affine is not None,
            "INDEX64": operands.index64(y, pooled),
            "BM": bm,
            "BN": bn,
            "num_warps": warps,
        },
    )
    return Plan((launch,), pooled)


def plan_global_avg_pool(x: Tensor, target: str) -> Plan:
    x = operands.nhwc(x)
    n, c, h, w = x.shape
    y = operands.allocate(x, (n, c, 1, 1))
    bm, bn, warps = tiles.load(target)["average_pool"]
    launch = Launch(
        average_pool_kernel,
        (n, ceil_div(c, bn)),
        (x, y, h * w),
        {"C": c, "INDEX64": operands.index64(x, y), "BM": bm, "BN": bn, "num_warps": warps},
    )
    return Plan((launch,), y)
