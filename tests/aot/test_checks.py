"""The checks themselves, on figures that are made up: each finds what it is there to find, and nothing else."""

import json
from collections.abc import Hashable
from typing import Any

import pytest
import torch

from resnet_fast.kernels.triton import forward, tiles
from tests.aot import regressions
from tests.aot.assembly import Loop
from tests.aot.backward_layers import backward_launches
from tests.aot.checks import Result, narrow, offenders, races, resident_programs, spills, too_large, wrong_units
from tests.aot.exceptions import EXEMPT
from tests.aot.layers import EIGHT_BITS, Item, distinct, image, items, launches
from tests.aot.offline import Compiled
from tests.aot.shipped import TARGETS, _form, everything, subset
from tests.aot.training_layers import forward_launches

GOOD = Compiled(
    registers=128,
    spilled=0,
    local_accesses=0,
    shared=98304,
    tensor_memory=0,
    warps=8,
    tensor_core=4,
    units=frozenset({"HGMMA.64x128x16.F32"}),
    wide_loads=16,
    narrow_loads=4,
    narrow_copies=0,
    tiny_loads=0,
    instructions=500,
    descriptor_loads=0,
    thread_copies=16,
    loop=Loop(instructions=100, products=4, rolled=True, wide_loads=8, narrow_loads=0),
    hazards=(),
)


def first(architecture: str, precision: str, kernel: str = "conv_kernel", **constants: Any) -> Item:
    """A launch with many channels, of a tile of 128 x 128 x 64 unless ``constants`` say otherwise."""
    one = next(
        one
        for one in everything((architecture, precision))
        if one.launch.kernel.__name__ == kernel and one.launch.constants["C"] % 16 == 0
    )
    tile = {"PROLOGUE": False, "BM": 128, "BN": 128, "BK": 64}
    return one._replace(launch=one.launch._replace(constants={**one.launch.constants, **tile, **constants}))


def test_spills():
    one = first("sm_90", "fp16")
    assert not spills(one, GOOD)
    assert spills(one, GOOD._replace(spilled=8))
    assert spills(one, GOOD._replace(local_accesses=1))


def test_races():
    one = first("sm_90", "fp16")
    assert not races(one, GOOD)
    assert races(one, GOOD._replace(hazards=("MOV R4, R8 after HGMMA",)))


def test_too_large():
    one = first("sm_90", "fp16")
    assert not too_large(one, GOOD._replace(shared=232448, registers=255))
    assert too_large(one, GOOD._replace(shared=232449))
    assert too_large(one, GOOD._replace(registers=255, warps=16))
    assert too_large(one, GOOD._replace(registers=32, warps=33))
    assert too_large(one, GOOD._replace(tensor_memory=513))
    assert too_large(one._replace(launch=one.launch._replace(grid=(1, 65536))), GOOD)


@pytest.mark.parametrize(
    ("architecture", "registers", "warps", "shared", "programs"),
    [
        # Up to 128 registers, two programs of 8 warps share the 16 warps that the registers suffice for.
        ("sm_90", 128, 8, 1000, 2),
        ("sm_90", 129, 8, 1000, 1),
        ("sm_90", 169, 4, 1000, 2),  # as much as 176
        # 228 KiB of shared memory, of which every program takes 1 KiB more than it asks for.
        ("sm_90", 32, 4, 75 * 1024, 3),
        ("sm_90", 32, 4, 75 * 1024 + 1, 2),
        ("sm_90", 16, 4, 0, 16),  # 2048 threads
        ("gfx942", 128, 8, 32768, 2),
        ("gfx942", 136, 8, 32768, 1),
        ("gfx942", 64, 4, 32769, 1),
    ],
)
def test_resident_programs(architecture, registers, warps, shared, programs):
    assert resident_programs(architecture, GOOD._replace(registers=registers, warps=warps, shared=shared)) == programs


