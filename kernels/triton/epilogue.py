"""What every convolution does with a finished tile: scale, shift, residual, ReLU, store.

Batch norm, the residual add and ReLU would each read and write the whole feature map in a kernel of their own. Here
they happen to float32 accumulators that are still in registers, so the feature map is written once.

A wide tile holds so many accumulators that the residual no longer fits beside them and registers spill to memory. It
is finished in two halves: with ``SPLIT`` the tile's columns are cut in the middle and the halves go one after the
other, so that only half of the residual is held at a time.
"""

import triton
import triton.language as tl


@triton.jit
def store_columns(
    acc,
    y_ptr,
    residual_ptr,
    scale_ptr,
    shift_ptr,
    row_offsets,
    row_mask,
    columns,
    K: tl.constexpr,
    MASK_COLUMNS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    RELU: tl.constexpr,
):
    """The same for some of a tile's columns. Returns what was stored, undefined where ``columns >= K``."""
    offsets = row_offsets[:, None] + columns[None, :]
    mask = row_mask[:, None]
    if MASK_COLUMNS:
        column_mask = columns < K
        mask = mask & column_mask[None, :]
        scale = tl.load(scale_ptr + columns, mask=column_mask, other=0.0).to(tl.float32)
        shift = tl.load(shift_ptr + columns, mask=column_mask, other=0.0).to(tl.float32)
    else:
        scale = tl.load(scale_ptr + columns).to(tl.float32)
        shift = tl.load(shift_ptr + columns).to(tl.float32)
    y = acc * scale[None, :] + shift[None, :]
    if HAS_RESIDUAL:
        y += tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if RELU:
        # As in PyTorch, the ReLU of NaN is NaN.
        y = tl.maximum(y, 0.0, propagate_nan=tl.PropagateNan.ALL)
    y = y.to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + offsets, y, mask=mask)
    return y


@triton.jit
def finish_tile(
    acc,
    y_ptr,
    residual_ptr,
    scale_ptr,
    shift_ptr,
    row_offsets,
    row_mask,
    first_column,
    K: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    SPLIT: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    RELU: tl.constexpr,
):
    """``y = relu(acc * scale + shift + residual)`` for one tile.

    acc [BM, BN] float32. row_offsets [BM]: where each row starts in y and in residual. first_column: the tile's first
    column, out of K. All pointers are those of the tile's group of columns.
    """
    if SPLIT:
        HALF: tl.constexpr = BN // 2
        left, right = tl.split(tl.permute(tl.reshape(acc, (BM, 2, HALF)), (0, 2, 1)))
        columns = first_column + tl.arange(0, HALF)
        store_columns(
            left, y_ptr, residual_ptr, scale_ptr, shift_ptr, row_offsets, row_mask, columns,
            K, K % BN != 0, HAS_RESIDUAL, RELU,
        )  # fmt: skip
        store_columns(
            right, y_ptr, residual_ptr, scale_ptr, shift_ptr, row_offsets, row_mask, columns + HALF,
            K, K % BN != 0, HAS_RESIDUAL, RELU,
        )  # fmt: skip
    else:
        columns = first_column + tl.arange(0, BN)
        store_columns(
            acc, y_ptr, residual_ptr, scale_ptr, shift_ptr, row_offsets, row_mask, columns,
            K, K % BN != 0, HAS_RESIDUAL, RELU,
        )  # fmt: skip
