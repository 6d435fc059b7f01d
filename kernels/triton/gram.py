"""Mean and covariance of the channels of an activated image: ``E[a]`` and ``E[a a^T] - E[a] E[a]^T``.

``E[a a^T]`` is a matrix product of a tall image with itself, ``[C, M] @ [M, C]``. Its result is small and its sum long,
so the rows are split over programs: each leaves the products of its rows in a workspace, and ``covariance_kernel`` adds
these up in their order. The matrix is symmetric; only blocks on and above the diagonal are computed.

The difference cancels where a mean is large beside the deviations. So ``a`` in float32 is first shifted by a ``pivot``
that is near the mean, which changes no covariance: that of its first pixels. Products of 16-bit numbers are exact, and
shifting would round. Sums over one program's rows are float32, and from there on everything is float64.
"""

from typing import Optional

import torch
from torch import Tensor

import triton
import triton.language as tl
from resnet_fast.kernels.contract import Affine, Pair
from resnet_fast.kernels.triton import operands, tiles
from resnet_fast.kernels.triton.plan import Launch, Plan, ceil_div
from resnet_fast.kernels.triton.prologue import activate, load_affine


@triton.jit
def _load_pixels(
    x_ptr,
    first,
    last,
    channels,
    scale,
    shift,
    H,
    W,
    P,
    Q,
    C: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PROLOGUE: tl.constexpr,
    INDEX64: tl.constexpr,
    BN: tl.constexpr,
    BP: tl.constexpr,
):
    """``a`` of BP pixels from ``first`` on, BN channels; zero where there is no such channel, nor pixel before last."""
    pixels = first + tl.arange(0, BP)
    inside = pixels < last
    if STRIDE_H != 1 or STRIDE_W != 1:
        pixels = ((pixels // (P * Q)) * H + pixels // Q % P * STRIDE_H) * W + pixels % Q * STRIDE_W
    if INDEX64:
        pixels = pixels.to(tl.int64)
    mask = inside[:, None]
    if C % BN != 0:
        mask = mask & (channels < C)[None, :]
    x = tl.load(x_ptr + (pixels * C)[:, None] + channels[None, :], mask=mask, other=0.0)
    if PROLOGUE:
        x = activate(x, scale, shift, inside, True)
    return x


@triton.jit
def _gram_block(
    x_ptr,
    scale_ptr,
    shift_ptr,
    products_ptr,
    sums_ptr,
    pivot_ptr,
    first,
    last,
    rows,
    columns,
    M,
    H,
    W,
    P,
    Q,
    C: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PROLOGUE: tl.constexpr,
    DIAGONAL: tl.constexpr,
    INDEX64: tl.constexpr,
    BN: tl.constexpr,
    BP: tl.constexpr,
):
    """Sums over the pixels from ``first`` to ``last`` of the products of channels ``rows`` with channels ``columns``.

    On the diagonal, where they are the same, also the sums of the channels.
    """
    PIVOT: tl.constexpr = x_ptr.dtype.element_ty == tl.float32
    row_scale, row_shift, column_scale, column_shift = (0.0, 0.0, 0.0, 0.0)
    if PROLOGUE:
        row_scale, row_shift = load_affine(scale_ptr, shift_ptr, rows, C, C % BN != 0)
        column_scale, column_shift = load_affine(scale_ptr, shift_ptr, columns, C, C % BN != 0)
    if PIVOT:
        count = tl.minimum(M, BP).to(tl.float32)
        a = _load_pixels(
            x_ptr, 0, M, columns, column_scale, column_shift, H, W, P, Q,
            C, STRIDE_H, STRIDE_W, PROLOGUE, INDEX64, BN, BP,
        )  # fmt: skip
        column_pivot = tl.sum(a, axis=0) / count
        if DIAGONAL:
            tl.store(pivot_ptr + columns, column_pivot, mask=columns < C)
        else:
            b = _load_pixels(
                x_ptr, 0, M, rows, row_scale, row_shift, H, W, P, Q,
                C, STRIDE_H, STRIDE_W, PROLOGUE, INDEX64, BN, BP,
            )  # fmt: skip
            row_pivot = tl.sum(b, axis=0) / count

    products = tl.zeros((BN, BN), tl.float32)
    total = tl.zeros((BP, BN), tl.float32)
    for start in range(first, last, BP):
        a = _load_pixels(
            x_ptr, start, last, columns, column_scale, column_shift, H, W, P, Q,
            C, STRIDE_H, STRIDE_W, PROLOGUE, INDEX64, BN, BP,
        )  # fmt: skip
        inside = (start + tl.arange(0, BP) < last)[:, None]
        if PIVOT:
            a = tl.where(inside, a - column_pivot[None, :], 0.0)
        if DIAGONAL:
            total += a.to(tl.float32)
            products = tl.dot(tl.trans(a), a, products, input_precision="ieee")
        else:
            b = _load_pixels(
                x_ptr, start, last, rows, row_scale, row_shift, H, W, P, Q,
                C, STRIDE_H, STRIDE_W, PROLOGUE, INDEX64, BN, BP,
            )  # fmt: skip
            if PIVOT:
                b = tl.where(inside, b - row_pivot[None, :], 0.0)
            products = tl.dot(tl.trans(b), a, products, input_precision="ieee")
    mask = (rows < C)[:, None] & (columns < C)[None, :]
    tl.store(products_ptr + rows[:, None] * C + columns[None, :], products, mask=mask)
    if DIAGONAL:
        tl.store(sums_ptr + columns, tl.sum(total, axis=0), mask=columns < C)


@triton.jit(do_not_specialize=["M", "CHUNK", "H", "W", "P", "Q"])
def gram_kernel(
    x_ptr,
    scale_ptr,
    shift_ptr,
    products_ptr,
    sums_ptr,
    pivot_ptr,
    M,
    CHUNK,
    H,
    W,
    P,
    Q,
    C: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PROLOGUE: tl.constexpr,
    INDEX64: tl.constexpr,
    BN: tl.constexpr,
    BP: tl.constexpr,
):
    """x [N, H, W, C], of which every STRIDE-th pixel counts, M = N * P * Q in all; scale, shift [C] float32 or None.

    Program (i * blocks + j, n) makes block (i, j), for i <= j, of products [n, C, C] from the n-th CHUNK of pixels, and
    block j of sums [n, C] if i is j. Blocks are BN channels wide. The rest of ``products`` is not written. pivot [C] is
    written if x is float32 (by the programs of every chunk, the same numbers), and otherwise None.
    """
    BLOCKS: tl.constexpr = (C + BN - 1) // BN
    i = tl.program_id(0) // BLOCKS
    j = tl.program_id(0) % BLOCKS
    chunk = tl.program_id(1)
    rows = i * BN + tl.arange(0, BN)
    columns = j * BN + tl.arange(0, BN)
    first = chunk * CHUNK
    last = tl.minimum(first + CHUNK, M)
    products_ptr += chunk.to(tl.int64) * (C * C)
    sums_ptr += chunk * C
    if i == j:
        _gram_block(
            x_ptr, scale_ptr, shift_ptr, products_ptr, sums_ptr, pivot_ptr, first, last, rows, columns, M,
            H, W, P, Q, C, STRIDE_H, STRIDE_W, PROLOGUE, True, INDEX64, BN, BP,
        )  # fmt: skip
    if BLOCKS > 1:  # known when compiling: one block is one loop  # noqa: SIM102
        if i < j:
            _gram_block(
                x_ptr, scale_ptr, shift_ptr, products_ptr, sums_ptr, pivot_ptr, first, last, rows, columns, M,
                H, W, P, Q, C, STRIDE_H, STRIDE_W, PROLOGUE, False, INDEX64, BN, BP,
            )  # fmt: skip


@triton.jit(do_not_specialize=["M", "CHUNKS"])
def covariance_kernel(
    products_ptr,
    sums_ptr,
    pivot_ptr,
    out_ptr,
    M,
    CHUNKS,
    C: tl.constexpr,
    PIVOT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """products [CHUNKS, C, C], sums [CHUNKS, C], pivot [C] of ``gram_kernel`` -> out [1 + C, C]: mean and covariance.

    Each program makes BM x BN of the covariance, on and above the diagonal, and its mirror image.
    """
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    if tl.program_id(0) * BM >= tl.program_id(1) * BN + BN:
        return  # all of it is below the diagonal
    row_mask = rows < C
    column_mask = columns < C
    mask = row_mask[:, None] & column_mask[None, :]
    products = tl.zeros((BM, BN), tl.float64)
    row_sums = tl.zeros((BM,), tl.float64)
    column_sums = tl.zeros((BN,), tl.float64)
    at = products_ptr + rows[:, None] * C + columns[None, :]
    # The loads of several chunks are under way at once.
    for _ in tl.range(0, CHUNKS, loop_unroll_factor=8):
        products += tl.load(at, mask=mask, other=0.0).to(tl.float64)
        row_sums += tl.load(sums_ptr + rows, mask=row_mask, other=0.0).to(tl.float64)
        column_sums += tl.load(sums_ptr + columns, mask=column_mask, other=0.0).to(tl.float64)
        at += C * C
        sums_ptr += C
    column_mean = column_sums / M
    covariance = products / M - (row_sums / M)[:, None] * column_mean[None, :]
    if tl.program_id(0) == 0:
        if PIVOT:
            column_mean += tl.load(pivot_ptr + columns, mask=column_mask, other=0.0)
        tl.store(out_ptr + columns, column_mean.to(tl.float32), mask=column_mask)
    out_ptr += C
    covariance = covariance.to(tl.float32)
    upper = mask & (rows[:, None] <= columns[None, :])
    tl.store(out_ptr + rows[:, None] * C + columns[None, :], covariance, mask=upper)
    tl.store(out_ptr + columns[None, :] * C + rows[:, None], covariance, mask=upper)


def plan_gram(x: Tensor, prologue: Optional[Affine], stride: Pair, target: str) -> Plan:
    """Products of chunks of pixels, then their sum: mean ``[C]`` and covariance ``[C, C]``."""
    data = tiles.load(target)
    bn, bp, warps, stages = data["gram"]["ieee" if x.dtype == torch.float32 else "half"]
    x = operands.nhwc(x)
    n, c, h, w = x.shape
    p, q = (h - 1) // stride[0] + 1, (w - 1) // stride[1] + 1
    rows = n * p * q
    bn = min(bn, max(16, tiles.power_of_two(c)))
    blocks = ceil_div(c, bn)
    # Two programs for every multiprocessor; a chunk is a whole number of steps of BP pixels.
    chunks = max(1, 2 * data["multiprocessors"] // (blocks * (blocks + 1) // 2))
    chunk = ceil_div(ceil_div(rows, chunks), bp) * bp
    chunks = ceil_div(rows, chunk)
    products = operands.allocate_floats(x, (chunks, c, c))
    sums = operands.allocate_floats(x, (chunks, c))
    pivot = operands.allocate_floats(x, (c,)) if x.dtype == torch.float32 else None
    statistics = operands.allocate_floats(x, (1 + c, c))
    multiply = Launch(
        gram_kernel,
        (blocks**2, chunks),
        (x, *operands.vectors(prologue), products, sums, pivot, rows, chunk, h, w, p, q),
        {
            "C": c,
            "STRIDE_H": stride[0],
            "STRIDE_W": stride[1],
            "PROLOGUE": prologue is not None,
            "INDEX64": operands.index64(x, x),
            "BN": bn,
            "BP": bp,
            "num_warps": warps,
            "num_stages": stages,
        },
    )
    bm, bn, warps = data["covariance"]
    add = Launch(
        covariance_kernel,
        (ceil_div(c, bm), ceil_div(c, bn)),
        (products, sums, pivot, statistics, rows, chunks),
        {"C": c, "PIVOT": pivot is not None, "BM": bm, "BN": bn, "num_warps": warps},
    )
    return Plan((multiply, add), (statistics[0], statistics[1:]))
