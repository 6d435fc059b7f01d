"""Every shipped kernel and tile, compiled for its targets from the very plans that would be launched. No GPU is used.

Compiled here: one launch of every kind (layers.py) in fp16; in bf16, TF32 and fp32, whose kernels differ from those in
instructions but not in structure, one for every tile and kernel height, with and without a residual. Left out: layers
that differ from a compiled one in their numbers of channels only. ``python -m tests.aot.report --all`` compiles those.
"""

import functools
from collections.abc import Callable

import pytest
import torch

from resnet_fast.kernels.triton import launch, tiles
from tests.aot.checks import SHARED_MEMORY, Compiler, Result, narrow, offenders, spills, too_large, wrong_units
from tests.aot.layers import ARCHITECTURES, Launch, launches, one_per_tile, representative
from tests.aot.offline import Worker

CHOICES: dict[str, Callable[[list[Launch]], list[Launch]]] = {
    "fp16": representative,
    "bf16": one_per_tile,
    "tf32": one_per_tile,
    "ieee": one_per_tile,
}
TARGETS = [(a, p) for a in ARCHITECTURES for p in CHOICES if not (a.startswith("gfx") and p == "tf32")]

each_target = pytest.mark.parametrize(("architecture", "precision"), TARGETS)


@pytest.fixture(scope="module")
def results():
    """A function that compiles for a target, once."""
    with Compiler() as compiler:

        @functools.cache
        def all_of(architecture: str, precision: str) -> list[Result]:
            return compiler.results(CHOICES[precision](list(launches(architecture, precision))))

        yield all_of


@each_target
def test_compiles(results, architecture, precision):
    found = results(architecture, precision)
    assert len(found) >= 8
    assert not [item.name for item, compiled in found if compiled is None]


@each_target
def test_no_register_spills(results, architecture, precision):
    assert not offenders(results(architecture, precision), spills)


@each_target
def test_a_program_fits_the_multiprocessor(results, architecture, precision):
    """Triton does not check shared memory when it compiles; a kernel that takes too much fails at its first launch."""
    assert tiles.load(architecture)["shared_memory"] == SHARED_MEMORY[architecture]
    assert not offenders(results(architecture, precision), too_large)


@each_target
def test_tensor_cores(results, architecture, precision):
    """Used by every convolution, but for full-precision float32 on NVIDIA, which has no instruction for it."""
    assert not offenders(results(architecture, precision), wrong_units)


@each_target
def test_loads_are_16_bytes_wide(results, architecture, precision):
    """With channels in multiples of 16 bytes: no copy to shared memory is narrower, and no load is of single halves."""
    assert not offenders(results(architecture, precision), narrow)


@each_target
def test_every_tile_is_in_use(architecture, precision):
    """The data holds no tile that no layer of the models gets."""
    name = "half" if precision in ("fp16", "bf16") else precision
    shipped = {(bm, bn) for bm, bn, *_ in tiles.load(architecture)[name]}
    used = {
        (item.plan.constants["BM"], item.plan.constants["BN"])
        for item in launches(architecture, precision)
        if "BK" in item.plan.constants
    }
    assert shipped == used


# Without gfx11 and gfx12 in float32, for which those have no matrix instructions: compiled from gfx942's tiles, such
# kernels work but spill a few registers.
@pytest.mark.parametrize(
    ("architecture", "precision"),
    [
        *[(a, p) for a in ("sm_86", "sm_89", "sm_120") for p in ("fp16", "tf32", "ieee")],
        *[("gfx90a", p) for p in ("fp16", "ieee")],
        *[(a, "fp16") for a in ("gfx1100", "gfx1201")],
    ],
)
def test_relatives_take_the_tiles_of_their_nearest(architecture, precision):
    """Architectures without tiles of their own: a large 3x3 and a large 1x1 with a residual each."""
    chosen = [
        item
        for item in launches(architecture, precision)
        if "batch 128" in item.name and item.name.startswith(("3x3/1 128->128 28x28 +relu", "1x1/1 64->256 56x56 +res"))
    ]
    assert len(chosen) == 2
    with Worker() as worker:
        for item in chosen:
            made = worker.compile(item.plan, architecture)
            assert made.spilled == 0
            assert made.shared <= SHARED_MEMORY["gfx942" if architecture.startswith("gfx") else "sm_80"]
            assert (made.tensor_core > 0) == (precision != "ieee" or architecture.startswith("gfx"))


def test_nearest_architecture():
    names = [
        "sm_75",
        "sm_80",
        "sm_86",
        "sm_89",
        "sm_90",
        "sm_100",
        "sm_103",
        "sm_110",
        "sm_120",
        "gfx942",
        "gfx950",
        "gfx90a",
        "gfx1100",
    ]
    nearest = [tiles.nearest(name) for name in names]
    assert nearest == [*["sm_80"] * 4, "sm_90", *["sm_100"] * 3, "sm_80", "gfx942", "gfx950", *["gfx942"] * 2]


def test_tiles_follow_the_problem():
    """The largest tile that still gives every multiprocessor a program, cut down to the problem."""
    for architecture in ARCHITECTURES:
        data = tiles.load(architecture)
        largest, last = data["half"][0], data["half"][-1]
        assert list(tiles.pick(architecture, "half", 10**6, 1024, 256, 1)[:2]) == largest[:2]
        assert list(tiles.pick(architecture, "half", 49, 64, 256, 1)[:2]) == last[:2]
        assert tiles.pick(architecture, "half", 10**6, 10, 256, 1).columns == 16
        assert tiles.pick(architecture, "half", 10**6, 1024, 3, 1).reduction == 16
        assert tiles.pick(architecture, "half", 10**6, 1024, 96, 1).reduction == 32


def test_a_tensor_beyond_2_gib_gets_offsets_of_64_bits():
    def plan(batch: int) -> dict:
        x = torch.empty(batch, 64, 128, 128, dtype=torch.float16, device="meta").to(memory_format=torch.channels_last)
        weight = torch.empty(64, 64, 3, 3, dtype=torch.float16, device="meta")
        vector = torch.empty(64, device="meta")
        return launch.plan_conv(
            x, weight, vector, vector, None, (1, 1), (1, 1), (1, 1), 1, True, "sm_90"
        ).constants  # fmt: skip

    assert not plan(2**11 - 1)["INDEX64"]
    assert plan(2**11)["INDEX64"]
