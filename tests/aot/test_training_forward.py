"""The forward pass of training, compiled for its targets from the very plans that would be launched. No GPU is used.

Compiled here: one launch of every kernel, tile and set of flags in fp16; in the other precisions those with a prologue
and the Gram matrices, for what they compute besides a convolution depends on the dtype.
"""

import functools

import pytest

from tests.aot.checks import Compiler, Result, narrow, offenders, spills, too_large, wrong_units
from tests.aot.layers import ARCHITECTURES, PRECISIONS, one_per_tile
from tests.aot.training_layers import forward_launches

TARGETS = [(a, p) for a in ARCHITECTURES for p in PRECISIONS if not (a.startswith("gfx") and p == "tf32")]

each_target = pytest.mark.parametrize(("architecture", "precision"), TARGETS)


@pytest.fixture(scope="module")
def results():
    """A function that compiles for a target, once."""
    with Compiler() as compiler:

        @functools.cache
        def all_of(architecture: str, precision: str) -> list[Result]:
            found = one_per_tile(forward_launches(architecture, precision))
            if precision != "fp16":
                found = [one for one in found if one.plan.constants.get("PROLOGUE") or "BP" in one.plan.constants]
            return compiler.results(found)

        yield all_of


@each_target
def test_compiles(results, architecture, precision):
    found = results(architecture, precision)
    assert len(found) >= 5
    assert not [item.name for item, compiled in found if compiled is None]


@each_target
def test_no_register_spills(results, architecture, precision):
    assert not offenders(results(architecture, precision), spills)


@each_target
def test_a_program_fits_the_multiprocessor(results, architecture, precision):
    assert not offenders(results(architecture, precision), too_large)


@each_target
def test_tensor_cores(results, architecture, precision):
    """Used by every convolution and Gram matrix, but in float32 on NVIDIA, where only TF32 convolutions do."""
    assert not offenders(results(architecture, precision), wrong_units)


@each_target
def test_loads_are_16_bytes_wide(results, architecture, precision):
    assert not offenders(results(architecture, precision), narrow)
