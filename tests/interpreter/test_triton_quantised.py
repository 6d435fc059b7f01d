"""The kernels on 8-bit numbers against the definition in float64, every access checked (guard.py).

int8 must be exact, to the bit: sums of products are integers, and rounding is defined. What is not exact is float32,
after the sums. Where all of it can be computed without rounding (scales that are powers of two), results must be equal,
ties between two steps included. Elsewhere the real number before the last rounding is known up to an error that follows
from the number of float32 operations, and the result must be what some number within that error is rounded to: one
value, except where a tie lies within the error.
"""

import copy
from typing import NamedTuple, Optional

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from resnet_fast import quantised as api
from resnet_fast.kernels.contract import Case
from resnet_fast.kernels.reference import quantised as reference
from resnet_fast.kernels.reference.quantised import RANGE, REAL
from resnet_fast.kernels.triton import device, operands, pack, table, tiles
from tests.interpreter.cases import CONVS, SMALL, Conv, nhwc
from tests.interpreter.checking import assert_within, rounding

pytestmark = pytest.mark.usefixtures("guarded")

INT8, FP8 = RANGE
_HALF_ULP = torch.finfo(torch.float32).eps / 2

each_dtype = pytest.mark.parametrize("dtype", RANGE, ids=["int8", "fp8"])

SMALL_8 = SMALL._replace(rows=64, reduction=32)
TILES = {"default": None, "small": SMALL_8, "split": SMALL_8._replace(rows=32, columns=32, reduction=64, split=True)}

QUANTISED = {
    "round": CONVS["round"],
    "round without relu": Conv(1, 64, 4, 8, 32, residual=True, relu=False),
    "neither residual nor relu": CONVS["neither residual nor relu"],
    "stride 2": CONVS["stride 2"],
    "48 channels, odd outputs": Conv(1, 48, 6, 5, 33, residual=True),
    "smaller than the kernel": CONVS["smaller than the kernel"],
    "one pixel": CONVS["one pixel"],
    "5x3, asymmetric": Conv(2, 16, 9, 8, 33, (5, 3), (2, 1), (2, 0), (1, 2), residual=True),
    "2x2 without padding": Conv(2, 48, 6, 7, 16, (2, 2), (2, 2), (0, 0)),
    "7x7/2": Conv(1, 16, 11, 9, 24, (7, 7), (2, 2), (3, 3)),
    "dilation 2": CONVS["dilation 2"],
    "dilation past the border": CONVS["dilation past the border"],
    "1x1": CONVS["1x1"],
    "1x1/2": CONVS["1x1/2"],
    "1x1 with padding": CONVS["1x1 with padding"],
    "2 groups": Conv(1, 64, 6, 7, 80, groups=2, residual=True),
    "32 groups of 4, ResNeXt": CONVS["32 groups of 4, ResNeXt"],
    "1x1 in groups": CONVS["1x1 in groups"],
    "depthwise": Conv(1, 32, 7, 6, 32, groups=32),
}


class Inputs(NamedTuple):
    """Of ``conv_quantised``, up to the geometry."""

    x: Tensor
    weight: Tensor
    scale: Tensor
    shift: Tensor
    residual: Optional[Tensor]
    residual_scale: float
    out_scale: float


@pytest.fixture(params=TILES)
def tile(request, monkeypatch):
    force(monkeypatch, TILES[request.param])


def force(monkeypatch, tile: Optional[tiles.Tile]) -> None:
    if tile is not None:
        monkeypatch.setattr(tiles, "pick", lambda *problem: tile)


def full_range(shape: tuple, dtype: torch.dtype) -> Tensor:
    """All of int8's numbers alike; fp8's of a normal distribution, whose sums are those of int8 or so."""
    if dtype == INT8:
        return torch.randint(-128, 128, shape, dtype=INT8)
    return (74 * torch.randn(shape)).clamp(-448, 448).to(FP8)


