"""What a convolution of 8-bit numbers does with a finished tile: scale, shift, residual, ReLU, 8 bits again, store.

As in epilogue.py, but around it the numbers have 8 bits: the sums are int32 (or float32, of fp8), the residual has a
scale of its own, and the result is divided by its scale and rounded on the way out. So an image is read and written
with one byte a number, and in real numbers it only ever exists in registers.
"""

import triton
import triton.language as tl
from resnet_fast.kernels.triton.prologue import load_affine


@triton.jit
def requantise(y, inverse_scale, y_ptr):
    """``saturate(round(y * inverse_scale))``, y float32, in the dtype that y_ptr points to: int8 or float8_e4m3fn."""
    y *= inverse_scale
    if y_ptr.dtype.element_ty == tl.int8:
        # This maximum takes NaN for "no number" and returns the other one.
        y = tl.minimum(tl.maximum(y, -128.0), 127.0)
        # From 2^23 to 2^24 float32 numbers are 1 apart. So adding 1.5 * 2^23 rounds y to an integer, half to even, and
        # leaves it in the low bits of the sum: one addition. A conversion has a quarter of an addition's rate.
        return (y + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)
    else:
        y = tl.maximum(y, -448.0, propagate_nan=tl.PropagateNan.ALL)
        return tl.minimum(y, 448.0, propagate_nan=tl.PropagateNan.ALL).to(y_ptr.dtype.element_ty)


@triton.jit
def _store_columns(
    acc,
    y_ptr,
    residual_ptr,
    scale_ptr,
    shift_ptr,
    residual_scale,
    inverse_scale,
    row_offsets,
    row_mask,
    columns,
    K: tl.constexpr,
    MASK_COLUMNS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    RELU: tl.constexpr,
    REQUANTISE: tl.constexpr,
):
    offsets = row_offsets[:, None] + columns[None, :]
    mask = row_mask[:, None]
    if MASK_COLUMNS:
        mask = mask & (columns < K)[None, :]
    scale, shift = load_affine(scale_ptr, shift_ptr, columns, K, MASK_COLUMNS)
    y = acc.to(tl.float32) * scale[None, :] + shift[None, :]
    if HAS_RESIDUAL:
        y += tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32) * residual_scale
    if RELU:
        y = tl.maximum(y, 0.0, propagate_nan=tl.PropagateNan.ALL)
    if REQUANTISE:
        tl.store(y_ptr + offsets, requantise(y, inverse_scale, y_ptr), mask=mask)
    else:
        tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def finish_quantised_tile(
    acc,
    y_ptr,
    residual_ptr,
    scale_ptr,
    shift_ptr,
    residual_scale,
    inverse_scale,
    row_offsets,
    row_mask,
    first_column,
    K: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    SPLIT: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    RELU: tl.constexpr,
    REQUANTISE: tl.constexpr,
):
    """``y = relu(acc * scale + shift + residual * residual_scale)``, with REQUANTISE in 8 bits, for one tile.

    acc [BM, BN] int32 or float32. row_offsets [BM]: where each row starts in y and in residual. first_column: the
    tile's first column, out of K. SPLIT: as in epilogue.py. All pointers are those of the tile's group of columns.
    """
    if SPLIT:
        HALF: tl.constexpr = BN // 2
        left, right = tl.split(tl.permute(tl.reshape(acc, (BM, 2, HALF)), (0, 2, 1)))
        columns = first_column + tl.arange(0, HALF)
        _store_columns(
            left, y_ptr, residual_ptr, scale_ptr, shift_ptr, residual_scale, inverse_scale, row_offsets, row_mask,
            columns, K, K % BN != 0, HAS_RESIDUAL, RELU, REQUANTISE,
        )  # fmt: skip
        _store_columns(
            right, y_ptr, residual_ptr, scale_ptr, shift_ptr, residual_scale, inverse_scale, row_offsets, row_mask,
            columns + HALF, K, K % BN != 0, HAS_RESIDUAL, RELU, REQUANTISE,
        )  # fmt: skip
    else:
        columns = first_column + tl.arange(0, BN)
        _store_columns(
            acc, y_ptr, residual_ptr, scale_ptr, shift_ptr, residual_scale, inverse_scale, row_offsets, row_mask,
            columns, K, K % BN != 0, HAS_RESIDUAL, RELU, REQUANTISE,
        )  # fmt: skip
