"""Kernels for small maps, compiled for their targets from the very plans that would be launched. No GPU is used.

Convolutions of small images whose inner dimension is cut in parts, with the launch that adds these up; and the
classifier's head, in one launch and in two.
"""

import functools
from collections.abc import Iterator

import pytest
import torch

from resnet_fast.kernels.triton import launch, tiles
from tests.aot.checks import Compiler, Result, narrow, offenders, spills, too_large, wrong_units
from tests.aot.layers import DTYPES, Launch, float32_precision, image

TARGETS = [(a, "fp16") for a in ("sm_80", "sm_90", "sm_100", "gfx942")]
TARGETS += [("sm_90", "bf16"), ("sm_90", "tf32"), ("sm_80", "ieee"), ("gfx942", "ieee")]

each_target = pytest.mark.parametrize(("architecture", "precision"), TARGETS)

# c, size, k, kernel, stride, groups, parts: 8 even parts of 9 steps (72), 5 uneven ones, 8 of one step (1x1).
CONVS = [
    (512, 7, 512, 3, 1, 1, 8),
    (256, 14, 512, 3, 2, 1, 5),
    (512, 7, 2048, 1, 1, 1, 8),
    (1024, 7, 1024, 3, 1, 32, 2),
]
# n, c, k
HEADS = [(1, 512, 1000), (1, 2048, 1000), (64, 2048, 10), (128, 2048, 1000)]


def small_launches(architecture: str, precision: str) -> Iterator[Launch]:
    dtype = DTYPES[precision]
    with float32_precision(precision):
        for c, size, k, kernel, stride, groups, parts in CONVS:
            x, y = image(1, c, size, size, dtype), image(1, k, 7, 7, dtype)
            weight = torch.empty(k, c // groups, kernel, kernel, dtype=dtype, device="meta")
            vector = torch.empty(k, device="meta")
            pad = kernel // 2
            plan = launch.plan_conv(
                x, weight, vector, vector, y, (stride, stride), (pad, pad), (1, 1), groups, True, architecture,
                tile=tile_of(architecture, precision, c // groups)._replace(parts=parts),
            )  # fmt: skip
            for one in plan.launches():
                name = f"{kernel}x{kernel}/{stride} {c}->{k} {size}x{size} in {parts} parts"
                yield Launch(name, architecture, precision, one)
        for n, c, k in HEADS:
            weight, bias = torch.empty(k, c, dtype=dtype, device="meta"), torch.empty(k, dtype=dtype, device="meta")
            for one in launch.plan_head(image(n, c, 7, 7, dtype), weight, bias, architecture).launches():
                yield Launch(f"head {c}->{k} batch {n}", architecture, precision, one)


def tile_of(architecture: str, precision: str, channels: int) -> tiles.Tile:
    """Small, as small maps get them; the tables are tested elsewhere."""
    if precision == "ieee":
        return tiles.Tile(64, 32, 16, 4, 3, False)
    stages = 2 if architecture.startswith("gfx") else 4
    return tiles.Tile(64, 64, min(channels, 64 if precision != "tf32" else 32), 4, stages, False)


@pytest.fixture(scope="module")
def results():
    """A function that compiles for a target, once."""
    with Compiler() as compiler:

        @functools.cache
        def all_of(architecture: str, precision: str) -> list[Result]:
            launches = {one.binary(): one for one in small_launches(architecture, precision)}
            return compiler.results(launches.values())

        yield all_of


@each_target
def test_compiles(results, architecture, precision):
    found = results(architecture, precision)
    assert not [item.name for item, compiled in found if compiled is None]
    kernels = {item.plan.kernel.__name__ for item, _ in found}
    assert kernels == {"conv_kernel", "gemm_kernel", "add_parts_kernel", "head_kernel", "average_pool_kernel"}


@each_target
def test_no_register_spills(results, architecture, precision):
    assert not offenders(results(architecture, precision), spills)


@each_target
def test_a_program_fits_the_multiprocessor(results, architecture, precision):
    assert not offenders(results(architecture, precision), too_large)


@each_target
def test_tensor_cores(results, architecture, precision):
    """Used by every part of a convolution and by the product of a large head; the small head has none to make."""
    assert not offenders(results(architecture, precision), wrong_units)


@each_target
def test_loads_are_16_bytes_wide(results, architecture, precision):
    assert not offenders(results(architecture, precision), narrow)


def test_a_convolution_that_is_not_cut_is_one_launch():
    x = image(1, 64, 7, 7, torch.float16)
    vector = torch.empty(64, device="meta")
    weight = torch.empty(64, 64, 3, 3, device="meta")
    geometry = ((1, 1), (1, 1), (1, 1), 1, True)
    tile = tiles.Tile(64, 64, 64, 4, 3, False)
    plan = launch.plan_conv(x, weight, vector, vector, None, *geometry, "sm_90", tile=tile)
    assert (plan.then, plan.workspace, plan.constants["PARTS"]) == (None, None, 1)


def test_adding_parts_fills_the_gpu_with_small_programs():
    """A 7x7 image: 8 rows at a time, where a large one gets the tile of the table."""
    vector = torch.empty(512, device="meta")

    def rows(n: int, size: int) -> int:
        x, weight = image(n, 512, size, size, torch.float16), torch.empty(512, 512, 3, 3, device="meta")
        tile = tiles.Tile(64, 64, 64, 4, 3, False, parts=8)
        geometry = ((1, 1), (1, 1), (1, 1), 1, True)
        plan = launch.plan_conv(x, weight, vector, vector, None, *geometry, "sm_90", tile=tile)
        assert plan.then is not None
        assert plan.workspace is not None and plan.workspace.shape == (8, n * size * size, 512)
        return plan.then.constants["BM"]

    assert rows(1, 7) == 8
    assert rows(128, 14) == tiles.load("sm_90")["pointwise"][0]


@pytest.mark.parametrize(
    ("channels", "images", "classes", "launches"),
    [
        (512, 1, 1000, 1),
        (512, 128, 1000, 2),
        (2048, 1, 1000, 1),
        (2048, 128, 1000, 2),
        (2048, 205, 10, 1),
        (2048, 206, 10, 2),
    ],
)
def test_head_is_one_launch_where_little_is_read_again(channels, images, classes, launches):
    """The examples of classifier.py."""
    weight = torch.empty(classes, channels, dtype=torch.float16, device="meta")
    plan = launch.plan_head(image(images, channels, 7, 7, torch.float16), weight, None, "sm_90")
    assert len(list(plan.launches())) == launches
    assert plan.output.shape == (images, classes, 1, 1)
