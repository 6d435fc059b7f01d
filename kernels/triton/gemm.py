"""A 1x1 convolution of stride 1 is a matrix product: every pixel's channels times the weight.

In NHWC the image is already the matrix ``x [M, C]`` with ``M = N * H * W``, so a tile of rows is a tile of pixels and
nothing is gathered. Half of ResNet-50's convolutions are of this kind.

Each program makes a tile ``y[BM, BN]``. Pointers to ``x[rows, 0:BK]`` and ``w[columns, 0:BK]`` advance together by BK
along the channels. Programs that share rows of x have neighbouring numbers, so that x comes from L2 after the first of
them; the weight is small enough to stay there anyway.

``PARTS``, and training's ``PROLOGUE``, ``FLIP`` and ``STATISTICS``, are as in conv.py; a part is on the second axis of
the grid.
"""

import triton
import triton.language as tl
from resnet_fast.kernels.triton.convolution import Convolution, end_of
from resnet_fast.kernels.triton.epilogue import finish_tile
from resnet_fast.kernels.triton.plan import Launch, Plan, ceil_div
from resnet_fast.kernels.triton.prologue import activate, add_product, load_affine
from resnet_fast.kernels.triton.split_k import store_part
from resnet_fast.kernels.triton.statistics import store_with_statistics


@triton.jit(do_not_specialize=["M"])
def gemm_kernel(
    x_ptr,
    w_ptr,
    scale_ptr,
    shift_ptr,
    residual_ptr,
    y_ptr,
    prologue_scale_ptr,
    prologue_shift_ptr,
    partials_ptr,
    M,
    C: tl.constexpr,
    K: tl.constexpr,
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
    """``y = relu(x @ w.T * scale + shift + residual)``.

    x [M, C]; w [K, ceil(C / BK) * BK], zero beyond C; scale, shift [K]; residual, y [M, K];
    prologue_scale, prologue_shift [C]; partials [row tiles, 2, K]. With several PARTS, y [PARTS, M, K] float32 takes
    the parts of ``x @ w.T``. Pointers that the flags leave unused are None.
    """
    COLUMN_TILES: tl.constexpr = (K + BN - 1) // BN
    BLOCKS: tl.constexpr = (C + BK - 1) // BK
    PART_BLOCKS: tl.constexpr = (BLOCKS + PARTS - 1) // PARTS

    tile = tl.program_id(0)
    first_row = (tile // COLUMN_TILES) * BM
    first_column = (tile % COLUMN_TILES) * BN
    rows = first_row + tl.arange(0, BM)
    columns = first_column + tl.arange(0, BN)
    channels = tl.arange(0, BK)
    row_mask = rows < M
    if INDEX64:
        rows = rows.to(tl.int64)

    x_tile = x_ptr + (rows * C)[:, None] + channels[None, :]
    w_tile = w_ptr + (columns * (BLOCKS * BK))[None, :] + channels[:, None]
    acc = tl.zeros((BN, BM) if FLIP else (BM, BN), tl.float32)
    first_block = 0
    last_block = BLOCKS
    if PARTS > 1:
        first_block = tl.program_id(1) * PART_BLOCKS
        last_block = first_block + PART_BLOCKS
        if BLOCKS % PARTS != 0:
            last_block = tl.minimum(last_block, BLOCKS)
    for block in range(first_block, last_block):
        x_mask = row_mask[:, None]
        if C % BK != 0:
            x_mask = x_mask & (block * BK + channels < C)[None, :]
        x = tl.load(x_tile + block * BK, mask=x_mask, other=0.0)
        if PROLOGUE:
            scale, shift = load_affine(prologue_scale_ptr, prologue_shift_ptr, block * BK + channels, C, C % BK != 0)
            x = activate(x, scale, shift, row_mask, False)
        if K % BN != 0:
            w = tl.load(w_tile + block * BK, mask=(columns < K)[None, :], other=0.0)
        else:
            w = tl.load(w_tile + block * BK)
        acc = add_product(acc, x, w, FLIP, PRECISION)

    if FLIP:
        acc = tl.trans(acc)
    if STATISTICS:
        store_with_statistics(
            acc, y_ptr, partials_ptr, rows * K, row_mask, first_row, first_column, M, K, K, BM, BN, SPLIT
        )
    elif PARTS > 1:
        part_ptr = y_ptr + tl.program_id(1).to(tl.int64) * M * K
        store_part(acc, part_ptr, rows * K, row_mask, columns, K, K % BN != 0)
    else:
        finish_tile(
            acc, y_ptr, residual_ptr, scale_ptr, shift_ptr, rows * K, row_mask, first_column,
            K, BM, BN, SPLIT, HAS_RESIDUAL, RELU,
        )  # fmt: skip


def plan_gemm(conv: Convolution) -> Plan:
    """A 1x1 convolution of stride 1 without padding or groups."""
    (_, c, *_), (n, k, p, q) = conv.x.shape, conv.y.shape
    tile, rows = conv.tile, n * p * q
    end = end_of(conv, ceil_div(c, tile.reduction))
    launch = Launch(
        gemm_kernel,
        (ceil_div(rows, tile.rows) * ceil_div(k, tile.columns), end.parts),
        (conv.x, conv.packed, *end.operands, rows),
        {"C": c, "K": k, **end.constants, **tile.constants()},
    )
    return end.plan(conv, launch)
