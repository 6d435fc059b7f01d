"""A convolution's inner dimension in parts: what each part leaves, and the launch that adds them up.

A 7x7 image has 49 pixels, so that its convolution makes a few tiles, and each of them is a sum over up to 4608 taps and
channels. On a GPU of 132 multiprocessors almost all would be idle for as long as that one loop takes. So the loop is
cut into parts, with a program for each. A part knows neither the whole sum nor what comes after it (scale, shift,
residual, ReLU, rounding), so it stores its float32 sums in a workspace ``[parts, M, K]``, and ``add_parts_kernel`` does
the rest. The workspace is small, and comes from the cache where it has just been written.

The parts are added in their order, whichever programs ran first: repeats are equal to the bit. (Atomic adds would save
the workspace, but give other last bits in every run, and round to half precision in between.)
"""

from typing import Optional

from torch import Tensor

import triton
import triton.language as tl
from resnet_fast.kernels.triton import operands, tiles
from resnet_fast.kernels.triton.epilogue import finish_tile
from resnet_fast.kernels.triton.plan import Launch, Plan, ceil_div


@triton.jit
def store_part(acc, part_ptr, row_offsets, row_mask, columns, K: tl.constexpr, MASK_COLUMNS: tl.constexpr):
    """Store one tile of a part as it is: acc [BM, BN] float32, row_offsets [BM], columns [BN] out of K."""
    mask = row_mask[:, None]
    if MASK_COLUMNS:
        mask = mask & (columns < K)[None, :]
    tl.store(part_ptr + row_offsets[:, None] + columns[None, :], acc, mask=mask)


@triton.jit(do_not_specialize=["PARTS", "M"])
def add_parts_kernel(
    parts_ptr,
    scale_ptr,
    shift_ptr,
    residual_ptr,
    y_ptr,
    PARTS,
    M,
    K: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    RELU: tl.constexpr,
    INDEX64: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """``y = relu(sum(parts) * scale + shift + residual)``.

    parts [PARTS, M, K] float32; scale, shift [K]; residual (None if unused), y [M, K].
    """
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    first_column = tl.program_id(1) * BN
    columns = first_column + tl.arange(0, BN)
    row_mask = rows < M
    mask = row_mask[:, None]
    if K % BN != 0:
        mask = mask & (columns < K)[None, :]
    if INDEX64:
        rows = rows.to(tl.int64)
    part_size = tl.cast(M, tl.int64) * K
    at = parts_ptr + (rows * K)[:, None] + columns[None, :]
    acc = tl.zeros((BM, BN), tl.float32)
    # The loads of several parts are under way at once.
    for _ in tl.range(0, PARTS, loop_unroll_factor=4):
        acc += tl.load(at, mask=mask, other=0.0)
        at += part_size
    finish_tile(
        acc, y_ptr, residual_ptr, scale_ptr, shift_ptr, rows * K, row_mask, first_column,
        K, BM, BN, False, HAS_RESIDUAL, RELU,
    )  # fmt: skip


def plan_add_parts(
    parts: Tensor,
    scale: Optional[Tensor],
    shift: Optional[Tensor],
    residual: Optional[Tensor],
    y: Tensor,
    relu: bool,
    target: str,
) -> Plan:
    """``y = relu(sum(parts) * scale + shift + residual)``, parts ``[n, N * P * Q, K]``."""
    count, rows, k = parts.shape
    data = tiles.load(target)
    bm, bn, warps = data["pointwise"]
    # There is little to do: rather small programs than idle multiprocessors, down to 16 bytes a thread.
    threads = warps * (64 if target.startswith("gfx") else 32)
    while bm * bn > 4 * threads and ceil_div(rows, bm) * ceil_div(k, bn) < data["multiprocessors"]:
        bm //= 2
    launch = Launch(
        add_parts_kernel,
        (ceil_div(rows, bm), ceil_div(k, bn)),
        (parts, scale, shift, residual, y, count, rows),
        {
            "K": k,
            "HAS_RESIDUAL": residual is not None,
            "RELU": relu,
            "INDEX64": operands.index64(y, y),
            "BM": bm,
            "BN": bn,
            "num_warps": warps,
        },
    )
    return Plan((launch,), y)
