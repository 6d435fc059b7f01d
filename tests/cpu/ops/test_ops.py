"""The fused ops on the CPU: every implementation against the definition in float64, and the ops as PyTorch sees them.

Every operand lies between poisoned borders, so a read beyond it shows in the result and a write to it is found.
"""

import itertools
import subprocess
import sys
from collections import Counter

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from resnet_fast import ops
from resnet_fast.kernels.contract import Case
from resnet_fast.kernels.native import library
from resnet_fast.kernels.reference import inference as reference
from tests.cpu.ops.cases import (
    HALF,
    SERVED,
    WEIRD,
    Conv,
    Data,
    Norm,
    Poison,
    assert_channels_last,
    assert_close,
    cpu_implementations,
    dtype_name,
    exact_conv,
    exact_stem,
    make,
    network_convs,
    nhwc,
    tiles_with,
    tolerance,
    unfused,
    winograd,
)

conv_bn_act = torch.ops.resnet_fast.conv_bn_act
stem = torch.ops.resnet_fast.stem
global_avg_pool = torch.ops.resnet_fast.global_avg_pool

each_dtype = pytest.mark.parametrize("dtype", SERVED, ids=dtype_name)
# For the slow tests: the definition against itself in float64 says little, and the weird shapes say it too.
fast_implementations = pytest.mark.parametrize(
    "implementation", [name for name in cpu_implementations() if name != "reference"], indirect=True
)
COMBINATIONS = list(itertools.product((False, True), (False, True)))  # residual, relu


class Implementation:
    """The implementation under test, chosen as a user chooses it, and a count of what really ran."""

    def __init__(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.name = name
        self.calls: Counter = Counter()
        monkeypatch.setenv("RESNET_FAST_IMPLEMENTATION", name)
        for module_name in {name, "reference"}:
            for op in ("conv_bn_act", "stem", "global_avg_pool"):
                module = ops.IMPLEMENTATIONS[module_name]
                monkeypatch.setattr(module, op, self._counted(module_name, op, getattr(module, op)))

    def _counted(self, name: str, op: str, function):
        def counted(*args):
            self.calls[name, op] += 1
            return function(*args)

        return counted

    def serves(self, case: Case) -> bool:
        return ops.IMPLEMENTATIONS[self.name].supports(case) is None

    def check_served(self, case: Case, blind: bool = False) -> None:
        """It said who would serve the case, and that one alone did; it cannot have fallen back in silence.

        Where the convolution is ``blind``, which its case does not tell, it may have, and should.
        """
        expected = self.name if self.serves(case) else "reference"
        assert ops.implementation_for(case) == expected
        assert self.calls[expected, case.op] > 0, f"{expected} was not called"
        others = {name for name, _ in self.calls} - {expected, "reference" if blind else expected}
        assert not others, f"{others} ran instead of {expected}"
        self.calls.clear()


@pytest.fixture(params=cpu_implementations())
def implementation(request, monkeypatch) -> Implementation:
    return Implementation(request.param, monkeypatch)


@pytest.fixture(autouse=True)
def threads(request):
    """One thread, unless a test asks for more: on a busy machine, two cost these small shapes a hundred times more."""
    before = torch.get_num_threads()
    torch.set_num_threads(getattr(request, "param", 1))
    yield
    torch.set_num_threads(before)


@pytest.fixture
def poison():
    poison = Poison()
    yield poison
    poison.check()


def test_everything_is_under_test():
    """On every CPU that PyTorch supports here, oneDNN serves float32; without it, half of this file tests nothing.

    The native kernels are missing where there is no compiler.
    """
    assert "onednn" in cpu_implementations()
    assert "native" in cpu_implementations() or not library.LIBRARY.exists()
    assert "reference" in cpu_implementations()


def _check(implementation: Implementation, poison: Poison, data: Data, residual: bool, relu: bool) -> torch.Tensor:
    args = poison.args(data.args(residual, relu))
    actual = conv_bn_act(*args)
    implementation.check_served(data.conv.case(data.x.dtype), data.conv.blind)
    exact = exact_conv(args)
    assert actual.dtype == data.x.dtype
    assert_channels_last(actual)
    assert_close(actual, exact, tolerance(args, exact, unfused(data, residual, relu)))
    return actual


# --- conv_bn_act: shapes, dtypes, epilogues ---------------------------------------------------------------------------


@each_dtype
@pytest.mark.parametrize("name", WEIRD)
def test_weird_shapes(name, dtype, implementation, poison):
    """All four epilogues, on shapes that no tile divides."""
    data = make(WEIRD[name], dtype)
    for residual, relu in COMBINATIONS:
        _check(implementation, poison, data, residual, relu)


@each_dtype
@fast_implementations
@pytest.mark.parametrize("name", network_convs())
def test_layers_of_resnets(name, dtype, implementation, poison):
    """Every convolution of ResNet-18, ResNet-50 and ResNeXt-50, as in the middle and at the end of a block."""
    data = make(network_convs()[name], dtype)
    _check(implementation, poison, data, residual=False, relu=True)
    _check(implementation, poison, data, residual=True, relu=True)


@each_dtype
@fast_implementations
@pytest.mark.parametrize("threads", [2, 3], indirect=True)
@pytest.mark.parametrize("name", ["round", "17 channels", "1x1/2", "5x3, asymmetric"])
def test_threads(name, threads, dtype, implementation, poison):
    """More than one thread, and a number that divides nothing, share the work without a gap."""
    _check(implementation, poison, make(WEIRD[name], dtype), residual=True, relu=True)


@each_dtype
@pytest.mark.parametrize(("residual", "relu"), COMBINATIONS)
def test_batch_of_0(residual, relu, dtype, implementation):
    """An empty batch (a detector without proposals) gives an empty result of the right shape."""
    conv = Conv(0, 8, 9, 10, 12, stride=(2, 2))
    y = conv_bn_act(*make(conv, dtype).args(residual, relu))
    assert (y.shape, y.dtype) == (conv.output, dtype)


def test_definition_is_the_unfused_modules():
    """The reference in float64 is PyTorch's unfused computation; everything else here is measured against it."""
    data = make(WEIRD["5x3, asymmetric"], torch.float64)
    data = data._replace(norm=Norm(*(t.double() for t in data.norm[:4])))
    for residual, relu in COMBINATIONS:
        actual, expected = exact_conv(data.args(residual, relu)), unfused(data, residual, relu)
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)  # scale and shift are rounded to float32


