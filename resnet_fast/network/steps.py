"""What a plan is made of: steps of the native library, the values between them, and the weights that they read."""

from dataclasses import dataclass
from typing import Any, NamedTuple, Optional

from torch import Tensor

from resnet_fast.graph import batch_norm
from resnet_fast.graph.conditions import Path
from resnet_fast.graph.ranges import Ranges
from resnet_fast.kernels.native import abi


class NotPlanned(Exception):
    """Why a module cannot run as one native program."""


@dataclass(eq=False)
class Storage:
    """Memory for ``size`` numbers, float32 or int8 times a ``scale``. Values that are views of one another share it."""

    size: int
    scale: Optional[float] = None

    @property
    def bytes(self) -> int:
        return self.size * self.element

    @property
    def element(self) -> int:
        """Bytes of a number."""
        return 4 if self.scale is None else 1


@dataclass(eq=False, frozen=True)
class Image:
    """A value of the graph: dense float32, ``[N, C, H, W]`` in either order of memory, or ``[N, C]``."""

    shape: tuple[int, ...]
    storage: Storage
    nhwc: bool

    @property
    def in_both_orders(self) -> bool:
        return len(self.shape) != 4 or self.shape[1] == 1 or self.shape[2:] == (1, 1)


class Weights(NamedTuple):
    """What a convolution's or a linear layer's numbers are made of."""

    weight: Tensor
    bias: Optional[Tensor]
    norm: Optional[batch_norm.BatchNorm]


class Pack(NamedTuple):
    """What a convolution reads beside its input."""

    weight: Tensor  # bytes, in the layout of the algorithm
    shift: Tensor  # [K]
    scale: Optional[Tensor] = None  # [K], of an int8 one


@dataclass(eq=False)
class Step:
    """One operation of the native library, before memory is assigned."""

    kind: int
    shape: abi.Shape
    x: Storage
    y: Storage
    residual: Optional[Storage] = None
    # Of a convolution:
    weights: Optional[Weights] = None
    path: Path = ()  # the module
    ranges: Optional[Ranges] = None  # if it is to run in int8
    algorithm: str = ""  # this and the next by ``Steps.prepare``
    pack: Optional[Pack] = None

    @property
    def in_int8(self) -> bool:
        return self.x.scale is not None

    @property
    def factor(self) -> float:
        """What a number of the residual, or of what is quantised and dequantised, is multiplied by."""
        read = self.x if self.residual is None else self.residual
        return (read.scale or 1.0) / (self.y.scale or 1.0)


@dataclass(frozen=True)
class Child:
    """A module as an argument of a call."""

    module: Any
    path: Path


def of_images(shape: abi.Shape, images: int) -> abi.Shape:
    """The same operation on another number of images."""
    copy = abi.Shape.from_buffer_copy(shape)
    copy.n = images
    return copy


def of_int8(shape: abi.Shape) -> abi.Shape:
    """The same operation on images in int8."""
    copy = abi.Shape.from_buffer_copy(shape)
    copy.dtype = abi.INT8
    return copy


def sources(weights: Weights) -> tuple[Tensor, ...]:
    """The tensors that a pack depends on."""
    own = (weights.weight, *([] if weights.bias is None else [weights.bias]))
    return own if weights.norm is None else (*own, *batch_norm.tensors_of(weights.norm))
