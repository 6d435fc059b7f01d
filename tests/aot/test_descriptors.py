"""The kernels with tensor descriptors, compiled for sm_90 and sm_100 from their plans. No GPU is used.

The tiles here are the ones that are known to compile well, for whoever chooses tiles. The tables name some of
them, which test_compile.py compiles with the models' layers; tuning may choose others.
"""

from typing import Any, Optional

import pytest
import torch

from resnet_fast.kernels.triton import forward, tiles
from resnet_fast.kernels.triton.tiles import Tile
from resnet_fast.utils import compat
from tests.aot.checks import Result, faults, offenders, shared_memory, spills, too_large
from tests.aot.layers import DTYPES, Item, Layer, image, items
from tests.aot.offline import Compiled

EXPAND = Layer(256, 14, 14, 1024, (1, 1), (1, 1), (0, 0), 1, residual=True, relu=True)
ONE_STEP = Layer(64, 56, 56, 256, (1, 1), (1, 1), (0, 0), 1, residual=True, relu=True)
CONV = Layer(256, 14, 14, 256, (3, 3), (1, 1), (1, 1), 1, residual=False, relu=True)
CONV_RESIDUAL = CONV._replace(residual=True)

# All that was compiled without a spill, with a residual and without: rows, columns, reduction, warps, stages, split.
WIDE = Tile(128, 256, 64, 8, 3, True)
SQUARE = Tile(128, 128, 64, 8, 3, False)
NARROW = Tile(128, 64, 64, 4, 4, False)
SMALL = Tile(64, 64, 64, 4, 4, False)
HIGH = Tile(256, 64, 64, 8, 4, False)
TF32 = Tile(128, 128, 32, 8, 4, False)

# architecture, kernel, precision, tile, layer
COMPILED = [
    ("sm_90", "descriptors", "fp16", WIDE, EXPAND),
    ("sm_90", "descriptors", "fp16", WIDE, CONV_RESIDUAL),
    ("sm_90", "descriptors", "fp16", SQUARE, EXPAND),
    ("sm_90", "descriptors", "fp16", NARROW, ONE_STEP),
    ("sm_90", "descriptors", "bf16", SMALL, EXPAND),
    ("sm_90", "descriptors", "tf32", TF32, EXPAND),
    ("sm_100", "specialised", "fp16", HIGH, EXPAND),
    ("sm_100", "specialised", "fp16", HIGH, CONV),
    ("sm_100", "specialised", "fp16", SQUARE, EXPAND),
    ("sm_100", "specialised", "fp16", SQUARE, CONV_RESIDUAL),
    ("sm_100", "specialised", "fp16", NARROW, ONE_STEP),
    ("sm_100", "specialised", "bf16", SMALL, CONV_RESIDUAL),
    ("sm_100", "specialised", "tf32", TF32, CONV),
    ("sm_100", "descriptors", "fp16", SQUARE, EXPAND),
]


def planned(architecture: str, kernel: str, precision: str, tile: Tile, layer: Layer, batch: int = 128) -> Item:
    dtype = DTYPES[precision]
    x = image(batch, layer.c, layer.h, layer.w, dtype)
    weight = torch.empty(layer.k, layer.c, *layer.kernel, dtype=dtype, device="meta")
    vector = torch.empty(layer.k, device="meta")
    residual: Optional[torch.Tensor] = image(batch, layer.k, layer.h, layer.w, dtype) if layer.residual else None
    with compat.float32_in_tf32(precision == "tf32"):
        plan = forward.plan_conv_bn_act(
            x, weight, vector, vector, residual, layer.stride, layer.padding, (1, 1), 1, layer.relu, architecture,
            tile=tile._replace(kernel=kernel),
        )  # fmt: skip
    (item,) = items(f"{kernel} {layer.name()}", architecture, precision, plan)
    return item


@pytest.fixture(scope="module")
def results(compiler) -> list[Result]:
    return compiler.results(planned(*one) for one in COMPILED if _serves(*one))


def _serves(architecture: str, kernel: str, precision: str, *_: Any) -> bool:
    """Whether this Triton has what the kernel asks for."""
    return compat.has_descriptors() and (compat.descriptors_round() or (kernel, precision) == ("descriptors", "fp16"))


def test_all_are_sound_kernels_with_descriptors(results):
    """And the copy engine does all copies: see ``narrow``."""
    assert all("descriptor" in item.launch.kernel.__name__ for item, _ in results)
    assert not faults(results)


def test_as_many_programs_as_run_side_by_side(results):
    """By what the binaries take of shared memory and of registers. One too many would only wait; see ``programs``."""

    def other(item: Item, made: Compiled) -> bool:
        multiprocessors = tiles.load(item.architecture)["multiprocessors"]
        by_memory = shared_memory(item.architecture) // made.shared
        by_registers = 65536 // (made.registers * made.warps * 32)
        return item.launch.grid[0] > multiprocessors * max(1, min(by_memory, by_registers))

    assert not offenders(results, other)


def test_a_refused_tile_serves_the_pointer_kernels(compiler):
    """The tiles above, on the layers above, but with a number of channels that no descriptor takes."""
    refused = [planned(*others, layer._replace(c=layer.c + 4)) for *others, layer in (*COMPILED[:2], COMPILED[6])]
    assert {item.launch.kernel.__name__ for item in refused} == {"gemm_kernel", "conv_kernel"}
    found = compiler.results(refused)
    assert not offenders(found, spills)
    assert not offenders(found, too_large)


@pytest.mark.skipif(not compat.has_descriptors(), reason="this Triton has no tensor descriptors that serve")
@pytest.mark.parametrize("layer", [EXPAND, CONV], ids=["1x1", "3x3"])
def test_an_image_of_2_gib_serves_the_pointer_kernels(layer):
    """Whose tensor map Triton would encode as a small one's, see tests/driver."""
    layer = layer._replace(h=64, w=64)
    image = layer.c * layer.h * layer.w * 2  # bytes
    for batch, described in ((2**31 // image - 1, True), (2**31 // image, False)):
        item = planned("sm_90", "descriptors", "fp16", SQUARE, layer, batch)
        assert ("descriptor" in item.launch.kernel.__name__) == described, batch
