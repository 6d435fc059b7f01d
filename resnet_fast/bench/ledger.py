"""Operations by what they move, and the ledger in which a count enters them."""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Optional

from torch import Tensor


class Value(NamedTuple):
    """A tensor, as an operation reads or writes it.

    ``id``: of its contents; views share it, and writing in place makes a new one. ``size``: the bytes that are read or
    written, which may be fewer than it has. ``image``: ``[N, C, H, W]``, and no weight.
    """

    id: int
    shape: tuple[int, ...]
    size: int
    image: bool


class Place(NamedTuple):
    """A place in a model.

    ``block``: path of the module whose forward it is part of; "" for the model itself. ``layer``: path of the
    convolution or linear layer that it belongs to, or follows; "" before any.
    """

    block: str = ""
    layer: str = ""


@dataclass(frozen=True)
class Move:
    """One operation: its operands and results in order, each once for every time that it is read.

    ``flops``: of products of matrices, which convolutions are; a multiplication and an addition are two. ``pointwise``:
    every element of a result depends on one element of each operand.
    """

    place: Place
    op: str
    reads: tuple[Value, ...]
    writes: tuple[Value, ...]
    flops: int = 0
    pointwise: bool = False
    backward: bool = False

    @property
    def block(self) -> str:
        return self.place.block

    @property
    def layer(self) -> str:
        return self.place.layer

    @property
    def read(self) -> int:
        """Bytes of images."""
        return sum(value.size for value in self.reads if value.image)

    @property
    def written(self) -> int:
        """Bytes of images."""
        return sum(value.size for value in self.writes if value.image)

    @property
    def images(self) -> int:
        """Bytes of images, read and written."""
        return self.read + self.written

    @property
    def bytes(self) -> int:
        """Read and written, of everything."""
        return sum(value.size for value in (*self.reads, *self.writes))

    @property
    def other(self) -> int:
        """Bytes, read and written, of what is no image: weights, vectors of channels, statistics, logits."""
        return self.bytes - self.images


@dataclass
class Contents:
    """What a ledger knows of the contents of a tensor.

    ``parameter``: a parameter or buffer, a gradient of one, or made of these alone. ``owner``: of a parameter or
    buffer, its block and its module. ``place``: where it was made, if in this model; ``backward``: by which pass.
    """

    id: int
    parameter: bool = False
    owner: Optional[Place] = None
    place: Optional[Place] = None
    backward: bool = False


class Ledger:
    """The moves so far, and what is known of the tensors: by their memory, so of views the same as of their base.

    Whatever makes a tensor says so (``made``), because memory is used again.
    """

    def __init__(self) -> None:
        self.moves: list[Move] = []
        self.at = Place()  # of the last move
        self.backward = False  # whether the backward pass has begun
        self._known: dict[int, Contents] = {}
        self._ids = itertools.count()

    def contents(self, tensor: Tensor) -> Contents:
        key = _memory(tensor)
        if key not in self._known:
            self._known[key] = Contents(next(self._ids))
        return self._known[key]

    def value(self, tensor: Tensor, size: Optional[int] = None) -> Value:
        """Return the tensor as a value of which ``size`` bytes are moved; None: all."""
        contents = self.contents(tensor)
        image = tensor.dim() == 4 and not contents.parameter
        return Value(contents.id, tuple(tensor.shape), tensor.nbytes if size is None else size, image)

    def values(self, tensors: Iterable[Tensor]) -> list[Value]:
        return [self.value(tensor) for tensor in tensors]

    def made(self, tensor: Tensor, place: Optional[Place] = None, parameter: bool = False) -> Value:
        """Enter the tensor as one whose contents are new."""
        self._known[_memory(tensor)] = Contents(next(self._ids), parameter, None, place, self.backward)
        return self.value(tensor)

    def own(self, tensor: Tensor, owner: Place) -> None:
        """Enter a parameter or buffer of the model."""
        self.made(tensor, None, parameter=True)
        self.contents(tensor).owner = owner

    def alias(self, tensor: Tensor, other: Tensor) -> None:
        """Let the tensor stand for another, in other memory."""
        self._known[_memory(tensor)] = self.contents(other)

    def add(
        self,
        place: Place,
        op: str,
        reads: Sequence[Value],
        writes: Sequence[Value],
        flops: int = 0,
        pointwise: bool = False,
    ) -> None:
        """Enter an operation, unless it moves nothing."""
        self.at = place
        move = Move(place, op, tuple(reads), tuple(writes), flops, pointwise, self.backward)
        if move.bytes:
            self.moves.append(move)

    def belongs(self, index: int, layer: str) -> None:
        """Move the ``index``-th move to another layer."""
        move = self.moves[index]
        self.moves[index] = replace(move, place=move.place._replace(layer=layer))


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def pixels_needed(x: Tensor, weight: Tensor, stride: Sequence[int], out: Sequence[int]) -> int:
    """Return the bytes of the pixels of ``x [N, C, H, W]`` that a convolution to ``out [N, K, P, Q]`` reads."""
    n, c, *size = x.shape
    h, w = (min(size[i], out[2 + i] * weight.shape[2 + i]) for i in range(2))
    return n * c * h * w * x.itemsize