@st.composite
def _convs(draw) -> Conv:
    def pair(low: int, high: int) -> tuple[int, int]:
        return draw(st.integers(low, high)), draw(st.integers(low, high))

    groups = draw(st.sampled_from([1, 1, 1, 2, 3, 8]))
    c, k = groups * draw(st.integers(1, 20)), groups * draw(st.integers(1, 20))
    kernel, dilation, padding, stride = pair(1, 5), pair(1, 3), pair(0, 3), pair(1, 3)
    least = [max(1, d * (r - 1) + 1 - 2 * p) for r, d, p in zip(kernel, dilation, padding)]
    h, w = (draw(st.integers(low, low + 9)) for low in least)
    return Conv(draw(st.integers(1, 3)), c, h, w, k, kernel, stride, padding, dilation, groups)


@fast_implementations
def test_random_shapes(implementation):
    """A few hundred shapes that nobody chose, in float32. The same ones at every run; a failing one is printed."""

    @settings(max_examples=300, deadline=None, derandomize=True, database=None)
    @given(conv=_convs(), seed=st.integers(0, 99), residual=st.booleans(), relu=st.booleans(), plain=st.booleans())
    def run(conv, seed, residual, relu, plain):
        data, poison = make(conv, torch.float32, seed), Poison()
        if plain:
            data = data._replace(x=data.x.contiguous(), residual=data.residual.contiguous())
        _check(implementation, poison, data, residual, relu)
        poison.check()

    run()


# --- conv_bn_act: how the operands lie in memory ----------------------------------------------------------------------