def inputs(conv: Conv, dtype: torch.dtype, residual: Optional[torch.dtype] = None) -> Inputs:
    """Such that results are of the order of 1 and fill the range; some lie beyond both its ends."""
    taps = conv.c // conv.groups * conv.kernel[0] * conv.kernel[1]
    x = nhwc(full_range((conv.n, conv.c, conv.h, conv.w), dtype))
    weight = full_range((conv.k, conv.c // conv.groups, *conv.kernel), dtype)
    scale = (torch.rand(conv.k) + 0.5) / (74**2 * taps**0.5)
    scale[0] = 0.0  # a zero-initialised last batch norm
    shift = torch.randn(conv.k)
    added = None
    if conv.residual:
        shape = reference.conv_quantised(x, weight, scale, shift, None, 1.0, 1.0, *conv.geometry(), torch.float32).shape
        added = full_range(shape, dtype) if residual in (None, dtype) else torch.randn(shape).to(residual)
        added = nhwc(added)
    residual_scale = 1 / 100 if added is not None and added.dtype in RANGE else 0.7
    return Inputs(x, weight, scale, shift, added, residual_scale, 2.5 / RANGE[dtype][1])


def exact_and_error(given: Inputs, geometry: tuple) -> tuple[Tensor, Tensor]:
    """The result in float64 before it is rounded to its dtype, and how far float32 may be from it.

    Between the sum of products and the last rounding, no number goes through more than eight roundings to float32: the
    sum's own, scale, shift, the residual's scale and its product, its addition, the inverse of out_scale and the
    product with it. Each errs by up to half an ulp of a number that the sum of magnitudes bounds. The sum itself is
    exact in int8; in fp8 its errors add up like a random walk (checking.sum_tolerance).
    """
    *geometry, relu = geometry
    wide = (given.scale.double(), given.shift.double())
    exact = reference.conv_quantised(
        given.x, given.weight, *wide, given.residual, *given[5:], *geometry, relu, torch.float64
    )
    product = given._replace(shift=0 * given.shift, scale=given.scale.abs())
    if given.x.dtype == FP8:
        product = product._replace(x=given.x.float().abs().to(FP8), weight=given.weight.float().abs().to(FP8))
    magnitude = reference.conv_quantised(
        product.x, product.weight, product.scale.double(), product.shift.double(), None, *given[5:], *geometry, False,
        torch.float64,
    ).abs()  # fmt: skip
    terms = given.weight[0].numel() if given.x.dtype == FP8 else 0
    error = 2 * _HALF_ULP * terms**0.5 * magnitude
    magnitude += given.shift.double().abs().view(1, -1, 1, 1)
    if given.residual is not None:
        magnitude += given.residual.double().abs() * given.residual_scale
    return exact, error + 8 * _HALF_ULP * magnitude


def assert_quantised(actual: Tensor, exact: Tensor, error: Tensor, scale: float) -> None:
    """Each element is what some number within ``error`` of ``exact`` is quantised to; NaN where ``exact`` is NaN."""
    number = ~exact.isnan()
    error = torch.where(exact.isinf(), 0.0, error)
    lowest, highest = (reference.quantise(exact + sign * error, scale, actual.dtype).double() for sign in (-1.0, 1.0))
    values = actual.double()
    assert actual.shape == exact.shape
    if actual.dtype == FP8:
        assert torch.equal(values.isnan(), ~number), "NaN in other places"
    else:
        assert (values[~number] == RANGE[INT8][0]).all()
    wrong = number & ~((lowest <= values) & (values <= highest))
    assert not wrong.any(), f"{int(wrong.sum())} of {wrong.numel()}: {values[wrong][:5]}, {exact[wrong][:5] / scale}"


def check(given: Inputs, conv: Conv, out_dtype: Optional[torch.dtype] = None) -> Tensor:
    out_dtype = out_dtype or given.x.dtype
    actual = table.conv_quantised(*given, *conv.geometry(), out_dtype)
    assert actual.dtype == out_dtype
    assert actual.is_contiguous(memory_format=torch.channels_last)
    exact, error = exact_and_error(given, conv.geometry())
    if out_dtype in RANGE:
        assert_quantised(actual, exact, error, given.out_scale)
    else:
        assert_within(actual, exact, rounding(exact, out_dtype) + error)
    return actual


@each_dtype
@pytest.mark.parametrize("name", QUANTISED)
def test_conv(name, dtype, tile):
    """Quantised results, in whole and in small tiles."""
    conv = QUANTISED[name]
    case = Case("conv_quantised", "cpu", dtype, conv.c, conv.k, conv.kernel, *conv.geometry()[:-1])
    assert table.supports(case) is None
    check(inputs(conv, dtype), conv)


@each_dtype
def test_every_residual_and_result(dtype, monkeypatch):
    """In a tile that is finished in halves, the second beyond the result but for one column."""
    force(monkeypatch, SMALL_8._replace(columns=64, reduction=64, split=True))
    for i, residual in enumerate((dtype, *REAL)):
        for j, out_dtype in enumerate((dtype, *REAL)):
            conv = QUANTISED["48 channels, odd outputs"]._replace(relu=(i + j) % 2 == 0)
            check(inputs(conv, dtype, residual), conv, out_dtype)


@pytest.mark.parametrize("name", ["round", "1x1", "7x7/2", "32 groups of 4, ResNeXt"])
def test_sums_of_int8_are_exact(name):
    """Of numbers of all sizes, and of the largest products."""
    conv = QUANTISED[name]._replace(relu=False, residual=False)
    given = inputs(conv, INT8)._replace(scale=torch.ones(conv.k), shift=torch.zeros(conv.k))
    largest = [torch.full_like(t, -128) for t in (given.x, given.weight)]
    for x, weight in ((given.x, given.weight), largest):
        exact = torch.nn.functional.conv2d(x.double(), weight.double(), None, *conv.geometry()[:-1])
        actual = table.conv_quantised(x, weight, *given[2:], *conv.geometry(), torch.float32)
        assert torch.equal(actual, exact.float())


def test_sums_of_int8_beyond_24_bits(tile):
    """As many bits as float32 has no room for: a sum in int32 is rounded once, when all of it is there."""
    conv = Conv(1, 1024, 2, 3, 16, (1, 3), padding=(0, 1), relu=False)
    x = nhwc(torch.randint(100, 128, (1, 1024, 2, 3), dtype=INT8))
    weight = torch.randint(100, 128, (16, 1024, 1, 3), dtype=INT8)
    exact = torch.nn.functional.conv2d(x.double(), weight.double(), None, padding=(0, 1))
    assert (exact > 2**24).all()
    vectors = torch.ones(16), torch.zeros(16)
    actual = table.conv_quantised(x, weight, *vectors, None, 1.0, 1.0, *conv.geometry(), torch.float32)
    assert torch.equal(actual, exact.float())


@pytest.mark.parametrize("relu", [False, True], ids=["signed", "relu"])
@pytest.mark.parametrize("name", ["round", "1x1/2", "2 groups"])
def test_ties_go_to_the_even_number(name, relu, tile):
    """Powers of two as scales: nothing is rounded but the result, and many results are halfway between two steps."""
    conv = QUANTISED[name]._replace(relu=relu, residual=True)
    given = inputs(conv, INT8)
    x, weight = (t.clamp(-4, 4) for t in given[:2])
    given = given._replace(
        x=x,
        weight=weight,
        scale=2.0 ** torch.randint(-5, 0, (conv.k,)),
        shift=torch.randint(-40, 40, (conv.k,)) / 4,
        residual_scale=0.25,
        out_scale=0.5,
    )
    geometry = conv.geometry()
    exact, _ = exact_and_error(given, geometry)
    steps = exact / given.out_scale
    tie = (steps % 1 == 0.5) & (steps.abs() < 127)
    assert tie.sum() > 20
    assert (steps < -129).any() or relu
    assert (steps > 128).any()
    actual = table.conv_quantised(*given, *geometry, INT8)
    assert (actual[tie] % 2 == 0).all()
    assert torch.equal(actual.double(), torch.round(steps).clamp(-128, 127))


@each_dtype
def test_saturates_at_both_ends(dtype):
    """Without ReLU, at the range's own ends; far beyond, and infinite, as well."""
    conv = Conv(1, 16, 3, 3, 8, relu=False)
    lowest, highest = RANGE[dtype]
    given = inputs(conv, dtype)
    shift = torch.tensor([0.0, highest, highest + 1000, 1e30, torch.inf, lowest, lowest - 1000, -torch.inf])
    actual = check(given._replace(scale=torch.zeros(8), shift=shift, out_scale=1.0), conv)
    ends = [0.0, *[highest] * 4, *[lowest] * 3]
    assert torch.equal(actual.double(), torch.tensor(ends).double().view(1, -1, 1, 1).expand(1, 8, 3, 3))


@pytest.mark.parametrize("name", ["round", "1x1", "stride 2"])
def test_nan_in_fp8(name, monkeypatch):
    """It reaches the outputs whose window it is in, and no others; in the residual, its own."""
    force(monkeypatch, SMALL_8)
    conv = QUANTISED[name]
    given = inputs(conv, FP8)
    given.x.view(torch.uint8)[0, -1, 0, 0] = 0x7F
    assert check(given, conv).isnan().any()
    assert check(given, conv, torch.float16).isnan().any()
    if given.residual is not None:
        given = inputs(conv, FP8)
        given.residual.view(torch.uint8)[-1, 0, 0, 0] = 0xFF
        assert check(given, conv).isnan().sum() == 1


@pytest.mark.parametrize("relu", [False, True])
def test_nan_has_no_int8(relu):
    """Of shift or of a real residual: the lowest number, as defined."""
    conv = QUANTISED["round"]._replace(relu=relu)
    given = inputs(conv, INT8, torch.float16)
    given.shift[3] = torch.nan
    given.residual[0, 5, 2, 1] = torch.nan
    actual = table.conv_quantised(*given, *conv.geometry(), INT8)
    assert (actual[:, 3] == -128).all()
    assert actual[0, 5, 2, 1] == -128
    assert torch.equal(actual, reference.conv_quantised(*given, *conv.geometry(), INT8))


@each_dtype
def test_any_strides(dtype):
    """NCHW, a slice of a wider image, an expanded scale, an NHWC weight."""
    for name in ("round", "1x1"):
        conv = QUANTISED[name]
        given = inputs(conv, dtype)
        wide = torch.cat([given.x, given.x], dim=3)[:, :, :, 1 : conv.w + 1]
        expanded = torch.tensor([1e-4]).expand(conv.k)
        check(given._replace(x=given.x.contiguous(), residual=given.residual.contiguous()), conv)
        check(given._replace(x=wide, scale=expanded), conv)
        check(given._replace(weight=nhwc(given.weight)), conv)


def test_an_updated_weight_is_packed_again():
    conv = QUANTISED["32 groups of 4, ResNeXt"]
    given = inputs(conv, INT8)
    check(given, conv)
    given.weight.copy_(given.weight.flip(0))
    check(given, conv)


@each_dtype
def test_offsets_of_64_bits(dtype, monkeypatch):
    """Tensors of 2^31 elements do not fit a test; the arithmetic that they use does."""
    monkeypatch.setattr(operands, "_INT32_ELEMENTS", 0)
    for name in ("round", "1x1", "2 groups", "1x1/2"):
        check(inputs(QUANTISED[name], dtype), QUANTISED[name])
    x = torch.randn(2, 16, 5, 3)
    assert torch.equal(table.quantise(x, 0.25, dtype).double(), reference.quantise(x, 0.25, dtype).double())
    q = full_range(x.shape, dtype)
    assert torch.equal(table.dequantise(q, 0.3, torch.float16), reference.dequantise(q, 0.3, torch.float16))


class Known(NamedTuple):
    """An image in float64, how far at most 8 bits may be from it, and how far on average."""

    exact: Tensor
    bound: Tensor
    variance: Tensor


def step(values: Tensor, scale, dtype: torch.dtype) -> Tensor:
    """Between neighbouring numbers of ``dtype * scale`` around ``values``."""
    if dtype == INT8:
        return scale * torch.ones_like(values)
    # Three bits behind the first one, down to the smallest normal number, 2^-6.
    return scale * 2.0 ** ((values.abs() / scale).clamp(min=2**-6).log2().floor() - 3)


def quantised_again(image: Known, scale: float, dtype: torch.dtype) -> Known:
    """Rounding adds up to half a step, and on average (uniformly distributed) a step squared by 12 of variance."""
    bound = image.bound + step(image.exact.abs() + image.bound, scale, dtype) / 2
    return Known(image.exact, bound, image.variance + step(image.exact, scale, dtype).square() / 12)


def through(image: Known, conv: nn.Conv2d, bn: nn.BatchNorm2d, dtype: torch.dtype) -> Known:
    """Image and weight both have errors: (x + dx)(w + dw) = xw + dx w + (x + dx) dw. Variances of products add up."""
    weight = conv.weight
    _, scales = api.quantise_weight(weight.float(), dtype)
    steps = step(weight, scales.double().view(-1, 1, 1, 1), dtype)
    gain = (bn.weight / (bn.running_var + bn.eps).sqrt()).view(1, -1, 1, 1)

    def product(x: Tensor, w: Tensor) -> Tensor:
        return torch.nn.functional.conv2d(x, w, None, conv.stride, conv.padding)

    bound = product(image.bound, weight.abs()) + product(image.exact.abs() + image.bound, steps / 2)
    squares = image.exact.square() + image.variance
    variance = product(image.variance, weight.square()) + product(squares, steps.square() / 12)
    return Known(bn(conv(image.exact)), gain.abs() * bound, gain.square() * variance)


def plus(image: Known, other: Known) -> Known:
    return Known(*(a + b for a, b in zip(image, other)))


def relu(image: Known) -> Known:
    """Brings no two numbers further apart."""
    return image._replace(exact=image.exact.relu())


@each_dtype
@pytest.mark.parametrize(
    "kind", ["basic, identity", "basic, projection", "bottleneck, identity", "bottleneck, projection"]
)
@torch.no_grad()
def test_a_residual_block_from_end_to_end(kind, dtype, monkeypatch):
    """torchvision's blocks, by the public functions. Every tensor between two convolutions has 8 bits.

    The error stays below what the roundings of weights and images can add up to, and its mean square below what they
    add up to on average, taken for independent and uniform (Widrow and Kollar, 2008). The ReLUs, which make errors
    smaller, are left out of that.
    """
    monkeypatch.setenv("RESNET_FAST_IMPLEMENTATION", "triton")
    make = BasicBlock if "basic" in kind else Bottleneck
    planes = 32 if "basic" in kind else 16
    out = planes * make.expansion
    projection = "projection" in kind
    stride, channels = (2, 48) if projection else (1, out)
    shortcut = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))
    block = make(channels, planes, stride, shortcut if projection else None).eval()
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean):
                tensor.normal_()
            module.running_var.uniform_(0.5, 1.5)
    wide = copy.deepcopy(block).double()
    layers = [(getattr(block, f"conv{i}"), getattr(block, f"bn{i}")) for i in range(1, 3 + ("bottleneck" in kind))]
    exact = [(getattr(wide, f"conv{i}"), getattr(wide, f"bn{i}")) for i in range(1, len(layers) + 1)]

    def scale_of(image: Known) -> float:
        return api.scale_from_amax(image.exact.abs().max(), dtype)

    x = torch.randn(2, channels, 10, 9)
    known = Known(x.double(), torch.zeros(x.shape).double(), torch.zeros(x.shape).double())
    scale = scale_of(known)
    image, known = api.quantise(x, scale, dtype), quantised_again(known, scale, dtype)
    residual, known_residual, residual_scale = image, known, scale
    if projection:
        known_residual = through(known, *wide.downsample, dtype)
        residual_scale = scale_of(known_residual)
        known_residual = quantised_again(known_residual, residual_scale, dtype)
        residual = api.conv_bn_act(image, scale, *block.downsample, out_scale=residual_scale, relu=False)
    for i, (layer, wide_layer) in enumerate(zip(layers, exact)):
        last = i == len(layers) - 1
        known = through(known, *wide_layer, dtype)
        known = relu(plus(known, known_residual) if last else known)
        out_scale = scale_of(known)
        known = quantised_again(known, out_scale, dtype)
        added = {"residual": residual, "residual_scale": residual_scale} if last else {}
        image = api.conv_bn_act(image, scale, *layer, **added, out_scale=out_scale)
        scale = out_scale

    torch.testing.assert_close(known.exact, wide(x.double()))
    assert image.dtype == dtype
    error = image.double() * scale - known.exact
    assert (error.abs() <= known.bound).all()
    assert error.square().mean() <= known.variance.mean()


