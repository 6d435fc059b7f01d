"""What a pass through a model moves and multiplies, counted from the operations that it is made of.

The model runs without data (on the ``meta`` device). Every operation reads each of its operands once and writes each of
its results once, whatever its kernel keeps in caches and workspaces; a convolution reads the pixels that it needs, and
batch norm by batch statistics reads its operands twice: for the sums, and to apply them. A block counts as the
primitives that ``ops/block.py`` asks for and what it computes between them, so the count follows that code.
Other fused ops need no mention here: they have operands like any.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Optional

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from resnet_fast import accelerate
from resnet_fast.bench.ledger import Ledger, Move, Place, pixels_needed
from resnet_fast.bench.operands import Primitives
from resnet_fast.kernels.contract import Geometry, nhwc
from resnet_fast.ops import block_backward, block_forward, residual_block
from resnet_fast.ops.checks import conv_output

_aten, _ours = torch.ops.aten, torch.ops.resnet_fast
_STRIDES = {_aten.convolution.default: 3, _ours.conv_bn_act.default: 5}
"""Convolutions of an image, the first operand, by a weight, the second: where their arguments have the stride."""
_PRODUCTS = {
    _aten.mm.default: 0,
    _aten.mv.default: 0,
    _aten.bmm.default: 0,
    _aten.addmm.default: 1,
    _aten.baddbmm.default: 1,
}
"""Matrix products: where their arguments have the left matrix."""
_FACTORIES = ("new_empty", "new_zeros", "new_ones", "new_full", "empty_like", "zeros_like", "ones_like", "full_like")
"""They read no more than the shape of their operand."""


def compare(model: nn.Module, shape: Any, dtype: torch.dtype, backward: bool = False) -> dict[str, list[Move]]:
    """Count what ``model(images)`` moves, operation by operation: "stock", and accelerated, "ours".

    Args:
        model: a stock one, in the mode that it is to be counted in. What eval mode computes from parameters alone
            (batch norms folded into scales and shifts) is not counted: it is done once.
        shape: of the images, ``[N, C, H, W]``.
        dtype: of images, weights and vectors alike.
        backward: whether the gradients of the parameters follow.
    """
    layers: dict[str, str] = {}
    return {
        "stock": _count(copy.deepcopy(model), shape, dtype, backward, layers),
        "ours": _count(accelerate(model, inplace=False), shape, dtype, backward, layers),
    }


def _count(model: nn.Module, shape: Any, dtype: torch.dtype, backward: bool, layers: dict[str, str]) -> list[Move]:
    """``layers``: by the path of a module with vectors of channels, the layer whose results go through it. What the
    count learns of that is added: in the stock model, more of it is seen."""
    model = model.to("meta", dtype)
    images = torch.empty(shape, dtype=dtype, device="meta", memory_format=torch.channels_last)
    counter = _Counter(model, layers)
    with torch.set_grad_enabled(backward), counter:
        results = model(images)
    if backward:
        outputs = [leaf for leaf in tree_leaves(results) if isinstance(leaf, Tensor) and leaf.requires_grad]
        gradients = counter.turn(outputs)
        with counter:
            torch.autograd.backward(outputs, gradients)
    return counter.moves()


def blocks(moves: list[Move]) -> dict[str, int]:
    """Bytes of images by block, in order; stem and head are left out: what has parameters outside of blocks, and the
    pooling before it."""
    found: dict[str, int] = {}
    for move in moves:
        if move.block:
            found[move.block] = found.get(move.block, 0) + move.images
    return found


class _Counter(TorchDispatchMode):
    """Sees every operation below autograd, and enters it in its ledger."""

    def __init__(self, model: nn.Module, layers: dict[str, str]) -> None:
        super().__init__()
        self.ledger = Ledger()
        self._layers = layers
        self._in_block = False
        self._ready = not model.training  # whether what is made of parameters alone is made before
        self._head = 0  # the moves after the last one of the forward pass with parameters of a block
        for tensor, owner in _owners(model):
            self.ledger.own(tensor, owner)

    def moves(self) -> list[Move]:
        """Return all moves, the head's told from the last block's.

        After that block's last parameters, the head is what is neither an addition nor a ReLU, but a pooling.
        """
        return [
            replace(move, place=Place("", move.layer))
            if i >= self._head and not move.pointwise and not move.backward
            else move
            for i, move in enumerate(self.ledger.moves)
        ]

    def turn(self, outputs: list[Tensor]) -> list[Tensor]:
        """The backward pass begins with the gradients of ``outputs``, which are returned."""
        self.ledger.backward = True
        gradients = [torch.empty_like(output) for output in outputs]
        for output, gradient in zip(outputs, gradients):
            self.ledger.made(gradient, self.ledger.contents(output).place)
        return gradients

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._in_block:  # below autograd already, where nothing else takes operations apart
            with self:
                result = func.decompose(*args, **(kwargs or {}))
            if result is not NotImplemented:
                return result
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        place = self._place(func, given)
        owners = [self.ledger.contents(tensor).owner for tensor in given]
        reads = self.ledger.values(given)  # what they are now: the operation may overwrite them
        result = func(*args, **(kwargs or {}))
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if func is _ours.residual_block.default:
            self._training_block(place, args, made)
        elif func is _ours.residual_block_backward.default:
            self._block_backward(place, args, made)
        elif func is _aten.convolution_backward.default:
            self._convolution_backward(place, args, made)
        elif not func.is_view and func is not _aten.detach.default:
            self._operation(func, place, args, given, reads, made)
        if not self.ledger.backward and any(owner.block for owner in owners if owner):
            self._head = len(self.ledger.moves)
        return result

    def _operation(
        self, func: Any, place: Place, args: Any, given: list[Tensor], reads: list[Any], made: list[Tensor]
    ) -> None:
        name = func.overloadpacket.__name__
        of_parameters = bool(given) and all(self.ledger.contents(tensor).parameter for tensor in given)
        flops = self._flops(func, args, given, made)
        writes = [self.ledger.made(tensor, place, of_parameters) for tensor in made]
        if (of_parameters and self._ready) or (not given and name.startswith("empty")):
            return
        if name in _FACTORIES:
            reads = []
        elif func in _STRIDES:
            reads[0] = reads[0]._replace(size=pixels_needed(args[0], args[1], args[_STRIDES[func]], made[0].shape))
        elif func is _aten.native_batch_norm.default and args[5]:
            reads = [*reads, reads[0]]
        elif func is _aten.native_batch_norm_backward.default and args[7]:
            reads = [*reads, *reads[:2]]
        pointwise = torch.Tag.pointwise in func.tags or name in ("_to_copy", "copy_")
        self.ledger.add(place, name, reads, writes, flops, pointwise)

    def _convolution_backward(self, place: Place, args: Any, made: list[Tensor]) -> None:
        """Enter a kernel for each gradient of a convolution."""
        grad, x, weight, _, stride, *_, wanted = args
        value, flops = self.ledger.value, 2 * grad.numel() * weight[0].numel()
        pixels = value(x, pixels_needed(x, weight, stride, grad.shape))
        kernels = (
            ("convolution_dgrad", (value(grad), value(weight)), flops),
            ("convolution_wgrad", (value(grad), pixels), flops),
            ("convolution_bias_grad", (value(grad),), 0),
        )
        for wants, (name, reads, products), tensor in zip(wanted, kernels, _spread(made, wanted)):
            if wants:
                written = self.ledger.made(tensor, place, parameter=name != "convolution_dgrad")
                self.ledger.add(place, name, reads, [written], products)

    def _flops(self, func: Any, args: Any, given: list[Tensor], made: list[Tensor]) -> int:
        if func in _PRODUCTS:
            return 2 * made[0].numel() * args[_PRODUCTS[func]].shape[-1]
        if func is _aten.convolution.default:
            transposed = args[6]
            return 2 * (args[0] if transposed else made[0]).numel() * args[1][0].numel()
        if func.namespace != "resnet_fast":
            return 0
        if func is _ours.stem.default:
            convolved = conv_output(args[0].shape, args[1].shape, Geometry((2, 2), (3, 3)))
            return 2 * torch.Size(convolved).numel() * args[1][0].numel()
        # Its weights, each with the result that it gives.
        matrices = [tensor for tensor in given if tensor.dim() > 1 and self.ledger.contents(tensor).owner]
        return sum(2 * result.numel() * matrix[0].numel() for result, matrix in zip(made, matrices))

    def _place(self, func: Any, given: Sequence[Tensor]) -> Place:
        """An operation's layer is its weight's, else that of its first operand; its block is its parameters'.

        Without parameters, it is in the block of the operation before. Backward, it follows the first operand that the
        forward pass made, but for matrix products, which are layers' gradients.
        """
        known = [self.ledger.contents(tensor) for tensor in given]
        owned = [contents.owner for contents in known if contents.owner]
        weights = [contents.owner for contents, tensor in zip(known, given) if contents.owner and tensor.dim() > 1]
        sources = [contents for contents in known if contents.place]
        if self.ledger.backward and func not in _PRODUCTS:
            sources.sort(key=lambda contents: contents.backward)
        source = (sources[0].place if sources else None) or self.ledger.at
        follows = source if self.ledger.backward else self.ledger.at
        if weights:
            layer = weights[0].layer
        elif owned and sources:
            layer = self._layers.setdefault(owned[0].layer, source.layer)
        else:
            layer = self._layers.get(owned[0].layer, source.layer) if owned else source.layer
        return Place(owned[0].block if owned else follows.block, layer)

    # --- blocks in training ---

    def _training_block(self, place: Place, args: Any, made: list[Tensor]) -> None:
        x, residual, weights, scales, shifts, *plain = args
        block = residual_block.block_of(self._real(weights), self._real(scales), self._real(shifts), *plain)
        self.ledger.at = place
        with self._seen():
            result = block_forward.forward(block, nhwc(x), nhwc(residual), Primitives(self.ledger, block).pick)
        self._same(made, [result.out, *result.statistics, *result.saved])

    def _block_backward(self, place: Place, args: Any, made: list[Tensor]) -> None:
        grad, x, residual, out, weights, scales, shifts, *plain, saved, flags = args
        block = residual_block.block_of(self._real(weights), self._real(scales), self._real(shifts), *plain)
        wanted = residual_block._wanted(flags)
        vectors = iter(self._real([tensor for tensor in saved if tensor.dim() != 4]))
        saved = [tensor if tensor.dim() == 4 else next(vectors) for tensor in saved]
        self.ledger.at = place
        with self._seen():
            pick = Primitives(self.ledger, block).pick
            found = block_backward.backward(block, nhwc(grad), nhwc(x), nhwc(residual), out, saved, wanted, pick)
            for gradient in found.weights:
                if gradient is not None:
                    self.ledger.contents(gradient).parameter = True
            gradients = [
                gradient.to(tensor.dtype) if want and gradient is not None else None
                for given, wants, tensors in (
                    (found.weights, wanted.weights, weights),
                    (found.scales, wanted.vectors, scales),
                    (found.shifts, wanted.vectors, shifts),
                )
                for gradient, want, tensor in zip(given, wants, tensors)
            ]
        images = [found.x if wanted.x else None, found.residual if wanted.residual else None]
        self._same(made, [*images, *gradients])

    @contextmanager
    def _seen(self) -> Iterator[None]:
        """Count what a block does between its primitives like everything else."""
        self._in_block = True
        try:
            with self:
                yield
        finally:
            self._in_block = False

    def _real(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The images have no data, but what is decided by statistics needs some: of zeros, none are lost."""
        zeros = [torch.zeros(tensor.shape, dtype=tensor.dtype) for tensor in tensors]
        self._same(zeros, tensors)
        return zeros

    def _same(self, tensors: Sequence[Tensor], others: Sequence[Optional[Tensor]]) -> None:
        for tensor, other in zip(tensors, others):
            if other is not None:
                self.ledger.alias(tensor, other)


def _owners(model: nn.Module) -> Iterator[tuple[Tensor, Place]]:
    """Every parameter and buffer with its module and block: the innermost module around that which is no Sequential."""
    for path, module in model.named_modules():
        above = path
        while above:
            above = above.rpartition(".")[0]
            if not isinstance(model.get_submodule(above), (nn.Sequential, nn.ModuleList)):
                break
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            yield tensor, Place(above, path)


def _spread(made: list[Tensor], wanted: Sequence[bool]) -> list[Any]:
    """The results at the places of those that were wanted: the others are None, or not there at all."""
    results = iter(made)
    return [next(results) if wants else None for wants in wanted]
