"""The Triton kernels against the definition in float64, in every dtype, every access checked (guard.py)."""

from typing import Optional

import pytest
import torch

from resnet_fast.kernels.contract import Case
from resnet_fast.kernels.reference import inference as reference
from resnet_fast.kernels.triton import operands, pack, tiles
from resnet_fast.kernels.triton import table as kernels
from resnet_fast.kernels.triton.pool import plan_tail_pool
from tests.interpreter.cases import CONVS, DTYPES, SMALL, TILES, Conv, each_dtype, nhwc
from tests.interpreter.checking import (
    assert_as_good_as_pytorch,
    assert_within,
    conv_exact,
    conv_tolerance,
)

pytestmark = pytest.mark.usefixtures("guarded")


@each_dtype
@pytest.mark.parametrize("name", CONVS)
def test_conv(name, dtype, tile):
    conv = CONVS[name]
    inputs, geometry = conv.inputs(dtype), conv.geometry()
    actual = kernels.conv_bn_act(*inputs, *geometry)

    exact = conv_exact(*inputs, *geometry)
    assert actual.dtype == dtype
    assert actual.is_contiguous(memory_format=torch.channels_last)
    assert_within(actual, exact, conv_tolerance(exact, *inputs, *geometry))
    assert_as_good_as_pytorch(actual, reference.conv_bn_act(*inputs, *geometry), exact)


@each_dtype
@pytest.mark.parametrize("factor", [1e-6, 1e4])
def test_huge_and_tiny_scales(factor, dtype):
    """float32 until the end: nothing overflows or vanishes that the result's dtype can hold."""
    conv = CONVS["round"]
    x, weight, scale, shift, residual = conv.inputs(dtype)
    scale, shift = scale * factor, shift * factor
    _check(x, weight, scale, shift, residual, conv)


@each_dtype
def test_accumulates_in_float32(dtype):
    """A sum far beyond float16's range that comes back into it, by the scale."""
    conv = Conv(1, 64, 5, 5, 16)
    x, weight, scale, shift, residual = conv.inputs(dtype)
    _check(x * 2e3, weight * 2e2, scale / 4e5, shift, residual, conv)