_SHAPES = [(2, 64, 8, 8), (1, 10, 7, 9), (3, 33, 1, 1)]


@each_dtype
@pytest.mark.parametrize("source", REAL, ids=str)
@pytest.mark.parametrize("shape", _SHAPES)
def test_quantise(shape, source, dtype, monkeypatch):
    """By a power of two equal to the definition; by another scale within the roundings of it and of the product."""
    monkeypatch.setitem(tiles.load("interpreter"), "quantise", [256, 4])
    x = (100 * torch.randn(shape)).to(source)
    x[0, 0, 0, 0], x[0, 1, 0, 0], x[0, 2, 0, 0], x[0, 3, 0, 0] = torch.nan, torch.inf, -torch.inf, -0.0
    x[0, 4:9, 0, 0] = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5]) / 2  # ties
    actual = table.quantise(x, 0.5, dtype)
    expected = reference.quantise(x, 0.5, dtype)
    assert actual.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(actual.view(torch.uint8), nhwc(expected).view(torch.uint8)) or dtype == FP8
    torch.testing.assert_close(actual.double(), expected.double(), rtol=0, atol=0, equal_nan=True)

    exact = x.double()
    assert_quantised(table.quantise(x, 0.7, dtype), exact, 3 * _HALF_ULP * exact.abs().nan_to_num(posinf=0), 0.7)


