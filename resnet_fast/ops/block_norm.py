"""Batch norm by batch statistics in a block's passes: over this process, or over all of a process group."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from resnet_fast.kernels.reference.training import gram_statistics, normalised
from resnet_fast.ops.block import Block, Layer, Norm, matrix, norm_of


def normalise(block: Block, layer: Layer, mean: Tensor, variance: Tensor, count: int) -> tuple[Norm, Tensor]:
    """Batch norm from this process's statistics; and what its running statistics move towards, ``[2, K]``."""
    total: Any = count
    if block.process_group:
        mean, variance, total = _joined(block.process_group, mean, variance, count)
    vectors, moments = normalised(mean, variance, layer.norm, total)
    return norm_of(vectors, total), moments


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


def means(block: Block, norm: Norm, total: Tensor, product: Tensor) -> tuple[Tensor, Tensor, Any]:
    """Sums over all processes, and of how many values. Over several processes these are means: sums of one value."""
    if not block.process_group:
        return total, product, norm.count
    group = dist.distributed_c10d._resolve_process_group(block.process_group)  # type: ignore[arg-type]
    sums = torch.cat([total, product])
    dist.all_reduce(sums, group=group)
    total, product = (sums / norm.count).chunk(2)
    return total, product, 1


def from_gram(layer: Layer, x: Tensor, input_mean: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``reference.gram_statistics`` of a layer."""
    return gram_statistics(matrix(layer, x), input_mean, covariance, layer.eps)