@each_dtype
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ["round", "neither residual nor relu", "3 channels", "7x7/2", "1x1", "1x1/2"])
def test_nan_and_inf_in_the_image(name, value, dtype, monkeypatch):
    """They reach the outputs whose window they are in, and no others."""
    monkeypatch.setattr(tiles, "pick", lambda *problem: SMALL)
    conv = CONVS[name]
    inputs = conv.inputs(dtype)
    inputs[0][0, -1, 0, 0] = value
    inputs[0][-1, 0, conv.h // 2, conv.w // 2] = value
    _check(*inputs, conv)


@each_dtype
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_inf_elsewhere(value, dtype):
    """In a weight, where 0 * Inf of the padding is NaN as in PyTorch; in scale, shift and residual."""
    for position in range(1, 5):
        conv = CONVS["round"]
        inputs = conv.inputs(dtype)
        changed = inputs[position]
        changed[(-1,) + (0,) * (changed.dim() - 1)] = value
        _check(*inputs, conv)


@each_dtype
def test_nan_in_merged_groups(dtype):
    """A NaN reaches all that it should. It may also reach the groups that were merged with its own, and no others."""
    conv = CONVS["32 groups of 8, ResNeXt"]
    inputs, geometry = conv.inputs(dtype), conv.geometry()
    inputs[0][0, 70, 2, 1] = torch.nan
    together = 8 * pack.merged(32, 8)
    actual, exact = kernels.conv_bn_act(*inputs, *geometry), conv_exact(*inputs, *geometry)
    assert actual[exact.isnan()].isnan().all()
    reached = actual.isnan().any(dim=(0, 2, 3)).nonzero().flatten()
    assert set(reached.tolist()) <= set(range(70 // together * together, (70 // together + 1) * together))


def test_merging_keeps_groups_whole():
    assert [pack.merged(32, width) for width in (4, 8, 16, 32, 64)] == [8, 4, 2, 1, 1]
    assert pack.merged(1, 3) == 1
    assert pack.merged(37, 1) == 1  # prime: 37 would be wider than 32
    assert pack.merged(3, 5) == 3
    assert pack.merged(40, 1) == 20


@each_dtype
@pytest.mark.parametrize("name", ["round", "3 channels", "1x1", "2 groups"])
def test_any_strides(name, dtype):
    """NCHW, a slice of a wider image, a flipped batch order, an expanded scale."""
    conv = CONVS[name]
    x, weight, scale, shift, residual = conv.inputs(dtype)
    _check(x.contiguous(), weight, scale, shift, _maybe(residual, torch.Tensor.contiguous), conv)
    wide = torch.cat([x, x], dim=3)[:, :, :, 1 : conv.w + 1]
    _check(wide, weight, scale, shift, residual, conv)
    _check(x.transpose(2, 3).contiguous().transpose(2, 3), weight, scale, shift, residual, conv)
    expanded = torch.tensor([0.5]).expand(conv.k)
    _check(x, weight.contiguous(memory_format=torch.channels_last), expanded, shift, residual, conv)


@each_dtype
def test_float32_weight_beside_a_narrow_image(dtype):
    conv = CONVS["17 channels"]
    x, _, scale, shift, residual = conv.inputs(dtype)
    weight = torch.randn(conv.k, conv.c, *conv.kernel) / 12
    _check(x, weight, scale, shift, residual, conv)


def test_an_updated_weight_is_packed_again():
    conv = CONVS["32 groups of 4, ResNeXt"]
    x, weight, *rest = conv.inputs(torch.float32)
    _check(x, weight, *rest, conv)
    weight.mul_(-0.5)
    _check(x, weight, *rest, conv)


def test_one_weight_under_several_tiles_and_dtypes(monkeypatch):
    """As with several image sizes or autocast: each gets the pack that it needs."""
    for name in ("round", "17 channels", "1x1, odd channels", "7x7/2, 3 channels"):
        conv = CONVS[name]
        x, weight, scale, shift, residual = conv.inputs(torch.float32)
        for tile in (SMALL, TILES["split"], SMALL._replace(reduction=64)):
            monkeypatch.setattr(tiles, "pick", lambda *problem, tile=tile: tile)
            for dtype in DTYPES:
                _check(x.to(dtype), weight, scale, shift, _maybe(residual, lambda r, dtype=dtype: r.to(dtype)), conv)


def test_offsets_of_64_bits(monkeypatch, tile):
    """Tensors of 2^31 elements do not fit a test; the arithmetic that they use does."""
    monkeypatch.setattr(operands, "_INT32_ELEMENTS", 0)
    for name in ("round", "1x1", "3 channels", "2 groups", "7x7/2"):
        _check(*CONVS[name].inputs(torch.float32), CONVS[name])
    x = nhwc(torch.randn(2, 20, 9, 7))
    torch.testing.assert_close(kernels.global_avg_pool(x), reference.global_avg_pool(x))
    assert torch.equal(plan_tail_pool(x, None, "interpreter").run(), torch.nn.functional.max_pool2d(x, 3, 2, 1))


@each_dtype
@pytest.mark.parametrize(
    ("n", "c", "h", "w", "k"),
    [
        (2, 3, 12, 12, 32),
        (1, 3, 17, 21, 33),
        (1, 1, 20, 13, 10),
        (1, 4, 10, 15, 32),
        (2, 2, 7, 5, 16),
        (1, 8, 9, 9, 33),
    ],
)
def test_stem(n, c, h, w, k, dtype, tile):
    conv = Conv(n, c, h, w, k, (7, 7), (2, 2), (3, 3))
    x, weight, scale, shift, _ = conv.inputs(dtype)
    actual = kernels.stem(x.contiguous() if n == 2 else x, weight, scale, shift)
    exact = reference.stem(*(t.double() for t in (x, weight, scale, shift)))
    # The maximum of right values is right within the largest of their tolerances.
    before = conv_exact(x, weight, scale, shift, None, *conv.geometry())
    tolerance = conv_tolerance(before, x, weight, scale, shift, None, *conv.geometry())
    assert actual.dtype == dtype
    assert actual.is_contiguous(memory_format=torch.channels_last)
    assert_within(actual, exact, torch.nn.functional.max_pool2d(tolerance, 3, 2, 1))
    assert_as_good_as_pytorch(actual, reference.stem(x, weight, scale, shift), exact)


@each_dtype
@pytest.mark.parametrize(("n", "c", "h", "w"), [(2, 64, 8, 8), (1, 10, 7, 9), (3, 33, 1, 1), (1, 70, 2, 3)])
def test_max_pool(n, c, h, w, dtype, monkeypatch):
    """Exact, with negative values at the border, infinities and NaN. In whole and in small tiles."""
    x = nhwc((torch.randn(n, c, h, w) - 2).to(dtype))
    x[0, 0, 0, 0], x[-1, -1, -1, -1], x[0, 3] = torch.inf, torch.nan, -torch.inf
    expected = torch.nn.functional.max_pool2d(x, 3, 2, 1)
    data = tiles.load("interpreter")
    for tile in (data["max_pool"], [16, 32, 4]):
        monkeypatch.setitem(data, "max_pool", tile)
        actual = plan_tail_pool(x, None, "interpreter").run()
        torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


@each_dtype
@pytest.mark.parametrize(("n", "c", "h", "w"), [(2, 512, 7, 7), (1, 10, 13, 11), (3, 33, 1, 1), (1, 70, 2, 3)])
def test_global_avg_pool(n, c, h, w, dtype, monkeypatch):
    x = torch.randn(n, c, h, w).to(dtype)
    data = tiles.load("interpreter")
    exact = reference.global_avg_pool(x.double())
    # One rounding of the result, and the sum of h * w float32 terms divided by their number; see checking.py.
    mean = x.double().abs().mean(dim=(2, 3), keepdim=True)
    info = torch.finfo(dtype)
    tolerance = 1.001 * info.eps / 2 * exact.abs().clamp(min=info.tiny)
    tolerance += 2 * (torch.finfo(torch.float32).eps / 2) * (h * w + 1) ** 0.5 * mean
    for tile in (data["average_pool"], [16, 32, 4]):
        monkeypatch.setitem(data, "average_pool", tile)
        for image in (x, nhwc(x)):
            actual = kernels.global_avg_pool(image)
            assert actual.dtype == dtype
            assert_within(actual, exact, tolerance)


def test_global_avg_pool_sums_beyond_float16_and_keeps_nan():
    x = torch.full((2, 16, 9, 9), 3e4, dtype=torch.float16)
    x[1, 3, 4, 4], x[1, 5, 0, 0] = torch.nan, torch.inf
    actual, expected = kernels.global_avg_pool(x), reference.global_avg_pool(x)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def test_supports():
    case = Case("conv_bn_act", "cpu", torch.float32, 64, 64, (3, 3), (2, 2), (1, 1), (2, 2), 4)
    assert kernels.supports(case) is None
    assert kernels.supports(case._replace(dtype=torch.bfloat16, op="global_avg_pool")) is None
    assert "float64" in kernels.supports(case._replace(dtype=torch.float64))
    assert "mps" in kernels.supports(case._replace(device="mps"))
    assert kernels.supports(case._replace(op="stem", in_channels=4)) is None
    assert kernels.supports(case._replace(op="head", dtype=torch.float16)) is None
    assert "16 input channels" in kernels.supports(case._replace(op="stem", in_channels=16))


def test_empty_tensors_get_the_definition():
    scale = shift = torch.ones(8)
    y = kernels.conv_bn_act(
        torch.empty(0, 4, 5, 5), torch.ones(8, 4, 3, 3), scale, shift, None, (1, 1), (1, 1), (1, 1), 1, True
    )
    assert y.shape == (0, 8, 5, 5)
    assert kernels.stem(torch.empty(0, 3, 32, 32), torch.ones(8, 3, 7, 7), scale, shift).shape == (0, 8, 8, 8)
    assert kernels.global_avg_pool(torch.empty(0, 4, 5, 5)).shape == (0, 4, 1, 1)


def _check(x, weight, scale, shift, residual, conv: Conv) -> None:
    inputs, geometry = (x, weight, scale, shift, residual), conv.geometry()
    actual = kernels.conv_bn_act(*inputs, *geometry)
    exact = conv_exact(*inputs, *geometry)
    assert_within(actual, exact, conv_tolerance(exact, *inputs, *geometry))


def _maybe(x: Optional[torch.Tensor], function) -> Optional[torch.Tensor]:
    return None if x is None else function(x)
