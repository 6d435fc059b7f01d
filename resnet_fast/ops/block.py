"""A residual block in training: its layers, its primitives, and what forward keeps for the backward pass.

A block is convolutions in a row, each followed by batch norm and, but for the last, ReLU; its tail adds a shortcut and
applies ReLU, or ReLU and a stem's max-pool. That is a residual block (He et al. 2015), or a stem. Its two passes
(``block_forward.py``, ``block_backward.py``) are composed of the primitives of ``kernels/reference/training.py``.
Forward writes every convolution's raw result once; batch norm and ReLU are applied by whoever reads it. Kept for the
backward pass are those raw results and vectors of channels. Two kinds of layer keep less:

- **frozen**: batch norm by running statistics is part of the convolution; its result is kept, where the ReLU left it.
- **expand**: a 1x1 convolution to at least twice the channels, last in its block or on the shortcut. Its statistics
  come from the mean and covariance of its *input* (``gram``), so that convolution, batch norm, shortcut and ReLU are
  one kernel, and its raw result, the widest tensor of the block, is neither written nor kept. Where the statistics
  lose too many digits that way, they are taken from the result, which backward then makes again (``cancellation.py``).
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Optional

from torch import Tensor

from resnet_fast.kernels.contract import Affine, BatchNorm, Case, Geometry, wide
from resnet_fast.ops.checks import conv_output
from resnet_fast.ops.dispatch import conv_case

EXPANSION = 2
"""Expand layers have at least so many times as many output as input channels, and output pixels as output channels."""


class Layer(NamedTuple):
    """A convolution and its batch norm."""

    weight: Tensor  # [K, C/groups, R, S]
    scale: Tensor  # [K]: gamma, or with frozen statistics what the convolution's result is multiplied by
    shift: Tensor  # [K]: beta, or what is added then
    eps: float
    geometry: Geometry
    batch_statistics: bool

    @property
    def norm(self) -> BatchNorm:
        return BatchNorm(self.scale, self.shift, self.eps)


class Block(NamedTuple):
    """The layers, and what is around them. With ``projection``, the last layer is the shortcut's."""

    layers: tuple[Layer, ...]
    identity: bool  # the shortcut is the block's input
    projection: bool  # the shortcut is a convolution and batch norm, of the residual if there is one, else of the input
    relu: bool
    pool: bool  # a 3x3 max-pool of stride 2 follows the ReLU
    process_group: str  # over which batch statistics are taken; "": this process alone

    @property
    def main(self) -> tuple[Layer, ...]:
        return self.layers[:-1] if self.projection else self.layers


Pick = Callable[[Case], Any]
"""Gives the implementation of a primitive."""


class Primitives:
    """The primitives by name, each run by the implementation that covers the case."""

    def __init__(self, pick: Pick) -> None:
        self._pick = pick

    def conv(self, name: str, x: Tensor, weight: Tensor, geometry: Geometry) -> Callable[..., Any]:
        return getattr(self._pick(conv_case(name, x, weight, geometry)), name)

    def pass_(self, name: str, x: Tensor) -> Callable[..., Any]:
        case = Case(name, x.device.type, x.dtype, x.shape[1], x.shape[1], gpu=x.device.index)
        return getattr(self._pick(case), name)


def output_shape(shape: Any, layer: Layer) -> list[Any]:
    """``[N, K, P, Q]`` of a layer's result for an input of ``shape``."""
    return conv_output(shape, layer.weight.shape, layer.geometry)


def expands(block: Block, layer: Layer, x_shape: Any) -> bool:
    """Whether the layer, at the end of its block or on the shortcut, takes its statistics from its input's.

    Before a pool, which reads raw results, none does.
    """
    if block.pool or not layer.batch_statistics:
        return False
    k, c, r, s = layer.weight.shape
    n, _, p, q = output_shape(x_shape, layer)
    pointwise = r == 1 and s == 1 and layer.geometry.padding == (0, 0) and layer.geometry.groups == 1
    return pointwise and k >= EXPANSION * c and n * p * q >= EXPANSION * k


class Image(NamedTuple):
    """A tensor, and what whoever reads it applies."""

    x: Tensor
    prologue: Optional[Affine] = None


class Norm(NamedTuple):
    """A batch norm's statistics, as backward needs them; ``count`` is the number of values a channel."""

    vectors: Tensor  # [4, K], of which the others are parts
    mean: Tensor
    rstd: Tensor
    affine: Affine
    count: Any  # a number, or with a process group a tensor of one


def norm_of(vectors: Tensor, count: Any) -> Norm:
    mean, rstd, scale, shift = vectors.unbind(0)
    return Norm(vectors, mean, rstd, Affine(scale, shift), count)


# --- what is kept -----------------------------------------------------------------------------------------------------


def saved_shapes(block: Block, x: Any, residual: Any) -> list[Optional[Sequence[Any]]]:
    """Of ``Result.saved``, for inputs of these shapes: of images four numbers, of vectors fewer; None: a CPU flag."""
    shapes: list[Optional[Sequence[Any]]] = []
    shape = x
    for i, layer in enumerate(block.main):
        shapes += _layer_shapes(block, layer, shape, last=i == len(block.main) - 1)
        shape = output_shape(shape, layer)
    if block.projection:
        shapes += _layer_shapes(block, block.layers[-1], x if residual is None else residual, last=True)
    return shapes


def _layer_shapes(block: Block, layer: Layer, x: Any, last: bool) -> list[Optional[Sequence[Any]]]:
    k, c = layer.weight.shape[:2]
    if not layer.batch_statistics:
        return [] if last else [output_shape(x, layer)]
    count: list[Optional[Sequence[Any]]] = [(1,)] if block.process_group else []
    vectors: list[Optional[Sequence[Any]]] = [(4, k), *count]
    if last and expands(block, layer, x):
        return [*vectors, (c,), (c, c), None]
    return [*vectors, output_shape(x, layer)]


def norm_tensors(block: Block, norm: Norm) -> list[Tensor]:
    return [norm.vectors, *([norm.count] if block.process_group else [])]


def matrix(layer: Layer, x: Tensor) -> Tensor:
    """An expand layer's weight ``[K, C]`` as the convolution multiplies by it, in the precision of statistics."""
    return layer.weight.flatten(1).to(x.dtype).to(wide(x))
