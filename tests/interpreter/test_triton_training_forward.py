"""The forward primitives of training against their definition in float64, every access checked (guard.py)."""

from typing import Optional

import pytest
import torch
from triton.runtime.interpreter import InterpreterBuilder

from resnet_fast.kernels.contract import Affine, Case, Geometry
from resnet_fast.kernels.reference import training as reference
from resnet_fast.kernels.triton import operands, tiles
from resnet_fast.kernels.triton import table as kernels
from tests.cpu.ops.residual_blocks import SHAPES, OwnMemory, results
from tests.interpreter.cases import CONVS, SMALL, TILES, Conv, each_dtype, nhwc
from tests.interpreter.checking import (
    assert_as_good_as_pytorch,
    assert_within,
    conv_exact,
    conv_tolerance,
    double,
    rounding,
)

pytestmark = pytest.mark.usefixtures("guarded")

_FLOAT32 = torch.finfo(torch.float32).eps
_VALUES = pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])

CONV_NAMES = [
    "round",
    "stride 2",
    "odd sizes, 1 channel",
    "3 channels, stride 2",
    "17 channels",
    "smaller than the kernel",
    "one pixel",
    "5x3, asymmetric",
    "7x7/2",
    "dilation 2",
    "1x1",
    "1x1, odd channels",
    "1x1/2",
    "1x1 with padding",
    "3 groups, more outputs than inputs",
]
RAW_NAMES = ["round", "7x7/2, 3 channels", "1x1", "2 groups"]
# n, c, h, w, stride
GRAMS = [
    (2, 64, 6, 7, (1, 1)),
    (1, 17, 9, 5, (1, 1)),
    (2, 40, 5, 6, (2, 2)),
    (1, 33, 8, 7, (2, 1)),
    (3, 8, 1, 1, (1, 1)),
    (1, 5, 1, 1, (2, 2)),
]
IMAGES = [(2, 64, 8, 8), (1, 10, 7, 9), (3, 33, 1, 1), (1, 70, 2, 3)]


@pytest.fixture(params=["default", "small"])
def small(request, monkeypatch):
    """Small tiles for all kernels, whose statistics take several rounds to combine."""
    if request.param == "small":
        data = tiles.load("interpreter")
        for name in ("combine", "tail", "max_pool"):
            monkeypatch.setitem(data, name, [4, 16, 4])
        monkeypatch.setitem(data, "covariance", [8, 16, 4])
        monkeypatch.setitem(data, "gram", {"half": [16, 16, 4, 1], "ieee": [16, 16, 4, 1]})
        monkeypatch.setitem(data, "multiprocessors", 5)
        monkeypatch.setattr(tiles, "pick", lambda *problem: SMALL)


def affine(channels: int) -> Affine:
    """Negative and zero scales among them."""
    scale = torch.randn(channels)
    scale[1:2] = 0.0
    return Affine(scale, torch.randn(channels))


def plain(conv: Conv) -> tuple:
    """Without a batch norm: scale, shift, residual, geometry, relu."""
    return torch.ones(conv.k), torch.zeros(conv.k), None, *conv.geometry()[:-1], False


def check_statistics(y: torch.Tensor, mean: torch.Tensor, variance: torch.Tensor) -> None:
    """Against those of the stored ``y``, by the rounding errors of sums of M terms (checking.py says why sqrt(M))."""
    values = y.double()
    m = y.numel() // y.shape[1]
    exact_mean = values.mean((0, 2, 3))
    exact_variance = values.var((0, 2, 3), correction=0)
    mean_tolerance = _FLOAT32 * (m + 1) ** 0.5 * values.abs().mean((0, 2, 3))
    tiny = torch.finfo(torch.float32).tiny
    assert mean.dtype == variance.dtype == torch.float32
    assert_within(mean, exact_mean, mean_tolerance + tiny)
    assert_within(variance, exact_variance, _FLOAT32 * (m + 3) ** 0.5 * exact_variance + mean_tolerance.square() + tiny)


def check_conv_statistics(x, prologue: Optional[Affine], weight, conv: Conv) -> tuple:
    y, mean, variance = kernels.conv_statistics(x, prologue, weight, Geometry(*conv.geometry()[:-1]))
    a = reference.activate(x, prologue)
    exact = conv_exact(a, weight, *plain(conv))
    assert y.dtype == x.dtype
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert_within(y, exact, conv_tolerance(exact, a, weight, *plain(conv)))
    check_statistics(y, mean, variance)
    return y, mean, variance


