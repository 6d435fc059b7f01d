"""Convolution as an implicit matrix product, in NHWC.

Motivation: a convolution is the product of the weight with a matrix that has one row for every output pixel and one
column for every (tap r, tap s, channel c). That matrix repeats each input pixel up to R * S times, so it is never
written: each program gathers the piece it needs straight from the image.

Pointers in words: an output pixel (n, p, q) looks at the window whose first pixel is ``(p * stride - padding,
q * stride - padding)`` of image n. Each row of a tile keeps a pointer to that pixel, possibly outside the image and
then never followed. Tap (r, s) lies ``r * dilation`` rows and ``s * dilation`` pixels further, which is the same
distance for every row of the tile: so one scalar, ``x_step``, moves the whole tile of pointers from tap to tap and
from one block of channels to the next.

The loop runs over all (r, s, block of channels) in one go, so that the pipeline of loads never drains. Its position is
carried in counters: dividing a single index instead is no faster, and was reported to miscompile at 8 warps
(pytorch issue 173068).

Padding: a tap outside the image must count as zero. Which taps are inside is found once per row and kept as one bit
per tap, when there are up to 32 taps; with more, the bounds are compared again for every tap. Without padding every
tap of every window is inside, and nothing is checked.

Groups: each is a convolution of its own, on the second axis of the grid.

Small images and batches: one tile after the other would leave most of the GPU idle, with a long loop each. With
``PARTS`` the loop is cut, and each part is made by programs of its own, the third axis of the grid; see split_k.py.

Training's convolutions differ at the two ends. With ``PROLOGUE`` the image is a raw result, which gets its batch norm
and ReLU as it is loaded, and with ``FLIP`` the product is made the other way round (prologue.py). With ``STATISTICS``
the sums are stored as they are, and the statistics for the next batch norm are left in ``partials`` (statistics.py).

Images with very few channels (a ResNet's first layer) come as ``pack.pixels`` lays them out: padded in space and to 4
or 8 channels, so that the S taps of one row lie side by side. The kernel then sees R x 1 taps of S * 4 "channels".
"""

import triton
import triton.language as tl
from resnet_fast.kernels.triton import operands, pack
from resnet_fast.kernels.triton.convolution import Convolution, end_of
from resnet_fast.kernels.triton.epilogue import finish_tile
from resnet_fast.kernels.triton.plan import Launch, Plan, ceil_div
from resnet_fast.kernels.triton.prologue import activate, add_product, load_affine
from resnet_fast.kernels.triton.split_k import store_part
from resnet_fast.kernels.triton.statistics import store_with_statistics


