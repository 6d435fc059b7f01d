"""Kernels for small maps: convolutions whose inner dimension is cut in parts, and the classifier's head."""

from typing import Optional

import pytest
import torch
import torch.nn.functional as F
from triton.runtime.interpreter import InterpreterBuilder

import resnet_fast.ops.inference  # noqa: F401  registers torch.ops.resnet_fast
from resnet_fast.kernels.contract import Affine, Geometry
from resnet_fast.kernels.reference import inference as reference
from resnet_fast.kernels.triton import classifier, forward, operands, tiles
from resnet_fast.kernels.triton import table as kernels
from resnet_fast.kernels.triton.cost_model import cost
from resnet_fast.kernels.triton.plan import Plan
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

# --- convolutions in parts --------------------------------------------------------------------------------------------

NAMES = [
    "round",
    "round without relu",
    "neither residual nor relu",
    "stride 2",
    "3 channels, stride 2",
    "17 channels",
    "smaller than the kernel",
    "one pixel",
    "5x3, asymmetric",
    "7x7/2",
    "7x7/2, 3 channels",
    "dilation 2",
    "1x1",
    "1x1, odd channels",
    "1x1/2",
    "32 groups of 4, ResNeXt",
    "3 groups, more outputs than inputs",
]


TILE = SMALL._replace(rows=64, columns=32)
IN_HALF = ["round", "5x3, asymmetric", "7x7/2, 3 channels", "1x1, odd channels", "32 groups of 4, ResNeXt"]


def check_parts(conv: Conv, inputs: list, parts: int, tile: tiles.Tile = TILE) -> Plan:
    geometry = conv.geometry()
    plan = forward.plan_conv_bn_act(*inputs, *geometry, "interpreter", tile=tile._replace(parts=parts))
    actual, exact = plan.run(), conv_exact(*inputs, *geometry)
    assert actual.dtype == inputs[0].dtype
    assert actual.is_contiguous(memory_format=torch.channels_last)
    assert_within(actual, exact, conv_tolerance(exact, *inputs, *geometry))
    return plan


def parts_made(plan: Plan) -> int:
    """How many programs share a tile, which must be as many as the second launch adds up."""
    first, *rest = plan.launches
    parts = first.grid[-1]
    assert first.constants["PARTS"] == parts
    assert len(rest) == len(plan.workspaces) == (0 if parts == 1 else 1)
    assert all(sums.shape[0] == parts == add.args[5] for sums, add in zip(plan.workspaces, rest))
    return parts


@pytest.mark.parametrize(
    ("name", "dtype", "parts"),
    [
        *((name, torch.float32, parts) for name in NAMES for parts in (2, 5)),
        *((name, torch.float32, 1000) for name in ("7x7/2, 3 channels", "1x1")),
        *((name, dtype, 3) for name in IN_HALF for dtype in (torch.float16, torch.bfloat16)),
    ],
    ids=str,
)
def test_conv_in_parts(name, dtype, parts):
    """Even and uneven parts, and as many as there are steps."""
    conv = CONVS[name]
    inputs = conv.inputs(dtype)
    plan = check_parts(conv, inputs, parts)
    assert 1 < parts_made(plan) <= parts
    theirs = reference.conv_bn_act(*inputs, *conv.geometry())
    assert_as_good_as_pytorch(plan.result, theirs, conv_exact(*inputs, *conv.geometry()))


def test_wide_tiles_in_parts():
    """A tile that is finished in halves when it is whole; and one that holds everything, so that there is one step."""
    inputs = CONVS["1x1"].inputs(torch.float16)
    assert parts_made(check_parts(CONVS["1x1"], inputs, 2, TILES["split"])) == 2
    whole = tiles.Tile(64, 64, 64, 4, 1, False)
    assert parts_made(check_parts(CONVS["1x1"], inputs, 4, whole)) == 1