@each_dtype
@pytest.mark.parametrize(
    ("name", "with_prologue"), [*((n, True) for n in CONV_NAMES), *((n, False) for n in RAW_NAMES)]
)
def test_conv_statistics(name, with_prologue, dtype, small):
    conv = CONVS[name]
    x, weight, *_ = conv.inputs(dtype)
    prologue = affine(conv.c) if with_prologue else None
    y, _, _ = check_conv_statistics(x, prologue, weight, conv)
    geometry = Geometry(*conv.geometry()[:-1])
    theirs, _, _ = reference.conv_statistics(x, prologue, weight, geometry)
    assert_as_good_as_pytorch(y, theirs, conv_exact(reference.activate(x, prologue), weight, *plain(conv)))


@pytest.mark.parametrize("name", ["17 channels", "1x1", "2 groups"])
def test_statistics_of_a_tile_in_halves(name, monkeypatch):
    monkeypatch.setattr(tiles, "pick", lambda *problem: TILES["split"])
    conv = CONVS[name]
    x, weight, *_ = conv.inputs(torch.float32)
    check_conv_statistics(x, affine(conv.c), weight, conv)


@each_dtype
@pytest.mark.parametrize("name", ["round", "17 channels", "7x7/2", "1x1", "1x1/2", "1x1, odd channels", "2 groups"])
def test_products_the_other_way_round(name, dtype, monkeypatch):
    """As on sm_90."""
    monkeypatch.setattr(operands, "flip", lambda *_: True)
    monkeypatch.setattr(tiles, "pick", lambda *problem: SMALL)
    conv = CONVS[name]
    x, weight, *_ = conv.inputs(dtype)
    check_conv_statistics(x, affine(conv.c), weight, conv)
    check_conv_affine(conv, dtype)


def test_statistics_of_a_large_mean(small):
    """Deviations 1e4 times smaller than the mean: sums of squares would leave nothing of them."""
    conv = Conv(2, 16, 9, 11, 16, (1, 1), padding=(0, 0))
    x = nhwc(100 + torch.randn(2, 16, 9, 11) / 100)
    weight = torch.eye(16).view(16, 16, 1, 1)
    check_conv_statistics(x, None, weight, conv)


@each_dtype
@pytest.mark.parametrize("name", ["17 channels", "1x1", "1x1/2", "2 groups"])
def test_conv_affine(name, dtype, small):
    """With a prologue; without it is ``conv_bn_act``."""
    check_conv_affine(CONVS[name], dtype)


def check_conv_affine(conv: Conv, dtype: torch.dtype) -> None:
    x, weight, scale, shift, residual = conv.inputs(dtype)
    prologue, geometry = affine(conv.c), Geometry(*conv.geometry()[:-1])
    rest = (weight, Affine(scale, shift), residual, geometry, conv.relu)
    actual = kernels.conv_affine(x, prologue, *rest)

    inputs = (reference.activate(x, prologue), weight, scale, shift, residual, *conv.geometry())
    exact = conv_exact(*inputs)
    assert actual.dtype == dtype
    assert actual.is_contiguous(memory_format=torch.channels_last)
    assert_within(actual, exact, conv_tolerance(exact, *inputs))
    assert_as_good_as_pytorch(actual, reference.conv_affine(x, prologue, *rest), exact)


@each_dtype
@pytest.mark.parametrize(("n", "c", "h", "w", "stride"), GRAMS)
@pytest.mark.parametrize("with_prologue", [False, True], ids=["raw", "prologue"])
def test_gram(n, c, h, w, stride, with_prologue, dtype, small):
    x = nhwc(torch.randn(n, c, h, w).to(dtype))
    prologue = affine(c) if with_prologue else None
    mean, covariance = kernels.gram(x, prologue, stride)

    a = reference.activate(x, prologue).double()
    exact_mean, exact_covariance = reference.gram(a, None, stride)
    rows = a[:, :, :: stride[0], :: stride[1]].permute(0, 2, 3, 1).reshape(-1, c).abs()
    m = rows.shape[0]
    tiny = torch.finfo(torch.float32).tiny
    assert mean.dtype == covariance.dtype == torch.float32
    assert_within(mean, exact_mean, _FLOAT32 * (m + 1) ** 0.5 * rows.mean(0) + tiny)
    magnitude = rows.T @ rows / m + rows.mean(0)[:, None] * rows.mean(0)
    # In float32 both factors of every product are shifted, so rounded, too: three roundings a term.
    assert_within(covariance, exact_covariance, _FLOAT32 * (3 * m + 1) ** 0.5 * magnitude + tiny)
    assert torch.equal(covariance, covariance.T)
    if m > 1:
        theirs_mean, theirs_covariance = reference.gram(x, prologue, stride)
        assert_as_good_as_pytorch(mean, theirs_mean, exact_mean, roundings=3)
        if dtype == torch.float32:  # which is centred; products of 16 bits are not, see gram.py
            assert_as_good_as_pytorch(covariance, theirs_covariance, exact_covariance, roundings=3)


