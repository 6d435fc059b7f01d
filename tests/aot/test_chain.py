"""Chains of two 1x1 convolutions, compiled for their targets from the plans that would be launched. No GPU is used.

Compiled here: where one bottleneck of ResNet-50 meets the next, in every stage that has a tile for it, in fp16 and
TF32; in bf16, which differs in a few conversions, the widest.
"""

import functools
from collections.abc import Iterator

import pytest
import torch

from resnet_fast.kernels.triton import chain_launch, launch, tiles
from tests.aot.checks import Compiler, Result, narrow, offenders, shared_memory, spills, too_large, wrong_units
from tests.aot.layers import ARCHITECTURES, DTYPES, Launch, float32_precision, image
from tests.aot.offline import Worker

STAGES = ((64, 56), (128, 28), (256, 14), (512, 7))  # channels of the narrow side, height and width
TARGETS = [(a, p) for a in ARCHITECTURES for p in ("fp16", "bf16", "tf32") if not (a.startswith("gfx") and p == "tf32")]

each_target = pytest.mark.parametrize(("architecture", "precision"), TARGETS)


def plan(architecture: str, precision: str, width: int, size: int, batch: int = 128) -> launch.Plan:
    dtype = DTYPES[precision]
    with float32_precision(precision):
        x, residual = (image(batch, channels, size, size, dtype) for channels in (width, 4 * width))
        weight, next_weight = (
            torch.empty(*shape, 1, 1, dtype=dtype, device="meta") for shape in ((4 * width, width), (width, 4 * width))
        )
        wide, slim = (torch.empty(channels, device="meta") for channels in (4 * width, width))
        return chain_launch.plan_chain(x, weight, wide, wide, residual, next_weight, slim, slim, architecture)


def covered(architecture: str, precision: str) -> list[tuple[int, int]]:
    name = "tf32" if precision == "tf32" else "half"
    return [stage for stage in STAGES if tiles.pick_chain(architecture, name, stage[0], stage[0])]


def launches(architecture: str, precision: str) -> Iterator[Launch]:
    for width, size in covered(architecture, precision):
        name = f"1x1 {width}->{4 * width}->{width} {size}x{size}"
        yield Launch(name, architecture, precision, plan(architecture, precision, width, size))


@pytest.fixture(scope="module")
def results():
    """A function that compiles for a target, once."""
    with Compiler() as compiler:

        @functools.cache
        def all_of(architecture: str, precision: str) -> list[Result]:
            found = list(launches(architecture, precision))
            return compiler.results(found[-1:] if precision == "bf16" else found)

        yield all_of


@each_target
def test_compiles(results, architecture, precision):
    assert not [item.name for item, compiled in results(architecture, precision) if compiled is None]


@each_target
def test_no_register_spills(results, architecture, precision):
    assert not offenders(results(architecture, precision), spills)


@each_target
def test_a_program_fits_the_multiprocessor(results, architecture, precision):
    assert not offenders(results(architecture, precision), too_large)


@each_target
def test_tensor_cores(results, architecture, precision):
    assert not offenders(results(architecture, precision), wrong_units)


@each_target
def test_loads_are_16_bytes_wide(results, architecture, precision):
    assert not offenders(results(architecture, precision), narrow)


def test_what_is_covered():
    """In half precision the first three stages of ResNet-50; in full float32 nothing."""
    for architecture in ARCHITECTURES:
        assert covered(architecture, "fp16") == list(STAGES[:3])
        assert tiles.pick_chain(architecture, "ieee", 64, 64) is None


def test_every_tile_is_in_use():
    for architecture in ARCHITECTURES:
        for name in ("half", "tf32"):
            shipped = tiles.load(architecture)["chain"][name]
            assert [widest for widest, *_ in shipped] == [w for w, _ in covered(architecture, name)]


@pytest.mark.parametrize("architecture", ["sm_89", "sm_120"])
def test_relatives_take_the_tiles_of_their_nearest(architecture):
    with Worker() as worker:
        (made,) = worker.compile([plan(architecture, "fp16", 256, 14)], architecture)
    assert made.spilled == 0
    assert made.shared <= shared_memory("sm_86")
    assert made.tensor_core > 0
