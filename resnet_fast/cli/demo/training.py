"""A small ResNet learns the digits; a large one gets batch norm statistics."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import resnet

from resnet_fast.cli.demo.data import CLASSES, Digits
from resnet_fast.cli.demo.study import Finding

REQUIRED_ACCURACY = 0.95
_BATCH, _LEARNING_RATE = 64, 2e-3


@dataclass(frozen=True)
class History:
    """One entry per epoch: mean training loss, and share of the test digits that are right."""

    loss: list[float]
    accuracy: list[float]
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def digits_network(seed: int) -> nn.Module:
    """torchvision's ResNet with one BasicBlock per stage, 4.9 million parameters."""
    torch.manual_seed(seed)
    return resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1], num_classes=len(CLASSES))


def train(
    network: nn.Module, data: Digits, epochs: int, seed: int, progress: Callable[[str], None] = lambda text: None
) -> tuple[nn.Module, History]:
    """Train in plain PyTorch and return the network in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    steps = -(-len(data.train_images) // _BATCH)
    optimiser = torch.optim.AdamW(network.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, _LEARNING_RATE, total_steps=epochs * steps)
    losses, accuracies = [], []
    start = time.perf_counter()
    for epoch in range(epochs):
        network.train()
        total = 0.0
        for index in torch.randperm(len(data.train_images), generator=generator).split(_BATCH):
            loss = F.cross_entropy(network(data.train_images[index]), data.train_labels[index])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            total += loss.item() * len(index)
        losses.append(total / len(data.train_images))
        accuracies.append(_accuracy(network.eval(), data))
        progress(f"training on the digits: epoch {epoch + 1} of {epochs}, {accuracies[-1]:.1%} right")
    return network, History(losses, accuracies, time.perf_counter() - start)


def _accuracy(network: nn.Module, data: Digits) -> float:
    with torch.inference_mode():
        right = network(data.test_images).argmax(1) == data.test_labels
    return right.float().mean().item()


def accuracy_of(history: History) -> Finding:
    """Whether the network has learnt enough to say anything about predictions."""
    reached = history.accuracy[-1]
    return Finding(
        "The network has learnt its task",
        f"{reached:.1%} of the test digits are right",
        f"at least {REQUIRED_ACCURACY:.0%}",
        reached >= REQUIRED_ACCURACY,
    )


def calibrate(model: nn.Module, images: Tensor) -> nn.Module:
    """Set the batch norms' running statistics to those of ``images``, as one epoch of training would; eval mode."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean over all batches, which are one
    with torch.inference_mode():
        model.train()(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return model.eval()
