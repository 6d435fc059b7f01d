"""The backward pass of training, compiled for its targets from the very plans that would be launched. No GPU is used.

Compiled here: one launch for every kernel and tile, with all that it can be asked to do besides.
"""

import functools

import pytest
import torch

from resnet_fast.kernels.reference_training import Gate, Geometry
from resnet_fast.kernels.triton import tiles, training_backward
from tests.aot.backward_layers import backward_launches, one_per_tile
from tests.aot.checks import Compiler, Result, narrow, offenders, spills, too_large, wrong_units
from tests.aot.layers import ARCHITECTURES, Launch, image

# bfloat16's kernels are float16's but for the conversions: one architecture shows that they compile as well.
TARGETS = [(a, p) for a in ARCHITECTURES for p in ("fp16", "tf32", "ieee") if not (a.startswith("gfx") and p == "tf32")]
TARGETS.append(("sm_90", "bf16"))

each_target = pytest.mark.parametrize(("architecture", "precision"), TARGETS)


@functools.cache
def all_launches(architecture: str, precision: str) -> list[Launch]:
    return list(backward_launches(architecture, precision))


@pytest.fixture(scope="module")
def results():
    """A function that compiles for a target, once."""
    with Compiler() as compiler:

        @functools.cache
        def all_of(architecture: str, precision: str) -> list[Result]:
            return compiler.results(one_per_tile(all_launches(architecture, precision)))

        yield all_of


@each_target
def test_compiles(results, architecture, precision):
    found = results(architecture, precision)
    assert len(found) >= 10
    assert not [item.name for item, compiled in found if compiled is None]


@each_target
def test_no_register_spills(results, architecture, precision):
    assert not offenders(results(architecture, precision), spills)


@each_target
def test_a_program_fits_the_multiprocessor(results, architecture, precision):
    assert not offenders(results(architecture, precision), too_large)


@each_target
def test_tensor_cores(results, architecture, precision):
    """Used by dgrad and wgrad, but in full-precision float32 on NVIDIA, which has no instruction for it."""
    assert not offenders(results(architecture, precision), wrong_units)


@each_target
def test_loads_are_16_bytes_wide(results, architecture, precision):
    """But wgrad's in TF32, whose instructions want pixels side by side where NHWC has channels: 4 bytes at a time."""
    found = [one for one in results(architecture, precision) if not _wgrad_in_tf32(one)]
    assert not offenders(found, narrow)


def _wgrad_in_tf32(one: Result) -> bool:
    return one.launch.precision == "tf32" and one.launch.plan.kernel.__name__ == "wgrad_kernel"


@pytest.mark.parametrize("kind", ["dgrad", "wgrad"])
@each_target
def test_every_tile_is_in_use(architecture, precision, kind):
    """The data holds no tile that no layer of the models gets."""
    name = f"{kind}_{'half' if precision in ('fp16', 'bf16') else precision}"
    shipped = {tuple(tile[:2]) for tile in tiles.load(architecture)[name]}
    plans = [one.plan for one in all_launches(architecture, precision) if one.plan.kernel.__name__ == f"{kind}_kernel"]
    assert shipped <= {(plan.constants["BM"], plan.constants["BN"]) for plan in plans}


def test_offsets_of_64_bits_beyond_2_gib():
    def constants(batch: int) -> list[dict]:
        x = image(batch, 64, 128, 128, torch.float16)
        weight = torch.empty(64, 64, 3, 3, device="meta")
        geometry = Geometry(padding=(1, 1))
        dgrad = training_backward.plan_dgrad(x, weight, geometry, x, Gate(), None, "sm_90")
        wgrad = training_backward.plan_wgrad(x, x, None, weight.shape, geometry, "sm_90")
        return [steps.plans[0].constants for steps in (dgrad, wgrad)]

    assert not any(one["INDEX64"] for one in constants(2**11 - 1))
    assert all(one["INDEX64"] for one in constants(2**11))