@triton.jit(do_not_specialize=["N", "H", "W", "P", "Q"])
def conv_kernel(
    x_ptr,
    w_ptr,
    scale_ptr,
    shift_ptr,
    residual_ptr,
    y_ptr,
    prologue_scale_ptr,
    prologue_shift_ptr,
    partials_ptr,
    N,
    H,
    W,
    row_units,
    P,
    Q,
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
    FLIP: tl.constexpr,
    STATISTICS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    RELU: tl.constexpr,
    PRECISION: tl.constexpr,
    PARTS: tl.constexpr,
    INDEX64: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """``y = relu(conv(x, w) * scale + shift + residual)``. C and K count the channels of one group.

    x: N images of H rows of ``row_units * ROW_UNIT`` elements, pixels PIXEL elements apart (ROW_UNIT is a constant so
    that the compiler sees the alignment of every row). w [GROUPS * K, R, S, ceil(C / BK) * BK], zero beyond C.
    scale, shift [GROUPS * K]. residual, y [N, P, Q, GROUPS * K]. prologue_scale, prologue_shift [GROUPS * C].
    partials [row tiles, 2, GROUPS * K]. With several PARTS, y [PARTS, N, P, Q, GROUPS * K] float32 takes the parts of
    ``conv(x, w)``. Pointers that the flags leave unused are None.
    """
    COLUMN_TILES: tl.constexpr = (K + BN - 1) // BN
    BLOCKS: tl.constexpr = (C + BK - 1) // BK
    STEPS: tl.constexpr = R * S * BLOCKS
    PART_STEPS: tl.constexpr = (STEPS + PARTS - 1) // PARTS
    CHECK_BOUNDS: tl.constexpr = PAD_H > 0 or PAD_W > 0
    BOUNDS_IN_BITS: tl.constexpr = R * S <= 32

    tile = tl.program_id(0)
    group = tl.program_id(1)
    first_row = (tile // COLUMN_TILES) * BM
    first_column = (tile % COLUMN_TILES) * BN
    x_ptr += group * C
    w_ptr += group * (K * R * S * BLOCKS * BK)
    if PROLOGUE:
        prologue_scale_ptr += group * C
        prologue_shift_ptr += group * C
    if STATISTICS:
        partials_ptr += group * K
    elif PARTS == 1:
        scale_ptr += group * K
        shift_ptr += group * K
        residual_ptr += group * K
    y_ptr += group * K

    rows = first_row + tl.arange(0, BM)
    columns = first_column + tl.arange(0, BN)
    channels = tl.arange(0, BK)
    row_mask = rows < N * P * Q
    image = rows // (P * Q)
    pixel = rows % (P * Q)
    top = (pixel // Q) * STRIDE_H - PAD_H
    left = (pixel % Q) * STRIDE_W - PAD_W
    row_pitch = row_units * ROW_UNIT
    if INDEX64:
        image = image.to(tl.int64)
        rows = rows.to(tl.int64)
    window = (image * H + top) * row_pitch + left * PIXEL

    if CHECK_BOUNDS and BOUNDS_IN_BITS:
        inside_bits = tl.zeros((BM,), tl.int32)
        for i in tl.static_range(R):
            for j in tl.static_range(S):
                h = top + i * DILATION_H
                w_ = left + j * DILATION_W
                inside = row_mask & (h >= 0) & (h < H) & (w_ >= 0) & (w_ < W)
                inside_bits |= inside.to(tl.int32) << (i * S + j)

    x_tile = x_ptr + window[:, None] + channels[None, :]
    w_tile = w_ptr + (columns * (R * S * BLOCKS * BK))[None, :] + channels[:, None]
    acc = tl.zeros((BN, BM) if FLIP else (BM, BN), tl.float32)
    r = 0
    s = 0
    first_channel = 0
    x_step = 0
    first_step = 0
    last_step = STEPS
    if PARTS > 1:
        first_step = tl.program_id(2) * PART_STEPS
        last_step = first_step + PART_STEPS
        if STEPS % PARTS != 0:
            last_step = tl.minimum(last_step, STEPS)
        r = first_step // BLOCKS // S
        s = first_step // BLOCKS % S
        first_channel = first_step % BLOCKS * BK
        x_step = r * (DILATION_H * row_pitch) + s * (DILATION_W * PIXEL) + first_channel
    for step in range(first_step, last_step):
        if not CHECK_BOUNDS:
            inside = row_mask
        elif BOUNDS_IN_BITS:
            inside = ((inside_bits >> (r * S + s)) & 1) != 0
        else:
            h = top + r * DILATION_H
            w_ = left + s * DILATION_W
            inside = row_mask & (h >= 0) & (h < H) & (w_ >= 0) & (w_ < W)
        x_mask = inside[:, None]
        if C % BK != 0:
            x_mask = x_mask & (first_channel + channels < C)[None, :]
        x = tl.load(x_tile + x_step, mask=x_mask, other=0.0)
        if PROLOGUE:
            scale, shift = load_affine(prologue_scale_ptr, prologue_shift_ptr, first_channel + channels, C, C % BK != 0)
            x = activate(x, scale, shift, inside, CHECK_BOUNDS)
        if K % BN != 0:
            w = tl.load(w_tile + step * BK, mask=(columns < K)[None, :], other=0.0)
        else:
            w = tl.load(w_tile + step * BK)
        acc = add_product(acc, x, w, FLIP, PRECISION)

        # To the next block of channels, or the next tap's first, or the next row of taps' first.
        first_channel += BK
        x_step += BK
        next_tap = first_channel == BLOCKS * BK
        first_channel = tl.where(next_tap, 0, first_channel)
        s = tl.where(next_tap, s + 1, s)
        x_step += tl.where(next_tap, DILATION_W * PIXEL - BLOCKS * BK, 0)
        next_row = s == S
        s = tl.where(next_row, 0, s)
        r = tl.where(next_row, r + 1, r)
        x_step += tl.where(next_row, DILATION_H * row_pitch - S * DILATION_W * PIXEL, 0)

    if FLIP:
        acc = tl.trans(acc)
    if STATISTICS:
        store_with_statistics(
            acc, y_ptr, partials_ptr, rows * (GROUPS * K), row_mask, first_row, first_column,
            N * P * Q, K, GROUPS * K, BM, BN, SPLIT,
        )  # fmt: skip
    elif PARTS > 1:
        part_ptr = y_ptr + tl.program_id(2).to(tl.int64) * (N * P * Q) * (GROUPS * K)
        store_part(acc, part_ptr, rows * (GROUPS * K), row_mask, columns, K, K % BN != 0)
    else:
        finish_tile(
            acc, y_ptr, residual_ptr, scale_ptr, shift_ptr, rows * (GROUPS * K), row_mask, first_column,
            K, BM, BN, SPLIT, HAS_RESIDUAL, RELU,
        )  # fmt: skip


def plan_conv(conv: Convolution) -> Plan:
    (n, k, p, q), (h, w), (r, s) = conv.y.shape, conv.size, conv.kernel
    tile, (stride, padding, dilation, groups) = conv.tile, conv.geometry
    if conv.kind == "stem":
        # Few channels: all taps of one kernel row side by side.
        _, h, row, pixel = conv.x.shape
        c, s, padding, row_unit = s * pixel, 1, (0, 0), pack.ROW_UNIT
    else:
        pixel = row_unit = conv.x.shape[1]
        c, row = pixel // groups, w
    k //= groups
    end = end_of(conv, r * s * ceil_div(c, tile.reduction))
    launch = Launch(
        conv_kernel,
        (ceil_div(n * p * q, tile.rows) * ceil_div(k, tile.columns), groups, end.parts),
        (conv.x, conv.packed, *end.operands, n, h, w, row * pixel // row_unit, p, q),
        {
            "C": c,
            "K": k,
            "GROUPS": groups,
            "R": r,
            "S": s,
            **operands.window(stride, padding, dilation),
            "PIXEL": pixel,
            "ROW_UNIT": row_unit,
            **end.constants,
            **tile.constants(),
        },
    )
    return end.plan(conv, launch)
