"""What a batch norm module computes: by which statistics, over which processes, and what happens to its buffers.

The arithmetic of batch statistics, on tensors, is in ``ops/block_norm.py``.
"""

from collections.abc import Callable, Hashable
from itertools import chain
from typing import Any, NamedTuple, Optional, Union

import torch
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from resnet_fast.graph.conditions import SYNCHRONISED
from resnet_fast.graph.sync_batch_norm import CpuSyncBatchNorm
from resnet_fast.kernels.contract import wide
from resnet_fast.kernels.packing import PackCache


class Affine(NamedTuple):
    """A norm of somebody's own: ``x * scale + shift``, both made of its own tensors."""

    owner: nn.Module
    function: Callable[[nn.Module], tuple[Tensor, Tensor]]  # scale and shift, each of K numbers in any shape
    widens: bool  # whether ``x`` becomes as wide as they are


BatchNorm = Union[nn.BatchNorm2d, nn.SyncBatchNorm, CpuSyncBatchNorm, FrozenBatchNorm2d, Affine]

_folds = PackCache()


def uses_batch_statistics(norm: Optional[BatchNorm]) -> bool:
    if norm is None or isinstance(norm, (FrozenBatchNorm2d, Affine)):
        return False
    return norm.training or (norm.running_mean is None and norm.running_var is None)


def process_group(norm: BatchNorm) -> str:
    """Over which processes the norm takes its batch statistics, as SyncBatchNorm decides it; "": this one."""
    if not isinstance(norm, SYNCHRONISED) or not norm.training:
        return ""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return ""
    group: Any = getattr(norm, "process_group", None) or torch.distributed.group.WORLD
    return group.group_name if torch.distributed.get_world_size(group) > 1 else ""


def scale_and_shift(
    conv: nn.Conv2d, norm: Optional[BatchNorm], batch_statistics: bool = False
) -> tuple[Tensor, Tensor]:
    """What the op takes as scale and shift: gamma and beta, or the running statistics folded in.

    Without a norm: ones, and the convolution's bias.
    """
    if norm is None:
        source = conv.weight if conv.bias is None else conv.bias
        return _kept((source,), "no norm", lambda: _without_norm(conv))
    if not batch_statistics:
        return fold_batch_norm(norm, conv.bias)
    dtype = wide(conv.weight)
    assert not isinstance(norm, (FrozenBatchNorm2d, Affine))
    size, device = conv.out_channels, conv.weight.device
    gamma = torch.ones(size, dtype=dtype, device=device) if norm.weight is None else norm.weight.to(dtype)
    beta = torch.zeros(size, dtype=dtype, device=device) if norm.bias is None else norm.bias.to(dtype)
    # Batch statistics take a convolution's bias out again: its gradient is 0, which is not the same as none.
    return gamma, beta if conv.bias is None else beta + 0.0 * conv.bias


def move_running_statistics(conv: nn.Conv2d, norm: Any, moments: Tensor) -> None:
    """What ``_BatchNorm.forward`` does to its buffers, given ``[2, K]``: the batch's mean and unbiased variance."""
    if not (norm.training and norm.track_running_stats):
        return
    momentum = 0.0 if norm.momentum is None else norm.momentum
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if norm.momentum is None:
            momentum = 1.0 / float(norm.num_batches_tracked)
    mean, variance = moments.unbind(0)
    if conv.bias is not None:
        mean = mean + conv.bias
    for running, current in ((norm.running_mean, mean), (norm.running_var, variance)):
        if running is not None:
            # As batch norm does: its own forward, run before and not yet differentiated, may have kept the tensor.
            with torch.autograd._unsafe_preserve_version_counter(running):
                running.lerp_(current.to(running.dtype), momentum)


def tensors_of(norm: BatchNorm) -> tuple[Tensor, ...]:
    """What its running statistics' normalisation depends on: a pack made of them has these as its sources."""
    if isinstance(norm, Affine):
        return tuple(chain(norm.owner.parameters(), norm.owner.buffers()))
    counter = getattr(norm, "num_batches_tracked", None)  # its version rises when the running statistics are updated
    tensors = (norm.running_var, norm.running_mean, norm.weight, norm.bias, counter)
    return tuple(tensor for tensor in tensors if tensor is not None)


def fold_batch_norm(bn: BatchNorm, conv_bias: Optional[Tensor] = None) -> tuple[Tensor, Tensor]:
    """``scale`` and ``shift``, each ``[K]`` in float32 or wider, with ``bn(y + conv_bias) == y * scale + shift``.

    ``scale = weight / sqrt(running_var + eps)`` and ``shift = bias + (conv_bias - running_mean) * scale`` (Ioffe and
    Szegedy 2015, section 3.1).
    """
    sources = (*tensors_of(bn), *([] if conv_bias is None else [conv_bias]))
    return _kept(sources, (settings_of(bn), conv_bias is None), lambda: _fold(bn, conv_bias))


def _kept(sources: tuple[Tensor, ...], key: Hashable, make: Callable[[], tuple[Tensor, Tensor]]) -> Any:
    differentiated = torch.is_grad_enabled() and any(t.requires_grad for t in sources)
    if differentiated or torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return make()
    return _folds.get(sources, key, make)


def settings_of(bn: BatchNorm) -> Hashable:
    """What a pack made of it depends on beside its tensors."""
    return bn.function if isinstance(bn, Affine) else bn.eps


def _without_norm(conv: nn.Conv2d) -> tuple[Tensor, Tensor]:
    scale = torch.ones(conv.out_channels, dtype=wide(conv.weight), device=conv.weight.device)
    return scale, torch.zeros_like(scale) if conv.bias is None else conv.bias.to(scale.dtype)


def fold_exactly(bn: BatchNorm, conv_bias: Optional[Tensor] = None) -> tuple[Tensor, Tensor]:
    """The same in float64, computed each time."""
    return _fold(bn, None if conv_bias is None else conv_bias.detach().double(), torch.float64)


def _fold(bn: BatchNorm, conv_bias: Optional[Tensor], dtype: Optional[torch.dtype] = None) -> tuple[Tensor, Tensor]:
    if isinstance(bn, Affine):
        scale, shift = (t.flatten() for t in bn.function(bn.owner))
        dtype = dtype or wide(scale)
        scale, shift = scale.to(dtype), shift.to(dtype)
        return scale, shift if conv_bias is None else shift + conv_bias * scale
    assert bn.running_var is not None and bn.running_mean is not None
    dtype = dtype or wide(bn.running_var)
    scale = torch.rsqrt(bn.running_var.to(dtype) + bn.eps)
    if bn.weight is not None:
        scale = scale * bn.weight
    centre = bn.running_mean.to(dtype)
    if conv_bias is not None:
        centre = centre - conv_bias
    shift = -centre * scale
    if bn.bias is not None:
        shift = shift + bn.bias
    return scale, shift
