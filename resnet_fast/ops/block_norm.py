"""Batch norm by batch statistics in a block's passes: over this process, or over all of a process group."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from resnet_fast.kernels.contract import Affine
from resnet_fast.ops.block import Block, Layer, Norm, matrix

MOST_CANCELLATION = 16.0
"""How many times smaller than for uncorrelated channels an expand layer's variances may be: see ``from_gram``."""


def normalise(block: Block, layer: Layer, mean: Tensor, variance: Tensor, count: int) -> tuple[Norm, Tensor]:
    """Batch norm from this process's statistics; and what its running statistics move towards, ``[2, K]``."""
    total: Any = count
    if block.process_group:
        mean, variance, total = _joined(block.process_group, mean, variance, count)
    rstd = torch.rsqrt(variance + layer.eps)
    scale = layer.scale * rstd
    norm = Norm(mean, rstd, Affine(scale, layer.shift - mean * scale), total)
    return norm, torch.stack([mean, variance * (total / (total - 1))])


def _joined(group_name: str, mean: Tensor, variance: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Statistics over all processes, in the order of their ranks (Chan et al. 1979, pairwise sums of squares)."""
    group = dist.distributed_c10d._resolve_process_group(group_name)  # type: ignore[arg-type]
    mine = torch.cat([mean, variance, mean.new_tensor([count])])
    parts = mine.new_empty(dist.get_world_size(group), mine.numel())
    dist.all_gather(list(parts), mine, group)
    means, variances, counts = parts.split([mean.numel(), mean.numel(), 1], 1)
    total = counts.sum(0)
    share = counts / total
    joined = (means * share).sum(0)
    return joined, ((variances + (means - joined).square()) * share).sum(0), total


def coefficients(block: Block, layer: Layer, norm: Norm, total: Tensor, product: Tensor) -> tuple[Tensor, ...]:
    """``a``, ``b`` and ``c`` of batch norm's backward pass, over all processes."""
    if block.process_group:
        group = dist.distributed_c10d._resolve_process_group(block.process_group)  # type: ignore[arg-type]
        sums = torch.cat([total, product])
        dist.all_reduce(sums, group=group)
        total, product = sums.chunk(2)
    a = layer.scale * norm.rstd
    return a, a * norm.rstd.square() * product / norm.count, a * total / norm.count


def from_gram(layer: Layer, x: Tensor, input_mean: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and variance of a 1x1 convolution's result from those of its input; and whether that lost too many digits.

    The variance of ``w a`` is a sum of ``C^2`` terms ``w_i w_j cov_ij``, each off by about ``eps * |w_i w_j| * sqrt(
    cov_ii cov_jj)`` in either direction: together by ``eps * sum_i(w_i^2 cov_ii)``, which is eps times the variance
    for uncorrelated channels. If it is ``k`` times the variance, the result is off by ``k eps / 2`` of its deviation,
    and a convolution's rounding, which meets the same cancellation, by ``sqrt(k) eps``: twice that is reached at 16.
    """
    w = matrix(layer, x)
    variance = ((w @ covariance) * w).sum(1).clamp_(min=0)
    uncorrelated = w.square() @ covariance.diagonal()
    cancels = (uncorrelated > MOST_CANCELLATION * (variance + layer.eps)).any()
    return w @ input_mean, variance, cancels
