"""What the primitives of ``reference/training.py`` move and multiply, counted from their arguments and results."""

import inspect
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

from resnet_fast.bench.ledger import Ledger, Place, pixels_needed
from resnet_fast.kernels.contract import Case
from resnet_fast.kernels.reference import training as reference
from resnet_fast.ops.block import Block


class Primitives:
    """Enters every primitive that a block asks for in the ledger, and makes its results.

    A primitive reads every tensor among its arguments once and writes every tensor among its results once; ``_reads``
    has the exceptions. The definition, run without data, says what the results are: images stay without data, the rest
    is zeros, because what a block decides by statistics needs some.
    """

    def __init__(self, ledger: Ledger, block: Block) -> None:
        self._ledger = ledger
        self._block = ledger.at.block
        self._layer = ledger.at.layer  # of the primitive before
        self._last = self._layer = self._owner(block.main[-1].weight)
        self._grams: list[int] = []  # moves that belong to the next convolution

    def pick(self, case: Case) -> SimpleNamespace:
        return SimpleNamespace(**{case.op: partial(self._run, case.op)})

    def _run(self, name: str, *args: Any) -> Any:
        definition = getattr(reference, name)
        with _disable_current_modes():  # its own operations on tensors are none of the model's
            results = definition(*tree_map_only(Tensor, lambda tensor: tensor.to("meta"), args))
            if name == "wgrad":
                results = _zeros(results)
            else:
                results = tree_map_only(Tensor, lambda made: made if made.dim() == 4 else _zeros(made), results)
            self._enter(name, dict(zip(inspect.signature(definition).parameters, args)), _tensors(results))
        return results

    def _enter(self, name: str, given: dict[str, Any], results: list[Tensor]) -> None:
        layer = self._layer_of(given)
        if name.startswith("conv_"):
            for index in self._grams:
                self._ledger.belongs(index, layer)
            self._grams.clear()
        elif name == "gram":
            self._grams.append(len(self._ledger.moves))
        operands = [(operand, tensor) for operand, value in given.items() for tensor in _tensors(value)]
        sizes = _reads(name, given, results)
        reads = [self._ledger.value(tensor, sizes.get(key)) for key, tensor in operands if sizes.get(key) != 0]
        place = Place(self._block, layer)
        made = [tensor for tensor in results if not any(tensor is operand for _, operand in operands)]
        writes = [self._ledger.made(tensor, place, parameter=name == "wgrad") for tensor in made]
        if name == "conv_statistics":
            writes = writes[:2]  # without the variance, which nobody has counted so far
        self._ledger.add(place, name, reads, writes, _flops(name, given, results))
        self._layer = layer

    def _layer_of(self, given: dict[str, Any]) -> str:
        """The layer of the weight, else that which made the raw result, else that of the primitive before."""
        if "weight" in given:
            return self._owner(given["weight"])
        if "y" not in given:
            return self._layer
        place = None if given["y"] is None else self._ledger.contents(given["y"]).place
        return self._last if place is None else place.layer

    def _owner(self, weight: Tensor) -> str:
        """The layer that a weight is of; of one that was made of another: that of the primitive before, its layer's."""
        owner = self._ledger.contents(weight).owner
        return self._layer if owner is None else owner.layer


def _reads(name: str, given: dict[str, Any], results: list[Tensor]) -> dict[str, int]:
    """Bytes that are read of an operand, where that is not all of it."""
    gate = given.get("gate")
    if name == "dgrad":
        return {} if gate else {"x": 0}  # of x, and of wgrad's weight, only the shape is needed
    if name == "wgrad" or name.startswith("conv_"):
        out = given.get("dy", results[0])
        pixels = pixels_needed(given["x"], given["weight"], given["geometry"].stride, out.shape)
        return {"x": pixels, **({"weight": 0} if name == "wgrad" else {})}
    if "stride" in given and gate is None:
        return {"x": _every(given["x"], given["stride"]).nbytes}
    return {}


def _flops(name: str, given: dict[str, Any], results: list[Tensor]) -> int:
    if name == "gram":
        n, c, h, w = _every(given["x"], given["stride"]).shape
        # The matrix is symmetric, but for the blocks on its diagonal half of it is computed.
        return n * h * w * c * (c + 1)
    if "weight" not in given:
        return 0
    image = given.get("dy", given.get("g", results[0]))
    flops = 2 * image.numel() * given["weight"][0].numel()
    return flops + 2 * image[:, 0].numel() * given["q"].numel() if "q" in given else flops


def _every(x: Tensor, stride: tuple[int, int]) -> Tensor:
    return x[:, :, :: stride[0], :: stride[1]]


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _zeros(tensor: Tensor) -> Tensor:
    return torch.zeros(tensor.shape, dtype=tensor.dtype)
