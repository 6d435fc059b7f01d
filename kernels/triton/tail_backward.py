"""Training's backward passes that only move data: through a block's tail, through the stem's, through batch norm.

Where batch norm's sums are wanted, each program walks over its share of the pixels, adds BM of them at a time to BM
rows of partial sums, and leaves the sum of these rows in the workspace that ``gradient_epilogue.py`` describes.
"""

from typing import Optional

from torch import Tensor

import triton
import triton.language as tl
from resnet_fast.kernels.contract import Affine, Gradient
from resnet_fast.kernels.triton import operands, tiles
from resnet_fast.kernels.triton.gradient_epilogue import centred, passes, plan_sum_rows
from resnet_fast.kernels.triton.plan import Launch, Plan, ceil_div
from resnet_fast.kernels.triton.prologue import activate, load_affine

_WAVES = 2  # programs to aim at, for every multiprocessor, where their number is free


@triton.jit(do_not_specialize=["M", "share"])
def tail_backward_kernel(
    grad_ptr,
    out_ptr,
    y_ptr,
    mean_ptr,
    residual_ptr,
    residual_mean_ptr,
    g_ptr,
    sums_ptr,
    M,
    share,
    C: tl.constexpr,
    RELU: tl.constexpr,
    PRODUCT: tl.constexpr,
    RESIDUAL_PRODUCT: tl.constexpr,
    INDEX64: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """``g = grad`` where ReLU's result ``out`` is positive, and the sums of g, g * (y - mean) and the residual's.

    All images [M, C]. sums [1 to 3, programs, C]: of those that are asked for, in this order. share: pixels of one
    program, a multiple of BM. Without RELU ``grad`` is ``g`` already and is only summed.
    """
    program = tl.program_id(0)
    channels = tl.program_id(1) * BN + tl.arange(0, BN)
    channel_mask = channels < C
    total = tl.zeros((BM, BN), tl.float32)
    product = tl.zeros((BM, BN), tl.float32)
    residual_product = tl.zeros((BM, BN), tl.float32)
    for first in range(program * share, tl.minimum((program + 1) * share, M), BM):
        rows = first + tl.arange(0, BM)
        mask = (rows < M)[:, None] & channel_mask[None, :]
        if INDEX64:
            rows = rows.to(tl.int64)
        offsets = (rows * C)[:, None] + channels[None, :]
        g = tl.load(grad_ptr + offsets, mask=mask, other=0.0)
        if RELU:
            out = tl.load(out_ptr + offsets, mask=mask, other=0.0)
            g = tl.where(passes(out, out_ptr, out_ptr, channels, C, False, False), g, tl.zeros((1, 1), g.dtype))
            tl.store(g_ptr + offsets, g, mask=mask)
        g = g.to(tl.float32)
        total += g
        if PRODUCT:
            y = tl.load(y_ptr + offsets, mask=mask, other=0.0)
            product += g * centred(y, mean_ptr, channels, C, C % BN != 0)
        if RESIDUAL_PRODUCT:
            residual = tl.load(residual_ptr + offsets, mask=mask, other=0.0)
            residual_product += g * centred(residual, residual_mean_ptr, channels, C, C % BN != 0)

    layer = tl.num_programs(0) * C
    sums_ptr += program * C + channels
    tl.store(sums_ptr, tl.sum(total, axis=0), mask=channel_mask)
    if PRODUCT:
        sums_ptr += layer
        tl.store(sums_ptr, tl.sum(product, axis=0), mask=channel_mask)
    if RESIDUAL_PRODUCT:
        sums_ptr += layer
        tl.store(sums_ptr, tl.sum(residual_product, axis=0), mask=channel_mask)


@triton.jit(do_not_specialize=["N", "H", "W", "P", "Q"])
def pool_winner_kernel(
    y_ptr,
    scale_ptr,
    shift_ptr,
    winner_ptr,
    N,
    H,
    W,
    P,
    Q,
    C: tl.constexpr,
    INDEX64: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Which of the 3x3 taps won the max-pool (stride 2, padding 1) of relu(y * scale + shift).

    y [N, H, W, C]; scale, shift [C]; winner [N, P, Q, C] uint8, 3 * r + s of tap (r, s). The first of
    equals in reading order; a NaN wins over all before it. Both as in PyTorch.
    """
    pixels = tl.program_id(0) * BM + tl.arange(0, BM)
    channels = tl.program_id(1) * BN + tl.arange(0, BN)
    pixel_mask = pixels < N * P * Q
    image = pixels // (P * Q)
    top = (pixels // Q) % P * 2 - 1
    left = pixels % Q * 2 - 1
    if INDEX64:
        image = image.to(tl.int64)
        pixels = pixels.to(tl.int64)
    window = ((image * H + top) * W + left) * C
    scale, shift = load_affine(scale_ptr, shift_ptr, channels, C, C % BN != 0)

    best = tl.full((BM, BN), float("-inf"), tl.float32)
    winner = tl.zeros((BM, BN), tl.int32)
    for i in tl.static_range(3):
        for j in tl.static_range(3):
            h = top + i
            w = left + j
            inside = (pixel_mask & (h >= 0) & (h < H) & (w >= 0) & (w < W))[:, None] & (channels < C)[None, :]
            offsets = (window + (i * W + j) * C)[:, None] + channels[None, :]
            y = tl.load(y_ptr + offsets, mask=inside, other=0.0)
            value = activate(y, scale, shift, pixel_mask, False).to(tl.float32)
            better = inside & ((value > best) | (value != value))
            best = tl.where(better, value, best)
            winner = tl.where(better, 3 * i + j, winner)
    mask = pixel_mask[:, None] & (channels < C)[None, :]
    tl.store(winner_ptr + (pixels * C)[:, None] + channels[None, :], winner.to(tl.uint8), mask=mask)


@triton.jit(do_not_specialize=["N", "H", "W", "P", "Q", "share"])
def pool_backward_kernel(
    grad_ptr,
    winner_ptr,
    y_ptr,
    scale_ptr,
    shift_ptr,
    mean_ptr,
    g_ptr,
    sums_ptr,
    N,
    H,
    W,
    P,
    Q,
    share,
    C: tl.constexpr,
    PRODUCT: tl.constexpr,
    INDEX64: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Back through max-pool and ReLU: each pixel of y gathers the gradients of the windows that it won.

    A pixel lies in up to two windows along each side: those of the pooled pixel at half its place, rounded up, and of
    the one before, if its own place is odd. y, g [N, H, W, C]; grad, winner [N, P, Q, C]; sums [1 or 2, programs, C].
    """
    program = tl.program_id(0)
    channels = tl.program_id(1) * BN + tl.arange(0, BN)
    channel_mask = channels < C
    total = tl.zeros((BM, BN), tl.float32)
    product = tl.zeros((BM, BN), tl.float32)
    for first in range(program * share, tl.minimum((program + 1) * share, N * H * W), BM):
        pixels = first + tl.arange(0, BM)
        pixel_mask = pixels < N * H * W
        image = pixels // (H * W)
        h = pixels // W % H
        w = pixels % W
        if INDEX64:
            image = image.to(tl.int64)
            pixels = pixels.to(tl.int64)
        g = tl.zeros((BM, BN), tl.float32)
        for i in tl.static_range(2):
            for j in tl.static_range(2):
                p = (h + 1) // 2 - 1 + i
                q = (w + 1) // 2 - 1 + j
                r = h + 1 - 2 * p
                s = w + 1 - 2 * q
                inside = pixel_mask & (p >= 0) & (p < P) & (q >= 0) & (q < Q) & (r < 3) & (s < 3)
                mask = inside[:, None] & channel_mask[None, :]
                offsets = (((image * P + p) * Q + q) * C)[:, None] + channels[None, :]
                winner = tl.load(winner_ptr + offsets, mask=mask, other=255).to(tl.int32)
                grad = tl.load(grad_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
                g += tl.where(winner == (3 * r + s)[:, None], grad, 0.0)
        mask = pixel_mask[:, None] & channel_mask[None, :]
        offsets = (pixels * C)[:, None] + channels[None, :]
        y = tl.load(y_ptr + offsets, mask=mask, other=0.0)
        g = tl.where(passes(y, scale_ptr, shift_ptr, channels, C, C % BN != 0, True), g, 0.0)
        stored = g.to(g_ptr.dtype.element_ty)
        tl.store(g_ptr + offsets, stored, mask=mask)
        g = tl.where(mask, stored.to(tl.float32), 0.0)
        total += g
        if PRODUCT:
            product += g * centred(y, mean_ptr, channels, C, C % BN != 0)

    sums_ptr += program * C + channels
    tl.store(sums_ptr, tl.sum(total, axis=0), mask=channel_mask)
    if PRODUCT:
        tl.store(sums_ptr + tl.num_programs(0) * C, tl.sum(product, axis=0), mask=channel_mask)


@triton.jit(do_not_specialize=["M", "COUNT"])
def bn_backward_kernel(
    g_ptr,
    y_ptr,
    vectors_ptr,
    total_ptr,
    product_ptr,
    dy_ptr,
    dgamma_ptr,
    M,
    COUNT,
    C: tl.constexpr,
    INDEX64: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """``dy = a * g - b * (y - mean) - c`` and dgamma, as ``reference/training.py`` has them.

    g, y, dy [M, C], dy may be g. vectors [4, C]: mean, rstd, a and another. total, product, dgamma [C]. COUNT: values a
    channel that the sums are of.
    """
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    channels = tl.program_id(1) * BN + tl.arange(0, BN)
    channel_mask = channels < C
    mask = (rows < M)[:, None] & channel_mask[None, :]
    if INDEX64:
        rows = rows.to(tl.int64)
    offsets = (rows * C)[:, None] + channels[None, :]
    rstd = tl.load(vectors_ptr + C + channels, mask=channel_mask, other=0.0)
    a = tl.load(vectors_ptr + 2 * C + channels, mask=channel_mask, other=0.0)
    product = tl.load(product_ptr + channels, mask=channel_mask, other=0.0)
    count = tl.cast(COUNT, tl.float32)
    b = a * (rstd * rstd) * product / count
    c = a * tl.load(total_ptr + channels, mask=channel_mask, other=0.0) / count
    if tl.program_id(0) == 0:
        tl.store(dgamma_ptr + channels, product * rstd, mask=channel_mask)
    g = tl.load(g_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    y = tl.load(y_ptr + offsets, mask=mask, other=0.0)
    dy = a[None, :] * g - b[None, :] * centred(y, vectors_ptr, channels, C, C % BN != 0) - c[None, :]
    tl.store(dy_ptr + offsets, dy.to(dy_ptr.dtype.element_ty), mask=mask)


def plan_tail_backward(
    grad: Tensor,
    out: Optional[Tensor],
    y: Optional[Tensor],
    mean: Optional[Tensor],
    residual: Optional[Tensor],
    residual_mean: Optional[Tensor],
    target: str,
) -> Plan:
    grad = operands.nhwc(grad)
    g = grad if out is None else operands.allocate(grad, tuple(grad.shape))
    n, c, h, w = grad.shape
    grid, share, constants = _shares(target, n * h * w, c)
    quantities = 1 + (y is not None) + (residual is not None)
    sums = operands.allocate_floats(grad, (quantities, grid[0], c))
    launch = Launch(
        tail_backward_kernel,
        grid,
        (
            grad, operands.nhwc(out), operands.nhwc(y), operands.vector(mean), operands.nhwc(residual),
            operands.vector(residual_mean), g, sums, n * h * w, share,
        ),
        {
            "C": c,
            "RELU": out is not None,
            "PRODUCT": y is not None,
            "RESIDUAL_PRODUCT": residual is not None,
            "INDEX64": operands.index64(grad, grad),
            **constants,
        },
    )  # fmt: skip
    total = plan_sum_rows(sums, target)
    summed, *rest = total.result.unbind(0)
    gradient = Gradient(g, summed, None if y is None else rest.pop(0))
    return Plan((launch, *total.launches), (gradient, None if residual is None else rest.pop(0)))


def plan_tail_pool_backward(grad: Tensor, y: Tensor, affine: Affine, mean: Optional[Tensor], target: str) -> Plan:
    grad, y = operands.nhwc(grad), operands.nhwc(y)
    scale, shift = operands.vectors(affine)
    n, c, h, w = y.shape
    p, q = grad.shape[2:]
    g = operands.allocate(y, (n, c, h, w))
    winner = operands.allocate_bytes(y, (n, p, q, c))
    bm, bn, warps = tiles.load(target)["max_pool"]
    find = Launch(
        pool_winner_kernel,
        (ceil_div(n * p * q, bm), ceil_div(c, bn)),
        (y, scale, shift, winner, n, h, w, p, q),
        {"C": c, "INDEX64": operands.index64(y, y), "BM": bm, "BN": bn, "num_warps": warps},
    )
    grid, share, constants = _shares(target, n * h * w, c)
    sums = operands.allocate_floats(y, (1 if mean is None else 2, grid[0], c))
    gather = Launch(
        pool_backward_kernel,
        grid,
        (grad, winner, y, scale, shift, operands.vector(mean), g, sums, n, h, w, p, q, share),
        {"C": c, "PRODUCT": mean is not None, "INDEX64": operands.index64(y, y), **constants},
    )
    total = plan_sum_rows(sums, target)
    return Plan((find, gather, *total.launches), Gradient(g, *total.result))


def plan_bn_backward(
    g: Tensor, y: Tensor, vectors: Tensor, total: Tensor, product: Tensor, count: int, overwrite: bool, target: str
) -> Plan:
    g = operands.nhwc(g)
    n, channels, h, w = g.shape
    dgamma = operands.allocate_floats(g, (channels,))
    dy = g if overwrite else operands.allocate(g, (n, channels, h, w))
    bm, bn, warps = tiles.load(target)["pointwise"]
    launch = Launch(
        bn_backward_kernel,
        (ceil_div(n * h * w, bm), ceil_div(channels, bn)),
        (g, operands.nhwc(y), *map(operands.vector, (vectors, total, product)), dy, dgamma, n * h * w, count),
        {"C": channels, "INDEX64": operands.index64(g, g), "BM": bm, "BN": bn, "num_warps": warps},
    )
    return Plan((launch,), (dy, dgamma))


def _shares(target: str, pixels: int, channels: int) -> tuple[tuple[int, int], int, dict[str, int]]:
    """For a kernel that sums over pixels: the grid, the pixels of each program, the constants."""
    data = tiles.load(target)
    bm, bn, warps = data["pointwise"]
    columns = ceil_div(channels, bn)
    most = ceil_div(_WAVES * data["multiprocessors"], columns)
    share = ceil_div(ceil_div(pixels, most), bm) * bm
    return (ceil_div(pixels, share), columns), share, {"BM": bm, "BN": bn, "num_warps": warps}
