"""The kernels on 8-bit numbers, compiled from the very plans that would be launched: see test_compile.py."""

import functools

import pytest

from resnet_fast.kernels.triton import tiles
from tests.aot.checks import Compiler, Result, narrow, offenders, spills, too_large, wrong_units
from tests.aot.quantised_layers import TARGETS, launches, representative

# Of these, sm_80's binaries with other scheduling, one stands for all.
_RELATIVES = ("sm_86", "int8"), ("sm_89", "int8")

each_target = pytest.mark.parametrize(("architecture", "precision"), TARGETS)


@pytest.fixture(scope="module")
def results():
    """A function that compiles for a target, once."""
    with Compiler() as compiler:

        @functools.cache
        def all_of(architecture: str, precision: str) -> list[Result]:
            chosen = representative(launches(architecture, precision))
            return compiler.results(chosen[:1] if (architecture, precision) in _RELATIVES else chosen)

        yield all_of


@each_target
def test_compiles(results, architecture, precision):
    found = results(architecture, precision)
    assert len(found) == 1 or len(found) > len(tiles.load(architecture)[precision])
    assert not [item.name for item, compiled in found if compiled is None]


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


@each_target
def test_every_tile_is_in_use(architecture, precision):
    """The data holds no tile that no layer of the models gets."""
    shipped = {(bm, bn) for bm, bn, *_ in tiles.load(architecture)[precision]}
    used = {
        (item.plan.constants["BM"], item.plan.constants["BN"])
        for item in launches(architecture, precision)
        if "BK" in item.plan.constants
    }
    assert shipped == used


def test_no_tiles_of_fp8_where_it_is_refused():
    """sm_80's tiles are also those of sm_89 and sm_120, which have fp8."""
    assert tiles.load("gfx942")["fp8"] == []
    assert ("sm_80", "fp8") not in TARGETS
    assert ("sm_86", "fp8") not in TARGETS
