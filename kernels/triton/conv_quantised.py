"""Convolution of 8-bit numbers as an implicit matrix product, in NHWC.

A tensor core multiplies twice as many 8-bit numbers as halves in the same time, and an image of them has half the
bytes. The gathering of the image is conv.py's, where its pointers are explained: one loop over all (tap r, tap s, block
of channels), its position in counters, which taps are inside the image in one bit each. What differs:

- Products add up in int32, exactly, or for fp8 in float32.
- A step of the loop takes up to 128 channels, as many bytes as conv.py's 64 halves. Eight-bit tensor cores want both
  operands with the inner dimension contiguous, which NHWC images and the packed weight are.
- A 1x1 convolution needs no kernel of its own: without padding and strides a row's window is the row itself, and with
  one tap the counters vanish. All of that is decided at compile time.
- The end of a tile is requantise.py's.

Channels must come in multiples of 16, so that every pixel starts at a multiple of 16 bytes, the widest load. A first
layer of 3 channels would be padded to 16, so that 13 of 16 products and bytes would be padding; it stays in half
precision, where pack.pixels pads to 4. Its result is quantised after the max-pool, a quarter of the numbers: rounding
and saturating keep the order of numbers, so that gives the same as a max-pool of quantised numbers.
"""

from typing import Optional

import torch
from torch import Tensor

import triton
import triton.language as tl
from resnet_fast.kernels.contract import Pair, output_size
from resnet_fast.kernels.reference.quantised import RANGE
from resnet_fast.kernels.triton import operands, pack, tiles
from resnet_fast.kernels.triton.plan import Launch, Plan, ceil_div
from resnet_fast.kernels.triton.requantise import finish_quantised_tile

PRECISIONS = {torch.int8: "int8", torch.float8_e4m3fn: "fp8"}
"""The lists of tiles."""
_SHORTEST = 32  # elements of the inner dimension that an 8-bit instruction takes at least


