"""A convolution whose kernel is still to be launched: what forward.py hands to the plan of the kernel that it chose."""

from collections.abc import Callable
from typing import Any, NamedTuple, Optional

from torch import Tensor

from resnet_fast.kernels.contract import Affine, Geometry, Pair
from resnet_fast.kernels.triton import device, operands
from resnet_fast.kernels.triton.cost_model.cost import parts_of
from resnet_fast.kernels.triton.plan import Launch, Plan, ceil_div
from resnet_fast.kernels.triton.split_k import plan_add_parts
from resnet_fast.kernels.triton.tiles import Tile


class Convolution(NamedTuple):
    """``relu(conv(prologue(x)) * scale + shift + residual)``, its operands as kernels read them.

    prologue: the scale and shift of a batch norm and ReLU that x still has to go through. Without scale and shift of
    its own the result is stored as it is, and ``workspaces`` of the plan are its statistics (statistics.py).
    """

    kind: str  # of the matrix product that it is, see cost.KINDS
    size: Pair  # height and width of the image
    image: Callable[[Tensor], Tensor]  # what made x of the image
    x: Tensor  # in NHWC, or as pack.pixels lays it out
    packed: Tensor  # the weight
    kernel: Pair
    scale: Optional[Tensor]
    shift: Optional[Tensor]
    residual: Optional[Tensor]
    prologue: Optional[Affine]
    y: Tensor
    geometry: Geometry  # with merged groups
    relu: bool
    target: str
    tile: Tile

    @property
    def training(self) -> bool:
        """Whether it has a prologue or statistics, which only training asks for."""
        return self.scale is None or self.prologue is not None

    def epilogue(self) -> tuple[Optional[Tensor], ...]:
        """scale, shift, residual, y; some residual is there even where it is not read."""
        return self.scale, self.shift, self.y if self.residual is None else self.residual, self.y

    def constants(self, parts: bool = False) -> dict[str, Any]:
        """Those of the epilogue; parts are stored as they are."""
        return {"HAS_RESIDUAL": self.residual is not None and not parts, "RELU": self.relu and not parts}

    def numbers(self) -> dict[str, Any]:
        """The constants for the precision of products and for the size of offsets."""
        precision = device.dot_precision(self.y.dtype, self.target)
        return {"PRECISION": precision, "INDEX64": operands.index64(self.x, self.y)}


class End(NamedTuple):
    """What a launch does with its tiles: its operands from ``scale`` to ``partials``, and their flags."""

    operands: tuple[Optional[Tensor], ...]
    constants: dict[str, Any]
    parts: int = 1
    workspaces: tuple[Tensor, ...] = ()
    then: tuple[Launch, ...] = ()

    def plan(self, conv: Convolution, launch: Launch) -> Plan:
        """That of ``launch``, which has this end."""
        return Plan((launch, *self.then), conv.y, self.workspaces, None if conv.training else conv.image)


def end_of(conv: Convolution, steps: int) -> End:
    """``steps``: of the loop over taps and channels, which the tile's ``parts`` are to cut.

    Not into more parts than steps; and none is left empty, so that ten steps make five parts of two, not six. Training
    keeps it whole: statistics are of finished tiles, and its batches fill the GPU.
    """
    k = conv.y.shape[1]
    rows = conv.y.numel() // k
    statistics = conv.scale is None
    parts = 1 if conv.training else parts_of(steps, conv.tile.parts)
    constants = {
        "PROLOGUE": conv.prologue is not None,
        "FLIP": operands.flip(conv.prologue, conv.y.dtype, conv.target),
        "STATISTICS": statistics,
        **conv.constants(parts > 1),
        "PARTS": parts,
        **conv.numbers(),
    }
    if parts > 1:
        sums = operands.allocate_floats(conv.y, (parts, rows, k))
        add = plan_add_parts(sums, conv.scale, conv.shift, conv.residual, conv.y, conv.relu, conv.target)
        return End((None, None, None, sums, None, None, None), constants, parts, (sums,), add.launches)
    partials = (operands.allocate_floats(conv.y, (ceil_div(rows, conv.tile.rows), 2, k)),) if statistics else ()
    prologue = conv.prologue or (None, None)
    return End((*conv.epilogue(), *prologue, *(partials or (None,))), constants, workspaces=partials)
