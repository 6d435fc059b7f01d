"""The kernels with tensor descriptors, executed: the interpreter's tests on what Triton compiled for sm_90."""

import pytest
import torch

from resnet_fast.kernels.triton import descriptor, forward, operands
from resnet_fast.kernels.triton.plan import Plan
from resnet_fast.kernels.triton.tiles import Tile
from resnet_fast.utils import compat
from tests.aot.test_descriptors import NARROW, SMALL, SQUARE, TF32, WIDE
from tests.interpreter import test_triton_descriptors as descriptors
from tests.interpreter.cases import Conv
from tests.ptx.test_tf32 import tf32

if not compat.has_descriptors():
    pytest.skip("this Triton has no tensor descriptors that serve", allow_module_level=True)

ARCHITECTURES = ("sm_90",)
TILES = {
    "wide": WIDE,
    "square": SQUARE,
    "narrow": NARROW,
    "small": SMALL,
    # Rows of 64 and of 32 bytes, of which each has a swizzle of its own.
    "32 channels": NARROW._replace(reduction=32),
    "16 channels": NARROW._replace(reduction=16),
}
# bfloat16 is cut in the same way, and is converted elsewhere.
RUNS = [*((tile, torch.float16) for tile in TILES), ("small", torch.bfloat16)]
each_run = pytest.mark.parametrize(("tile", "dtype"), RUNS, ids=lambda value: str(value).removeprefix("torch."))
each_half = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])


@pytest.fixture(autouse=True)
def _compiled(monkeypatch, architecture):
    def planned(inputs: list, conv: Conv, tile: Tile) -> Plan:
        tile = tile._replace(kernel="descriptors")
        return forward.plan_conv_bn_act(*inputs, *conv.geometry(), architecture, tile=tile)

    monkeypatch.setattr(descriptors, "planned", planned)
    # The interpreter's own tiles are for programs of any size.
    monkeypatch.setattr(descriptors, "DESCRIPTOR_TILES", dict.fromkeys(descriptors.DESCRIPTOR_TILES, NARROW))


@each_run
@pytest.mark.parametrize("name", descriptors.CASES)
def test_right(name, tile, dtype):
    kernel, conv = descriptors.CASES[name]
    descriptors.check(conv.inputs(dtype), conv, TILES[tile], kernel)


@pytest.mark.skipif(not compat.descriptors_round(), reason="this Triton's descriptors do not round to TF32")
@pytest.mark.parametrize("name", descriptors.CASES)
def test_tf32(name):
    """Of numbers that are TF32 already: how the copy engine rounds others is not documented."""
    kernel, conv = descriptors.CASES[name]
    x, weight, *rest = conv.inputs(torch.float32)
    with compat.float32_in_tf32(True):
        descriptors.check([tf32(x), tf32(weight), *rest], conv, TF32, kernel)


@each_run
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("name", ["gemm: a row each", "gemm: without relu", "conv: 7x7, odd outputs", "conv: 5 images"])
def test_any_number_of_programs(name, count, tile, dtype, monkeypatch):
    """A program makes many tiles, one after another, and its mbarriers have many phases."""
    monkeypatch.setattr(descriptor, "programs", lambda work, *_: min(work, count))
    kernel, conv = descriptors.CASES[name]
    conv = conv._replace(n=16 * conv.n)
    descriptors.check(conv.inputs(dtype), conv, TILES[tile], kernel)


@each_half
@pytest.mark.parametrize("name", ["gemm: round", "conv: round"])
def test_offsets_of_64_bits(name, dtype, monkeypatch):
    monkeypatch.setattr(operands, "_INT32_ELEMENTS", 0)
    kernel, conv = descriptors.CASES[name]
    descriptors.check(conv.inputs(dtype), conv, SMALL, kernel)


@each_half
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["gemm: odd outputs", "conv: 7x7, odd outputs"])
def test_nan_and_inf_in_the_image(name, value, dtype):
    descriptors.test_nan_and_inf_in_the_image(name, value, dtype, None)
