"""Batch norms set so that what is measured or compared is a fair case."""

from typing import Any

import torch
from torch import Tensor, nn


def norms_of(model: nn.Module) -> list[Any]:
    """Return the batch norms of ``model``."""
    return [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


def settle_relus(model: nn.Module) -> None:
    """Shift what batch norms give, by six deviations up and down in turn, so that rounding flips no ReLU after them.

    Else gradients could not be compared: one flip is no error and changes them by more than an error would. Every
    other channel of the residual stream is then zero, the others are above it, in all blocks the same.
    """
    with torch.no_grad():
        for norm in norms_of(model):
            if norm.affine:
                norm.bias.copy_(6 * norm.weight)
                norm.bias[1::2].neg_()


def freeze_batch_norm(model: nn.Module, images: Tensor) -> None:
    """Have every batch norm keep to its running statistics, now those of ``images``, in training mode too."""
    norms = norms_of(model)
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.train().momentum = 1.0
    with torch.no_grad():
        model(images)
    for norm, momentum in zip(norms, momenta):
        norm.eval().momentum = momentum


def randomise_batch_norm(model: nn.Module, seed: int) -> None:
    """Give every batch norm statistics and parameters that no special case fits (fresh ones are 0 and 1).

    The scales stay below 1, so that the residual stream of a deep network does not overflow.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(like: Tensor, low: float, high: float) -> Tensor:
        return torch.rand(like.shape, generator=generator) * (high - low) + low

    with torch.no_grad():
        for norm in norms_of(model):
            if norm.running_mean is not None:
                norm.running_mean.copy_(uniform(norm.running_mean, -0.5, 0.5))
                norm.running_var.copy_(uniform(norm.running_var, 0.5, 2.0))
                if norm.affine:
                    norm.weight.copy_(uniform(norm.weight, 0.25, 0.75))
                    norm.bias.copy_(uniform(norm.bias, -0.25, 0.25))