@each_dtype
def test_gram_gives_the_statistics_of_the_convolution(dtype, small):
    """What it is for: mean and variance of a 1x1 convolution's result, without that result."""
    x = nhwc(torch.randn(4, 32, 9, 7).to(dtype))
    prologue, weight = affine(32), torch.randn(64, 32).to(dtype)
    mean, covariance = kernels.gram(x, prologue, (1, 1))
    a = reference.activate(x, prologue).double()
    y = torch.einsum("nchw,kc->nkhw", a, weight.double())
    w = weight.float()
    torch.testing.assert_close(w @ mean, y.mean((0, 2, 3)).float(), rtol=1e-5, atol=1e-5)
    variance = ((w @ covariance) * w).sum(1)
    torch.testing.assert_close(variance, y.var((0, 2, 3), correction=0).float(), rtol=1e-5, atol=0)


@each_dtype
@pytest.mark.parametrize("shape", IMAGES)
@pytest.mark.parametrize("residual", ["no residual", "residual", "raw residual"])
def test_tail(shape, residual, dtype, small):
    relu = shape[0] == 1
    y, r = nhwc(torch.randn(2, *shape).to(dtype).flatten(0, 1)).view(2, *shape).unbind(0)
    r = None if residual == "no residual" else r
    ours, theirs = affine(shape[1]), affine(shape[1]) if residual == "raw residual" else None
    actual = kernels.tail(y, ours, r, theirs, relu)

    wide = [None if t is None else Affine(*map(double, t)) for t in (ours, theirs)]
    exact = reference.tail(y.double(), wide[0], double(r), wide[1], relu)
    magnitude = reference.tail(
        y.double().abs(),
        Affine(*(v.abs() for v in wide[0])),
        None if r is None else r.double().abs(),
        None if wide[1] is None else Affine(*(v.abs() for v in wide[1])),
        False,
    )
    assert actual.dtype == dtype
    assert actual.is_contiguous(memory_format=torch.channels_last)
    assert_within(actual, exact, rounding(exact, dtype) + 4 * (_FLOAT32 / 2) * magnitude)


@each_dtype
@pytest.mark.parametrize("shape", IMAGES)
def test_tail_pool(shape, dtype, small):
    """Also where all of a window is negative, and at the border, where the padding must not win."""
    y = nhwc((torch.randn(shape) - 1).to(dtype))
    ours = affine(shape[1])
    y[0, 1, 0, 0], y[0, 2, 0, 0], y[0, 3, -1, -1] = torch.nan, torch.inf, -torch.inf
    actual = kernels.tail_pool(y, ours)
    wide = Affine(*map(double, ours))
    exact = reference.tail_pool(y.double(), wide)
    magnitude = y.double().abs() * wide.scale.abs().view(1, -1, 1, 1) + wide.shift.abs().view(1, -1, 1, 1)
    tolerance = rounding(exact, dtype) + 2 * (_FLOAT32 / 2) * torch.nn.functional.max_pool2d(magnitude, 3, 2, 1)
    assert actual.is_contiguous(memory_format=torch.channels_last)
    assert_within(actual, exact, tolerance)


