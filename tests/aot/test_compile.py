"""Every shipped kernel and tile, compiled for its targets from the very plans that would be launched. No GPU is used.

Compiled here: some launches that stand for all (``shipped.subset``), or with ``--all`` every binary that ships. A
launch that a check may find fault with is named, with the reason, in exceptions.py.
"""

import pytest
import torch

from resnet_fast.kernels.triton import forward, tiles
from resnet_fast.kernels.triton.cost_model.cost import KINDS
from resnet_fast.utils import compat
from tests.aot import regressions
from tests.aot.checks import narrow, offenders, races, shared_memory, spills, too_large, wrong_units
from tests.aot.exceptions import EXEMPT
from tests.aot.layers import ARCHITECTURES, launches
from tests.aot.make_tiles import BATCHES, KERNEL_OF
from tests.aot.shipped import TARGETS, everything, subset

pytestmark = pytest.mark.timeout(3600)  # the first test of a target waits for all that is compiled for it

each_target = pytest.mark.parametrize("target", TARGETS, ids="-".join)
each_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)


@pytest.fixture(scope="module")
def results(request, compiler, compile_all):
    """A function: what the compiler makes for a target. It starts here, with the targets of all tests that will run."""
    chosen = everything if compile_all else subset().__getitem__
    parameters = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    for target in dict.fromkeys(one["target"] for one in parameters if "target" in one):
        compiler.start(chosen(target))
    return lambda target: compiler.results(chosen(target))


@each_target
def test_compiles(results, target):
    found = results(target)
    assert found
    assert not [item.name for item, compiled in found if compiled is None]


@each_target
def test_no_register_spills(results, target):
    assert not offenders(results(target), spills)


@pytest.mark.parametrize(("architecture", "limit"), [("sm_80", {"maxnreg": 64}), ("gfx942", {"waves_per_eu": 8})])
def test_a_spill_is_seen(compiler, architecture, limit):
    """With few registers, a launch that has enough of them otherwise."""
    plain = next(one for one in launches(architecture, "fp16", (128,)) if one.name.startswith("3x3/1 128->128"))
    short = plain._replace(launch=plain.launch._replace(constants={**plain.launch.constants, **limit}))
    (_, made), (_, with_few) = compiler.results([plain, short])
    assert not spills(plain, made)
    assert with_few.spilled > 100
    assert with_few.local_accesses > 100


@each_target
def test_a_program_fits_the_multiprocessor(results, target):
    """Triton does not check shared memory when it compiles; a kernel that takes too much fails at its first launch."""
    assert not offenders(results(target), too_large)


@each_target
def test_tensor_cores(results, target):
    """Every product uses the instruction that its architecture has for the precision, where it has one."""
    assert not offenders(results(target), wrong_units)


@each_target
def test_loads_are_16_bytes_wide(results, target):
    """In the main loop, with channels in multiples of 16 bytes."""
    assert not offenders(results(target), narrow)


@each_target
def test_no_product_reads_what_is_written(results, target):
    assert not offenders(results(target), races)


@each_target
def test_no_worse_than_recorded(results, target):
    """regressions.py says what counts."""
    assert not regressions.regressions(results(target))


@each_architecture
def test_every_figure_is_of_a_launch(compile_all, architecture):
    if not compile_all:
        pytest.skip("needs --all")
    shipped = [one for target in TARGETS if target[0] == architecture for one in everything(target)]
    assert not regressions.unused(architecture, shipped), regressions.RECORD


@pytest.mark.parametrize("exempt", EXEMPT, ids=lambda one: f"{one.check}-{one.kernel}")
def test_every_exception_is_needed(compiler, compile_all, exempt):
    if not compile_all:
        pytest.skip("needs --all")
    if not exempt.holds():
        pytest.skip(f"holds for Triton {exempt.release}")
    check = {one.__name__: one for one in (spills, too_large, wrong_units, narrow)}[exempt.check]
    covered = [one for target in TARGETS for one in everything(target) if exempt.covers(exempt.check, one)]
    assert any(made is not None and check(one, made) for one, made in compiler.results(covered))


@each_architecture
def test_tiles_state_the_shared_memory(architecture):
    assert tiles.load(architecture)["shared_memory"] == shared_memory(architecture)


