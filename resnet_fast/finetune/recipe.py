"""Optimizer, schedule, average of the weights: PyTorch's, with the choices that fine-tuning makes."""

import math
from typing import Any

from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from resnet_fast.finetune.arguments import SettingError, Settings

_QAT_LR = 0.01
"""Of what training starts with: NVIDIA's recipe, for a tenth of the epochs (Wu et al. 2020, arXiv:2004.09602)."""


def optimizer(model: nn.Module, settings: Settings) -> Optimizer:
    """AdamW or SGD over what learns, without weight decay of biases and norms."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    adamw = settings.opt == "adamw"
    decay = settings.weight_decay if settings.weight_decay is not None else (0.05 if adamw else 1e-4)
    groups = [
        {"params": [parameter for parameter in learning if parameter.dim() > 1], "weight_decay": decay},
        {"params": [parameter for parameter in learning if parameter.dim() <= 1], "weight_decay": 0.0},
    ]
    lr = settings.lr if settings.lr is not None else (1e-3 if adamw else 0.05) * (_QAT_LR if settings.qat else 1)
    if adamw:
        return AdamW(groups, lr=lr)
    return SGD(groups, lr=lr, momentum=settings.momentum, nesterov=settings.momentum > 0)


def schedule(optimizer: Optimizer, settings: Settings, steps_per_epoch: int) -> LRScheduler:
    """A linear rise, then a cosine to zero; one step for each of the optimizer's.

    Raises:
        SettingError: the rise takes all epochs.
    """
    steps = settings.epochs * steps_per_epoch
    epochs = settings.epochs / 10 if settings.warmup_epochs is None else settings.warmup_epochs
    rise = math.ceil(epochs * steps_per_epoch)
    if epochs >= settings.epochs:
        raise SettingError("warmup_epochs", f"is {epochs:g}, expected fewer than --epochs {settings.epochs}")
    cosine = CosineAnnealingLR(optimizer, max(steps - rise, 1))
    if not rise:
        return cosine
    linear = LinearLR(optimizer, start_factor=1 / (rise + 1), total_iters=rise)
    return SequentialLR(optimizer, [linear, cosine], milestones=[rise])


def go_on(optimizer: Optimizer, schedule: LRScheduler, state: dict[str, Any], steps: int) -> None:
    """Go on from the ``state`` of an optimizer after ``steps`` of another schedule, at the rates that this one has."""
    for _ in range(steps):
        schedule.step()
    rates = [group["lr"] for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def average(model: nn.Module, decay: float) -> AveragedModel:
    """An exponential moving average of parameters and buffers, whose first steps forget faster than ``decay``."""

    def update(averages: Any, values: Any, _: Any) -> None:
        step = int(ema.n_averaged)  # on the CPU; the argument is on the device, and would be waited for
        get_ema_multi_avg_fn(min(decay, (1 + step) / (10 + step)))(averages, values, _)

    ema = AveragedModel(model, multi_avg_fn=update, use_buffers=True)
    return ema
