"""The primitives of ``reference/training.py`` as a count sees them: their operands' sizes, and their arithmetic."""

import functools
from collections.abc import Callable
from typing import Any, Optional

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from resnet_fast.bench.moves import Ledger, Place, pixels_needed
from resnet_fast.kernels.contract import Case
from resnet_fast.kernels.reference.training import Affine, Gate, Geometry, Gradient, Pair, wide
from resnet_fast.ops.block_passes import Chain
from resnet_fast.ops.inference import conv_output, pooled


def _uncounted(primitive: Callable[..., Any]) -> Callable[..., Any]:
    """Its own operations on tensors are none of the model's."""

    @functools.wraps(primitive)
    def run(*args: Any) -> Any:
        with torch.utils._python_dispatch._disable_current_modes():
            return primitive(*args)

    return run


class Primitives:
    """Enters each in the ledger, and makes results of the right shapes: images without data, vectors of zeros."""

    def __init__(self, ledger: Ledger, chain: Chain) -> None:
        self._ledger = ledger
        self._block = ledger.at.block
        self._layer = ledger.at.layer  # of the primitive before
        self._last = self._layer = self._owner(chain.main[-1].weight)
        self._grams: list[int] = []  # moves that belong to the next convolution

    def pick(self, case: Case) -> "Primitives":
        return self

    # --- forward ---

    @_uncounted
    def conv_statistics(
        self, x: Tensor, prologue: Optional[Affine], weight: Tensor, geometry: Geometry
    ) -> tuple[Tensor, Tensor, Tensor]:
        y = _convolved(x, weight, geometry)
        mean, variance = torch.zeros(2, y.shape[1], dtype=wide(x)).unbind(0)
        self._convolution("conv_statistics", x, weight, geometry, y, [prologue], [mean])
        return y, mean, variance

    @_uncounted
    def gram(self, x: Tensor, prologue: Optional[Affine], stride: Pair) -> tuple[Tensor, Tensor]:
        n, c, h, w = x[:, :, :: stride[0], :: stride[1]].shape
        statistics = torch.zeros(1 + c, c, dtype=wide(x))
        pixels = n * h * w
        self._grams.append(len(self._ledger.moves))
        # The matrix is symmetric, but for the blocks on its diagonal half of it is computed.
        flops = pixels * c * (c + 1)
        self._add("gram", self._layer, [(x, pixels * c * x.itemsize)], [prologue], [statistics], flops)
        return statistics[0], statistics[1:]

    @_uncounted
    def conv_affine(
        self,
        x: Tensor,
        prologue: Optional[Affine],
        weight: Tensor,
        affine: Affine,
        residual: Optional[Tensor],
        geometry: Geometry,
        relu: bool,
    ) -> Tensor:
        y = _convolved(x, weight, geometry)
        self._convolution("conv_affine", x, weight, geometry, y, [prologue, affine, residual], [])
        return y

    @_uncounted
    def tail(
        self, y: Tensor, affine: Affine, residual: Optional[Tensor], residual_affine: Optional[Affine], relu: bool
    ) -> Tensor:
        out = torch.empty_like(y)
        self._add("tail", self._maker(y), [(y, None)], [residual, affine, residual_affine], [out])
        return out

    @_uncounted
    def tail_pool(self, y: Tensor, affine: Affine) -> Tensor:
        n, c, h, w = y.shape
        out = y.new_empty(n, c, pooled(h), pooled(w))
        self._add("tail_pool", self._maker(y), [(y, None)], [affine], [out])
        return out

    # --- backward ---

    @_uncounted
    def tail_backward(
        self,
        grad: Tensor,
        out: Optional[Tensor],
        y: Optional[Tensor],
        mean: Optional[Tensor],
        residual: Optional[Tensor],
        residual_mean: Optional[Tensor],
    ) -> tuple[Gradient, Optional[Tensor]]:
        g = grad if out is None else torch.empty_like(grad)
        total, product, residual_product = (_vector(grad) for _ in range(3))
        made = [total, *([] if out is None else [g])]
        made += [vector for vector, read in ((product, y), (residual_product, residual)) if read is not None]
        layer = self._last if y is None else self._maker(y)
        self._add("tail_backward", layer, [(grad, None)], [out, y, mean, residual, residual_mean], made)
        gradient = Gradient(g, total, None if y is None else product)
        return gradient, None if residual is None else residual_product

    @_uncounted
    def tail_pool_backward(self, grad: Tensor, y: Tensor, affine: Affine, mean: Optional[Tensor]) -> Gradient:
        gradient = Gradient(torch.empty_like(y), _vector(y), None if mean is None else _vector(y))
        self._add("tail_pool_backward", self._maker(y), [(grad, None)], [y, affine, mean], gradient)
        return gradient

    @_uncounted
    def bn_backward(
        self, g: Tensor, y: Tensor, mean: Tensor, a: Tensor, b: Tensor, c: Tensor, overwrite: bool
    ) -> Tensor:
        dy = torch.empty_like(g)
        self._add("bn_backward", self._maker(y), [(g, None)], [y, mean, a, b, c], [dy])
        return dy

    @_uncounted
    def dgrad(
        self,
        dy: Tensor,
        weight: Tensor,
        geometry: Geometry,
        x: Tensor,
        gate: Optional[Gate],
        residual: Optional[Tensor],
    ) -> Gradient:
        gradient = _gated(x, gate)
        others = [weight, residual, *([] if gate is None else [x, gate])]
        self._add("dgrad", self._owner(weight), [(dy, None)], others, gradient, 2 * dy.numel() * weight[0].numel())
        return gradient

    @_uncounted
    def dgrad_expand(
        self,
        g: Tensor,
        weight: Tensor,
        q: Tensor,
        c: Tensor,
        stride: Pair,
        x: Tensor,
        prologue: Optional[Affine],
        gate: Optional[Gate],
        residual: Optional[Tensor],
    ) -> Gradient:
        gradient = _gated(x, gate)
        every = x.nbytes if gate is not None else x[:, :, :: stride[0], :: stride[1]].nbytes
        pixels = g.numel() // g.shape[1]
        flops = 2 * pixels * (weight.numel() + q.numel())
        others = [weight, q, c, prologue, gate, residual]
        self._add("dgrad_expand", self._layer, [(g, None), (x, every)], others, gradient, flops)
        return gradient

    @_uncounted
    def wgrad(self, dy: Tensor, x: Tensor, prologue: Optional[Affine], weight: Tensor, geometry: Geometry) -> Tensor:
        dw = torch.zeros(weight.shape, dtype=wide(x))
        pixels = pixels_needed(x, weight, geometry.stride, dy.shape)
        flops = 2 * dy.numel() * weight[0].numel()
        self._add("wgrad", self._owner(weight), [(dy, None), (x, pixels)], [prologue], [dw], flops)
        return dw

    # --- shared ---

    def _convolution(
        self, op: str, x: Tensor, weight: Tensor, geometry: Geometry, y: Tensor, others: list[Any], made: list[Tensor]
    ) -> None:
        layer = self._owner(weight)
        for index in self._grams:
            self._ledger.belongs(index, layer)
        self._grams.clear()
        pixels = pixels_needed(x, weight, geometry.stride, y.shape)
        flops = 2 * y.numel() * weight[0].numel()
        self._add(op, layer, [(x, pixels)], [weight, *others], [y, *made], flops)

    def _add(
        self, op: str, layer: str, sized: list[tuple[Tensor, Optional[int]]], others: Any, made: Any, flops: int = 0
    ) -> None:
        """``sized`` and ``others`` are read, the former so many bytes of each."""
        place = Place(self._block, layer)
        reads = [self._ledger.value(tensor, size) for tensor, size in sized]
        reads += [self._ledger.value(leaf) for leaf in tree_leaves(others) if isinstance(leaf, Tensor)]
        results = [leaf for leaf in tree_leaves(made) if isinstance(leaf, Tensor)]
        writes = [self._ledger.made(leaf, place, parameter=op == "wgrad") for leaf in results]
        self._ledger.add(place, op, reads, writes, flops)
        self._layer = layer

    def _owner(self, weight: Tensor) -> str:
        """The layer that a weight is of; of one that was made of another: that of the primitive before, its layer's."""
        owner = self._ledger.contents(weight).owner
        return self._layer if owner is None else owner.layer

    def _maker(self, y: Tensor) -> str:
        place = self._ledger.contents(y).place
        return self._last if place is None else place.layer


def _convolved(x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    return x.new_empty(conv_output(x.shape, weight.shape, *geometry[:3]))


def _vector(image: Tensor) -> Tensor:
    return torch.zeros(image.shape[1], dtype=wide(image))


def _gated(x: Tensor, gate: Optional[Gate]) -> Gradient:
    if gate is None:
        return Gradient(torch.empty_like(x))
    return Gradient(torch.empty_like(x), _vector(x), None if gate.mean is None else _vector(x))
