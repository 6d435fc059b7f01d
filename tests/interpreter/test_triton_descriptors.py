"""The kernels with tensor descriptors against the definition in float64, every access checked (guard.py).

Each plan is asked for by its tile, and must be of the kernel that is meant: else the pointer kernels would be tested.
"""

import pytest
import torch

from resnet_fast.kernels.triton import descriptor, launch
from resnet_fast.kernels.triton.tiles import Tile
from tests.interpreter.cases import SMALL, TILES, Conv, each_dtype
from tests.interpreter.checking import (
    assert_as_good_as_pytorch,
    assert_within,
    conv_exact,
    conv_tolerance,
    reference,
)

# Together: one tile for all, tiles with tails in every dimension, halves, boxes of one image and of several.
DESCRIPTOR_TILES = {
    "large": Tile(rows=512, columns=128, reduction=64, warps=4, stages=1, split=False, kernel="descriptors"),
    "small": SMALL._replace(kernel="specialised"),
    "split": TILES["split"]._replace(kernel="descriptors"),
}
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
    "7x7": Conv(1, 24, 9, 7, 24, (7, 7), padding=(3, 3)),
    "dilation past the border": Conv(1, 16, 5, 5, 16, padding=(4, 4), dilation=(4, 4)),
    "1x1 with padding": Conv(1, 32, 4, 5, 16, (1, 1), padding=(1, 1)),
    "2 groups, merged to 1": Conv(1, 32, 6, 7, 64, groups=2, residual=True),
}
CASES = {
    **{f"gemm: {name}": ("gemm_descriptor_kernel", conv) for name, conv in GEMMS.items()},
    **{f"conv: {name}": ("conv_descriptor_kernel", conv) for name, conv in CONVS.items()},
}

each_tile = pytest.mark.parametrize("tile", DESCRIPTOR_TILES.values(), ids=DESCRIPTOR_TILES)


def planned(inputs: list, conv: Conv, tile: Tile) -> launch.Plan:
    return launch.plan_conv(*inputs, *conv.geometry(), "interpreter", tile=tile)


def check(inputs: list, conv: Conv, tile: Tile, kernel: str) -> None:
    plan = planned(inputs, conv, tile)
    assert plan.kernel.__name__ == kernel
    actual, exact = plan.run(), conv_exact(*inputs, *conv.geometry())
    assert actual.dtype == inputs[0].dtype
    assert actual.is_contiguous(memory_format=torch.channels_last)
    assert_within(actual, exact, conv_tolerance(exact, *inputs, *conv.geometry()))
    assert_as_good_as_pytorch(actual, reference.conv_bn_act(*inputs, *conv.geometry()), exact)


@each_dtype
@each_tile
@pytest.mark.parametrize("name", CASES)
def test_right(name, dtype, tile, guarded):
    kernel, conv = CASES[name]
    check(conv.inputs(dtype), conv, tile, kernel)


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
    monkeypatch.setattr(launch, "_INT32_ELEMENTS", 0)
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
    plan = planned(inputs, conv, DESCRIPTOR_TILES["small"])
    assert plan.kernel.__name__ == kernel
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
        plan = launch.plan_conv(
            x, weight, *affine, None, *conv.geometry()[:-1], False, "interpreter", before, DESCRIPTOR_TILES["small"]
        )
        assert plan.kernel.__name__ == pointers
