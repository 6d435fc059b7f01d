"""The kernels with tensor descriptors against the definition in float64, every access checked (guard.py).

Each plan is asked for by its tile, and must be of the kernel that is meant: else the pointer kernels would be tested.
"""

import math

import pytest
import torch

from resnet_fast.kernels.reference import inference as reference
from resnet_fast.kernels.triton import conv_descriptor, descriptor, forward, operands
from resnet_fast.kernels.triton.plan import Plan
from resnet_fast.kernels.triton.tiles import Tile
from resnet_fast.utils import compat
from tests.interpreter.cases import DTYPES, SMALL, TILES, Conv, each_dtype
from tests.interpreter.checking import (
    assert_as_good_as_pytorch,
    assert_within,
    conv_exact,
    conv_tolerance,
)

if not compat.has_descriptors():
    pytest.skip("this Triton has no tensor descriptors that serve", allow_module_level=True)

# Together: one tile for all, tiles with tails in every dimension, halves, boxes of one image and of several.
DESCRIPTOR_TILES = {
    "large": Tile(rows=512, columns=128, reduction=64, warps=4, stages=1, split=False, kernel="descriptors"),
    "small": SMALL._replace(kernel="specialised"),
    "split": TILES["split"]._replace(kernel="descriptors"),
}
# Of a small tile there are many, and the dtype changes little of how they are cut.
RUNS = [
    *[("large", dtype) for dtype in DTYPES],
    ("small", torch.float32),
    ("split", torch.bfloat16),
]
# Channels in multiples of 16 bytes in every dtype.
GEMMS = {
    "round": Conv(2, 64, 8, 8, 64, (1, 1), padding=(0, 0), residual=True),
    "without relu": Conv(2, 64, 7, 5, 80, (1, 1), padding=(0, 0), residual=True, relu=False),
    "odd outputs": Conv(1, 72, 5, 7, 17, (1, 1), padding=(0, 0), residual=True),
    "neither residual nor relu": Conv(3, 40, 3, 3, 33, (1, 1), padding=(0, 0), relu=False),
    "8 channels": Conv(1, 8, 6, 5, 24, (1, 1), padding=(0, 0)),
    "one pixel": Conv(1, 32, 1, 1, 10, (1, 1), padding=(0, 0)),
    "a row each": Conv(37, 24, 1, 1, 16, (1, 1), padding=(0, 0), residual=True),
}
CONVS = {
    "round": Conv(2, 32, 8, 8, 32, residual=True),
    "without relu": Conv(1, 64, 4, 8, 32, residual=True, relu=False),
    "neither residual nor relu": Conv(1, 32, 5, 6, 48, relu=False),
    "7x7, odd outputs": Conv(3, 40, 7, 7, 33, residual=True),
    "5 images": Conv(5, 16, 3, 3, 16),
    "a long image": Conv(1, 16, 1, 43, 16, residual=True),
    "a high image": Conv(2, 16, 29, 2, 16),
    "one pixel": Conv(3, 32, 1, 1, 20),
    "smaller than the kernel": Conv(2, 16, 2, 1, 16, kernel=(5, 5), padding=(2, 2)),
    "5x3, asymmetric": Conv(2, 24, 9, 8, 33, (5, 3), (1, 1), (2, 0), (1, 2), residual=True),
    "3x5, padding of one side": Conv(1, 16, 7, 9, 16, (3, 5), padding=(0, 2)),
    "2x2 without padding": Conv(2, 24, 6, 7, 16, (2, 2), padding=(0, 0)),
    "more padding than kernel": Conv(1, 16, 5, 4, 16, padding=(3, 4)),
    "7x7": Conv(1, 16, 8, 4, 16, (7, 7), padding=(3, 3)),
    "dilation past the border": Conv(1, 16, 5, 5, 16, padding=(4, 4), dilation=(4, 4)),
    "1x1 with padding": Conv(1, 32, 4, 5, 16, (1, 1), padding=(1, 1)),
    "2 groups, merged to 1": Conv(1, 32, 6, 7, 64, groups=2, residual=True),
}
CASES = {
    **{f"gemm: {name}": ("gemm_descriptor_kernel", conv) for name, conv in GEMMS.items()},
    **{f"conv: {name}": ("conv_descriptor_kernel", conv) for name, conv in CONVS.items()},
}