@each_dtype
@pytest.mark.parametrize("target", REAL, ids=str)
@pytest.mark.parametrize("shape", _SHAPES)
def test_dequantise(shape, target, dtype, monkeypatch):
    """The same float32 product and the same rounding: equal to the definition."""
    monkeypatch.setitem(tiles.load("interpreter"), "quantise", [256, 4])
    q = full_range(shape, dtype)
    if dtype == FP8:
        q.view(torch.uint8)[0, 0, 0, 0] = 0x7F
    actual = table.dequantise(q, 0.3, target)
    assert actual.dtype == target
    assert actual.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(actual, reference.dequantise(q, 0.3, target), rtol=0, atol=0, equal_nan=True)


def test_supports():
    case = Case("conv_quantised", "cpu", INT8, 64, 64, (3, 3), (2, 2), (1, 1), (2, 2), 4)
    assert table.supports(case) is None
    assert table.supports(case._replace(dtype=FP8)) is None
    assert table.supports(case._replace(op="quantise", in_channels=3, groups=1)) is None
    assert "float16" in table.supports(case._replace(dtype=torch.float16))
    assert "mps" in table.supports(case._replace(device="mps"))
    assert "no torch.int8" in table.supports(case._replace(op="conv_bn_act"))
    assert "3 input channels; multiples of 16" in table.supports(case._replace(in_channels=3, groups=1))
    assert "48 input channels in 2 groups" in table.supports(case._replace(in_channels=48, groups=2))
    assert table.supports(case._replace(in_channels=128, groups=32)) is None  # merged to 32 channels
    assert 128 // 32 * pack.merged(32, 4) == 32


def test_fp8_is_refused_where_no_instruction_multiplies_it():
    for architecture in ("sm_89", "sm_90", "sm_100", "sm_103", "sm_120", "gfx950"):
        assert device.no_fp8(architecture) is None
    for architecture in ("sm_80", "sm_86", "sm_87", "gfx90a", "gfx1100"):
        assert f"{architecture} does not multiply" in device.no_fp8(architecture)
    assert "float8_e4m3fnuz" in device.no_fp8("gfx942")


def test_empty_tensors_get_the_definition():
    x, weight = torch.empty(0, 16, 5, 5, dtype=INT8), torch.ones(8, 16, 3, 3, dtype=INT8)
    vector = torch.ones(8)
    geometry = Conv(0, 16, 5, 5, 8).geometry()
    y = table.conv_quantised(x, weight, vector, vector, None, 1.0, 1.0, *geometry, INT8)
    assert (y.shape, y.dtype) == ((0, 8, 5, 5), INT8)
    assert table.quantise(torch.empty(0, 4, 5, 5), 1.0, INT8).dtype == INT8
    assert table.dequantise(x, 1.0, torch.float16).shape == x.shape