@triton.jit(do_not_specialize=["N", "H", "W", "P", "Q"])
def conv_quantised_kernel(
    x_ptr,
    w_ptr,
    scale_ptr,
    shift_ptr,
    residual_ptr,
    y_ptr,
    residual_scale,
    inverse_scale,
    N,
    H,
    W,
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
    HAS_RESIDUAL: tl.constexpr,
    RELU: tl.constexpr,
    REQUANTISE: tl.constexpr,
    INDEX64: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    SPLIT: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """See ``reference_quantised.conv_quantised``. C and K count the channels of one group.

    x [N, H, W, GROUPS * C] int8 or float8_e4m3fn; w [GROUPS * K, R, S, ceil(C / BK) * BK], zero beyond C; scale, shift
    [GROUPS * K] float32; residual, y [N, P, Q, GROUPS * K]. REQUANTISE: y has 8 bits, by ``inverse_scale``. UNROLL: how
    many steps of the loop are written out as one.
    """
    INTEGER: tl.constexpr = x_ptr.dtype.element_ty == tl.int8
    COLUMN_TILES: tl.constexpr = (K + BN - 1) // BN
    BLOCKS: tl.constexpr = (C + BK - 1) // BK
    PIXEL: tl.constexpr = GROUPS * C
    CHECK_BOUNDS: tl.constexpr = PAD_H > 0 or PAD_W > 0
    BOUNDS_IN_BITS: tl.constexpr = R * S <= 32

    tile = tl.program_id(0)
    group = tl.program_id(1)
    first_row = (tile // COLUMN_TILES) * BM
    first_column = (tile % COLUMN_TILES) * BN
    x_ptr += group * C
    w_ptr += group * (K * R * S * BLOCKS * BK)
    scale_ptr += group * K
    shift_ptr += group * K
    residual_ptr += group * K
    y_ptr += group * K

    rows = first_row + tl.arange(0, BM)
    columns = first_column + tl.arange(0, BN)
    channels = tl.arange(0, BK)
    row_mask = rows < N * P * Q
    row_pitch = W * PIXEL
    if R * S * STRIDE_H * STRIDE_W == 1 and not CHECK_BOUNDS:
        if INDEX64:
            rows = rows.to(tl.int64)
        window = rows * PIXEL
    else:
        image = rows // (P * Q)
        pixel = rows % (P * Q)
        top = (pixel // Q) * STRIDE_H - PAD_H
        left = (pixel % Q) * STRIDE_W - PAD_W
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
    acc = tl.zeros((BM, BN), tl.int32 if INTEGER else tl.float32)
    r = 0
    s = 0
    first_channel = 0
    x_step = 0
    for step in tl.range(R * S * BLOCKS, loop_unroll_factor=UNROLL):
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
        if K % BN != 0:
            w = tl.load(w_tile + step * BK, mask=(columns < K)[None, :], other=0.0)
        else:
            w = tl.load(w_tile + step * BK)
        if INTEGER:
            acc = tl.dot(x, w, acc, out_dtype=tl.int32)
        else:
            # While a sum of fp8 products stays in sm_90's tensor cores, it keeps some 14 bits (DeepSeek-V3 technical
            # report, section 3.3.2). So it leaves them after every step, to be added to the others in float32.
            acc = tl.dot(x, w, acc, max_num_imprecise_acc=BK)

        # To the next block of channels, or the next tap's first, or the next row of taps' first.
        first_channel += BK
        x_step += BK
        if R * S > 1:
            next_tap = first_channel == BLOCKS * BK
            first_channel = tl.where(next_tap, 0, first_channel)
            s = tl.where(next_tap, s + 1, s)
            x_step += tl.where(next_tap, DILATION_W * PIXEL - BLOCKS * BK, 0)
            next_row = s == S
            s = tl.where(next_row, 0, s)
            r = tl.where(next_row, r + 1, r)
            x_step += tl.where(next_row, DILATION_H * row_pitch - S * DILATION_W * PIXEL, 0)

    finish_quantised_tile(
        acc, y_ptr, residual_ptr, scale_ptr, shift_ptr, residual_scale, inverse_scale, rows * (GROUPS * K), row_mask,
        first_column, K, BM, BN, SPLIT, HAS_RESIDUAL, RELU, REQUANTISE,
    )  # fmt: skip


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
    x, y, residual = operands.nhwc(x), operands.allocate(x, (n, k, p, q), out_dtype), operands.nhwc(residual)
    merge = pack.merged(groups, c // groups)
    groups_before, groups = groups, groups // merge
    c, k = c // groups, k // groups
    tile = tile or tiles.pick(target, PRECISIONS[x.dtype], n * p * q, k, max(c, _SHORTEST), groups)
    packed = pack.weight(weight, x.dtype, groups_before, merge, tile.reduction)
    launch = Launch(
        conv_quantised_kernel,
        (ceil_div(n * p * q, tile.rows) * ceil_div(k, tile.columns), groups),
        (
            x, packed, operands.vector(scale), operands.vector(shift), y if residual is None else residual, y,
            float(residual_scale), 1 / out_scale, n, h, w, p, q,
        ),
        {
            "C": c,
            "K": k,
            "GROUPS": groups,
            "R": r,
            "S": s,
            **operands.window(stride, padding, dilation),
            "HAS_RESIDUAL": residual is not None,
            "RELU": relu,
            "REQUANTISE": out_dtype in RANGE,
            "INDEX64": operands.index64(x, y),
            **tile.constants(),
            "UNROLL": _unrolled(target),
        },
    )  # fmt: skip
    return Plan((launch,), y)


def _unrolled(target: str) -> int:
    """How many steps of the loop are written out as one.

    In a loop of one product, for sm_8x, Triton 3.8 carries the first slice of both operands from step to step in
    registers, one for every 8-bit number: 254 registers and 442 instructions for 64 products of a tile of 128 x 128 x
    128. A loop of two products it leaves alone: 146 registers and 196 instructions for as many. On sm_120, whose
    instructions are the same, it saves some of what a step costs beside its products. The others have instructions that
    read shared memory themselves, and larger steps.
    """
    return 2 if target.startswith(("sm_8", "sm_12")) else 1