def _layouts(x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Tensors equal to ``x``, each in a layout of its own, with NaN wherever ``x`` is not."""
    n, c, h, w = x.shape

    def inside(shape: tuple[int, ...], *where, channels_last: bool = True) -> torch.Tensor:
        buffer = torch.full(shape, torch.nan, dtype=x.dtype)
        view = (nhwc(buffer) if channels_last else buffer)[where]
        return view.copy_(x)

    batch, channels = slice(1, n + 1), slice(2, c + 2)
    rows, columns = slice(1, h + 1), slice(3, w + 3)
    layouts = {
        "NCHW": x.contiguous(),
        "part of the batch": inside((n + 2, c, h, w), batch),
        "part of the channels": inside((n, c + 5, h, w), slice(None), channels),
        "part of the channels, NCHW": inside((n, c + 5, h, w), slice(None), channels, channels_last=False),
        "crop": inside((n, c, h + 2, w + 5), slice(None), slice(None), rows, columns),
        "crop, NCHW": inside((n, c, h + 2, w + 5), slice(None), slice(None), rows, columns, channels_last=False),
        "every second row and column": inside((n, c, 2 * h, 2 * w), ..., slice(None, None, 2), slice(None, None, 2)),
        "transposed": x.transpose(2, 3).contiguous().transpose(2, 3),
        "channels first of all": x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
        "at an odd address": torch.cat([x.new_full((1,), torch.nan), nhwc(x).permute(0, 2, 3, 1).flatten()])[1:]
        .view(n, h, w, c)
        .permute(0, 3, 1, 2),
    }
    for name, layout in layouts.items():
        assert torch.equal(layout, x), name
    return layouts


@each_dtype
@pytest.mark.parametrize("name", ["round", "1 channel", "17 channels", "one row", "1x1/2", "3 groups of 5"])
def test_layouts(name, dtype, implementation, poison):
    """Image and residual in any layout give the result of the channels_last ones, and are not written."""
    data = make(WEIRD[name], dtype)
    _check(implementation, poison, data, residual=True, relu=True)
    exact = exact_conv(data.args(True, True))
    allowed = tolerance(data.args(True, True), exact, unfused(data, True, True))
    residuals = _layouts(data.residual)
    for layout, x in _layouts(data.x).items():
        x, residual = x.detach(), residuals[layout]
        copies = x.clone(), residual.clone()
        y = conv_bn_act(*data._replace(x=x, residual=residual).args(True, True))
        implementation.check_served(data.conv.case(dtype))
        assert_channels_last(y)
        assert_close(y, exact, allowed)
        assert torch.equal(x, copies[0]) and torch.equal(residual, copies[1]), f"{layout}: an input was written"


@each_dtype
@pytest.mark.parametrize("axes", ["N", "C", "HW", "NCHW"])
def test_strides_of_zero(axes, dtype, implementation):
    """An expanded image, residual and scale, whose elements share memory."""
    conv = Conv(2, 16, 5, 6, 16)
    data = make(conv, dtype)
    shape = [1 if axis in axes else size for axis, size in zip("NCHW", data.x.shape)]
    x, residual = (t[tuple(slice(0, size) for size in shape)].expand(t.shape) for t in (data.x, data.residual))
    args = (x, data.weight, data.scale[1:2].expand(conv.k), data.shift, residual, *conv.geometry, True)
    y = conv_bn_act(*args)
    implementation.check_served(conv.case(dtype))
    exact = exact_conv(args)
    assert_close(y, exact, tolerance(args, exact, unfused(data._replace(x=x, residual=residual), True, True)))


@each_dtype
def test_strides_that_mean_nothing(dtype, implementation):
    """A dimension of one element may have any stride, even one that no address could reach."""
    for shape in ((1, 8, 5, 6), (2, 8, 1, 6), (2, 8, 5, 1), (1, 1, 5, 6)):
        n, c, h, w = shape
        data = make(Conv(n, c, h, w, 8), dtype)
        strides = [2**40 if size == 1 else stride for size, stride in zip(shape, data.x.stride())]
        odd = data.x.as_strided(shape, strides)
        y = conv_bn_act(*data._replace(x=odd).args(True, True))
        implementation.check_served(data.conv.case(dtype))
        exact = exact_conv(data.args(True, True))
        assert_close(y, exact, tolerance(data.args(True, True), exact, unfused(data, True, True)))


@each_dtype
def test_weights_in_any_layout(dtype, implementation, poison):
    """A channels_last model, a slice of a larger weight, a reversed scale."""
    data = make(WEIRD["17 channels"], dtype)
    expected = _check(implementation, poison, data, residual=True, relu=True)
    wide = torch.full((33, 40, 5, 5), torch.nan, dtype=dtype)
    wide[:, 3:20, 1:4, 1:4] = data.weight
    for weight in (
        nhwc(data.weight),
        wide[:, 3:20, 1:4, 1:4],
        data.weight.transpose(0, 1).contiguous().transpose(0, 1),
    ):
        assert torch.equal(conv_bn_act(*data._replace(weight=weight).args(True, True)), expected)
    spread = torch.full((3 * 33,), torch.nan)
    spread[1::3] = data.scale
    assert torch.equal(conv_bn_act(*data._replace(scale=spread[1::3]).args(True, True)), expected)


@each_dtype
def test_residual_is_the_image(dtype, implementation, poison):
    """The identity of a residual block: one tensor in both places, still there afterwards."""
    data = make(Conv(2, 24, 6, 5, 24), dtype)
    data = data._replace(residual=data.x)
    x = poison(data.x)
    args = (x, *data.args(True, True)[1:4], x, *data.conv.geometry, True)
    y = conv_bn_act(*args)
    implementation.check_served(data.conv.case(dtype))
    exact = exact_conv(args)
    assert_close(y, exact, tolerance(args, exact, unfused(data, True, True)))


# --- conv_bn_act: extreme numbers -------------------------------------------------------------------------------------


@each_dtype
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ["round", "1 channel", "17 channels", "3 groups of 5", "depthwise", "1x1/2"])
def test_nan_and_inf_in_the_image(name, value, dtype, implementation, poison):
    """They reach exactly the outputs that they reach in PyTorch's unfused float32 computation, and survive a ReLU.

    In half precision there may also be a NaN where PyTorch's own half-precision convolution has one: some of oneDNN's
    kernels multiply a whole vector of neighbours by zeros. In Winograd's algorithm they may reach a whole tile.
    """
    conv = WEIRD[name]
    data = make(conv, dtype)
    data.x[0, -1, 0, 0] = value
    data.x[-1, 0, conv.h // 2, conv.w // 2] = value
    for residual, relu in COMBINATIONS:
        args = poison.args(data.args(residual, relu))
        actual = conv_bn_act(*args)
        implementation.check_served(conv.case(dtype))
        expected, stock = unfused(data, residual, relu, torch.float32), unfused(data, residual, relu)
        assert not unfused(data, residual, False, torch.float32).isfinite().all()
        free = stock.isnan() & ~expected.isnan()
        if winograd(args):
            assert not actual[~expected.isfinite()].isfinite().any()
            free = tiles_with(~unfused(data, residual, False, torch.float32).isfinite(), winograd(args))
        for where in (torch.isnan, torch.isposinf, torch.isneginf):
            assert torch.equal(where(actual)[~free], where(expected)[~free])
        exact = exact_conv(args).masked_fill(free, 0)
        pytorch = stock.masked_fill(free, 0)
        assert_close(actual.masked_fill(free, 0), exact, tolerance(args, exact, pytorch))


@each_dtype
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("operand", ["weight", "scale", "shift", "residual"])
def test_nan_and_inf_elsewhere(operand, value, dtype, implementation):
    """A model that has diverged must show it: nothing is masked by the ReLU or by the way weights are packed."""
    data = make(WEIRD["17 channels"], dtype)
    changed = getattr(data, operand)
    # The middle tap of a weight: the outer ones meet the padding, where 0 * Inf is NaN or is never computed.
    changed[{"weight": (-1, 0, 1, 1), "residual": (-1, 0, 0, 0)}.get(operand, -1)] = value
    for relu in (False, True):
        args = data.args(True, relu)
        actual, expected = conv_bn_act(*args), exact_conv(args)
        if dtype != torch.float16:  # where a weight that float16 cannot hold goes elsewhere, as it should
            implementation.check_served(data.conv.case(dtype))
        if operand == "scale" and value == value:
            # An infinite scale inside the sum makes Inf - Inf of what is Inf outside it. Both say: diverged.
            assert not actual[expected.isinf()].isfinite().any() or relu
            assert torch.equal(actual[:, :-1].isfinite(), expected[:, :-1].isfinite())
            continue
        if operand == "weight" and winograd(args):  # whose transforms make NaN of infinities with opposite signs
            assert not actual[~expected.isfinite()].isfinite().any()
            assert actual[:, :-1].isfinite().all()
            continue
        for where in (torch.isnan, torch.isposinf, torch.isneginf):
            assert torch.equal(where(actual), where(expected))
        assert not expected.isfinite().all() or relu


def _norm(k: int, mean: float = 0.0, var: float = 1.0, weight: float = 1.0, bias: float = 0.0) -> Norm:
    return Norm(*(torch.full((k,), value) for value in (mean, var, weight, bias)))


TRAPS = {
    # name: (batch norm of the channels, factor of the image, factor of the weight)
    "tiny variance": (_norm(24, var=1e-12), 1.0, 1e-2),
    "tiny variance, denormal": (_norm(24, var=5.6e-45), 1.0, 1e-2),
    "tiny variance, large weight": (_norm(24, var=1e-12, weight=30.0), 1.0, 1e-2),
    "huge variance": (_norm(24, var=1e8), 3e2, 10.0),
    "huge variance, small result": (_norm(24, var=1e10), 1.0, 1.0),
    "tiny gamma": (_norm(24, weight=1e-6, bias=1.0), 1e2, 1.0),
    "large bias": (_norm(24, bias=3e4), 1.0, 1.0),
    "large mean": (_norm(24, mean=200.0), 30.0, 1.0),
}


@each_dtype
@pytest.mark.parametrize("only", ["all channels", "one channel"])
@pytest.mark.parametrize("trap", TRAPS)
def test_extreme_statistics(trap, only, dtype, implementation, poison):
    """Running variances far from 1 push scaled weights beyond float16, up or down. No worse than PyTorch's operators.

    Where PyTorch's own half-precision result overflows, anything goes.
    """
    norm, image, factor = TRAPS[trap]
    if only == "one channel":
        usual = make(Conv(1, 1, 3, 3, 24), torch.float32).norm
        norm = Norm(*(torch.cat([one[:5], extreme[5:6], one[6:]]) for one, extreme in zip(usual[:4], norm[:4])))
    data = make(Conv(2, 24, 6, 5, 24), torch.float32, norm=norm)
    data = data._replace(
        x=(data.x * image).to(dtype), weight=(data.weight * factor).to(dtype), residual=data.residual.to(dtype)
    )
    for residual, relu in COMBINATIONS:
        _check_extreme(data, residual, relu, poison)


def _check_extreme(data: Data, residual: bool, relu: bool, poison: Poison) -> None:
    args = poison.args(data.args(residual, relu))
    actual, exact, pytorch = conv_bn_act(*args), exact_conv(args), unfused(data, residual, relu)
    fine = pytorch.isfinite()
    assert fine.float().mean() > 0.5, "the trap is set where PyTorch has no result either"
    exact = exact.masked_fill(~fine, 0)
    actual = actual.masked_fill(~fine, 0)
    assert_close(actual, exact, tolerance(args, exact, pytorch.masked_fill(~fine, 0)))


@each_dtype
def test_wide_weight_beside_a_narrow_image(dtype, implementation):
    """As under autocast: a float32 weight is rounded once, whatever is folded into it."""
    if dtype == torch.float32:
        pytest.skip("nothing is wider that oneDNN serves")
    data = make(WEIRD["17 channels"], dtype)
    wide = data.weight.float() * 1.001
    args = data._replace(weight=wide).args(True, True)
    actual = conv_bn_act(*args)
    implementation.check_served(data.conv.case(dtype))
    exact = exact_conv(args)
    pytorch = unfused(data._replace(weight=wide), True, True)
    assert actual.dtype == dtype
    assert_close(actual, exact, tolerance(args, exact, pytorch))


def test_a_changed_operand_is_seen(implementation):
    """Whatever is derived from weight, scale and shift is made again when one of them is written."""
    data = make(WEIRD["17 channels"], torch.float32)
    args = data.args(True, False)
    for tensor in (data.weight, data.scale, data.shift):
        before = conv_bn_act(*args)
        tensor.flatten()[-1:].add_(1)  # beyond the first bytes of each
        tensor.view(-1)[-1] += 1
        exact = exact_conv(args)
        actual = conv_bn_act(*args)
        assert not torch.equal(actual, before)
        assert_close(actual, exact, tolerance(args, exact, None))


SIZES_SEEN = [(1, 5, 5, 1, 1), (2, 9, 4, 1, 1), (2, 9, 4, 2, 1), (2, 9, 4, 2, 0), (1, 30, 31, 1, 2), (4, 7, 7, 1, 1)]


def test_sizes_that_alternate(implementation):
    """A weight seen with many image sizes and geometries in turn, as a detector's: packs are never mixed up."""
    weight_of = make(Conv(1, 12, 5, 5, 12), torch.float32)
    for _ in range(2):
        for n, h, w, stride, padding in SIZES_SEEN:
            conv = Conv(n, 12, h, w, 12, stride=(stride, stride), padding=(padding, padding))
            data = make(conv, torch.float32)._replace(
                **{f: getattr(weight_of, f) for f in ("weight", "scale", "shift")}
            )
            args = data.args(True, True)
            actual, exact = conv_bn_act(*args), exact_conv(args)
            implementation.check_served(conv.case(torch.float32))
            assert_close(actual, exact, tolerance(args, exact, unfused(data, True, True)))


# --- stem and global_avg_pool -----------------------------------------------------------------------------------------

STEMS = {
    "ResNet": Conv(2, 3, 64, 64, 64),
    "odd": Conv(1, 3, 33, 47, 64),
    "grey": Conv(2, 1, 20, 21, 10),
    "4 channels": Conv(1, 4, 18, 31, 32),
    "1 output channel": Conv(1, 3, 9, 11, 1),
    "small": Conv(2, 2, 7, 5, 16),
    "one pixel": Conv(1, 8, 1, 1, 33),
}


@each_dtype
@pytest.mark.parametrize("name", STEMS)
def test_stem(name, dtype, implementation, poison):
    """Right in NCHW and channels_last, next to a border of NaN that the padding of neither window may reach."""
    conv = STEMS[name]._replace(kernel=(7, 7), stride=(2, 2), padding=(3, 3))
    data = make(conv, dtype)
    for x in (data.x, data.x.contiguous()):
        args = poison.args((x, data.weight, data.scale, data.shift))
        implementation.calls.clear()  # the definition of the stem, below, calls that of the convolution
        actual = stem(*args)
        implementation.check_served(conv.case(dtype, "stem"))
        exact = exact_stem(args)
        before = (*args, None, *conv.geometry, True)
        pytorch = unfused(data, False, True)
        # The largest of right values is right within the largest of their tolerances.
        allowed = F.max_pool2d(tolerance(before, exact_conv(before), pytorch), 3, 2, 1)
        assert actual.dtype == dtype
        assert_channels_last(actual)
        assert_close(actual, exact, allowed)


@each_dtype
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_stem_keeps_nan_and_inf(value, dtype, implementation):
    data = make(Conv(1, 3, 21, 17, 9, (7, 7), (2, 2), (3, 3)), dtype)
    data.x[0, 1, 10, 8] = value
    args = (data.x, data.weight, data.scale, data.shift)
    actual, expected = stem(*args), F.max_pool2d(unfused(data, False, True, torch.float32), 3, 2, 1)
    assert not expected.isfinite().all()
    free = torch.zeros_like(expected, dtype=torch.bool)
    tile = winograd(data.args(False, True))
    if tile:
        assert not actual[~expected.isfinite()].isfinite().any()
        # Seven taps are computed as eight, so a tile sees the image's next pixel too.
        seen = F.max_pool2d(F.pad((~data.x.isfinite()).any(1, keepdim=True).float(), (3, 4, 3, 4)), 8, 2)
        free = F.max_pool2d(tiles_with(seen > 0, tile).float(), 3, 2, 1).bool().expand_as(expected)
        assert not free.all()
    assert torch.equal(actual.isnan()[~free], expected.isnan()[~free])
    assert torch.equal(actual.isinf()[~free], expected.isinf()[~free])


@each_dtype
@pytest.mark.parametrize("shape", [(2, 512, 7, 7), (1, 10, 13, 11), (3, 33, 1, 1), (1, 1, 2, 3), (2, 17, 1, 9)])
def test_global_avg_pool(shape, dtype, implementation, poison):
    """As exact as a float32 sum rounded once, for any layout."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    exact = x.double().mean((2, 3), keepdim=True)
    eps, terms = torch.finfo(dtype).eps, shape[2] * shape[3]
    # Half an ulp of the result, and a float32 sum of that many terms; see cases.tolerance.
    allowed = eps / 2 * exact.abs() + (terms + 1) ** 0.5 * torch.finfo(torch.float32).eps * x.double().abs().mean()
    for layout in (nhwc(x), *_layouts(nhwc(x)).values()):
        y = global_avg_pool(layout)
        implementation.check_served(Case("global_avg_pool", "cpu", dtype, shape[1], shape[1]))
        assert y.dtype == dtype
        assert_channels_last(y)
        assert_close(y, exact, allowed)
    assert_close(global_avg_pool(poison(nhwc(x))), exact, allowed)


@pytest.mark.parametrize("dtype", HALF, ids=dtype_name)
def test_global_avg_pool_sums_in_float32(dtype, implementation):
    """A sum beyond float16, and one whose terms bfloat16 would no longer notice. NaN and Inf stay in their channels."""
    x = torch.full((2, 16, 20, 20), 3e4).to(dtype)
    x[1, 3, 4, 4], x[1, 5, 0, 0] = torch.nan, -torch.inf
    y, exact = global_avg_pool(x), x.double().mean((2, 3), keepdim=True).to(dtype)
    torch.testing.assert_close(y, exact, rtol=0, atol=0, equal_nan=True)


def test_empty_batches_of_stem_and_pool(implementation):
    assert stem(torch.empty(0, 3, 32, 32), torch.ones(8, 3, 7, 7), torch.ones(8), torch.ones(8)).shape == (0, 8, 8, 8)
    assert global_avg_pool(torch.empty(0, 4, 5, 5)).shape == (0, 4, 1, 1)


# --- dispatch ---------------------------------------------------------------------------------------------------------

CASE = Conv(1, 8, 5, 5, 8).case(torch.float32)


def test_the_best_serves_by_default(monkeypatch):
    """Without the variable, or with an empty one, the best implementation serves; float64 gets the definition."""
    best = cpu_implementations()[0]
    assert best != "reference"
    monkeypatch.delenv("RESNET_FAST_IMPLEMENTATION", raising=False)
    assert ops.implementation_for(CASE) == best
    monkeypatch.setenv("RESNET_FAST_IMPLEMENTATION", "")
    assert ops.implementation_for(CASE) == best
    assert ops.implementation_for(CASE._replace(dtype=torch.float64)) == "reference"


def test_unknown_implementation(monkeypatch):
    monkeypatch.setenv("RESNET_FAST_IMPLEMENTATION", "onednm")
    with pytest.raises(ValueError, match=r"RESNET_FAST_IMPLEMENTATION.*'onednm'.*onednn.*reference"):
        conv_bn_act(*make(Conv(1, 8, 5, 5, 8), torch.float32).args(False, True))


@pytest.mark.parametrize("name", list(ops.IMPLEMENTATIONS))
def test_supports_gives_none_or_a_reason(name):
    """One predicate for every case; the definition refuses none."""
    supports = ops.IMPLEMENTATIONS[name].supports
    for dtype in (*SERVED, torch.float64):
        for op in ("conv_bn_act", "stem", "global_avg_pool", "head"):
            for device in ("cpu", "cuda", "mps"):
                answer = supports(CASE._replace(op=op, dtype=dtype, device=device))
                assert answer is None or (isinstance(answer, str) and answer)
                assert name != "reference" or answer is None


def test_float64_falls_back_to_the_definition(implementation):
    data = make(WEIRD["17 channels"], torch.float64)
    args = tuple(arg.double() if isinstance(arg, torch.Tensor) else arg for arg in data.args(True, True))
    torch.testing.assert_close(conv_bn_act(*args), exact_conv(args), rtol=1e-12, atol=1e-12)
    implementation.check_served(data.conv.case(torch.float64))


# --- the ops as PyTorch sees them -------------------------------------------------------------------------------------


def _leaves(data: Data, residual: bool = True) -> list:
    """x, weight, scale, shift, residual as leaves that require gradients."""
    tensors = [data.x, data.weight, data.scale, data.shift, data.residual if residual else None]
    return [None if t is None else t.clone().requires_grad_() for t in tensors]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=dtype_name)
@pytest.mark.parametrize("gradients", [False, True], ids=["inference", "gradients"])
@pytest.mark.parametrize("op", ["conv_bn_act", "conv_bn_act, plain", "stem", "global_avg_pool"])
def test_opcheck(op, gradients, dtype):
    """Schema, fake kernel (shape, strides, dtype), autograd registration, and AOT dispatch with dynamic shapes."""
    data = make(Conv(2, 4, 9, 8, 6, stride=(2, 1)), dtype)
    tensors = _leaves(data) if gradients else [data.x, data.weight, data.scale, data.shift, data.residual]
    if op == "conv_bn_act":
        args = (*tensors, *data.conv.geometry, True)
    elif op == "conv_bn_act, plain":
        args = (*tensors[:4], None, *data.conv.geometry, False)
    elif op == "stem":
        data = make(Conv(2, 3, 19, 16, 6, (7, 7), (2, 2), (3, 3)), dtype)
        args = tuple(_leaves(data)[:4] if gradients else (data.x, data.weight, data.scale, data.shift))
    else:
        args = (tensors[0],)
    torch.library.opcheck(getattr(torch.ops.resnet_fast, op.split(",")[0]).default, args)


GRADIENT_CONVS = {
    "3x3": Conv(2, 4, 5, 4, 3),
    "5x3, asymmetric": Conv(1, 2, 7, 6, 3, (5, 3), (2, 1), (2, 0), (1, 2)),
    "grouped": Conv(2, 4, 4, 3, 6, groups=2),
    "1x1/2": Conv(2, 3, 5, 4, 2, (1, 1), (2, 2), (0, 0)),
}


def _double_leaves(conv: Conv) -> list:
    leaves = _leaves(make(conv, torch.float64))
    return [leaf.detach().double().requires_grad_() for leaf in leaves]


@pytest.mark.parametrize(("residual", "relu"), COMBINATIONS)
@pytest.mark.parametrize("name", GRADIENT_CONVS)
def test_gradcheck(name, residual, relu):
    """First and second derivatives for all five tensors against finite differences in float64."""
    conv = GRADIENT_CONVS[name]
    leaves = _double_leaves(conv)

    def function(x, weight, scale, shift, added):
        return conv_bn_act(x, weight, scale, shift, added if residual else None, *conv.geometry, relu)

    assert function(*leaves).abs().gt(1e-3).sum() > conv.n  # not all cut off by the ReLU
    inputs = leaves if residual else [*leaves[:4], None]
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


def test_gradcheck_of_stem_and_pool():
    x, weight, scale, shift, _ = _double_leaves(Conv(1, 2, 9, 8, 2, (7, 7), (2, 2), (3, 3)))
    with torch.no_grad():
        scale[0] = 0.7  # with 0, all values of a window are equal: no derivative
    assert torch.autograd.gradcheck(stem, (x, weight, scale, shift))
    assert torch.autograd.gradgradcheck(stem, (x, weight, scale, shift), fast_mode=True)
    assert torch.autograd.gradcheck(global_avg_pool, (x,))
    assert torch.autograd.gradgradcheck(global_avg_pool, (x,))


@pytest.mark.parametrize("needed", range(5))
def test_each_gradient_alone(needed, implementation):
    """A frozen part of a model: only what requires a gradient gets one, and it is the same as with all of them."""
    data = make(WEIRD["5x3, asymmetric"], torch.float32)
    everything = _leaves(data)
    conv_bn_act(*everything, *data.conv.geometry, True).square().sum().backward()
    alone = [leaf.detach().requires_grad_(i == needed) for i, leaf in enumerate(everything)]
    conv_bn_act(*alone, *data.conv.geometry, True).square().sum().backward()
    for i, (leaf, reference_leaf) in enumerate(zip(alone, everything)):
        if i == needed:
            torch.testing.assert_close(leaf.grad, reference_leaf.grad, rtol=1e-6, atol=1e-6)
        else:
            assert leaf.grad is None


def _module_gradients(data: Data, dtype: torch.dtype, upstream: torch.Tensor, fused: bool) -> list[torch.Tensor]:
    """Gradients of x, conv.weight, bn.weight, bn.bias and the residual, for the modules or for the op."""
    x, weight, residual = (t.to(dtype, copy=True).requires_grad_() for t in (data.x, data.weight, data.residual))
    norm = Norm(*(t.to(dtype, copy=True) for t in data.norm[:4]))
    gamma, beta = norm.weight.requires_grad_(), norm.bias.requires_grad_()
    if fused:
        scale = gamma * (norm.var + norm.eps).rsqrt()
        y = conv_bn_act(x, weight, scale, beta - norm.mean * scale, residual, *data.conv.geometry, True)
    else:
        y = F.conv2d(x, weight, None, *data.conv.geometry)
        y = F.relu(F.batch_norm(y, norm.mean, norm.var, gamma, beta, False, 0.0, norm.eps) + residual)
    y.backward(upstream.to(dtype))
    return [t.grad for t in (x, weight, gamma, beta, residual)]


@pytest.mark.parametrize("name", ["round", "5x3, asymmetric", "32 groups of 4", "1x1/2", "1 channel", "depthwise"])
def test_float32_gradients(name, implementation):
    """Against float64 autograd of the unfused modules: at most twice the error of float32 autograd of the same.

    Outputs within 1e-4 of the ReLU's corner get no upstream gradient: one flipped sign would be all the error there is.
    The floor is a float32 sum as long as the longest reduction, over n * p * q outputs or k * r * s taps.
    """
    data = make(WEIRD[name], torch.float32)
    conv = data.conv
    upstream = torch.randn(conv.output, generator=torch.Generator().manual_seed(1))
    upstream[unfused(data, True, False).abs() < 1e-4] = 0
    exact = _module_gradients(data, torch.float64, upstream, fused=False)
    pytorch = _module_gradients(data, torch.float32, upstream, fused=False)
    ours = _module_gradients(data, torch.float32, upstream, fused=True)
    implementation.check_served(conv.case(torch.float32))
    n, k, p, q = conv.output
    longest = max(n * p * q, k // conv.groups * conv.kernel[0] * conv.kernel[1])
    for what, a, b, c in zip(("x", "conv.weight", "bn.weight", "bn.bias", "residual"), ours, pytorch, exact):
        size = c.abs().max()
        error, theirs = ((t.double() - c).abs().max() / size for t in (a, b))
        assert error <= 2 * theirs + torch.finfo(torch.float32).eps * longest**0.5, f"gradient of {what}: {error:.2e}"


def test_float32_gradients_of_the_stem(implementation):
    """The pool hands each gradient to the maximum that PyTorch's pool would choose."""
    data = make(Conv(2, 3, 33, 30, 16, (7, 7), (2, 2), (3, 3)), torch.float32)
    ours = _leaves(data, False)[:4]
    exact = [leaf.detach().double().requires_grad_() for leaf in ours]
    upstream = torch.randn(2, 16, 9, 8, generator=torch.Generator().manual_seed(1))
    stem(*ours).backward(upstream)
    x, weight, scale, shift = exact
    y = F.conv2d(x, weight, None, *data.conv.geometry) * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)
    F.max_pool2d(F.relu(y), 3, 2, 1).backward(upstream.double())
    for a, b in zip(ours, exact):
        torch.testing.assert_close(a.grad.double(), b.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", HALF, ids=dtype_name)
def test_half_gradients_share_the_mask(dtype, implementation):
    """In half precision the ReLU's mask is that of the result, and gradients have the dtypes of their tensors.

    The vectors' are float32, and summed so.
    """
    data = make(WEIRD["17 channels"], dtype)
    leaves = _leaves(data)
    y = conv_bn_act(*leaves, *data.conv.geometry, True)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    y.backward(upstream)
    assert [leaf.grad.dtype for leaf in leaves] == [leaf.dtype for leaf in leaves]
    masked = upstream * (y > 0)
    assert torch.equal(leaves[4].grad, masked)
    x, weight, scale, shift, _ = leaves
    torch.testing.assert_close(shift.grad, masked.float().sum((0, 2, 3)), rtol=1e-5, atol=1e-5)
    conv = F.conv2d(x, weight, None, *data.conv.geometry).detach()
    torch.testing.assert_close(scale.grad, (masked.float() * conv.float()).sum((0, 2, 3)), rtol=1e-4, atol=1e-4)


def test_gradients_of_an_empty_batch():
    leaves = _leaves(make(Conv(0, 8, 5, 6, 4), torch.float32))
    conv_bn_act(*leaves, *Conv(0, 8, 5, 6, 4).geometry, True).sum().backward()
    for leaf in leaves:
        assert leaf.grad.shape == leaf.shape
        assert not leaf.grad.any()


@pytest.mark.parametrize("dtype", HALF, ids=dtype_name)
def test_autocast(dtype, implementation):
    """As a convolution under autocast: a half-precision result, float32 gradients for float32 parameters."""
    data = make(WEIRD["17 channels"], torch.float32)
    leaves = _leaves(data)
    with torch.autocast("cpu", dtype):
        y = conv_bn_act(*leaves, *data.conv.geometry, True)
    implementation.check_served(data.conv.case(dtype))
    assert y.dtype == dtype
    rounded = data._replace(x=data.x.to(dtype), residual=data.residual.to(dtype)).args(True, True)
    exact = exact_conv(rounded)
    narrow = data._replace(**{f: getattr(data, f).to(dtype) for f in ("x", "weight", "residual")})
    assert_close(y.detach(), exact, tolerance(rounded, exact, unfused(narrow, True, True)))
    y.float().square().sum().backward()
    assert [leaf.grad.dtype for leaf in leaves] == [torch.float32] * 5
    with torch.autocast("cpu", dtype, enabled=False):
        assert conv_bn_act(*data.args(True, True)).dtype == torch.float32


def test_backward_of_float32_is_float32_inside_autocast():
    gradients = []
    for inside in (True, False):
        torch.manual_seed(0)
        x, weight, w = torch.randn(2, 16, 8, 8), torch.randn(8, 16, 3, 3), torch.randn(5, 8)
        given = [t.requires_grad_() for t in (x, weight, torch.rand(8), torch.randn(8), w)]
        y = torch.ops.resnet_fast.conv_bn_act(*given[:4], None, (1, 1), (1, 1), (1, 1), 1, True)
        loss = torch.ops.resnet_fast.head(y, w, None).square().sum()
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            gradients.append(torch.autograd.grad(loss, given))
    assert all(map(torch.equal, *gradients))


def test_autocast_packs_once():
    """A float32 model evaluated under autocast lays out each weight once, not at every call."""
    args = make(WEIRD["17 channels"], torch.float32).args(False, True)
    with torch.profiler.profile() as profile, torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        for _ in range(4):
            conv_bn_act(*args)
    counts = {event.key: event.count for event in profile.key_averages()}
    assert counts["resnet_fast::conv_bn_act"] >= 4
    if ops.implementation_for(WEIRD["17 channels"].case(torch.bfloat16)) == "onednn":
        assert counts["aten::mkldnn_reorder_conv2d_weight"] == 1


def test_half_model_under_autocast(implementation):
    """The stock convolution casts a float16 weight to autocast's bfloat16; so does the op. float64 stays."""
    data = make(WEIRD["17 channels"], torch.float16)
    with torch.autocast("cpu", torch.bfloat16):
        y = conv_bn_act(*data.args(True, True))
        assert F.conv2d(data.x, data.weight).dtype == y.dtype == torch.bfloat16
        double = make(WEIRD["17 channels"], torch.float64)
        assert conv_bn_act(*double.args(True, True)).dtype == torch.float64
        assert F.conv2d(double.x, double.weight).dtype == torch.float64
    exact = exact_conv(data.args(True, True))
    torch.testing.assert_close(y.double(), exact, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("dtype", HALF, ids=dtype_name)
def test_stem_and_pool_under_autocast(dtype):
    """The stem is cast like its convolution; adaptive_avg_pool2d is not cast by PyTorch, nor is the pool here."""
    data = make(Conv(1, 3, 20, 20, 8, (7, 7), (2, 2), (3, 3)), torch.float32)
    leaves = _leaves(data, False)[:4]
    with torch.autocast("cpu", dtype):
        y = stem(*leaves)
        pooled = global_avg_pool(data.x)
        assert F.adaptive_avg_pool2d(data.x, 1).dtype == pooled.dtype == torch.float32
    assert y.dtype == dtype
    y.float().sum().backward()
    assert [leaf.grad.dtype for leaf in leaves] == [torch.float32] * 4


class Net(nn.Module):
    """All three ops in a row, as a model calls them."""

    def __init__(self) -> None:
        super().__init__()
        for name, conv in (("a", Conv(1, 3, 9, 9, 8, (7, 7), (2, 2), (3, 3))), ("b", Conv(1, 8, 9, 9, 8))):
            data = make(conv, torch.float32)
            for field in ("weight", "scale", "shift"):
                self.register_parameter(f"{name}_{field}", nn.Parameter(getattr(data, field)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = stem(x, self.a_weight, self.a_scale, self.a_shift)
        args = (self.b_weight, self.b_scale, self.b_shift, x, (1, 1), (1, 1), (1, 1), 1, True)
        return global_avg_pool(conv_bn_act(x, *args)).flatten(1)


SIZES = [(2, 3, 32, 36), (3, 3, 40, 33), (5, 3, 25, 64)]  # none equal: equal sizes become one symbol


def test_compile_with_dynamic_shapes():
    """One graph without breaks for three shapes, forward and backward, with the results of eager mode.

    Or as many as PyTorch's own max-pooling has: up to 2.11 one for even sizes, and one for odd ones.
    """
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    net = Net()
    compiled = torch.compile(net, fullgraph=True, backend=counter, dynamic=True)
    for size in SIZES:
        x = torch.randn(size, generator=torch.Generator().manual_seed(0))
        results = []
        for function in (net, compiled):
            net.zero_grad()
            leaf = x.clone().requires_grad_()
            y = function(leaf)
            y.square().sum().backward()
            results.append([y.detach(), leaf.grad, *(p.grad.clone() for p in net.parameters())])
        for eager, traced in zip(*results):
            torch.testing.assert_close(traced, eager)
    stock = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    pooled = torch.compile(lambda x: F.max_pool2d(x[..., ::2, ::2], 3, 2, 1), backend=stock, dynamic=True)
    for size in SIZES:
        pooled(torch.ones(size))
    assert counter.frame_count == stock.frame_count


def test_compile_for_inference():
    torch._dynamo.reset()
    net = Net().requires_grad_(False)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager", dynamic=True)
    for size in SIZES:
        x = torch.randn(size, generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            torch.testing.assert_close(compiled(x), net(x))


def test_export_with_dynamic_batch():
    """The program keeps the ops as single nodes and holds for batches other than the example's."""
    net = Net()
    batch = torch.export.Dim("batch")
    program = torch.export.export(net, (torch.randn(2, 3, 32, 32),), dynamic_shapes=({0: batch},))
    called = Counter(
        str(node.target).split(".")[1] for node in program.graph.nodes if "resnet_fast" in str(node.target)
    )
    assert called == {"stem": 1, "conv_bn_act": 1, "global_avg_pool": 1}
    for size in (1, 2, 7):
        x = torch.randn(size, 3, 32, 32)
        torch.testing.assert_close(program.module()(x), net(x))


@each_dtype
@pytest.mark.parametrize("name", ["17 channels", "5x3, asymmetric", "1 channel", "one pixel", "1 to 1", "depthwise"])
def test_meta_tensors(name, dtype):
    """Without data, the op gives the shape, dtype and layout that it has with data."""
    args = make(WEIRD[name], dtype).args(True, True)
    real = conv_bn_act(*args)
    meta = conv_bn_act(*(arg.to("meta") if isinstance(arg, torch.Tensor) else arg for arg in args))
    assert meta.is_meta
    assert (meta.shape, meta.dtype) == (real.shape, real.dtype)
    assert_channels_last(meta)


def test_meta_tensors_of_stem_and_pool():
    x = torch.empty(2, 3, 33, 47, device="meta")
    weight, vector = torch.empty(8, 3, 7, 7, device="meta"), torch.empty(8, device="meta")
    assert stem(x, weight, vector, vector).shape == (2, 8, 9, 12)
    assert global_avg_pool(x).shape == (2, 3, 1, 1)


def test_inference_mode(implementation):
    """The same numbers, no autograd history, and nothing left behind that autograd could not use later."""
    data = make(WEIRD["17 channels"], torch.float32)
    leaves = _leaves(data)
    with torch.inference_mode():
        inferred = conv_bn_act(*leaves, *data.conv.geometry, True)
    assert inferred.is_inference() and not inferred.requires_grad
    y = conv_bn_act(*leaves, *data.conv.geometry, True)
    assert torch.equal(y, inferred)
    y.sum().backward()
    assert all(leaf.grad is not None for leaf in leaves)
    with torch.no_grad():
        assert not conv_bn_act(*leaves, *data.conv.geometry, True).requires_grad


def test_a_result_changed_in_place_is_caught():
    """The ReLU's result is saved for backward: writing to it is an error, as with PyTorch's, not a wrong gradient."""
    leaves = _leaves(make(WEIRD["17 channels"], torch.float32))
    y = conv_bn_act(*leaves, *WEIRD["17 channels"].geometry, True)
    y.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_reference_is_what_the_others_fall_back_to():
    assert ops.IMPLEMENTATIONS["reference"] is reference
    assert list(ops.IMPLEMENTATIONS)[-1] == "reference"


# --- what oneDNN gets wrong -------------------------------------------------------------------------------------------


@each_dtype
def test_outputs_that_see_only_padding(dtype):
    """Such a dilated convolution must not crash the process, in whatever layout image and weight come.

    oneDNN's brgemm kernels follow a wild pointer there, called by PyTorch's own convolution as well: in bfloat16 if one
    of the two is channels_last, in float16 always. Hence a process of its own.
    """
    program = f"""
import itertools, torch, resnet_fast
nhwc = lambda t: t.contiguous(memory_format=torch.channels_last)
x, w, v = torch.randn(1, 10, 13, 1), torch.randn(5, 10, 3, 2), torch.ones(5)
for x, w in itertools.product((x, nhwc(x)), (w, nhwc(w))):
    x, w = x.to({dtype}), w.to({dtype})
    y = torch.ops.resnet_fast.conv_bn_act(x, w, v, v, None, (1, 2), (0, 3), (1, 2), 1, False)
    assert torch.equal(y, torch.ones_like(y)), y  # no tap of any output meets the one column
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stderr[-2000:]}"


@each_dtype
@fast_implementations
@pytest.mark.parametrize(
    "conv",
    [
        Conv(1, 256, 4, 2, 512, stride=(2, 2)),  # ResNet's layer4 under an image of 128 x 64
        Conv(2, 64, 8, 3, 64, (3, 2), (2, 2), (1, 0)),
        Conv(1, 12, 12, 5, 20, (3, 4), (1, 2), (0, 0)),
        Conv(1, 256, 4, 1, 512, stride=(2, 2)),  # layer4 under an image of 128 x 32: no column is left over
        Conv(1, 128, 7, 3, 512, (4, 3), (2, 2), (0, 0)),
        Conv(1, 1, 5, 2, 18, (3, 3), (1, 2), (1, 1)),
        Conv(1, 1, 8, 3, 3, (3, 4), (1, 3), (0, 1)),
    ],
    ids=["layer4, narrow", "3x2/2", "3x4", "layer4, one column", "4x3/2", "grey 3x3", "grey 3x4"],
)
def test_one_output_column(conv, dtype, implementation, poison):
    """One output column and a horizontal stride: oneDNN reads past the input, called by PyTorch's convolution as well.

    Its AMX kernels do in bfloat16, those for images of one channel in float32. With a horizontal stride of 1, which
    means the same there, all are right.
    """
    args = poison.args(make(conv, dtype).args(True, False))
    y = conv_bn_act(*args)
    if not implementation.calls[implementation.name, "conv_bn_act"]:
        pytest.skip(
            f"{implementation.name} leaves {dtype} to the definition, PyTorch's own convolution, which is wrong"
        )
    exact = exact_conv(args)
    assert_close(y, exact, tolerance(args, exact, unfused(make(conv, dtype), True, False)))


@pytest.mark.parametrize("dtype", SERVED, ids=dtype_name)
def test_shift_beyond_float16(dtype, implementation, poison):
    """Tiny variance and large mean: their product overflows float16 although each factor and the result fit.

    PyTorch normalises in float32 and gets it right.
    """
    norm = Norm(torch.full((8,), 300.0), torch.full((8,), 1e-8), torch.ones(8), torch.zeros(8))
    data = make(Conv(2, 1, 6, 5, 8, (1, 1), padding=(0, 0)), torch.float32, norm=norm)
    data = data._replace(x=(300 + data.x / 8).to(dtype), weight=torch.ones(8, 1, 1, 1, dtype=dtype))
    data = data._replace(residual=data.residual.to(dtype))
    for residual, relu in COMBINATIONS:
        _check_extreme(data, residual, relu, poison)


@each_dtype
def test_shift_with_gaps(dtype, implementation):
    """A slice of a larger vector, or an expanded one, as the shift. oneDNN takes its elements for neighbours."""
    data = make(Conv(2, 16, 5, 6, 16), dtype)
    spread = torch.full((3 * 16,), torch.nan)
    spread[1::3] = data.shift
    for shift in (spread[1::3], data.shift[1:2].expand(16)):
        args = data._replace(shift=shift).args(True, True)
        actual = conv_bn_act(*args)
        implementation.check_served(data.conv.case(dtype))
        exact = exact_conv(args)
        assert_close(actual, exact, tolerance(args, exact, None))


def test_onednn_switched_off_after_first_use(monkeypatch):
    """The answer of ``supports`` may change while the process runs: ``torch.backends.mkldnn.flags(enabled=False)``."""
    monkeypatch.setenv("RESNET_FAST_IMPLEMENTATION", "onednn")
    case = CASE._replace(in_channels=24)
    assert ops.implementation_for(case) == "onednn"
    with torch.backends.mkldnn.flags(enabled=False):
        assert ops.IMPLEMENTATIONS["onednn"].supports(case) is not None
        assert ops.implementation_for(case) == "reference"
