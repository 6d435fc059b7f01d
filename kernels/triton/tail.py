"""The end of a residual block in training: batch norm, residual and ReLU in one pass over the image.

It follows a convolution whose batch norm has to wait for the whole result (statistics.py), so it cannot be that
convolution's epilogue. It only moves data; programs take blocks of channels, which are contiguous, times blocks of
pixels.
"""

from typing import Optional

from torch import Tensor

import triton
import triton.language as tl
from resnet_fast.kernels.contract import Affine
from resnet_fast.kernels.triton import operands, tiles
from resnet_fast.kernels.triton.plan import Launch, Plan, ceil_div
from resnet_fast.kernels.triton.prologue import load_affine


@triton.jit(do_not_specialize=["M"])
def tail_kernel(
    y_ptr,
    scale_ptr,
    shift_ptr,
    residual_ptr,
    residual_scale_ptr,
    residual_shift_ptr,
    out_ptr,
    M,
    C: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    RESIDUAL_AFFINE: tl.constexpr,
    RELU: tl.constexpr,
    INDEX64: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """``out = relu(y * scale + shift + residual)``, the residual with RESIDUAL_AFFINE through its own scale and shift.

    y, residual, out [M, C]; the vectors [C] float32. Pointers that the flags leave unused are None.
    """
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    channels = tl.program_id(1) * BN + tl.arange(0, BN)
    mask = (rows < M)[:, None]
    if C % BN != 0:
        mask = mask & (channels < C)[None, :]
    if INDEX64:
        rows = rows.to(tl.int64)
    offsets = (rows * C)[:, None] + channels[None, :]

    scale, shift = load_affine(scale_ptr, shift_ptr, channels, C, C % BN != 0)
    z = tl.load(y_ptr + offsets, mask=mask, other=0.0).to(tl.float32) * scale[None, :] + shift[None, :]
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        if RESIDUAL_AFFINE:
            scale, shift = load_affine(residual_scale_ptr, residual_shift_ptr, channels, C, C % BN != 0)
            residual = residual * scale[None, :] + shift[None, :]
        z += residual
    if RELU:
        z = tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(out_ptr + offsets, z.to(out_ptr.dtype.element_ty), mask=mask)


def plan_tail(
    y: Tensor,
    affine: Affine,
    residual: Optional[Tensor],
    residual_affine: Optional[Affine],
    relu: bool,
    target: str,
) -> Plan:
    """``relu(y * scale + shift + residual)``, the residual through an affine map of its own if there is one."""
    y = operands.nhwc(y)
    out = operands.allocate(y, tuple(y.shape))
    rows, c = y.numel() // y.shape[1], y.shape[1]
    bm, bn, warps = tiles.load(target)["tail"]
    launch = Launch(
        tail_kernel,
        (ceil_div(rows, bm), ceil_div(c, bn)),
        (y, *operands.vectors(affine), operands.nhwc(residual), *operands.vectors(residual_affine), out, rows),
        {
            "C": c,
            "HAS_RESIDUAL": residual is not None,
            "RESIDUAL_AFFINE": residual_affine is not None,
            "RELU": relu,
            "INDEX64": operands.index64(y, y),
            "BM": bm,
            "BN": bn,
            "num_warps": warps,
        },
    )
    return Plan((launch,), out)
