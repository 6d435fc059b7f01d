"""A bottleneck's last convolution and the next one's first, back to back: two matrix products in one kernel.

A bottleneck ends by expanding its channels, 1x1, and adding the shortcut; the next begins by reducing them again, 1x1.
What lies between is the widest image of the block. It must be written, for the next shortcut, but it need not be read
again by the second convolution: a pixel's result there depends on that pixel alone. So each program takes a tile of
pixels through both products. It goes along the wide channels, BN at a time: makes these columns of the image, finishes
and stores them (epilogue.py), and multiplies them, still on the chip and already rounded as they were stored, with the
BN rows of the second weight that belong to them. The second product's sums are kept for all its columns.

The price: a program holds all channels of its pixels on both narrow sides, which bounds their numbers (tiles.py), and
there is one program for each tile of rows only, which is too few for a small image (``table.chain_pays``).
"""

from torch import Tensor

import triton
import triton.language as tl
from resnet_fast.kernels.triton import device, operands, pack, tiles
from resnet_fast.kernels.triton.epilogue import finish_tile, store_columns
from resnet_fast.kernels.triton.plan import Launch, Plan, ceil_div


@triton.jit(do_not_specialize=["M"])
def chain_kernel(
    x_ptr,
    w_ptr,
    scale_ptr,
    shift_ptr,
    residual_ptr,
    y_ptr,
    next_w_ptr,
    next_scale_ptr,
    next_shift_ptr,
    z_ptr,
    M,
    C: tl.constexpr,
    K: tl.constexpr,
    L: tl.constexpr,
    PRECISION: tl.constexpr,
    INDEX64: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BL: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """``y = relu(x @ w.T * scale + shift + residual)`` and ``z = relu(y @ next_w.T * next_scale + next_shift)``.

    x [M, C]; w [K, BK], zero beyond C; scale, shift [K]; residual, y [M, K]; next_w [L, ceil(K / BN) * BN], zero beyond
    K; next_scale, next_shift [L]; z [M, L]. BK and BL: C and L, rounded up to a power of two.
    """
    BLOCKS: tl.constexpr = (K + BN - 1) // BN

    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    channels = tl.arange(0, BK)
    next_columns = tl.arange(0, BL)
    row_mask = rows < M
    if INDEX64:
        rows = rows.to(tl.int64)

    x_mask = row_mask[:, None]
    if C != BK:
        x_mask = x_mask & (channels < C)[None, :]
    x = tl.load(x_ptr + (rows * C)[:, None] + channels[None, :], mask=x_mask, other=0.0)
    next_w_tile = next_w_ptr + (next_columns * (BLOCKS * BN))[None, :]
    z = tl.zeros((BM, BL), tl.float32)
    for block in range(BLOCKS):
        columns = block * BN + tl.arange(0, BN)
        w_tile = w_ptr + (columns * BK)[None, :] + channels[:, None]
        if K % BN != 0:
            w = tl.load(w_tile, mask=(columns < K)[None, :], other=0.0)
        else:
            w = tl.load(w_tile)
        y = store_columns(
            tl.dot(x, w, input_precision=PRECISION), y_ptr, residual_ptr, scale_ptr, shift_ptr, rows * K, row_mask,
            columns, K, K % BN != 0, True, True,
        )  # fmt: skip
        if K % BN != 0:
            # An Inf in x has made NaN of the columns beyond K.
            y = tl.where((columns < K)[None, :], y, tl.zeros_like(y))
        if L != BL:
            next_w = tl.load(next_w_tile + columns[:, None], mask=(next_columns < L)[None, :], other=0.0)
        else:
            next_w = tl.load(next_w_tile + columns[:, None])
        z = tl.dot(y, next_w, z, input_precision=PRECISION)

    finish_tile(
        z, z_ptr, z_ptr, next_scale_ptr, next_shift_ptr, rows * L, row_mask, 0, L, BM, BL, SPLIT, False, True
    )  # fmt: skip


def plan_conv_chain(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor,
    next_weight: Tensor,
    next_scale: Tensor,
    next_shift: Tensor,
    target: str,
) -> Plan:
    """Both convolutions.

    Raises:
        ValueError: the architecture has no tile for so many channels (see ``table.supports``).
    """
    n, c, h, w = x.shape
    k, last, rows = weight.shape[0], next_weight.shape[0], n * h * w
    precision = device.precision_of(x.dtype, target)
    tile = tiles.pick_chain(target, precision, c, last)
    if tile is None:
        raise ValueError(f"no tile of {target} for {precision} takes {c} channels in and {last} out")
    y, z = operands.allocate(x, (n, k, h, w)), operands.allocate(x, (n, last, h, w))
    x, residual = operands.nhwc(x), operands.nhwc(residual)
    scale, shift, next_scale, next_shift = map(operands.vector, (scale, shift, next_scale, next_shift))
    constants = tile.constants(c, last)
    packed = pack.weight(weight, x.dtype, 1, 1, constants["BK"])
    next_packed = pack.weight(next_weight, x.dtype, 1, 1, tile.columns)
    launch = Launch(
        chain_kernel,
        (ceil_div(rows, tile.rows),),
        (x, packed, scale, shift, residual, y, next_packed, next_scale, next_shift, z, rows),
        {
            "C": c,
            "K": k,
            "L": last,
            "PRECISION": device.dot_precision(x.dtype, target),
            "INDEX64": operands.index64(x, y),
            **constants,
        },
    )
    return Plan((launch,), (y, z))
