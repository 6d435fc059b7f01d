"""Mean and variance of every channel of a convolution's result, for the batch norm after it.

A pass of its own would read the whole result again. Instead each tile of the convolution leaves the mean and the
variance of its rows in ``partials [row tiles, 2, K]``, and ``combine_kernel`` makes one such pair of many (Chan, Golub
and LeVeque 1979), again and again until one is left. Nothing depends on the order in which programs run, so that
repeats are equal to the bit.

The variance is of distances to the tile's own mean, not of squares: a mean that is large beside the deviations costs
no accuracy.
"""

from typing import Optional

from torch import Tensor

import triton
import triton.language as tl
from resnet_fast.kernels.contract import BatchNorm
from resnet_fast.kernels.triton import operands, tiles
from resnet_fast.kernels.triton.plan import Launch, Plan, ceil_div


@triton.jit
def _describe_columns(
    y_ptr,
    partials_ptr,
    row_offsets,
    row_mask,
    count,
    columns,
    K: tl.constexpr,
    ALL_K: tl.constexpr,
    MASK_COLUMNS: tl.constexpr,
):
    column_mask = columns < K
    mask = row_mask[:, None]
    if MASK_COLUMNS:
        mask = mask & column_mask[None, :]
    y = tl.load(y_ptr + row_offsets[:, None] + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(y, axis=0) / count
    centred = tl.where(row_mask[:, None], y - mean[None, :], 0.0)
    variance = tl.sum(centred * centred, axis=0) / count
    tl.store(partials_ptr + columns, mean, mask=column_mask)
    tl.store(partials_ptr + ALL_K + columns, variance, mask=column_mask)


@triton.jit
def store_with_statistics(
    acc,
    y_ptr,
    partials_ptr,
    row_offsets,
    row_mask,
    first_row,
    first_column,
    M,
    K: tl.constexpr,
    ALL_K: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Store one tile as it is, and the statistics of what was stored (rounded) in the tile's row of ``partials``.

    The tile is read back, from cache: the layout in which memory is read has most of a column's rows in one thread,
    whereas summing the accumulators of a tensor core takes two to five times the instructions.

    acc [BM, BN] float32. row_offsets [BM]: where each row starts in y. M: rows in all. K: columns of the tile's group,
    ALL_K of all groups. All pointers are those of the tile's group of columns.
    """
    columns = first_column + tl.arange(0, BN)
    mask = row_mask[:, None]
    if K % BN != 0:
        mask = mask & (columns < K)[None, :]
    tl.store(y_ptr + row_offsets[:, None] + columns[None, :], acc.to(y_ptr.dtype.element_ty), mask=mask)
    # The threads that read a number are not those that wrote it. All of them share one first-level cache, so that after
    # the barrier they see it (on AMD unless the driver splits thread groups over compute units, which is off).
    tl.debug_barrier()

    partials_ptr += (first_row // BM).to(tl.int64) * (2 * ALL_K)
    count = tl.minimum(M - first_row, BM).to(tl.float32)
    PARTS: tl.constexpr = 2 if SPLIT else 1
    for part in tl.static_range(PARTS):
        some = first_column + part * (BN // PARTS) + tl.arange(0, BN // PARTS)
        _describe_columns(
            y_ptr, partials_ptr, row_offsets, row_mask, count, some, K, ALL_K, K % BN != 0
        )  # fmt: skip


@triton.jit
def _combined(partials_ptr, parts, columns, PARTIALS, EACH, M, K: tl.constexpr):
    """Mean and variance of ``parts`` [BM] together, of the block ``columns``."""
    mask = (parts < PARTIALS)[:, None] & (columns < K)[None, :]
    offsets = (parts.to(tl.int64) * (2 * K))[:, None] + columns[None, :]
    mean = tl.load(partials_ptr + offsets, mask=mask, other=0.0)
    variance = tl.load(partials_ptr + K + offsets, mask=mask, other=0.0)

    # Rows of the parts; as numbers of 64 bits, for EACH parts beyond the last may pass 2^31.
    count = tl.minimum(tl.maximum(M - parts.to(tl.int64) * EACH, 0), EACH).to(tl.float32)
    share = (count / tl.sum(count, axis=0))[:, None]
    combined_mean = tl.sum(mean * share, axis=0)
    distance = tl.where(mask, mean - combined_mean[None, :], 0.0)
    return combined_mean, tl.sum((variance + distance * distance) * share, axis=0)


@triton.jit(do_not_specialize=["PARTIALS", "EACH", "M"])
def combine_kernel(partials_ptr, combined_ptr, PARTIALS, EACH, M, K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """Mean and variance of BM neighbouring parts together: partials [PARTIALS, 2, K] -> combined [ceil / BM, 2, K].

    Every part describes EACH rows, the last one what is left of M.
    """
    parts = tl.program_id(0) * BM + tl.arange(0, BM)
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    mean, variance = _combined(partials_ptr, parts, columns, PARTIALS, EACH, M, K)
    combined_ptr += tl.program_id(0).to(tl.int64) * (2 * K)
    tl.store(combined_ptr + columns, mean, mask=columns < K)
    tl.store(combined_ptr + K + columns, variance, mask=columns < K)


@triton.jit
def store_norm(mean, variance, scale_ptr, shift_ptr, vectors_ptr, moments_ptr, channels, M, eps, K: tl.constexpr):
    """What batch norm makes of the statistics of M values: ``reference.normalised`` in memory.

    mean, variance: of the block ``channels``, out of K. scale, shift [K]: gamma and beta.
    """
    mask = channels < K
    rstd = tl.div_rn(1.0, tl.sqrt_rn(variance + eps))
    scale = tl.load(scale_ptr + channels, mask=mask, other=0.0).to(tl.float32) * rstd
    shift = tl.load(shift_ptr + channels, mask=mask, other=0.0).to(tl.float32) - mean * scale
    tl.store(vectors_ptr + channels, mean, mask=mask)
    tl.store(vectors_ptr + K + channels, rstd, mask=mask)
    tl.store(vectors_ptr + 2 * K + channels, scale, mask=mask)
    tl.store(vectors_ptr + 3 * K + channels, shift, mask=mask)
    tl.store(moments_ptr + channels, mean, mask=mask)
    rows = tl.cast(M, tl.float32)
    tl.store(moments_ptr + K + channels, variance * (rows / (rows - 1.0)), mask=mask)


@triton.jit(do_not_specialize=["PARTIALS", "EACH", "M"])
def normalise_kernel(
    partials_ptr,
    scale_ptr,
    shift_ptr,
    vectors_ptr,
    moments_ptr,
    PARTIALS,
    EACH,
    M,
    eps,
    K: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """The last round of ``combine_kernel``, of up to BM parts, and what batch norm makes of it."""
    columns = tl.program_id(0) * BN + tl.arange(0, BN)
    mean, variance = _combined(partials_ptr, tl.arange(0, BM), columns, PARTIALS, EACH, M, K)
    store_norm(mean, variance, scale_ptr, shift_ptr, vectors_ptr, moments_ptr, columns, M, eps, K)


def plan_combine(partials: Tensor, each: int, rows: int, norm: Optional[BatchNorm], target: str) -> Plan:
    """``partials [n, 2, K]`` of ``each`` rows, ``rows`` in all, in rounds: as ``reference.conv_statistics`` gives them,
    mean and variance ``[K]``, or with ``norm`` what it makes of them."""
    bm, bn, warps = tiles.load(target)["combine"]
    launches = []
    last = bm if norm is not None else 1  # so many parts are left to the last launch
    while partials.shape[0] > last or not (launches or norm):
        count, _, k = partials.shape
        combined = operands.allocate_floats(partials, (ceil_div(count, bm), 2, k))
        launches.append(
            Launch(
                combine_kernel,
                (combined.shape[0], ceil_div(k, bn)),
                (partials, combined, count, each, rows),
                {"K": k, "BM": bm, "BN": bn, "num_warps": warps},
            )
        )
        partials, each = combined, each * bm
    if norm is None:
        return Plan(tuple(launches), tuple(partials[0].unbind(0)))
    count, _, k = partials.shape
    vectors, moments = operands.allocate_floats(partials, (4, k)), operands.allocate_floats(partials, (2, k))
    finish = Launch(
        normalise_kernel,
        (ceil_div(k, bn),),
        (partials, *map(operands.vector, norm[:2]), vectors, moments, count, each, rows, norm.eps),
        {"K": k, "BM": bm, "BN": bn, "num_warps": warps},
    )
    return Plan((*launches, finish), (vectors, moments))
