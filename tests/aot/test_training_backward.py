"""The backward kernels of training, compiled for their targets from the very plans that would be launched.

As test_compile.py, whose limits these are: one launch for every kernel and tile.
"""

import functools

import pytest
import torch

from resnet_fast.kernels.reference_training import Gate, Geometry
from resnet_fast.kernels.triton import tiles, training_backward
from tests.aot.backward_layers import launches, one_per_tile
from tests.aot.layers import ARCHITECTURES, Launch, image
from tests.aot.offline import Compiled, Worker, lanes
from tests.aot.test_compile import REGISTERS, SHARED_MEMORY, Result, offenders

# bfloat16's kernels are float16's but for the conversions: one architecture shows that they compile as well.
TARGETS = [(a, p) for a in ARCHITECTURES for p in ("fp16", "tf32", "ieee") if not (a.startswith("gfx") and p == "tf32")]
TARGETS.append(("sm_90", "bf16"))

each_target = pytest.mark.parametrize(("architecture", "precision"), TARGETS)


@pytest.fixture(scope="module")
def results():
    """A function that compiles for a target, once. A crash of the compiler is an error of the test."""
    with Worker() as worker:

        @functools.cache
        def all_of(architecture: str, precision: str) -> list[Result]:
            chosen = one_per_tile(launches(architecture, precision))
            return [Result(one, worker.compile(one.plan, architecture)) for one in chosen]

        yield all_of


@each_target
def test_no_register_spills(results, architecture, precision):
    assert not offenders(results(architecture, precision), lambda _, made: made.spilled > 0 or made.local_accesses > 0)


@each_target
def test_a_program_fits_the_multiprocessor(results, architecture, precision):
    registers = REGISTERS["gfx" if architecture.startswith("gfx") else "sm"]

    def too_large(_: Launch, made: Compiled) -> bool:
        return (
            made.shared > SHARED_MEMORY[architecture] or made.registers * made.warps * lanes(architecture) > registers
        )

    assert not offenders(results(architecture, precision), too_large)


@each_target
def test_tensor_cores(results, architecture, precision):
    """Used by dgrad and wgrad, but for full-precision float32 on NVIDIA, which has no instruction for it."""
    expected = precision != "ieee" or architecture.startswith("gfx")

    def wrong(item: Launch, made: Compiled) -> bool:
        return (made.tensor_core > 0) != (expected and "BK" in item.plan.constants)

    assert not offenders(results(architecture, precision), wrong)


@each_target
def test_loads_are_16_bytes_wide(results, architecture, precision):
    """No kernel reads single halves: the channels of all layers come in multiples of 16 bytes."""

    def narrow(_: Launch, made: Compiled) -> bool:
        return made.wide_loads == 0 or made.tiny_loads > 0

    assert not offenders(results(architecture, precision), narrow)


@pytest.mark.parametrize("kind", ["dgrad", "wgrad"])
@each_target
def test_every_tile_is_in_use(architecture, precision, kind):
    """The data holds no tile that no layer of the models gets."""
    name = f"{kind}_{'half' if precision in ('fp16', 'bf16') else precision}"
    shipped = {tuple(tile[:2]) for tile in tiles.load(architecture)[name]}
    found = [one.plan for one in launches(architecture, precision) if one.plan.kernel.__name__ == f"{kind}_kernel"]
    assert shipped <= {(plan.constants["BM"], plan.constants["BN"]) for plan in found}


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