@each_dtype
@_VALUES
@pytest.mark.parametrize("name", ["round", "1x1", "1x1/2"])
def test_nan_and_inf_in_a_raw_image(name, value, dtype, monkeypatch):
    """They go through the prologue, reach the outputs whose window they are in, and no others; and the statistics."""
    monkeypatch.setattr(tiles, "pick", lambda *problem: SMALL)
    conv = CONVS[name]
    x, weight, *_ = conv.inputs(dtype)
    x[0, -1, 0, 0] = value
    x[-1, 0, conv.h // 2, conv.w // 2] = value
    prologue = affine(conv.c)
    check_conv_statistics(x, prologue, weight, conv)


@each_dtype
@_VALUES
def test_nan_and_inf_in_the_prologue(value, dtype):
    for position in (0, 1):
        conv = CONVS["round"]
        x, weight, *_ = conv.inputs(dtype)
        prologue = affine(conv.c)
        prologue[position][-1] = value
        check_conv_statistics(x, prologue, weight, conv)


@each_dtype
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_and_inf_in_gram(value, dtype, small):
    """They reach their channel's row and column, and no others."""
    x = nhwc(torch.rand(2, 40, 5, 6).to(dtype))
    x[1, 20, 3, 3] = value
    prologue = Affine(torch.ones(40), torch.ones(40))
    mean, covariance = kernels.gram(x, prologue, (1, 1))
    reached = torch.zeros(40, dtype=torch.bool)
    reached[20] = True
    assert torch.equal(mean.isfinite(), ~reached)
    assert torch.equal(covariance.isfinite(), ~(reached[:, None] | reached))


def test_the_order_of_programs_does_not_matter(small, monkeypatch):
    """All results are the same to the bit when the last program runs first."""
    conv = CONVS["round"]
    x, weight, scale, shift, residual = conv.inputs(torch.float32)
    prologue, geometry = affine(conv.c), Geometry(*conv.geometry()[:-1])

    def results() -> list[torch.Tensor]:
        return [
            *kernels.conv_statistics(x, prologue, weight, geometry),
            *kernels.gram(x, prologue, (1, 1)),
            kernels.conv_affine(x, prologue, weight, Affine(scale, shift), residual, geometry, True),
        ]

    forwards = results()
    place = InterpreterBuilder.set_grid_idx
    monkeypatch.setattr(
        InterpreterBuilder,
        "set_grid_idx",
        lambda self, *index: place(self, *(size - 1 - i for size, i in zip(self.grid_dim, index))),
    )
    assert all(map(torch.equal, forwards, results()))


@each_dtype
def test_any_strides(dtype):
    """NCHW, a slice of a wider image, an expanded scale, a weight that is wider than the image."""
    conv = CONVS["17 channels"]
    x, _, *_, residual = conv.inputs(dtype)
    weight = torch.randn(conv.k, conv.c, *conv.kernel) / 12
    prologue = Affine(torch.tensor([0.5]).expand(conv.c), torch.randn(2 * conv.c)[::2])
    sliced = torch.cat([x, x], dim=3)[:, :, :, 1 : conv.w + 1]
    for image in (x.contiguous(), sliced):
        check_conv_statistics(image, prologue, weight, conv)
        expected, actual = reference.gram(nhwc(image), prologue, (1, 2)), kernels.gram(image, prologue, (1, 2))
        torch.testing.assert_close(actual, expected)
        torch.testing.assert_close(
            kernels.tail(image, prologue, residual[:, : conv.c].contiguous(), None, True),
            reference.tail(image, prologue, residual[:, : conv.c], None, True),
        )
        torch.testing.assert_close(kernels.tail_pool(image, prologue), reference.tail_pool(image, prologue))


def test_offsets_of_64_bits(monkeypatch, small):
    """Tensors of 2^31 elements do not fit a test; the arithmetic that they use does."""
    monkeypatch.setattr(operands, "_INT32_ELEMENTS", 0)
    for name in ("round", "1x1", "2 groups"):
        conv = CONVS[name]
        x, weight, *_ = conv.inputs(torch.float32)
        prologue = affine(conv.c)
        check_conv_statistics(x, prologue, weight, conv)
        torch.testing.assert_close(kernels.gram(x, prologue, (2, 2)), reference.gram(x, prologue, (2, 2)))
        torch.testing.assert_close(kernels.tail(x, prologue, x, None, True), reference.tail(x, prologue, x, None, True))
        torch.testing.assert_close(kernels.tail_pool(x, prologue), reference.tail_pool(x, prologue))


def test_supports():
    case = Case("conv_statistics", "cpu", torch.float32, 64, 64, (3, 3), (2, 2), (1, 1), (2, 2), 4)
    assert kernels.supports(case) is None
    assert kernels.supports(case._replace(op="gram", dtype=torch.bfloat16)) is None
    assert "float64" in kernels.supports(case._replace(dtype=torch.float64))
    assert "mps" in kernels.supports(case._replace(device="mps"))
    assert kernels.supports(case._replace(op="conv_bn_act")) is None
    assert "no kernel for softmax" in kernels.supports(case._replace(op="softmax"))


def test_empty_images_get_the_definition():
    x, weight, ours = torch.empty(0, 4, 5, 5), torch.ones(8, 4, 3, 3), affine(8)
    y, mean, variance = kernels.conv_statistics(x, None, weight, Geometry())
    assert (y.shape, mean.shape, variance.shape) == ((0, 8, 3, 3), (8,), (8,))
    assert kernels.conv_affine(x, None, weight, ours, None, Geometry(), True).shape == (0, 8, 3, 3)
    assert kernels.gram(x, None, (1, 1))[1].shape == (4, 4)
    assert kernels.tail(y, ours, None, None, True).shape == y.shape
    assert kernels.tail_pool(torch.empty(0, 8, 4, 4), ours).shape == (0, 8, 2, 2)


@pytest.mark.parametrize("name", ["bottleneck, expand twice", "raw main, expand shortcut"])
def test_results_of_the_op_have_memory_of_their_own(name, monkeypatch):
    monkeypatch.setenv("RESNET_FAST_IMPLEMENTATION", "triton")
    with OwnMemory():
        results(SHAPES[name].block(), SHAPES[name].images(), True)
