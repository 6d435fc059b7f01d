"""The gradient of a convolution's weight: a matrix product over pixels.

For each tap (r, s), ``dw[k, r, s, c]`` is the sum over all output pixels of ``dy[pixel, k] * a[window + tap, c]``: the
product of two matrices, both with one row per pixel, over their long side. Each program makes a tile ``[BM of k, BN of
c]`` of one tap, and walks over pixels BK at a time.

There are few such tiles and hundreds of thousands of pixels, so the pixels are cut into parts, the second axis of the
grid. Each part writes its sum into a layer of a workspace, and ``sum_rows_kernel`` (gradient_epilogue.py) adds the
layers in a fixed order. (Atomic adds would save the workspace and give other last bits in every run.)

The input ``a = prologue(x)`` is made as it is loaded. Images with very few channels come as ``pack.pixels`` lays them
out, for which this kernel sees R x 1 taps, as ``conv.py`` does.
"""

from typing import Optional

import torch
from torch import Tensor

import triton
import triton.language as tl
from resnet_fast.kernels.contract import Affine, Geometry
from resnet_fast.kernels.triton import device, operands, pack, tiles
from resnet_fast.kernels.triton.gradient_epilogue import plan_sum_rows
from resnet_fast.kernels.triton.plan import Launch, Plan, ceil_div
from resnet_fast.kernels.triton.prologue import activate, load_affine

_PART = 1024  # pixels below which a part of the sum would not be worth its share of the workspace
_WAVES = 2  # programs to aim at, for every multiprocessor


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


def wgrad(dy: Tensor, x: Tensor, prologue: Optional[Affine], weight: Tensor, geometry: Geometry, target: str) -> Tensor:
    """See ``reference_training.wgrad``."""
    dw = plan_wgrad(dy, x, prologue, weight, geometry, target).run()
    k, channels, r, s = weight.shape
    if dw.dim() == 4:
        return dw
    merge = dw.shape[-1] // channels
    parts = dw.unflatten(1, (merge, -1)).unflatten(-1, (merge, channels)).diagonal(dim1=1, dim2=5).movedim(-1, 1)
    return parts.reshape(k, r, s, channels).permute(0, 3, 1, 2)


def plan_wgrad(
    dy: Tensor, x: Tensor, prologue: Optional[Affine], weight: Tensor, geometry: Geometry, target: str
) -> Plan:
    """Leaves the weight's gradient; of merged groups and of padded pixels ``[groups, K, R, S, C]``, where only C of the
    right one count."""
    stride, padding, dilation, groups = geometry
    k, channels, r, s = weight.shape
    dy = operands.nhwc(dy)
    n, _, p, q = dy.shape
    if groups == 1 and channels <= pack.STEM_CHANNELS and s > 1 and dilation[1] == 1 and prologue is None:
        # Few channels: all taps of one kernel row side by side.
        x, merge = pack.pixels(x, padding), 1
        _, h, w, pixel = x.shape
        c, s, padding, row_unit = s * pixel, 1, (0, 0), pack.ROW_UNIT
    else:
        x, merge = operands.nhwc(x), pack.merged(groups, max(channels, k // groups))
        _, pixel, h, w = x.shape
        c, row_unit = channels * merge, pixel
    groups, k = groups // merge, k // groups * merge
    pixels = n * p * q
    key = f"wgrad_{device.precision_of(x.dtype, target)}"
    tile = tiles.pick(target, key, k, c, pixels, groups * r * s * ceil_div(pixels, _PART))
    programs = ceil_div(k, tile.rows) * ceil_div(c, tile.columns) * r * s
    part = _part_size(pixels, programs * groups, tile.reduction, target)
    parts = ceil_div(pixels, part)
    if merge == 1 and c == channels:
        dw = result = operands.allocate(x, (groups * k, c, r, s), torch.float32)
    else:
        dw = operands.allocate_floats(x, (groups, k, *weight.shape[2:], pixel if s == 1 else c))
        result = dw[..., : channels * merge]
    sums = dw if parts == 1 else operands.allocate_floats(x, (1, parts, groups * k * r * s * c))
    launch = Launch(
        wgrad_kernel,
        (programs, parts, groups),
        (dy, x, *operands.vectors(prologue), sums, n, h, w, w * pixel // row_unit, p, q, part),
        {
            "C": c,
            "K": k,
            "GROUPS": groups,
            "R": r,
            "S": s,
            **operands.window(stride, padding, dilation),
            "PIXEL": pixel,
            "ROW_UNIT": row_unit,
            "PROLOGUE": prologue is not None,
            "PRECISION": device.dot_precision(x.dtype, target),
            "INDEX64": operands.index64(x, dy),
            **tile.constants(split=False),
        },
    )
    total = plan_sum_rows(sums, target, dw).launches if parts > 1 else ()
    return Plan((launch, *total), result)


def _part_size(pixels: int, programs: int, step: int, target: str) -> int:
    """The pixels in one part of the sum, a multiple of ``step``, where one part has ``programs`` programs."""
    parts = max(1, min(_WAVES * tiles.load(target)["multiprocessors"] // programs, pixels // _PART))
    return ceil_div(ceil_div(pixels, parts), step) * step
