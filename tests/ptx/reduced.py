"""Layers of real models with the tiles that were chosen for them, on images that are small enough to execute.

A kernel is compiled for channels, window and tile; heights, widths and the number of images are arguments. So what runs
here is what ships, but for images of 9x11 pixels, or whatever a window needs.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

from resnet_fast.kernels.triton import tiles
from resnet_fast.kernels.triton.tiles import Tile
from tests.aot.layers import Layer
from tests.interpreter.cases import Conv

_PICK = tiles.pick


class Chosen(NamedTuple):
    """A layer, and the tile that some batch of it gets."""

    architecture: str
    layer: Layer
    precision: str
    tile: Tile

    def name(self) -> str:
        tile = "x".join(map(str, self.tile[:3]))
        parts = f" in {self.tile.parts} parts" if self.tile.parts > 1 else ""
        kernel = "" if self.tile.kernel == "pointers" else f" {self.tile.kernel}"
        run = f"w{self.tile.warps}s{self.tile.stages}{parts}{kernel}"
        return f"{self.architecture} {self.precision} {self.layer.name()} {tile} {run}"

    def conv(self, images: int = 3) -> Conv:
        one = self.layer
        height, width = (9, 11) if one.kernel[0] < 7 else (21, 17)
        return Conv(
            images, one.c, height, width, one.k, one.kernel, one.stride, one.padding, (1, 1), one.groups,
            one.residual, one.relu,
        )  # fmt: skip


@contextlib.contextmanager
def forced(tile: Tile) -> Iterator[None]:
    with mock.patch.object(tiles, "pick", return_value=tile):
        yield


def picked(plan: Callable[[], Any]) -> Tile:
    """The tile that a plan asks for; of several plans, the last."""
    found = []

    def note(*problem: Any) -> Tile:
        found.append(_PICK(*problem))
        return found[-1]

    with mock.patch.object(tiles, "pick", note):
        plan()
    return found[-1]


def cheapest(all_chosen: list[Chosen]) -> list[Chosen]:
    """Of each architecture, precision, kind of convolution and tile, the layer with the fewest products."""
    found: dict[tuple, Chosen] = {}
    for one in sorted(all_chosen, key=_products):
        layer = one.layer
        kind = layer.kernel, layer.stride, layer.groups > 1, layer.residual
        found.setdefault((one.architecture, one.precision, kind, one.tile), one)
    return list(found.values())


def _products(one: Chosen) -> int:
    layer = one.layer
    return layer.c // layer.groups * layer.k * layer.kernel[0] * layer.kernel[1]
