"""Kernels for small maps: convolutions whose inner dimension is cut in parts, and the classifier's head.

test_compile.py compiles the tables' parts, and the heads. Tuning may choose others, of which some are compiled here.
"""

import itertools
from collections.abc import Iterator

import pytest
import torch

from resnet_fast.kernels.triton import forward, tiles
from resnet_fast.kernels.triton.plan import Plan
from resnet_fast.utils import compat
from tests.aot.checks import faults
from tests.aot.head_layers import CHANNELS, CLASSES, IMAGES
from tests.aot.head_layers import plan as plan_head
from tests.aot.layers import DTYPES, REAL, Item, distinct, image, items

TARGETS = [(a, "fp16") for a in ("sm_80", "sm_90", "sm_100", "gfx942")]
TARGETS += [("sm_90", "bf16"), ("sm_90", "tf32"), ("sm_80", "ieee"), ("gfx942", "ieee")]

# c, size, k, kernel, stride, groups, parts: 8 even parts of 9 steps (72), 5 uneven ones, 8 of one step (1x1).
CONVS = [
    (512, 7, 512, 3, 1, 1, 8),
    (256, 14, 512, 3, 2, 1, 5),
    (512, 7, 2048, 1, 1, 1, 8),
    (1024, 7, 1024, 3, 1, 32, 2),
]


def in_parts(architecture: str, precision: str) -> Iterator[Item]:
    dtype = DTYPES[precision]
    with compat.float32_in_tf32(precision == "tf32"):
        for c, size, k, kernel, stride, groups, parts in CONVS:
            x, y = image(1, c, size, size, dtype), image(1, k, 7, 7, dtype)
            weight = torch.empty(k, c // groups, kernel, kernel, dtype=dtype, device="meta")
            vector = torch.empty(k, device="meta")
            pad = kernel // 2
            plan = forward.plan_conv_bn_act(
                x, weight, vector, vector, y, (stride, stride), (pad, pad), (1, 1), groups, True, architecture,
                tile=tile_of(architecture, precision, c // groups)._replace(parts=parts),
            )  # fmt: skip
            name = f"{kernel}x{kernel}/{stride} {c}->{k} {size}x{size} in {parts} parts"
            yield from items(name, architecture, precision, plan)


def tile_of(architecture: str, precision: str, channels: int) -> tiles.Tile:
    """Small, as small maps get them."""
    if precision == "ieee":
        return tiles.Tile(64, 32, 16, 4, 3, False)
    stages = 2 if architecture.startswith("gfx") else 4
    return tiles.Tile(64, 64, min(channels, 64 if precision != "tf32" else 32), 4, stages, False)


@pytest.mark.parametrize(("architecture", "precision"), TARGETS)
def test_convolutions_in_parts(compiler, architecture, precision):
    found = compiler.results(distinct(in_parts(architecture, precision)))
    assert {item.launch.kernel.__name__ for item, _ in found} == {"conv_kernel", "gemm_kernel", "add_parts_kernel"}
    assert not faults(found)


def test_a_convolution_that_is_not_cut_is_one_launch():
    x = image(1, 64, 7, 7, torch.float16)
    vector = torch.empty(64, device="meta")
    weight = torch.empty(64, 64, 3, 3, device="meta")
    geometry = ((1, 1), (1, 1), (1, 1), 1, True)
    tile = tiles.Tile(64, 64, 64, 4, 3, False)
    plan = forward.plan_conv_bn_act(x, weight, vector, vector, None, *geometry, "sm_90", tile=tile)
    (launch,) = plan.launches
    assert (plan.workspaces, launch.constants["PARTS"]) == ((), 1)


def test_adding_parts_fills_the_gpu_with_small_programs():
    """A 7x7 image: 8 rows at a time, where a large one gets the tile of the table."""
    vector = torch.empty(512, device="meta")

    def rows(n: int, size: int) -> int:
        x, weight = image(n, 512, size, size, torch.float16), torch.empty(512, 512, 3, 3, device="meta")
        tile = tiles.Tile(64, 64, 64, 4, 3, False, parts=8)
        geometry = ((1, 1), (1, 1), (1, 1), 1, True)
        plan = forward.plan_conv_bn_act(x, weight, vector, vector, None, *geometry, "sm_90", tile=tile)
        (workspace,), (_, add) = plan.workspaces, plan.launches
        assert workspace.shape == (8, n * size * size, 512)
        return add.constants["BM"]

    assert rows(1, 7) == 8
    assert rows(128, 14) == tiles.load("sm_90")["pointwise"][0]


@pytest.mark.parametrize(
    ("channels", "images", "classes", "one"),
    [
        (512, 1, 1000, True),
        (512, 128, 1000, False),
        (2048, 1, 1000, True),
        (2048, 128, 1000, False),
        (2048, 205, 10, True),
        (2048, 206, 10, False),
    ],
)
def test_head_is_one_launch_where_little_is_read_again(channels, images, classes, one):
    """The examples of classifier.py. Else it is a pool and a product, which the tables may cut in parts."""
    plan = plan_head("sm_90", "fp16", images, channels, classes)
    assert _kernels(plan) in ([["head_kernel"]] if one else _POOL_AND_PRODUCT)
    assert plan.result.shape == (images, classes, 1, 1)


@pytest.mark.parametrize("precision", REAL)
def test_the_gate_has_heads_in_one_launch_and_in_several(precision):
    """But one float32 image of ResNet-50 is read again too often for 1000 classes."""
    never_one = [] if precision in ("fp16", "bf16") else [(2048, 1000)]
    for channels, classes in itertools.product(CHANNELS, CLASSES):
        found = [_kernels(plan_head("sm_90", precision, images, channels, classes)) for images in IMAGES]
        assert (["head_kernel"] in found) == ((channels, classes) not in never_one)
        assert any(kernels in _POOL_AND_PRODUCT for kernels in found)


_POOL_AND_PRODUCT = [["average_pool_kernel", "gemm_kernel", *parts] for parts in ([], ["add_parts_kernel"])]


def _kernels(plan: Plan) -> list[str]:
    return [one.kernel.__name__ for one in plan.launches]