@pytest.mark.parametrize(
    ("architecture", "precision", "right", "wrong"),
    [
        ("sm_80", "fp16", "HMMA.16816.F32", "HMMA.16816.F16"),
        ("sm_80", "bf16", "HMMA.16816.F32.BF16", "HMMA.16816.F32"),
        ("sm_80", "tf32", "HMMA.1688.F32.TF32", "HMMA.16816.F32"),
        ("sm_90", "fp16", "HGMMA.64x256x16.F32", "HMMA.16816.F32"),
        ("sm_90", "fp16", "HGMMA.64x256x16.F32", "HGMMA.64x256x16.F32.BF16"),
        ("sm_90", "bf16", "HGMMA.64x64x16.F32.BF16", "HGMMA.64x64x16.F32"),
        ("sm_100", "fp16", "UTCHMMA", "HMMA.16816.F32"),
        ("gfx942", "bf16", "v_mfma_f32_32x32x8_bf16", "v_mfma_f32_32x32x8_f16"),
        ("gfx950", "fp16", "v_mfma_f32_32x32x16_f16", "v_mfma_f32_32x32x16_bf16"),
        ("gfx942", "ieee", "v_mfma_f32_32x32x2_f32", "v_mfma_f32_32x32x4_xf32"),
    ],
)
def test_wrong_units(architecture, precision, right, wrong):
    one = next(one for one in everything((architecture, precision)) if one.launch.kernel.__name__ == "conv_kernel")
    assert not wrong_units(one, GOOD._replace(units=frozenset({right})))
    assert wrong_units(one, GOOD._replace(units=frozenset({right, wrong})))
    assert wrong_units(one, GOOD._replace(units=frozenset()))


def test_no_units_where_there_is_nothing_to_multiply():
    pool = next(one for one in launches("sm_90", "fp16") if one.launch.kernel.__name__ == "max_pool_kernel")
    exact = next(one for one in launches("sm_90", "ieee") if one.launch.kernel.__name__ == "conv_kernel")
    gram = next(one for one in everything(("sm_90", "tf32")) if one.launch.kernel.__name__ == "gram_kernel")
    for one in (pool, exact, gram):
        assert wrong_units(one, GOOD)
        assert not wrong_units(one, GOOD._replace(units=frozenset()))


def test_narrow():
    one = first("sm_90", "fp16")
    assert not narrow(one, GOOD)
    assert narrow(one, GOOD._replace(tiny_loads=1))
    assert narrow(one, GOOD._replace(loop=GOOD.loop._replace(wide_loads=0)))
    assert narrow(one, GOOD._replace(loop=GOOD.loop._replace(narrow_loads=1)))
    # Unrolled, what comes after the products is among them.
    unrolled = GOOD._replace(loop=GOOD.loop._replace(rolled=False, narrow_loads=1))
    assert not narrow(one, unrolled)
    assert not narrow(first("sm_90", "fp16", PROLOGUE=True), unrolled._replace(narrow_copies=1))
    assert narrow(one, unrolled._replace(narrow_copies=1))
    # A tile of 32 x 32 halves is 8 bytes for each of 256 threads.
    small = first("gfx942", "fp16", BN=32, BK=32)
    assert not narrow(small, GOOD._replace(warps=4, loop=GOOD.loop._replace(narrow_loads=1)))
    # One of 64 x 32 bytes, and the other operand's 32 x 32, have nowhere 16 bytes for each.
    none = GOOD._replace(warps=4, loop=GOOD.loop._replace(wide_loads=0, narrow_loads=3))
    bytes_ = first("gfx950", "int8", "conv_quantised_kernel", BM=64, BN=32, BK=32)
    assert not narrow(bytes_, none)
    assert narrow(bytes_, none._replace(tiny_loads=1))
    assert narrow(first("gfx950", "int8", "conv_quantised_kernel", BM=128, BN=32, BK=32), none)


