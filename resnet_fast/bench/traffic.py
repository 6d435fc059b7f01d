"""How many bytes a forward pass in training moves, counted from the operations that it is made of.

The model runs without data (on the ``meta`` device). Every operation reads each of its operands once and writes each of
its results once, whatever its kernel keeps in caches and workspaces; a convolution reads the pixels that it needs, and
batch norm by batch statistics reads its input twice, for the statistics and to apply them. A chain counts as the
primitives that ``chain.forward`` asks for, so the count follows that code.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Optional

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from resnet_fast import accelerate
from resnet_fast import chain as chains
from resnet_fast.kernels.case import Case
from resnet_fast.kernels.reference_training import Affine, Geometry, Pair, wide
from resnet_fast.ops import conv_output, pooled
from resnet_fast.training import chain_of

_aten, _ours = torch.ops.aten, torch.ops.resnet_fast


@dataclass(frozen=True)
class Move:
    """One operation's bytes.

    Attributes:
        block: path of the module whose forward it is part of; "" for the model itself.
        read, written: of images, ``[N, C, H, W]``.
        other: read and written of everything else: weights, vectors of channels, statistics, logits.
    """

    block: str
    op: str
    read: int
    written: int
    other: int

    @property
    def images(self) -> int:
        return self.read + self.written


def compare(model: nn.Module, shape: Any, dtype: torch.dtype) -> dict[str, list[Move]]:
    """What ``model(images)`` moves, operation by operation: "stock", and accelerated, "ours".

    Args:
        model: a stock one, in the mode that it is to be counted in.
        shape: of the images, ``[N, C, H, W]``.
        dtype: of images, weights and vectors alike.
    """
    return {
        "stock": _count(copy.deepcopy(model), shape, dtype),
        "ours": _count(accelerate(model, inplace=False), shape, dtype),
    }


def _count(model: nn.Module, shape: Any, dtype: torch.dtype) -> list[Move]:
    model = model.to("meta", dtype)
    images = torch.empty(shape, dtype=dtype, device="meta", memory_format=torch.channels_last)
    with torch.no_grad(), _Counter(model) as counter:
        model(images)
    return counter.moves


def blocks(moves: list[Move]) -> dict[str, int]:
    """Bytes of images by block, in order; the stem is left out, and with it what else has parameters outside blocks.

    The pooling at the end has none, and counts with the last block.
    """
    found: dict[str, int] = {}
    for move in moves:
        if move.block:
            found[move.block] = found.get(move.block, 0) + move.images
    return found


class _Counter(TorchDispatchMode):
    """Sees every operation below autograd. One without parameters belongs to the block of the one before."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.moves: list[Move] = []
        self._owners = dict(_owners(model))
        self._block = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        self._block = next((self._owners[id(t)] for t in given if id(t) in self._owners), self._block)
        if func is _ours.residual_block.default:
            x, residual, *rest = args
            self._count_chain(chain_of(*rest), x, residual)
        elif not func.is_view and func is not _aten.detach.default:
            made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
            self._count(func, args, given, made)
        return result

    def _count(self, func: Any, args: Any, given: list[Tensor], made: list[Tensor]) -> None:
        sizes = [(tensor, tensor.nbytes) for tensor in given]
        if func is _aten.convolution.default:
            x, weight, _, stride, *_ = args
            sizes[0] = x, _needed(x, weight, stride, made[0].shape)
        elif func is _aten.native_batch_norm.default and args[5]:
            sizes.append((args[0], args[0].nbytes))
        read = sum(size for tensor, size in sizes if tensor.dim() == 4 and id(tensor) not in self._owners)
        written = sum(tensor.nbytes for tensor in made if tensor.dim() == 4)
        every = sum(size for _, size in sizes) + sum(tensor.nbytes for tensor in made)
        if every:
            self.moves.append(Move(self._block, func.overloadpacket.__name__, read, written, every - read - written))

    def _count_chain(self, chain: chains.Chain, x: Tensor, residual: Optional[Tensor]) -> None:
        def real(tensor: Tensor) -> Tensor:
            return torch.zeros(tensor.shape, dtype=tensor.dtype)

        # The images have no data, but what is decided by statistics needs some: of zeros, none are lost.
        layers = [
            layer._replace(weight=real(layer.weight), scale=real(layer.scale), shift=real(layer.shift))
            for layer in chain.layers
        ]
        counting = _Primitives(self._block, self.moves)
        with torch.utils._python_dispatch._disable_current_modes():
            chains.forward(chain._replace(layers=tuple(layers)), x, residual, counting.pick)


def _owners(model: nn.Module) -> Iterator[tuple[int, str]]:
    """The block of every parameter: the innermost module around the layer that has it which is no Sequential."""
    for path, module in model.named_modules():
        above = path
        while above:
            above = above.rpartition(".")[0]
            if not isinstance(model.get_submodule(above), (nn.Sequential, nn.ModuleList)):
                break
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            yield id(tensor), above


def _needed(x: Tensor, weight: Tensor, stride: Any, out: Any) -> int:
    """Bytes of the pixels of ``x`` that a convolution reads."""
    n, c, *size = x.shape
    h, w = (min(size[i], out[2 + i] * weight.shape[2 + i]) for i in range(2))
    return n * c * h * w * x.itemsize


class _Primitives:
    """The forward primitives of ``reference_training.py`` by their operands' sizes alone."""

    def __init__(self, block: str, moves: list[Move]) -> None:
        self._block, self._moves = block, moves

    def pick(self, case: Case) -> "_Primitives":
        return self

    def conv_statistics(
        self, x: Tensor, prologue: Optional[Affine], weight: Tensor, geometry: Geometry
    ) -> tuple[Tensor, Tensor, Tensor]:
        y = self._convolved(x, weight, geometry)
        mean, variance = torch.zeros(2, y.shape[1], dtype=wide(x))
        self._move("conv_statistics", _needed(x, weight, geometry.stride, y.shape), y, prologue, weight, mean, variance)
        return y, mean, variance

    def gram(self, x: Tensor, prologue: Optional[Affine], stride: Pair) -> tuple[Tensor, Tensor]:
        c = x.shape[1]
        statistics = torch.zeros(1 + c, c, dtype=wide(x))
        self._move("gram", x[:, :, :: stride[0], :: stride[1]].nbytes, None, prologue, statistics)
        return statistics[0], statistics[1:]

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
        y = self._convolved(x, weight, geometry)
        read = _needed(x, weight, geometry.stride, y.shape) + (0 if residual is None else residual.nbytes)
        self._move("conv_affine", read, y, prologue, weight, affine)
        return y

    def tail(
        self, y: Tensor, affine: Affine, residual: Optional[Tensor], residual_affine: Optional[Affine], relu: bool
    ) -> Tensor:
        read = y.nbytes + (0 if residual is None else residual.nbytes)
        self._move("tail", read, y, affine, residual_affine)
        return torch.empty_like(y)

    def tail_pool(self, y: Tensor, affine: Affine) -> Tensor:
        n, c, h, w = y.shape
        out = y.new_empty(n, c, pooled(h), pooled(w))
        self._move("tail_pool", y.nbytes, out, affine)
        return out

    def _convolved(self, x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
        return x.new_empty(conv_output(x.shape, weight.shape, *geometry[:3]))

    def _move(self, op: str, read: int, out: Optional[Tensor], *others: Any) -> None:
        other = sum(leaf.nbytes for leaf in tree_leaves(others) if isinstance(leaf, Tensor))
        self._moves.append(Move(self._block, op, read, 0 if out is None else out.nbytes, other))
