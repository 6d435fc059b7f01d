"""The forward primitives of training (``reference/training.py``), from tensors to kernel launches.

As in forward.py, a ``plan_*`` function starts nothing. Where one launch needs what another made, it returns them in
their order; the last one's output are the statistics.
"""

from collections.abc import Iterable
from typing import Optional

import torch
from torch import Tensor

from resnet_fast.kernels.contract import Affine, Geometry, Pair
from resnet_fast.kernels.reference import training as reference_training
from resnet_fast.kernels.triton import forward, tiles
from resnet_fast.kernels.triton.forward import Plan
from resnet_fast.kernels.triton.gram import covariance_kernel, gram_kernel
from resnet_fast.kernels.triton.statistics import combine_kernel


def conv_statistics(
    x: Tensor, prologue: Optional[Affine], weight: Tensor, geometry: Geometry
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``reference_training.conv_statistics``."""
    if x.numel() == 0 or weight.numel() == 0:
        return reference_training.conv_statistics(x, prologue, weight, geometry)
    plans = plan_conv_statistics(x, prologue, weight, geometry, forward.architecture(x.device))
    y, *_, statistics = (plan.run() for plan in plans)
    mean, variance = statistics.view(2, -1)
    return y, mean, variance


def gram(x: Tensor, prologue: Optional[Affine], stride: Pair) -> tuple[Tensor, Tensor]:
    """See ``reference_training.gram``."""
    if x.numel() == 0:
        return reference_training.gram(x, prologue, stride)
    for plan in plan_gram(x, prologue, stride, forward.architecture(x.device)):
        statistics = plan.run()
    return statistics[0], statistics[1:]


def conv_affine(
    x: Tensor,
    prologue: Optional[Affine],
    weight: Tensor,
    affine: Affine,
    residual: Optional[Tensor],
    geometry: Geometry,
    relu: bool,
) -> Tensor:
    """See ``reference_training.conv_affine``."""
    if x.numel() == 0 or weight.numel() == 0:
        return reference_training.conv_affine(x, prologue, weight, affine, residual, geometry, relu)
    target = forward.architecture(x.device)
    return forward.plan_conv(x, weight, *affine, residual, *geometry, relu, target, prologue).run()


def tail(
    y: Tensor, affine: Affine, residual: Optional[Tensor], residual_affine: Optional[Affine], relu: bool
) -> Tensor:
    """See ``reference_training.tail``."""
    if y.numel() == 0:
        return reference_training.tail(y, affine, residual, residual_affine, relu)
    return forward.plan_tail(y, affine, residual, residual_affine, relu, forward.architecture(y.device)).run()


def tail_pool(y: Tensor, affine: Affine) -> Tensor:
    """See ``reference_training.tail_pool``."""
    if y.numel() == 0:
        return reference_training.tail_pool(y, affine)
    return forward.plan_max_pool(y, forward.architecture(y.device), affine).run()


def plan_conv_statistics(
    x: Tensor, prologue: Optional[Affine], weight: Tensor, geometry: Geometry, target: str
) -> list[Plan]:
    """The convolution, then rounds of combining its tiles' statistics into ``[1, 2, K]``: mean and variance."""
    conv = forward.plan_conv(x, weight, None, None, None, *geometry, False, target, prologue)
    rows = conv.output.numel() // conv.output.shape[1]
    assert conv.workspace is not None
    return [conv, *_plan_combine(conv.workspace, conv.constants["BM"], rows, target)]


def _plan_combine(partials: Tensor, each: int, rows: int, target: str) -> Iterable[Plan]:
    """``partials [n, 2, K]`` of ``each`` rows, ``rows`` in all."""
    bm, bn, warps = tiles.load(target)["combine"]
    while True:
        count, _, k = partials.shape
        combined = forward.allocate_floats(partials, (forward.ceil_div(count, bm), 2, k))
        yield Plan(
            combine_kernel,
            (combined.shape[0], forward.ceil_div(k, bn)),
            (partials, combined, count, each, rows),
            {"K": k, "BM": bm, "BN": bn, "num_warps": warps},
            combined,
        )
        if combined.shape[0] == 1:
            return
        partials, each = combined, each * bm


def plan_gram(x: Tensor, prologue: Optional[Affine], stride: Pair, target: str) -> list[Plan]:
    """Products of chunks of pixels, then their sum as ``[1 + C, C]``: mean and covariance."""
    data = tiles.load(target)
    bn, bp, warps, stages = data["gram"]["ieee" if x.dtype == torch.float32 else "half"]
    x = forward.nhwc(x)
    n, c, h, w = x.shape
    p, q = (h - 1) // stride[0] + 1, (w - 1) // stride[1] + 1
    rows = n * p * q
    bn = min(bn, max(16, tiles.power_of_two(c)))
    blocks = forward.ceil_div(c, bn)
    # Two programs for every multiprocessor; a chunk is a whole number of steps of BP pixels.
    chunks = max(1, 2 * data["multiprocessors"] // (blocks * (blocks + 1) // 2))
    chunk = forward.ceil_div(forward.ceil_div(rows, chunks), bp) * bp
    chunks = forward.ceil_div(rows, chunk)
    scale, shift = (None, None) if prologue is None else map(forward.vector, prologue)
    products = forward.allocate_floats(x, (chunks, c, c))
    sums = forward.allocate_floats(x, (chunks, c))
    pivot = forward.allocate_floats(x, (c,)) if x.dtype == torch.float32 else None
    statistics = forward.allocate_floats(x, (1 + c, c))
    bm, columns, reduce_warps = data["covariance"]
    return [
        Plan(
            gram_kernel,
            (blocks**2, chunks),
            (x, scale, shift, products, sums, pivot, rows, chunk, h, w, p, q),
            {
                "C": c,
                "STRIDE_H": stride[0],
                "STRIDE_W": stride[1],
                "PROLOGUE": prologue is not None,
                "INDEX64": forward.index64(x, x),
                "BN": bn,
                "BP": bp,
                "num_warps": warps,
                "num_stages": stages,
            },
            products,
            sums,
        ),
        Plan(
            covariance_kernel,
            (forward.ceil_div(c, bm), forward.ceil_div(c, columns)),
            (products, sums, pivot, statistics, rows, chunks),
            {"C": c, "PIVOT": pivot is not None, "BM": bm, "BN": columns, "num_warps": reduce_warps},
            statistics,
        ),
    ]
