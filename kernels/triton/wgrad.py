"""The gradient of a convolution's weight: a matrix product over pixels.

For each tap (r, s), ``dw[k, r, s, c]`` is the sum over all output pixels of ``dy[pixel, k] * a[window + tap, c]``: the
product of two matrices, both with one row per pixel, over their long side. Each program makes a tile ``[BM of k, BN of
c]`` of one tap, and walks over pixels BK at a time.

There are few such tiles and hundreds of thousands of pixels, so the pixels are cut into parts, the second axis of the
grid. Each part writes its sum into a layer of a workspace, and ``gate.sum_rows_kernel`` adds the layers in a fixed
order. (Atomic adds would save the workspace and give other last bits in every run.)

The input ``a = prologue(x)`` is made as it is loaded. Images with very few channels come as ``pack.pixels`` lays them
out, for which this kernel sees R x 1 taps, as ``conv.py`` does.
"""

import triton
import triton.language as tl
from resnet_fast.kernels.triton.prologue import activate, load_affine


@triton.jit(do_not_specialize=["N", "H", "W", "P", "Q", "part_size"])
def wgrad_kernel(
    dy_ptr,
    x_ptr,
    scale_ptr,
    shift_ptr,
    dw_ptr,
    N,
    H,
    W,
    row_units,
    P,
    Q,
    part_size,
    C: tl.constexpr,
    K: tl.constexpr,
    GROUPS: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    PIXEL: tl.constexpr,
    ROW_UNIT: tl.constexpr,
    PROLOGUE: tl.constexpr,
    PRECISION: tl.constexpr,
    INDEX64: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """``dw[part] = dy^T prologue(x)`` over ``part_size`` output pixels. C and K count the channels of one group.

    dy [N, P, Q, GROUPS * K]; x: N images of H rows of ``row_units * ROW_UNIT`` elements, pixels PIXEL elements apart;
    scale, shift [GROUPS * C]; dw [parts, GROUPS * K, R, S, C] float32. part_size: a multiple of BK.
    """
    ROW_TILES: tl.constexpr = (K + BM - 1) // BM
    COLUMN_TILES: tl.constexpr = (C + BN - 1) // BN
    CHECK_BOUNDS: tl.constexpr = PAD_H > 0 or PAD_W > 0

    tile = tl.program_id(0)
    part = tl.program_id(1)
    group = tl.program_id(2)
    outputs = (tile % ROW_TILES) * BM + tl.arange(0, BM)
    inputs = tile // ROW_TILES % COLUMN_TILES * BN + tl.arange(0, BN)
    tap = tile // (ROW_TILES * COLUMN_TILES)
    r = tap // S * DILATION_H - PAD_H
    s = tap % S * DILATION_W - PAD_W
    row_pitch = row_units * ROW_UNIT
    dy_ptr += group * K
    x_ptr += group * C
    if PROLOGUE:
        scale, shift = load_affine(scale_ptr + group * C, shift_ptr + group * C, inputs, C, C % BN != 0)

    acc = tl.zeros((BM, BN), tl.float32)
    for first in range(part * part_size, tl.minimum((part + 1) * part_size, N * P * Q), BK):
        pixels = first + tl.arange(0, BK)
        pixel_mask = pixels < N * P * Q
        image = pixels // (P * Q)
        h = pixels // Q % P * STRIDE_H + r
        w = pixels % Q * STRIDE_W + s
        inside = pixel_mask
        if CHECK_BOUNDS:
            inside = inside & (h >= 0) & (h < H) & (w >= 0) & (w < W)
        if INDEX64:
            image = image.to(tl.int64)
            pixels = pixels.to(tl.int64)
        dy_mask = pixel_mask[:, None]
        x_mask = inside[:, None]
        if K % BM != 0:
            dy_mask = dy_mask & (outputs < K)[None, :]
        if C % BN != 0:
            x_mask = x_mask & (inputs < C)[None, :]
        dy = tl.load(dy_ptr + (pixels * (GROUPS * K))[:, None] + outputs[None, :], mask=dy_mask, other=0.0)
        x_offsets = (image * H + h) * row_pitch + w * PIXEL
        a = tl.load(x_ptr + x_offsets[:, None] + inputs[None, :], mask=x_mask, other=0.0)
        if PROLOGUE:
            a = activate(a, scale, shift, inside, CHECK_BOUNDS)
        acc = tl.dot(tl.trans(dy), a, acc, input_precision=PRECISION)

    dw_ptr += (part * GROUPS + group) * (K * R * S * C)
    offsets = (outputs * (R * S * C))[:, None] + (tap * C + inputs)[None, :]
    tl.store(dw_ptr + offsets, acc, mask=(outputs < K)[:, None] & (inputs < C)[None, :])