def planned(inputs: list, conv: Conv, tile: Tile) -> Plan:
    return forward.plan_conv_bn_act(*inputs, *conv.geometry(), "interpreter", tile=tile)


def check(inputs: list, conv: Conv, tile: Tile, kernel: str) -> None:
    plan = planned(inputs, conv, tile)
    assert plan.launches[0].kernel.__name__ == kernel
    actual, exact = plan.run(), conv_exact(*inputs, *conv.geometry())
    assert actual.dtype == inputs[0].dtype
    assert actual.is_contiguous(memory_format=torch.channels_last)
    assert_within(actual, exact, conv_tolerance(exact, *inputs, *conv.geometry()))
    assert_as_good_as_pytorch(actual, reference.conv_bn_act(*inputs, *conv.geometry()), exact)


@pytest.mark.parametrize(("tile", "dtype"), RUNS, ids=[f"{tile}-{dtype}" for tile, dtype in RUNS])
@pytest.mark.parametrize("name", CASES)
def test_right(name, tile, dtype, guarded):
    kernel, conv = CASES[name]
    check(conv.inputs(dtype), conv, DESCRIPTOR_TILES[tile], kernel)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("name", ["gemm: without relu", "conv: 7x7, odd outputs"])
def test_any_number_of_programs(name, count, guarded, monkeypatch):
    """As on a GPU, where a program makes many tiles; above, most programs make one."""
    monkeypatch.setattr(descriptor, "programs", lambda work, *_: min(work, count))
    kernel, conv = CASES[name]
    check(conv.inputs(torch.float32), conv, DESCRIPTOR_TILES["small"], kernel)


@pytest.mark.parametrize("name", ["gemm: round", "conv: round"])
def test_offsets_of_64_bits(name, guarded, monkeypatch):
    """Tensors of 2^31 elements do not fit a test; the arithmetic that they use does."""
    monkeypatch.setattr(operands, "_INT32_ELEMENTS", 0)
    kernel, conv = CASES[name]
    check(conv.inputs(torch.float32), conv, DESCRIPTOR_TILES["small"], kernel)