def test_narrow_of_descriptors():
    """Both operands by the copy engine, nothing by threads; the epilogue's loads are part of a loop over tiles."""
    x, vector = image(128, 256, 14, 14, torch.float16), torch.empty(512, device="meta")
    weight = torch.empty(512, 256, 1, 1, dtype=torch.float16, device="meta")
    tile = tiles.Tile(128, 128, 64, 8, 3, False, "descriptors")
    geometry = ((1, 1), (0, 0), (1, 1), 1, True)
    plan = forward.plan_conv_bn_act(x, weight, vector, vector, None, *geometry, "sm_90", tile=tile)
    (one,) = items("1x1", "sm_90", "fp16", plan)
    made = GOOD._replace(descriptor_loads=2, thread_copies=0, loop=GOOD.loop._replace(narrow_loads=32))
    assert not narrow(one, made)
    assert narrow(one, made._replace(descriptor_loads=1))
    assert narrow(one, made._replace(thread_copies=1))


def test_exceptions_are_named():
    one = first("sm_90", "tf32", "wgrad_kernel")
    bad = Result(one, GOOD._replace(tiny_loads=1, spilled=8))
    assert not offenders([bad], narrow)
    assert len(offenders([bad], spills)) == 1
    other = Result(first("sm_90", "tf32"), bad.compiled)
    assert len(offenders([other], narrow)) == 1
    assert all(len(exempt.reason) > 20 for exempt in EXEMPT)


def test_regressions():
    before = regressions.figures(GOOD)
    assert before == (128, 98304, 100, 4)
    slower = GOOD._replace(loop=GOOD.loop._replace(instructions=106))
    (message,) = regressions.compare(before, slower, "sm_90")
    assert "100/4 = 25.0 before, 106/4 = 26.5 now" in message
    assert not regressions.compare(before, GOOD._replace(loop=GOOD.loop._replace(instructions=105)), "sm_90")
    # Unrolled twice, with as many instructions to a product.
    assert not regressions.compare(before, GOOD._replace(loop=Loop(200, 8, True, 16, 0)), "sm_90")
    assert regressions.compare(before, GOOD._replace(loop=Loop(100, 0, True, 16, 0)), "sm_90")
    assert not regressions.compare(before, GOOD._replace(registers=120), "sm_90")
    (message,) = regressions.compare(before, GOOD._replace(registers=129), "sm_90")
    assert "2 before, 1 now; 128 registers and 98304 bytes of shared memory before, 129 and 98304 now" in message
    # 150 registers or 160: one program either way.
    assert not regressions.compare(before._replace(registers=150), GOOD._replace(registers=160), "sm_90")


@pytest.fixture
def table(tmp_path, monkeypatch):
    """A folder of its own for the figures."""
    monkeypatch.setattr(regressions, "FOLDER", tmp_path / "expected")
    regressions.forget()
    yield tmp_path / "expected" / "sm_90.json"
    regressions.forget()


def test_a_table_comes_back_as_it_was_written(table):
    one = first("sm_90", "fp16")
    (message,) = regressions.regressions([Result(one, GOOD)])
    assert message.endswith(f"no figures; {regressions.RECORD}")
    regressions.save("sm_90", {one.entry(): regressions.figures(GOOD), "gone": regressions.figures(GOOD)})
    assert not regressions.regressions([Result(one, GOOD)])
    assert len(regressions.regressions([Result(one, GOOD._replace(registers=129))])) == 1
    assert regressions.unused("sm_90", [one]) == ["gone"]
    assert len(table.read_text().splitlines()) == 2 + 2 + 3  # one line for each binary


def test_another_triton_is_not_compared(table):
    one = first("sm_90", "fp16")
    regressions.save("sm_90", {one.entry(): regressions.figures(GOOD)})
    table.write_text(json.dumps({**json.loads(table.read_text()), "triton": "3.7.1"}))
    regressions.forget()
    with pytest.raises(pytest.skip.Exception, match=r"3\.7\.1"):
        regressions.regressions([Result(one, GOOD._replace(registers=129))])


