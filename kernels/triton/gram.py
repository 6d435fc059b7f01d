"""Mean and covariance of the channels of an activated image: ``E[a]`` and ``E[a a^T] - E[a] E[a]^T``.

``E[a a^T]`` is a matrix product of a tall image with itself, ``[C, M] @ [M, C]``. Its result is small and its sum long,
so the rows are split over programs: each leaves the products of its rows in a workspace, and ``covariance_kernel`` adds
these up in their order. The matrix is symmetric; only blocks on and above the diagonal are computed.

The difference cancels where a mean is large beside the deviations. So products of a program's rows are exact (16 bits
times 16 bits) or float32, sums over one program's rows float32, and from there on everything is float64.
"""

import triton
import triton.language as tl
from resnet_fast.kernels.triton.prologue import activate, load_affine


@triton.jit
def _load_pixels(x_tile, channels, mask, scale, shift, C: tl.constexpr, BN: tl.constexpr, PROLOGUE: tl.constexpr):
    """``a`` of some pixels and channels [BP, BN]; zero where there is no such pixel or channel."""
    if C % BN != 0:
        x = tl.load(x_tile + channels[None, :], mask=mask[:, None] & (channels < C)[None, :], other=0.0)
    else:
        x = tl.load(x_tile + channels[None, :], mask=mask[:, None], other=0.0)
    return activate(x, scale, shift, mask, True) if PROLOGUE else x


@triton.jit
def _gram_block(
    x_ptr,
    scale_ptr,
    shift_ptr,
    products_ptr,
    sums_ptr,
    first,
    last,
    rows,
    columns,
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
    """Sums over the pixels ``first`` to ``last`` of the products of channels ``rows`` with ``columns``.

    On the diagonal, where they are the same, also the sums of the channels.
    """
    row_scale, row_shift, column_scale, column_shift = (0.0, 0.0, 0.0, 0.0)
    if PROLOGUE:
        row_scale, row_shift = load_affine(scale_ptr, shift_ptr, rows, C, C % BN != 0)
        column_scale, column_shift = load_affine(scale_ptr, shift_ptr, columns, C, C % BN != 0)
    products = tl.zeros((BN, BN), tl.float32)
    total = tl.zeros((BP, BN), tl.float32)
    for start in range(first, last, BP):
        pixels = start + tl.arange(0, BP)
        mask = pixels < last
        if STRIDE_H != 1 or STRIDE_W != 1:
            pixels = ((pixels // (P * Q)) * H + pixels // Q % P * STRIDE_H) * W + pixels % Q * STRIDE_W
        if INDEX64:
            pixels = pixels.to(tl.int64)
        x_tile = x_ptr + (pixels * C)[:, None]
        a = _load_pixels(x_tile, columns, mask, column_scale, column_shift, C, BN, PROLOGUE)
        if DIAGONAL:
            total += a.to(tl.float32)
            products = tl.dot(tl.trans(a), a, products, input_precision="ieee")
        else:
            b = _load_pixels(x_tile, rows, mask, row_scale, row_shift, C, BN, PROLOGUE)
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
    block j of sums [n, C] if i is j. Blocks are BN channels wide. The rest of ``products`` is not written.
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
            x_ptr, scale_ptr, shift_ptr, products_ptr, sums_ptr, first, last, rows, columns, H, W, P, Q,
            C, STRIDE_H, STRIDE_W, PROLOGUE, True, INDEX64, BN, BP,
        )  # fmt: skip
    if BLOCKS > 1:
        if i < j:
            _gram_block(
                x_ptr, scale_ptr, shift_ptr, products_ptr, sums_ptr, first, last, rows, columns, H, W, P, Q,
                C, STRIDE_H, STRIDE_W, PROLOGUE, False, INDEX64, BN, BP,
            )  # fmt: skip


@triton.jit(do_not_specialize=["M", "CHUNKS"])
def covariance_kernel(products_ptr, sums_ptr, out_ptr, M, CHUNKS, C: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """products [CHUNKS, C, C], of which only what is on or above the diagonal is read, and sums [CHUNKS, C], to
    out [1 + C, C]: the mean, and the covariance. Each program makes BM x BN of the covariance and its mirror image.
    """
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    row_mask = rows < C
    column_mask = columns < C
    upper = row_mask[:, None] & column_mask[None, :] & (rows[:, None] <= columns[None, :])
    products = tl.zeros((BM, BN), tl.float64)
    row_sums = tl.zeros((BM,), tl.float64)
    column_sums = tl.zeros((BN,), tl.float64)
    at = products_ptr + rows[:, None] * C + columns[None, :]
    # The loads of several chunks are under way at once.
    for _ in tl.range(0, CHUNKS, loop_unroll_factor=8):
        products += tl.load(at, mask=upper, other=0.0).to(tl.float64)
        row_sums += tl.load(sums_ptr + rows, mask=row_mask, other=0.0).to(tl.float64)
        column_sums += tl.load(sums_ptr + columns, mask=column_mask, other=0.0).to(tl.float64)
        at += C * C
        sums_ptr += C
    column_mean = column_sums / M
    covariance = products / M - (row_sums / M)[:, None] * column_mean[None, :]
    if tl.program_id(0) == 0:
        tl.store(out_ptr + columns, column_mean.to(tl.float32), mask=column_mask)
    out_ptr += C
    covariance = covariance.to(tl.float32)
    tl.store(out_ptr + rows[:, None] * C + columns[None, :], covariance, mask=upper)
    tl.store(out_ptr + columns[None, :] * C + rows[:, None], covariance, mask=upper)