@each_dtype
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["gemm: odd outputs", "conv: 7x7, odd outputs"])
def test_nan_and_inf_in_the_image(name, value, dtype, guarded):
    """They reach the outputs whose window they are in, and no others, though the tail of a tile is multiplied too."""
    kernel, conv = CASES[name]
    inputs = conv.inputs(dtype)
    inputs[0][0, -1, 0, 0] = value
    inputs[0][-1, 0, conv.h // 2, conv.w // 2] = value
    plan = planned(inputs, conv, DESCRIPTOR_TILES["large"])
    assert plan.launches[0].kernel.__name__ == kernel
    exact = conv_exact(*inputs, *conv.geometry())
    assert_within(plan.run(), exact, conv_tolerance(exact, *inputs, *conv.geometry()))


REFUSED = {
    "stride": Conv(1, 32, 9, 8, 16, stride=(2, 1)),
    "1x1/2": Conv(1, 32, 9, 8, 16, (1, 1), (2, 2), (0, 0)),
    "groups": Conv(1, 128, 5, 5, 64, groups=2),
    "30 channels": Conv(1, 30, 5, 5, 16, residual=True),
    "30 channels, 1x1": Conv(1, 30, 5, 5, 16, (1, 1), padding=(0, 0), residual=True),
    "3 channels": Conv(1, 3, 9, 9, 16),
}


@pytest.mark.parametrize("name", REFUSED)
def test_the_pointer_kernels_take_what_descriptors_cannot(name, guarded):
    conv = REFUSED[name]
    kernel = "gemm_kernel" if conv.kernel == (1, 1) and conv.stride == (1, 1) else "conv_kernel"
    check(conv.inputs(torch.float32), conv, DESCRIPTOR_TILES["small"], kernel)


@pytest.mark.parametrize("kernel_size", [1, 3])
def test_an_unaligned_image_goes_to_the_pointer_kernels(kernel_size):
    conv = Conv(1, 16, 6, 5, 16, (kernel_size,) * 2, padding=(kernel_size // 2,) * 2)
    x, *rest = conv.inputs(torch.float32)
    memory = torch.empty(x.numel() + 1)[1:]
    unaligned = memory.as_strided(x.shape, x.stride()).copy_(x)
    assert unaligned.data_ptr() % 16 == 4
    check([unaligned, *rest], conv, DESCRIPTOR_TILES["small"], "gemm_kernel" if kernel_size == 1 else "conv_kernel")


@pytest.mark.parametrize("name", ["gemm: round", "conv: round"])
def test_training_goes_to_the_pointer_kernels(name):
    _, conv = CASES[name]
    x, weight, scale, shift, _ = conv.inputs(torch.float32)
    prologue = torch.ones(conv.c), torch.zeros(conv.c)
    pointers = "gemm_kernel" if name.startswith("gemm") else "conv_kernel"
    for affine, before in [((scale, shift), prologue), ((None, None), None)]:
        plan = forward.plan_conv_bn_act(
            x, weight, *affine, None, *conv.geometry()[:-1], False, "interpreter", before, DESCRIPTOR_TILES["small"]
        )
        assert plan.launches[0].kernel.__name__ == pointers


@pytest.mark.parametrize(
    ("target", "precision", "kernel", "reason"),
    [
        ("sm_90", "half", "descriptors", None),
        ("sm_90", "tf32", "descriptors", None),
        ("sm_120", "half", "descriptors", None),
        ("sm_100", "half", "specialised", None),
        ("sm_103", "half", "specialised", None),
        ("sm_90", "half", "pointers", "for pointers"),
        ("sm_89", "half", "descriptors", "no descriptors on sm_89"),
        ("gfx950", "half", "descriptors", "no descriptors on gfx950"),
        ("sm_90", "half", "specialised", "no specialised on sm_90"),
        ("sm_120", "half", "specialised", "no specialised on sm_120"),
        ("sm_90", "ieee", "descriptors", "float32 without TF32"),
    ],
)
def test_where_there_are_descriptors(target, precision, kernel, reason):
    x, weight = torch.ones(1, 16, 2, 2), torch.ones(16, 1, 1, 16)
    tile = SMALL._replace(kernel=kernel)
    refused = descriptor.refusal(tile, target, precision, x, weight, (1, 1), 1, False)
    if reason is None and not compat.descriptors_round():
        reason = {("tf32", "descriptors"): "round to TF32", ("half", "specialised"): "no warps"}.get(
            (precision, kernel)
        )
    assert refused is reason if reason is None else reason in refused


def test_no_pixels_and_too_many_are_refused():
    """From 2 GiB on. Coordinates of 32 bits reach every pixel of a smaller image, since a pixel has 16 bytes."""
    weight, tile = torch.ones(16, 1, 1, 16), DESCRIPTOR_TILES["small"]
    for n, refused in [(0, True), (511, False), (512, True)]:
        x = torch.empty(n, 16, 256, 256, device="meta")
        assert bool(descriptor.refusal(tile, "interpreter", "half", x, weight, (1, 1), 1, False)) == refused


def test_boxes_waste_little():
    assert conv_descriptor.box(128, 56, 56, 128) == (2, 8, 8)
    assert conv_descriptor.box(1, 56, 56, 128) == (1, 8, 16)
    assert conv_descriptor.box(128, 28, 28, 128) == (8, 4, 4)
    assert conv_descriptor.box(128, 7, 7, 128) == (128, 1, 1)
    assert conv_descriptor.box(1, 1, 43, 16) == (1, 1, 16)
    assert conv_descriptor.box(3, 1, 1, 1) == (1, 1, 1)
    for size in (56, 28, 14, 7):
        for n in (32, 64, 128, 256):
            sides = conv_descriptor.box(n, size, size, 128)
            covered = math.prod(-(-whole // side) * side for whole, side in zip((n, size, size), sides))
            assert covered <= n * size**2 * 8 / 7
