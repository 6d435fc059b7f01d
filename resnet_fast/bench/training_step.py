"""A training step, and what shows that it was right."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resnet_fast.bench.saved import saved_bytes
from resnet_fast.bench.workload import autocast, load_images, load_labels, load_model

LEARNING_RATE, MOMENTUM = 1e-4, 0.9
"""A rate so small that the model is the same in the last round as in the first, but for its weights' versions."""


class Step:
    """A call is one step on the same batch: forward, cross-entropy, backward, SGD with momentum. It gives the loss.

    Args:
        model: in training mode; its parameters change.
        images: ``[N, C, H, W]``.
        labels: ``[N]``, int64.
        precision: around every forward pass.
    """

    def __init__(
        self,
        model: nn.Module,
        images: Tensor,
        labels: Tensor,
        precision: "Optional[contextlib.AbstractContextManager[None]]" = None,
    ) -> None:
        self._model, self._images, self._labels = model, images, labels
        self._precision = precision or contextlib.nullcontext()
        self._optimiser = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM)

    def __call__(self) -> float:
        self._optimiser.zero_grad()
        with self._precision:
            loss = F.cross_entropy(self._model(self._images), self._labels)
        loss.backward()
        self._optimiser.step()
        return loss.item()

    def first(self) -> dict[str, np.ndarray]:
        """Take a step: the loss, and by module, as vectors, the gradients and the running statistics it leaves."""
        results = {"loss": np.array([self()])}
        for path, module in self._model.named_modules():
            gradients = [p.grad for p in module.parameters(recurse=False) if p.grad is not None]
            statistics = [b for b in module.buffers(recurse=False) if b.is_floating_point()]
            for name, tensors in ((f"gradient of {path}", gradients), (f"statistics of {path}", statistics)):
                if tensors:
                    results[name] = torch.cat([tensor.flatten() for tensor in tensors]).cpu().numpy()
        return results

    def saved_bytes(self) -> int:
        with self._precision:
            return saved_bytes(self._model, self._images)


def load_step(folder: Path, threads: int, change: Callable[[nn.Module], Any] = lambda model: None) -> Step:
    """The step of the workload in ``folder``, weights and images in channels_last, after ``change`` to its model."""
    torch.set_num_threads(threads)
    layout: Any = {"memory_format": torch.channels_last}
    model = load_model(folder).to(**layout)
    change(model)
    return Step(model, load_images(folder).to(**layout), load_labels(folder), autocast(folder))