def test_an_entry_says_all_that_the_compiler_is_told():
    one = first("sm_90", "fp16")
    launch = one.launch
    names = {
        one.entry(),
        first("sm_90", "bf16").entry(),
        one._replace(launch=launch._replace(args=(*launch.args[:-3], 16, *launch.args[-2:]))).entry(),
        one._replace(launch=launch._replace(args=(*launch.args[:-3], 1, *launch.args[-2:]))).entry(),
        *(
            one._replace(launch=launch._replace(constants={**launch.constants, name: value + 1})).entry()
            for name, value in launch.constants.items()
            if type(value) is int
        ),
        *(
            one._replace(launch=launch._replace(constants={**launch.constants, name: not value})).entry()
            for name, value in launch.constants.items()
            if type(value) is bool
        ),
    }
    assert len(names) == 4 + sum(type(value) in (int, bool) for value in launch.constants.values())
    # An argument that the kernel does not specialise on, N.
    assert one._replace(launch=launch._replace(args=(*launch.args[:9], 16, *launch.args[10:]))).entry() == one.entry()
    assert launch.args[9].__class__ is int and torch.is_tensor(launch.args[0])


def test_every_launch_has_a_form_that_is_made():
    """Layers that differ in their channels alone share one, of which the one with most channels is made."""
    target = ("sm_90", "fp16")
    made = {_form(one): one for one in everything(target)}
    planned = [*launches(*target), *forward_launches(*target), *backward_launches(*target)]
    assert {_form(one) for one in planned} <= made.keys()
    assert len(made) == len(everything(target)) < len(distinct(planned)) / 2
    for one in planned:
        longest = made[_form(one)].launch.constants.get("C", 0)
        assert one.launch.constants.get("C", 0) <= longest


def test_what_the_compiler_treats_otherwise_is_another_form():
    one = first("sm_90", "fp16", C=1024, K=1024)
    constants = one.launch.constants

    def with_constants(**changed) -> Hashable:
        return _form(one._replace(launch=one.launch._replace(constants={**constants, **changed})))

    tile = {name: constants[name] for name in ("BN", "BK")}
    assert with_constants(C=constants["C"] + tile["BK"], K=constants["K"] + tile["BN"]) == _form(one)
    others = {
        with_constants(**changed)
        for changed in (
            {"HAS_RESIDUAL": not constants["HAS_RESIDUAL"]},
            {"SPLIT": not constants["SPLIT"]},
            {"R": constants["R"] + 1},
            {"num_stages": constants["num_stages"] + 1},
            {"GROUPS": 2},
            {"PARTS": 2},
            {"C": constants["C"] + 1},
            {"C": constants["C"] + 16},
            {"C": tile["BK"]},
            {"K": constants["K"] + 1},
        )
    }
    assert len(others) == 10
    assert _form(one) not in others


def test_the_subset_holds_every_kernel_precision_architecture_and_tile():
    chosen = [one for some in subset().values() for one in some]
    whole = [one for target in TARGETS for one in everything(target)]
    for feature in (
        lambda one: (one.architecture, one.launch.kernel.__name__),
        lambda one: (one.precision, one.launch.kernel.__name__),
        lambda one: (one.architecture, one.precision),
        lambda one: (one.architecture, *(one.launch.constants.get(name) for name in ("BM", "BN", "BK", "num_warps"))),
        lambda one: (one.architecture, one.precision in EIGHT_BITS and (one.precision, one.launch.constants.get("BN"))),
        lambda one: (one.architecture, one.launch.constants.get("BL")),  # of a chain
    ):
        products = [one for one in whole if "BK" in one.launch.constants]
        assert {feature(one) for one in products} <= {feature(one) for one in chosen}
    assert {one.launch.kernel.__name__ for one in whole} == {one.launch.kernel.__name__ for one in chosen}
    assert len(chosen) < len(whole) / 9  # every tile of every table brings one or two, in all about a tenth
