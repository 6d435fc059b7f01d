"""What every backward convolution does with a finished tile: residual, ReLU's gate, store, batch norm's two sums.

The ReLU that the convolution's input came through stops the gradient where it was not positive, and the batch norm
before it needs ``sum(g)`` and ``sum(g * (x - mean))`` of what passes. Each would be one more pass over the feature map.

Every tile leaves its sums in a workspace, one row per tile, and ``sum_rows_kernel`` adds the rows in a fixed order:
atomics would give other last bits in every run. Summed are the values as stored, rounded, for those are what batch
norm's backward pass reads. They are read back for it: matrix instructions leave a column scattered over many threads,
and adding it up there takes several times the instructions that it takes in the layout of a plain load.
"""

from typing import Optional

from torch import Tensor

import triton
import triton.language as tl
from resnet_fast.kernels.triton import operands, tiles
from resnet_fast.kernels.triton.plan import Launch, Plan, ceil_div
from resnet_fast.kernels.triton.prologue import activate, load_affine


@triton.jit
def passes(x, scale_ptr, shift_ptr, channels, C: tl.constexpr, MASK: tl.constexpr, AFFINE: tl.constexpr):
    """Where ReLU lets a gradient through: where its result is positive, as stored (or NaN, as in PyTorch)."""
    if AFFINE:
        scale, shift = load_affine(scale_ptr, shift_ptr, channels, C, MASK)
        x = activate(x, scale, shift, channels, False)
    return (x.to(tl.float32) <= 0.0) == 0


@triton.jit
def centred(x, mean_ptr, channels, C: tl.constexpr, MASK: tl.constexpr):
    """``x - mean`` in float32."""
    if MASK:
        mean = tl.load(mean_ptr + channels, mask=channels < C, other=0.0)
    else:
        mean = tl.load(mean_ptr + channels)
    return x.to(tl.float32) - mean[None, :]


@triton.jit
def finish_gradient(
    acc,
    g_ptr,
    residual_ptr,
    x_ptr,
    scale_ptr,
    shift_ptr,
    mean_ptr,
    total_ptr,
    product_ptr,
    row_offsets,
    row_mask,
    columns,
    column_mask,
    C: tl.constexpr,
    MASK_COLUMNS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    GATE: tl.constexpr,
    AFFINE: tl.constexpr,
    PRODUCT: tl.constexpr,
):
    """``g = acc + residual`` for one tile, with GATE where ReLU passed x, and the tile's sums of g and g * (x - mean).

    acc [BM, BN] float32. row_offsets [BM]: where each row starts in g, residual and x. columns [BN], out of C; with
    MASK_COLUMNS only those of column_mask. total_ptr, product_ptr: the tile's row of the workspace.
    """
    offsets = row_offsets[:, None] + columns[None, :]
    mask = row_mask[:, None]
    if MASK_COLUMNS:
        mask = mask & column_mask[None, :]
    if HAS_RESIDUAL:
        acc += tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if GATE:
        x = tl.load(x_ptr + offsets, mask=mask, other=0.0)
        acc = tl.where(passes(x, scale_ptr, shift_ptr, columns, C, MASK_COLUMNS, AFFINE), acc, 0.0)
    tl.store(g_ptr + offsets, acc.to(g_ptr.dtype.element_ty), mask=mask)
    if GATE:
        tl.debug_barrier()  # other threads of this program wrote what this one reads
        g = tl.load(g_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        tl.store(total_ptr + columns, tl.sum(g, axis=0), mask=column_mask)
        if PRODUCT:
            x = tl.load(x_ptr + offsets, mask=mask, other=0.0)
            product = tl.sum(g * centred(x, mean_ptr, columns, C, MASK_COLUMNS), axis=0)
            tl.store(product_ptr + columns, product, mask=column_mask)


@triton.jit(do_not_specialize=["ROWS"])
def sum_rows_kernel(x_ptr, y_ptr, ROWS, C: tl.constexpr, INDEX64: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """x [L, ROWS, C] float32 -> y [L, C], L on the second axis of the grid. The order of the sum is fixed."""
    layer = tl.program_id(1)
    columns = tl.program_id(0) * BN + tl.arange(0, BN)
    rows = tl.arange(0, BM)
    if INDEX64:
        layer = layer.to(tl.int64)
        rows = rows.to(tl.int64)
    x_tile = x_ptr + layer * ROWS * C + (rows * C)[:, None] + columns[None, :]
    total = tl.zeros((BM, BN), tl.float32)
    for first in range(0, ROWS, BM):
        mask = (first + rows < ROWS)[:, None] & (columns < C)[None, :]
        total += tl.load(x_tile, mask=mask, other=0.0)
        x_tile += BM * C
    tl.store(y_ptr + layer * C + columns, tl.sum(total, axis=0), mask=columns < C)


def plan_sum_rows(x: Tensor, target: str, y: Optional[Tensor] = None) -> Plan:
    """float32 ``[L, rows, C]`` -> ``[L, C]``, in ``y`` if that is given."""
    layers, rows, c = x.shape
    y = operands.allocate_floats(x, (layers, c)) if y is None else y
    bm, elements, warps = tiles.load(target)["sum_rows"]
    bm = min(bm, tiles.power_of_two(rows))
    bn = elements // bm
    launch = Launch(
        sum_rows_kernel,
        (ceil_div(c, bn), layers),
        (x, y, rows),
        {"C": c, "INDEX64": operands.index64(x, x), "BM": bm, "BN": bn, "num_warps": warps},
    )
    return Plan((launch,), y)
