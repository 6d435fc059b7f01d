"""The small work around an expand layer's matrices: ``block.py`` says what such a layer is.

Its statistics and its gradients are a few products of small matrices, which PyTorch's own kernels make, and vectors
of channels made of them, each of which would be a launch. Here they are one launch forward and one back.
"""

import torch
from torch import Tensor

import triton
import triton.language as tl
from resnet_fast.kernels.contract import BatchNorm
from resnet_fast.kernels.reference import training as reference
from resnet_fast.kernels.triton import operands, tiles
from resnet_fast.kernels.triton.plan import Launch, Plan, ceil_div
from resnet_fast.kernels.triton.statistics import store_norm

_ELEMENTS, _WARPS = 2048, 4  # of a program's block of a matrix
_LARGEST_BLOCK = 256


@triton.jit(do_not_specialize=["M"])
def expand_statistics_kernel(
    w_ptr,
    product_ptr,
    mean_ptr,
    covariance_ptr,
    scale_ptr,
    shift_ptr,
    vectors_ptr,
    moments_ptr,
    cancels_ptr,
    M,
    eps,
    most,
    K: tl.constexpr,
    C: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """w, product = w covariance [K, C]; mean [C]; covariance [C, C]. The rest is as for ``normalise_kernel``.

    cancels [programs]: 1 where a variance of the program's rows lost too many digits, else 0.
    """
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    row_mask = rows < K
    mean = tl.zeros((BM,), tl.float32)
    variance = tl.zeros((BM,), tl.float32)
    uncorrelated = tl.zeros((BM,), tl.float32)
    for first in range(0, C, BN):
        columns = first + tl.arange(0, BN)
        column_mask = columns < C
        mask = row_mask[:, None] & column_mask[None, :]
        offsets = rows[:, None] * C + columns[None, :]
        w = tl.load(w_ptr + offsets, mask=mask, other=0.0)
        product = tl.load(product_ptr + offsets, mask=mask, other=0.0)
        input_mean = tl.load(mean_ptr + columns, mask=column_mask, other=0.0)
        diagonal = tl.load(covariance_ptr + columns * (C + 1), mask=column_mask, other=0.0)
        mean += tl.sum(w * input_mean[None, :], axis=1)
        variance += tl.sum(w * product, axis=1)
        uncorrelated += tl.sum(w * w * diagonal[None, :], axis=1)
    variance = tl.maximum(variance, 0.0, propagate_nan=tl.PropagateNan.ALL)
    cancels = row_mask & (uncorrelated > most * (variance + eps))
    tl.store(cancels_ptr + tl.program_id(0), tl.max(tl.where(cancels, 1.0, 0.0), axis=0))
    store_norm(mean, variance, scale_ptr, shift_ptr, vectors_ptr, moments_ptr, rows, M, eps, K)


@triton.jit(do_not_specialize=["M"])
def expand_backward_kernel(
    gx_ptr,
    w_ptr,
    product_ptr,
    input_mean_ptr,
    vectors_ptr,
    total_ptr,
    dw_ptr,
    dgamma_ptr,
    aw_ptr,
    bw_ptr,
    constant_ptr,
    M,
    K: tl.constexpr,
    C: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """gx, w, product = w covariance [K, C]; input_mean [C]; vectors [4, K]; total [K]. The results are those of
    ``reference.expand_backward``, and ``b w [K, C]`` and ``c - b mean [K]``, which are still to be multiplied by w.
    """
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    row_mask = rows < K
    gxw = tl.zeros((BM,), tl.float32)
    wm = tl.zeros((BM,), tl.float32)
    for first in range(0, C, BN):
        columns = first + tl.arange(0, BN)
        mask = row_mask[:, None] & (columns < C)[None, :]
        offsets = rows[:, None] * C + columns[None, :]
        w = tl.load(w_ptr + offsets, mask=mask, other=0.0)
        gxw += tl.sum(w * tl.load(gx_ptr + offsets, mask=mask, other=0.0), axis=1)
        wm += tl.sum(w * tl.load(input_mean_ptr + columns, mask=columns < C, other=0.0)[None, :], axis=1)

    mean = tl.load(vectors_ptr + rows, mask=row_mask, other=0.0)
    rstd = tl.load(vectors_ptr + K + rows, mask=row_mask, other=0.0)
    a = tl.load(vectors_ptr + 2 * K + rows, mask=row_mask, other=0.0)
    total = tl.load(total_ptr + rows, mask=row_mask, other=0.0)
    sum_of_products = gxw - mean * total
    pixels = tl.cast(M, tl.float32)
    b = a * (rstd * rstd) * sum_of_products / pixels
    c = a * total / pixels
    tl.store(dgamma_ptr + rows, sum_of_products * rstd, mask=row_mask)
    tl.store(constant_ptr + rows, c - b * mean, mask=row_mask)

    for first in range(0, C, BN):
        columns = first + tl.arange(0, BN)
        mask = row_mask[:, None] & (columns < C)[None, :]
        offsets = rows[:, None] * C + columns[None, :]
        w = tl.load(w_ptr + offsets, mask=mask, other=0.0)
        gx = tl.load(gx_ptr + offsets, mask=mask, other=0.0)
        product = tl.load(product_ptr + offsets, mask=mask, other=0.0)
        input_mean = tl.load(input_mean_ptr + columns, mask=columns < C, other=0.0)[None, :]
        centred = product + (wm - mean)[:, None] * input_mean
        dw = a[:, None] * gx - pixels * (b[:, None] * centred + c[:, None] * input_mean)
        tl.store(dw_ptr + offsets, dw, mask=mask)
        tl.store(aw_ptr + offsets, a[:, None] * w, mask=mask)
        tl.store(bw_ptr + offsets, b[:, None] * w, mask=mask)


def expand_statistics(
    w: Tensor, input_mean: Tensor, covariance: Tensor, norm: BatchNorm, count: int, target: str
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``reference_training.expand_statistics``."""
    vectors, moments, cancels = plan_expand_statistics(w, w @ covariance, input_mean, covariance, norm, count).run()
    return vectors, moments, cancels.any()


def plan_expand_statistics(
    w: Tensor, product: Tensor, input_mean: Tensor, covariance: Tensor, norm: BatchNorm, count: int
) -> Plan:
    """``product``: ``w covariance``. Of the flag, one number for each program."""
    k, c = w.shape
    grid, constants = _rows(k, c)
    vectors, moments = operands.allocate_floats(w, (4, k)), operands.allocate_floats(w, (2, k))
    cancels = operands.allocate_floats(w, grid)
    launch = Launch(
        expand_statistics_kernel,
        grid,
        (
            *map(operands.vector, (w, product, input_mean, covariance, *norm[:2])), vectors, moments, cancels,
            count, norm.eps, reference.MOST_CANCELLATION,
        ),
        constants,
    )  # fmt: skip
    return Plan((launch,), (vectors, moments, cancels))


def expand_backward(
    gx: Tensor,
    w: Tensor,
    input_mean: Tensor,
    covariance: Tensor,
    vectors: Tensor,
    total: Tensor,
    count: int,
    target: str,
) -> tuple[Tensor, ...]:
    """See ``reference_training.expand_backward``."""
    dw, dgamma, aw, bw, constant = plan_expand_backward(gx, w, w @ covariance, input_mean, vectors, total, count).run()
    transposed = w.t()
    return dw, dgamma, aw, torch.mm(transposed, bw), torch.mv(transposed, constant)


def plan_expand_backward(
    gx: Tensor, w: Tensor, product: Tensor, input_mean: Tensor, vectors: Tensor, total: Tensor, count: int
) -> Plan:
    k, c = w.shape
    grid, constants = _rows(k, c)
    results = [operands.allocate_floats(w, shape) for shape in ((k, c, 1, 1), (k,), (k, c), (k, c), (k,))]
    inputs = map(operands.vector, (gx, w, product, input_mean, vectors, total))
    launch = Launch(expand_backward_kernel, grid, (*inputs, *results, count), constants)
    return Plan((launch,), tuple(results))


def _rows(k: int, c: int) -> tuple[tuple[int], dict[str, int]]:
    """The grid over rows of a matrix ``[k, c]``, and the constants."""
    bn = min(_LARGEST_BLOCK, tiles.power_of_two(c))
    bm = _ELEMENTS // bn
    return (ceil_div(k, bm),), {"K": k, "C": c, "BM": bm, "BN": bn, "num_warps": _WARPS}