def test_every_part_has_work():
    """All steps are in a part, none is empty, and there are as many as asked for where that is possible."""
    for steps in range(1, 80):
        for wanted in range(1, 90):
            parts = cost.parts_of(steps, wanted)
            each = -(-steps // parts)
            assert 1 <= parts <= min(steps, wanted)
            assert (parts - 1) * each < steps <= parts * each
        assert [cost.parts_of(steps, wanted) for wanted in (1, steps, 1000)] == [1, steps, steps]
    assert cost.parts_of(72, 8) == 8
    assert cost.parts_of(10, 6) == 5


@each_dtype
@_VALUES
@pytest.mark.parametrize("name", ["5x3, asymmetric", "1x1"])
def test_nan_and_inf_in_parts(name, value, dtype):
    """They reach the outputs whose window they are in, and no others."""
    conv = CONVS[name]
    inputs = conv.inputs(dtype)
    inputs[0][0, -1, 0, 0] = value
    inputs[0][-1, 0, conv.h // 2, conv.w // 2] = value
    check_parts(conv, inputs, 3)


@each_dtype
def test_parts_are_float32(dtype):
    """Sums far beyond float16's range, in every part, that the scale brings back into it."""
    conv = Conv(1, 64, 5, 5, 16)
    x, weight, scale, shift, residual = conv.inputs(dtype)
    check_parts(conv, [x * 2e3, weight * 2e2, scale / 4e5, shift, residual], 4)


def test_the_order_of_programs_does_not_matter(monkeypatch):
    """Results are the same to the bit when the last program runs first."""

    def results() -> list[torch.Tensor]:
        torch.manual_seed(0)
        return [check_parts(CONVS[name], CONVS[name].inputs(torch.float32), 5).result for name in ("dilation 2", "1x1")]

    forwards = results()
    place = InterpreterBuilder.set_grid_idx
    monkeypatch.setattr(
        InterpreterBuilder,
        "set_grid_idx",
        lambda self, *index: place(self, *(size - 1 - i for size, i in zip(self.grid_dim, index))),
    )
    assert all(map(torch.equal, forwards, results()))


@pytest.mark.parametrize("name", ["1x1", "3 channels, stride 2", "2 groups"])
def test_parts_with_offsets_of_64_bits(name, monkeypatch):
    """Tensors of 2^31 elements do not fit a test; the arithmetic that they use does."""
    monkeypatch.setattr(operands, "_INT32_ELEMENTS", 0)
    check_parts(CONVS[name], CONVS[name].inputs(torch.float32), 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_ops_in_parts(dtype, monkeypatch):
    """The ops that users call, with a table that cuts every convolution: also the stem, before its max-pool. The parts
    are added in several programs."""
    monkeypatch.setattr(tiles, "pick", lambda *problem: TILE._replace(parts=3))
    monkeypatch.setitem(tiles.load("interpreter"), "pointwise", [32, 16, 4])
    conv = CONVS["17 channels"]
    inputs = conv.inputs(dtype)
    exact = conv_exact(*inputs, *conv.geometry())
    actual = kernels.conv_bn_act(*inputs, *conv.geometry())
    assert_within(actual, exact, conv_tolerance(exact, *inputs, *conv.geometry()))

    conv = Conv(1, 3, 17, 21, 33, (7, 7), (2, 2), (3, 3))
    x, weight, scale, shift, _ = conv.inputs(dtype)
    before = conv_exact(x, weight, scale, shift, None, *conv.geometry())
    tolerance = conv_tolerance(before, x, weight, scale, shift, None, *conv.geometry())
    exact = reference.stem(*map(double, (x, weight, scale, shift)))
    assert_within(kernels.stem(x, weight, scale, shift), exact, F.max_pool2d(tolerance, 3, 2, 1))


def test_training_is_not_cut(monkeypatch):
    """Statistics are of whole sums: the table's parts do not count there, nor with a prologue."""
    conv = CONVS["1x1"]
    x, weight, scale, shift, _ = conv.inputs(torch.float32)
    prologue, geometry = Affine(torch.rand(conv.c), torch.rand(conv.c)), Geometry(*conv.geometry()[:-1])

    def results() -> list[torch.Tensor]:
        affine = kernels.conv_affine(x, prologue, weight, Affine(scale, shift), None, geometry, True)
        return [*kernels.conv_statistics(x, None, weight, geometry), affine]

    monkeypatch.setattr(tiles, "pick", lambda *problem: TILE)
    expected = results()
    monkeypatch.setattr(tiles, "pick", lambda *problem: TILE._replace(parts=4))
    assert all(map(torch.equal, results(), expected))


# --- head -------------------------------------------------------------------------------------------------------------

HEADS = {
    "17 channels": (2, 17, 7, 7, 10),
    "15x10 pixels": (3, 40, 15, 10, 10),
    "one pixel": (2, 64, 1, 1, 40),
    "1 channel, 1 class": (1, 1, 3, 2, 1),
    "1000 classes": (1, 40, 7, 7, 1000),
    "several blocks of channels": (1, 1100, 3, 3, 17),
}


@pytest.fixture(params=["one launch", "one launch, small tiles", "two launches"])
def head_launches(request, monkeypatch):
    """Each test runs with the head in one launch and in two."""
    many = request.param == "two launches"
    monkeypatch.setattr(classifier, "_READ_AGAIN", -1 if many else 2**60)
    if request.param.endswith("small tiles"):
        monkeypatch.setattr(classifier, "_TILE", (16, 128, 32, 4))
    return 2 if many else 1


def head_inputs(n: int, c: int, h: int, w: int, k: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """x, weight, bias, such that the results are of the order of 1."""
    x = torch.randn(n, c, h, w) + 0.5
    return [nhwc(x.to(dtype)), (torch.randn(k, c) / c**0.5).to(dtype), torch.randn(k).to(dtype)]


def check_head(x: torch.Tensor, weight: torch.Tensor, bias: Optional[torch.Tensor]) -> torch.Tensor:
    actual = kernels.head(x, weight, bias)
    narrow = weight.to(x.dtype)
    exact = reference.head(*map(double, (x, narrow, bias)))
    # The mean and the product are sums in float32 (checking.py), and the mean is rounded to the dtype of x in between.
    mean = x.double().abs().mean((2, 3))
    magnitude = mean @ narrow.double().abs().T + (0 if bias is None else bias.double().abs())
    terms = x.shape[1] + x.shape[2] * x.shape[3] + 2
    slack = _FLOAT32 * terms**0.5 + 1.001 * torch.finfo(x.dtype).eps / 2
    assert actual.dtype == x.dtype
    assert actual.is_contiguous()
    assert_within(actual, exact, rounding(exact, x.dtype) + slack * magnitude)
    return actual


@each_dtype
@pytest.mark.parametrize("name", HEADS)
def test_head(name, dtype, head_launches):
    """Those of one image have no bias."""
    x, weight, bias = head_inputs(*HEADS[name], dtype)
    bias = bias if len(x) > 1 else None
    assert len(classifier.plan_head(x, weight, bias, "interpreter").launches) == head_launches
    actual = check_head(x, weight, bias)
    exact = reference.head(*map(double, (x, weight, bias)))
    # Two sums, each of which PyTorch may happen to get exactly.
    assert_as_good_as_pytorch(actual, reference.head(x, weight, bias), exact, roundings=2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_head_rounds_the_mean_as_a_pool_does(dtype, head_launches):
    """1 + eps / 4 is 1 in ``dtype``: then the difference of two such channels is exactly 0."""
    x = torch.ones(1, 2, 2, 2)
    x[0, 0, 0, 0] += torch.finfo(dtype).eps
    weight = torch.tensor([[1024.0, -1024.0]]).to(dtype)
    actual = kernels.head(nhwc(x.to(dtype)), weight, None)
    assert torch.equal(actual, reference.head(x.to(dtype), weight, None))
    assert actual == 0


@each_dtype
@_VALUES
def test_nan_and_inf_in_the_head(value, dtype, head_launches):
    """In a pixel, they reach all classes of that image, with the weight's sign; in a weight or a bias, its class."""
    inputs = head_inputs(3, 40, 5, 3, 20, dtype)
    inputs[0][1, -1, 2, 1] = value
    actual = check_head(*inputs)
    assert actual[[0, 2]].isfinite().all()
    assert not actual[1].isfinite().any()
    for position in (1, 2):
        inputs = head_inputs(3, 40, 5, 3, 20, dtype)
        inputs[position][7] = value
        assert check_head(*inputs)[:, :7].isfinite().all()


def test_head_sums_beyond_float16(head_launches):
    """The sum over pixels, and that over channels, which only the last product brings back."""
    x = torch.full((2, 16, 9, 9), 3e4, dtype=torch.float16)
    weight = torch.ones(10, 16, dtype=torch.float16)
    weight[:, ::2] = -1
    actual = check_head(nhwc(x), weight, None)
    assert torch.equal(actual, torch.zeros(2, 10, dtype=torch.float16))


@each_dtype
def test_head_takes_any_strides(dtype, head_launches):
    """NCHW, a slice of a wider image, weights that are part of others."""
    x, weight, bias = head_inputs(2, 24, 6, 5, 10, dtype)
    expected = check_head(x, weight, bias)
    wide = torch.cat([x, x], dim=3)[:, :, :, :5]
    spread = torch.stack([weight, weight], dim=1).flatten(0, 1)
    for image in (x.contiguous(), wide, x.transpose(2, 3).contiguous().transpose(2, 3)):
        for matrix in (weight.T.contiguous().T, spread[::2]):
            for vector in (torch.stack([bias, bias], dim=1)[:, 0], bias):
                assert torch.equal(check_head(image, matrix, vector), expected)


@each_dtype
def test_head_with_float32_weights_beside_a_narrow_image(dtype, head_launches):
    x, *_ = head_inputs(2, 24, 6, 5, 10, dtype)
    check_head(x, torch.randn(10, 24) / 5, torch.randn(10))


def test_head_sees_an_updated_weight(head_launches):
    x, weight, bias = head_inputs(2, 24, 6, 5, 10, torch.float32)
    before = check_head(x, weight, bias)
    weight.mul_(-0.5)
    bias.add_(1)
    assert not torch.equal(check_head(x, weight, bias), before)


def test_head_with_offsets_of_64_bits(head_launches, monkeypatch):
    monkeypatch.setattr(operands, "_INT32_ELEMENTS", 0)
    check_head(*head_inputs(2, 17, 7, 5, 10, torch.float32))


def test_head_of_nothing():
    weight, bias = torch.ones(10, 8), torch.ones(10)
    assert kernels.head(torch.empty(0, 8, 7, 7), weight, bias).shape == (0, 10)
    assert kernels.head(torch.ones(2, 8, 7, 7), weight[:0], bias[:0]).shape == (2, 0)


def test_head_op(head_launches, monkeypatch):
    """As PyTorch sees it: a result of its own, that may be changed in place, and the gradients of the stock pair."""
    monkeypatch.setenv("RESNET_FAST_IMPLEMENTATION", "triton")
    leaves = [t.requires_grad_() for t in head_inputs(2, 24, 6, 5, 10, torch.float32)]
    y = torch.ops.resnet_fast.head(*leaves)
    y.add_(1)
    y.square().sum().backward()
    copies = [t.detach().clone().requires_grad_() for t in leaves]
    (reference.head(*copies) + 1).square().sum().backward()
    for ours, theirs in zip(leaves, copies):
        torch.testing.assert_close(ours.grad, theirs.grad)
    torch.library.opcheck(torch.ops.resnet_fast.head.default, [t.detach() for t in leaves])
