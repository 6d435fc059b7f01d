"""Batch norm over all processes of a training run on a CPU, where ``nn.SyncBatchNorm`` refuses to run."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm


class CpuSyncBatchNorm(_BatchNorm):
    """What ``nn.SyncBatchNorm`` is on a GPU, over the default process group; ``x`` is ``[N, C, ...]``.

    Inside fused blocks its own forward does not run: they take its statistics as they take ``nn.SyncBatchNorm``'s.
    """

    def _check_input_dim(self, x: Tensor) -> None:
        pass  # as the norm that this was takes it

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        axes = [axis for axis in range(x.dim()) if axis != 1]
        shape = [1, -1, *[1] * (x.dim() - 2)]
        wide = x if x.dtype == torch.float64 else x.float()  # as the GPU's, it sums half precision in float32
        count = _sum_over_processes(wide.new_tensor(x.numel() / x.shape[1]))
        mean = _sum_over_processes(wide.sum(axes)) / count
        centred = wide - mean.view(shape)
        variance = _sum_over_processes(centred.square().sum(axes)) / count
        self._track(mean.detach(), variance.detach() * count / (count - 1))
        result = centred * (variance + self.eps).rsqrt().view(shape)
        if self.affine:
            result = result * self.weight.view(shape) + self.bias.view(shape)
        return result.to(x.dtype)

    def _track(self, mean: Tensor, unbiased_variance: Tensor) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        momentum = 1 / self.num_batches_tracked.item() if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, momentum)
        self.running_var.lerp_(unbiased_variance, momentum)


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:  # each process's loss depends on every process's x
        total = gradients[0].clone()
        dist.all_reduce(total)
        return total


def _sum_over_processes(x: Tensor) -> Tensor:
    return _Sum.apply(x)
