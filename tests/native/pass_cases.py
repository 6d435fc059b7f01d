"""Data for training's passes over whole images, and memory in which a wrong access of theirs shows."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from resnet_fast.kernels.contract import Affine, Gate
from resnet_fast.kernels.native import passes
from tests.native.harness import Place, placed

SHAPES = {
    "round": (2, 64, 8, 8),
    "odd sizes": (3, 20, 9, 11),
    "even and odd": (1, 48, 6, 7),
    "1 channel": (2, 1, 11, 10),
    "17 channels, one pixel": (1, 17, 1, 1),
    "one row": (2, 33, 1, 19),
    "one column": (1, 16, 18, 1),
    "two by three": (1, 3, 2, 3),
    "three images of one pixel": (3, 40, 1, 1),
    "2049 channels": (1, 2049, 5, 3),
    "several runs": (2, 37, 21, 25),
    "every chunk": (3, 9, 50, 53),
}


class Data(NamedTuple):
    """Operands of one shape. ``y``, ``scale`` and ``shift`` are short binary fractions: ``y * scale + shift`` is exact,
    often 0 or equal to its neighbour, and no rounding decides what a ReLU or a maximum lets through."""

    y: Tensor
    residual: Tensor
    out: Tensor
    grad: Tensor
    pooled_grad: Tensor
    affine: Affine
    residual_affine: Affine
    mean: Tensor
    residual_mean: Tensor
    slope: Tensor


def make(name: str) -> Data:
    n, c, h, w = SHAPES[name]
    torch.manual_seed(0)
    y = torch.randint(-32, 33, (n, c, h, w)) / 8
    affine = Affine(torch.tensor([-0.5, 0.5, 1, 2])[torch.randint(4, (c,))], torch.randint(-8, 9, (c,)) / 4)
    pooled_grad = torch.randn(n, c, (h - 1) // 2 + 1, (w - 1) // 2 + 1)
    residual, grad, vectors = torch.randn(n, c, h, w), torch.randn(n, c, h, w), torch.randn(5, c)
    out = torch.randn(n, c, h, w).relu()
    return Data(y, residual, out, grad, pooled_grad, affine, Affine(*vectors[:2]), *vectors[2:])


def each(function: Callable[[Tensor], Tensor], operand: Any) -> Any:
    """``function`` of a tensor, or of every tensor of a tuple, which may be a named one."""
    if isinstance(operand, tuple):
        return getattr(operand, "_make", tuple)(each(function, part) for part in operand)
    return function(operand) if isinstance(operand, Tensor) else operand


class Memory:
    """Copies of tensors where ``place`` puts them, NHWC if images; ``image`` is to replace ``passes._image``."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self._copies: list[tuple[Tensor, Tensor]] = []

    def image(self, *size: int) -> Tensor:
        return self._copy(torch.full(size, torch.nan))

    def copy(self, operand: Any) -> Any:
        return each(self._copy, operand)

    def _copy(self, tensor: Tensor) -> Tensor:
        there = placed(tensor, self.place)
        there = there.permute(0, 3, 1, 2) if tensor.dim() == 4 else there
        self._copies.append((there, tensor))
        return there

    def unchanged(self, *operands: Any) -> None:
        """Nothing was written to these."""
        for operand in operands:
            for there, before in self._copies:
                if there is operand:
                    assert torch.equal(there, before), "an operand was written"


def everything(data: Data) -> list[Tensor]:
    """Every result that there is."""

    def grad() -> Tensor:  # to be overwritten
        return passes._image(*data.grad.shape).copy_(data.grad)

    gradient, product = passes.tail_backward(data.grad, data.out, data.y, data.mean, data.residual, data.residual_mean)
    return [
        passes.tail(data.y, data.affine, data.residual, data.residual_affine, True),
        passes.tail_pool(data.y, data.affine),
        *passes.statistics(data.residual),
        *passes.gate(grad(), data.y, Gate(data.affine, data.mean), data.residual),
        *gradient,
        product,
        *passes.tail_pool_backward(data.pooled_grad, data.y, data.affine, data.mean),
        passes.bn_gradient(grad(), data.y, data.mean, data.affine.scale, data.slope, data.affine.shift, True),
    ]
