"""A training step, what shows that it was right, and what it keeps between its two passes."""

import contextlib
from typing import Optional

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

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


def saved_bytes(model: nn.Module, images: Tensor) -> int:
    """Bytes that autograd holds between ``model(images)`` and its backward pass.

    Storages are counted once, however many tensors share them, and whole. The model's parameters and buffers are left
    out: they are there anyway. The images are not: a caller could let go of them, were it not for the backward pass.

    Args:
        model: in the mode that it is to be measured in; its running statistics move as in any call.
        images: ``[N, C, H, W]``.
    """
    own = {_storage(tensor) for tensor in (*model.parameters(), *model.buffers())}
    sizes: dict[int, int] = {}
    held: list[Tensor] = []  # so that no storage's address is used again while they are counted

    def pack(tensor: Tensor) -> Tensor:
        held.append(tensor.detach())
        sizes[_storage(tensor)] = tensor.untyped_storage().nbytes()
        return held[-1]  # not a result itself, whose graph would hold it: neither would ever be freed

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = nn.functional.cross_entropy(
            model(images), torch.zeros(len(images), dtype=torch.int64, device=images.device)
        )
        del loss
    return sum(size for storage, size in sizes.items() if storage not in own)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