@pytest.mark.parametrize(
    ("architecture", "precision"),
    [(a, p) for a in ARCHITECTURES for p in ("fp16", "tf32", "ieee") if (a, p) in TARGETS],
)
def test_every_tile_is_in_use(architecture, precision):
    """The data holds no tile that no layer of the models gets, and none gets another; but the step may be shorter, as
    it is where a convolution has few channels."""
    name = "half" if precision in ("fp16", "bf16") else precision
    constants = ("BM", "BN", "BK", "num_warps", "num_stages", "SPLIT")
    # Where Triton lacks a kernel, that with pointers serves its tiles.
    serves = {"pointers": True, "descriptors": compat.has_descriptors(), "specialised": compat.descriptors_round()}
    shipped = {
        (*tile[:6], tile.kernel if serves[tile.kernel] else "pointers", tile.parts > 1)
        for tile in tiles.listed_tiles(architecture, name)
    }
    used = {
        (
            *map(item.launch.constants.get, constants),
            KERNEL_OF[item.launch.constants.get("SPECIALISE")],
            item.launch.constants.get("PARTS", 1) > 1,
        )
        for item in launches(architecture, precision, BATCHES)
        if "BK" in item.launch.constants
    }
    # One that is to be cut in parts serves short sums whole.
    assert {(*one[:2], *one[3:7]) for one in used} == {(*one[:2], *one[3:7]) for one in shipped}


# Without gfx11 and gfx12 in float32, for which those have no matrix instructions: compiled from gfx942's tiles, such
# kernels work but spill a few registers.
RELATIVES = [
    *[(a, p) for a in ("sm_86", "sm_89", "sm_120") for p in ("fp16", "tf32", "ieee") if a not in ARCHITECTURES],
    *[("gfx90a", p) for p in ("fp16", "ieee")],
    *[(a, "fp16") for a in ("gfx1100", "gfx1201")],
]


@pytest.mark.parametrize(("architecture", "precision"), RELATIVES)
def test_relatives_take_the_tiles_of_their_nearest(compiler, architecture, precision):
    """Architectures without tiles of their own: a large 3x3 and a large 1x1 with a residual each."""
    chosen = [
        item
        for item in launches(architecture, precision)
        if "batch 128" in item.name and item.name.startswith(("3x3/1 128->128 28x28 +relu", "1x1/1 64->256 56x56 +res"))
    ]
    assert len(chosen) == 2
    found = compiler.results(chosen)
    assert all(compiled is not None for _, compiled in found)
    assert not [problem for check in (spills, too_large, wrong_units) for problem in offenders(found, check)]


def test_tiles_of_lists_follow_the_problem():
    """Where there are no classes: the largest tile that still gives every multiprocessor a program, cut down to it."""
    for architecture in ARCHITECTURES:
        listed = tiles.load(architecture)["dgrad_half"]
        assert list(tiles.pick(architecture, "dgrad_half", 10**6, 1024, 256, 1)[:2]) == listed[0][:2]
        assert list(tiles.pick(architecture, "dgrad_half", 49, 64, 256, 1)[:2]) == listed[-1][:2]


@pytest.mark.parametrize("kind", [None, *KINDS])
def test_tiles_are_cut_down_to_the_problem(kind):
    for architecture in ARCHITECTURES:
        assert tiles.pick(architecture, "half", 10**6, 10, 256, 1, kind).columns == 16
        assert tiles.pick(architecture, "half", 10**6, 1024, 3, 1, kind).reduction == 16
        assert tiles.pick(architecture, "half", 10**6, 1024, 96, 1, kind).reduction == 32


def test_a_tensor_beyond_2_gib_gets_offsets_of_64_bits():
    def plan(batch: int) -> dict:
        x = torch.empty(batch, 64, 128, 128, dtype=torch.float16, device="meta").to(memory_format=torch.channels_last)
        weight = torch.empty(64, 64, 3, 3, dtype=torch.float16, device="meta")
        vector = torch.empty(64, device="meta")
        geometry = ((1, 1), (1, 1), (1, 1), 1, True)
        return forward.plan_conv_bn_act(x, weight, vector, vector, None, *geometry, "sm_90").launches[0].constants

    assert not plan(2**11 - 1)["INDEX64"]
    assert plan(2**11)["INDEX64"]
