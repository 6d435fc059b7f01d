"""Training's backward kernels against their definition in float64, in every dtype, every access checked (guard.py)."""

from typing import Any, NamedTuple, Optional

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_fast.kernels.contract import Affine, Gate, Geometry, Gradient
from resnet_fast.kernels.reference import training as reference
from resnet_fast.kernels.triton import operands, tiles, wgrad
from resnet_fast.kernels.triton import table as kernels
from tests.interpreter.cases import each_dtype, nhwc
from tests.interpreter.checking import assert_as_good_as_pytorch, assert_within, sum_tolerance

SMALL = tiles.Tile(rows=64, columns=16, reduction=32, warps=4, stages=1, split=False)

pytestmark = pytest.mark.usefixtures("guarded")


@pytest.fixture(params=["default", "small"])
def tile(request, monkeypatch):
    """The default puts a whole small problem into one tile. Small ones cut it along every dimension, with tails."""
    if request.param == "small":
        use_small_tiles(monkeypatch)


def use_small_tiles(monkeypatch) -> None:
    monkeypatch.setattr(tiles, "pick", lambda *problem: SMALL)
    monkeypatch.setattr(wgrad, "_part_size", lambda pixels, programs, step, target: 2 * step)
    small = {"pointwise": [16, 32, 4], "max_pool": [16, 32, 4], "sum_rows": [4, 64, 4], "multiprocessors": 16}
    for name, value in small.items():
        monkeypatch.setitem(tiles.load("interpreter"), name, value)


class Conv(NamedTuple):
    n: int
    c: int
    h: int
    w: int
    k: int
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    def geometry(self) -> Geometry:
        return Geometry(self.stride, self.padding, self.dilation, self.groups)

    def x(self, dtype: torch.dtype) -> Tensor:
        return _away_from_zero(nhwc(torch.randn(self.n, self.c, self.h, self.w)), _affine(self.c)).to(dtype)

    def weight(self, dtype: torch.dtype) -> Tensor:
        terms = self.k // self.groups * self.kernel[0] * self.kernel[1]
        return (torch.randn(self.k, self.c // self.groups, *self.kernel) / terms**0.5).to(dtype)

    def dy(self, dtype: torch.dtype) -> Tensor:
        y = F.conv2d(torch.empty(self.n, self.c, self.h, self.w), self.weight(torch.float32), None, *self.geometry())
        return nhwc(torch.randn(y.shape).to(dtype))


CONVS = {
    "round": Conv(2, 32, 8, 8, 32),
    "odd sizes and channels": Conv(2, 17, 9, 7, 33),
    "stride 2": Conv(2, 32, 9, 10, 48, stride=(2, 2)),
    "stride 2, even": Conv(2, 20, 8, 8, 40, stride=(2, 2)),
    "7x7/2": Conv(1, 20, 11, 9, 24, (7, 7), (2, 2), (3, 3)),
    "7x7/2, 3 channels": Conv(1, 3, 15, 17, 40, (7, 7), (2, 2), (3, 3)),
    "7x7": Conv(1, 16, 6, 5, 16, (7, 7), padding=(3, 3)),
    "5x3/3x2, asymmetric": Conv(2, 17, 9, 8, 33, (5, 3), (3, 2), (2, 1), (1, 2)),
    "kernel smaller than the stride": Conv(1, 16, 10, 11, 16, (2, 2), (3, 3), (0, 0)),
    "pixels that no window covers": Conv(1, 16, 8, 8, 16, (3, 3), (2, 2), (0, 0)),
    "smaller than the kernel": Conv(2, 16, 2, 1, 16, (5, 5), padding=(2, 2)),
    "one pixel": Conv(3, 32, 1, 1, 20),
    "one pixel, 1x1": Conv(1, 16, 1, 1, 24, (1, 1), padding=(0, 0)),
    "dilation 2": Conv(1, 32, 9, 9, 32, padding=(2, 2), dilation=(2, 2)),
    "dilation 2, stride 2": Conv(1, 16, 9, 10, 16, (3, 3), (2, 2), (2, 2), (2, 2)),
    "dilation 3, stride 2": Conv(1, 16, 9, 10, 16, (3, 3), (2, 2), (3, 3), (3, 3)),
    "1x1": Conv(2, 64, 7, 5, 80, (1, 1), padding=(0, 0)),
    "1x1, odd channels": Conv(1, 33, 5, 7, 17, (1, 1), padding=(0, 0)),
    "1x1/2": Conv(2, 32, 9, 8, 48, (1, 1), (2, 2), (0, 0)),
    "1x1 with padding": Conv(1, 32, 4, 5, 16, (1, 1), padding=(1, 1)),
    "2 groups": Conv(1, 48, 6, 7, 64, groups=2),
    "32 groups of 4, ResNeXt": Conv(1, 128, 6, 5, 128, stride=(2, 2), groups=32),
    "3 groups, more outputs than inputs": Conv(2, 15, 7, 6, 30, groups=3),
    "depthwise, prime": Conv(1, 17, 4, 3, 34, stride=(2, 2), groups=17),
}
each_conv = pytest.mark.parametrize("name", CONVS)
GATES = ["none", "of a result", "of a raw one", "without mean"]


def gate(kind: str, channels: int) -> Optional[Gate]:
    if kind == "none":
        return None
    if kind == "of a result":
        return Gate()
    return Gate(_affine(channels), None if kind == "without mean" else torch.linspace(-1, 1, channels))


@each_dtype
@each_conv
def test_dgrad(name, dtype, tile):
    """Shape by shape another gate, and every other one with a residual; all combinations are below."""
    at = list(CONVS).index(name)
    check_dgrad(CONVS[name], dtype, GATES[-1 - at % 4], residual=at % 2 == 0)


@each_dtype
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("kind", GATES)
def test_dgrad_gates(kind, residual, dtype, monkeypatch):
    use_small_tiles(monkeypatch)
    check_dgrad(CONVS["1x1, odd channels"], dtype, kind, residual)


@each_dtype
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["stride 2", "1x1/2", "2 groups"])
def test_dgrad_of_nan_and_inf(name, value, dtype, monkeypatch):
    """They reach the pixels of their window and the sums of these channels, and no others. NaN passes a gate."""
    use_small_tiles(monkeypatch)
    conv = CONVS[name]
    x, weight, dy = conv.x(dtype), conv.weight(dtype), conv.dy(dtype)
    dy[0, -1, 1, 2] = value
    x[-1, 0, 2, 2] = value
    check_dgrad(conv, dtype, "of a raw one", True, x, weight, dy)


def check_dgrad(conv: Conv, dtype, kind: str, residual: bool, x=None, weight=None, dy=None) -> None:
    x = conv.x(dtype) if x is None else x
    weight = conv.weight(dtype) if weight is None else weight
    dy = conv.dy(dtype) if dy is None else dy
    rest = nhwc(torch.randn(x.shape).to(dtype)) if residual else None
    one = gate(kind, conv.c)
    arguments = dy, weight, conv.geometry(), x, one, rest
    actual = kernels.dgrad(*arguments)
    exact = reference.dgrad(*_double((dy, weight.to(dtype), *arguments[2:])))
    magnitude = reference.dgrad(*_double((dy.abs(), weight.to(dtype).abs())), *_double((conv.geometry(), x, one, rest)))
    terms = weight[:, 0].numel() + 1
    check_gradient(actual, exact, terms, magnitude.g, x, one)
    if all(t.isfinite().all() for t in (dy, x)):
        assert_as_good_as_pytorch(actual.g, reference.dgrad(*arguments).g, exact.g)


def check_gradient(actual: Gradient, exact: Gradient, terms: int, magnitude: Tensor, x: Tensor, one: Optional[Gate]):
    """g within its tolerance; its sums within the tolerance of a sum of what was stored."""
    assert actual.g.dtype == x.dtype
    assert actual.g.is_contiguous(memory_format=torch.channels_last)
    # abs: the residual was counted with its sign.
    assert_within(actual.g, exact.g, sum_tolerance(exact.g, x.dtype, terms, magnitude.abs() + 2 * exact.g.abs()))
    stored = actual.g.double()
    check_sum(actual.total, None if one is None else stored)
    mean = None if one is None else one.mean
    check_sum(actual.product, None if mean is None else stored * (x.double() - mean.double().view(1, -1, 1, 1)))


def check_sum(actual: Optional[Tensor], summands: Optional[Tensor]) -> None:
    """``actual [C]`` is the sum over the pixels."""
    assert (actual is None) == (summands is None)
    if actual is not None:
        exact, magnitude = summands.sum((0, 2, 3)), summands.abs().sum((0, 2, 3))
        assert actual.dtype == torch.float32
        assert_within(actual, exact, sum_tolerance(exact, actual.dtype, summands[:, 0].numel() + 3, magnitude))


@each_dtype
@pytest.mark.parametrize("stride", [(1, 1), (2, 2), (2, 3)])
@pytest.mark.parametrize("factor", [1.0, 2e-5])
def test_dgrad_expand(factor, stride, dtype, tile):
    """Also where the matrices are so small that float16 would hold few digits of them."""
    at = stride[0] + stride[1] + (factor < 1)
    check_dgrad_expand(2, 20, 7, 9, 33, stride, dtype, GATES[-1 - at % 4], factor)


@each_dtype
@pytest.mark.parametrize(("n", "c", "h", "w", "k"), [(2, 32, 4, 8, 64), (3, 16, 1, 1, 48), (1, 17, 5, 3, 5)])
def test_dgrad_expand_shapes(n, c, h, w, k, dtype, tile):
    check_dgrad_expand(n, c, h, w, k, (1, 1), dtype, "of a raw one", 1.0)


@each_dtype
@pytest.mark.parametrize(("c", "k", "stride"), [(32, 64, (1, 1)), (20, 33, (2, 2)), (17, 5, (1, 1))])
def test_dgrad_expand_the_other_way_round(c, k, stride, dtype, monkeypatch):
    """As on sm_90."""
    monkeypatch.setattr(operands, "flip", lambda *_: True)
    use_small_tiles(monkeypatch)
    check_dgrad_expand(2, c, 5, 7, k, stride, dtype, "of a raw one", 1.0)


@each_dtype
def test_dgrad_expand_of_nan_and_of_zero_matrices(dtype):
    check_dgrad_expand(2, 20, 5, 4, 33, (1, 1), dtype, "of a raw one", 0.0)
    check_dgrad_expand(2, 20, 5, 4, 33, (2, 2), dtype, "of a raw one", 1.0, value=torch.nan)
    check_dgrad_expand(2, 20, 5, 4, 33, (1, 1), dtype, "of a raw one", 1.0, value=torch.inf)


def check_dgrad_expand(n, c, h, w, k, stride, dtype, kind: str, factor: float, value: Optional[float] = None) -> None:
    one = gate(kind, c)
    prologue = None if one is None else one.affine
    conv = Conv(n, c, h, w, k, (1, 1), stride, (0, 0))
    x, g = conv.x(dtype), conv.dy(dtype)
    weight = torch.randn(k, c) * (factor / k**0.5)
    q = torch.randn(c, c) * (0.01 * factor / c**0.5)
    shift = torch.randn(c) * factor
    residual = None if kind == "of a result" else nhwc((torch.randn(x.shape) * factor).to(dtype))
    if value is not None:
        g[0, 1, 0, 0] = value
    arguments = g, weight, q, shift, stride, x, prologue, one, residual
    actual = kernels.dgrad_expand(*arguments)
    # The activation rounded as the kernel has it.
    a = reference.activate(x, prologue).double()
    inputs = g.double(), weight.double(), q.double(), shift.double(), stride
    exact = reference.dgrad_expand(*inputs, a, None, None, _double(residual))
    closed = _closed(x, one)
    exact = Gradient(torch.where(closed, 0.0, exact.g))
    absolute = (v.abs() for v in (inputs[0], inputs[1], -inputs[2], -inputs[3]))
    magnitude = torch.where(closed, 0.0, _expand_magnitude(*absolute, stride, a.abs()))
    # Each matrix was rounded too, by half an ulp.
    magnitude *= 1 + torch.finfo(dtype).eps / torch.finfo(torch.float32).eps / (k + c + 2) ** 0.5 / 2
    check_gradient(actual, exact, k + c + 2, magnitude, x, one)


def _expand_magnitude(g: Tensor, weight: Tensor, q: Tensor, c: Tensor, stride, a: Tensor) -> Tensor:
    """The sum of the magnitudes of the terms of ``dgrad_expand``."""
    return reference.dgrad_expand(g, weight, -q, -c, stride, a, None, None, None).g


def _closed(x: Tensor, one: Optional[Gate]) -> Tensor:
    """Where the gate lets nothing through."""
    return torch.zeros_like(x, dtype=torch.bool) if one is None else reference.activate(x, one.affine) <= 0


@each_dtype
@each_conv
def test_wgrad(name, dtype, tile):
    check_wgrad(CONVS[name], dtype, prologue=list(CONVS).index(name) % 2 == 0)


@each_dtype
@pytest.mark.parametrize("prologue", [False, True])
@pytest.mark.parametrize("name", ["stride 2", "1x1", "7x7/2, 3 channels", "32 groups of 4, ResNeXt"])
def test_wgrad_prologue(name, prologue, dtype, monkeypatch):
    use_small_tiles(monkeypatch)
    check_wgrad(CONVS[name], dtype, prologue)


@each_dtype
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["1x1/2", "pixels that no window covers"])
def test_wgrad_of_nan_and_inf(name, value, dtype, monkeypatch):
    """In a pixel of the input that every tap of some window sees."""
    use_small_tiles(monkeypatch)
    conv = CONVS[name]
    x = conv.x(dtype)
    x[0, 3, 2, 2] = value
    check_wgrad(conv, dtype, True, x)


def check_wgrad(conv: Conv, dtype, prologue: bool, x: Optional[Tensor] = None) -> None:
    x, dy, weight = conv.x(dtype) if x is None else x, conv.dy(dtype), conv.weight(dtype)
    affine = _affine(conv.c) if prologue else None
    arguments = dy, x, affine, weight, conv.geometry()
    actual = kernels.wgrad(*arguments)
    a = reference.activate(x, affine).double()
    exact = reference.wgrad(dy.double(), a, None, weight.double(), conv.geometry())
    magnitude = reference.wgrad(dy.double().abs(), a.abs(), None, weight.double(), conv.geometry())
    terms = dy[:, 0].numel()
    assert actual.dtype == torch.float32
    assert_within(actual, exact, sum_tolerance(exact, torch.float32, terms, magnitude))


@each_dtype
@pytest.mark.parametrize(("n", "c", "h", "w"), [(2, 64, 4, 8), (1, 17, 5, 7), (3, 40, 1, 1)])
@pytest.mark.parametrize("norms", [0, 1, 2])
@pytest.mark.parametrize("relu", [False, True])
def test_tail_backward(relu, norms, n, c, h, w, dtype, tile):
    grad, out, y, residual = (nhwc(torch.randn(n, c, h, w).to(dtype)) for _ in range(4))
    out[0, 0, 0, 0] = torch.nan  # which lets the gradient through, as in PyTorch
    out[0, 1, 0, 0] = 0.0
    grad[-1, 2, 0, 0] = torch.inf
    mean = torch.randn(c)
    arguments = [grad, out if relu else None, *((y, mean) if norms else (None, None))]
    arguments += (residual, mean) if norms == 2 else (None, None)
    actual, product = kernels.tail_backward(*arguments)
    expected, _ = reference.tail_backward(*arguments)
    assert torch.equal(actual.g, expected.g)
    assert actual.g.is_contiguous(memory_format=torch.channels_last)
    stored, centre = actual.g.double(), mean.double().view(1, -1, 1, 1)
    check_sum(actual.total, stored)
    check_sum(actual.product, stored * (y.double() - centre) if norms else None)
    check_sum(product, stored * (residual.double() - centre) if norms == 2 else None)


@each_dtype
@pytest.mark.parametrize(
    ("n", "c", "h", "w"), [(2, 64, 8, 8), (1, 17, 7, 9), (1, 40, 9, 6), (3, 20, 1, 1), (1, 16, 2, 1)]
)
@pytest.mark.parametrize("with_mean", [False, True])
def test_tail_pool_backward(with_mean, n, c, h, w, dtype, tile):
    """Few values, which all dtypes hold: so there are many equals in a window, and the first of them counts."""
    y = nhwc((torch.randint(-3, 4, (n, c, h, w)) / 4).to(dtype))
    y[0, 1, 0, 0] = torch.nan
    y[-1, 2, -1, -1] = torch.inf
    affine = Affine(torch.tensor([1.0, 0.5, 2.0, 0.0] * c)[:c], torch.tensor([0.25, -0.25, 0.0] * c)[:c])
    mean = torch.linspace(-1, 1, c) if with_mean else None
    grad = nhwc(torch.randn(n, c, (h - 1) // 2 + 1, (w - 1) // 2 + 1).to(dtype))
    actual = kernels.tail_pool_backward(grad, y, affine, mean)
    exact = reference.tail_pool_backward(*_double((grad, y, affine, mean)))
    magnitude = reference.tail_pool_backward(*_double((grad.abs(), y, affine, mean)))
    check_gradient(actual, exact, 4, magnitude.g, y, Gate(affine, mean))


@each_dtype
@pytest.mark.parametrize(("n", "c", "h", "w"), [(2, 64, 4, 8), (1, 17, 5, 7), (3, 40, 1, 1)])
def test_bn_backward(n, c, h, w, dtype, tile):
    g, y = (nhwc(torch.randn(n, c, h, w).to(dtype)) for _ in range(2))
    g[0, 1, 0, 0] = torch.nan
    vectors, total, product, count = torch.randn(4, c), torch.randn(c), torch.randn(c), 3
    exact, exact_dgamma = reference.bn_backward(*_double((g, y, vectors, total, product)), count, overwrite=False)
    theirs, _ = reference.bn_backward(g, y, vectors, total, product, count, overwrite=False)
    mean, rstd, scale, _ = vectors.double()
    a, b, c_ = (
        v.abs().view(1, -1, 1, 1) for v in reference.coefficients(rstd, scale, total.double(), product.double(), count)
    )
    magnitude = a * g.double().abs() + b * (y.double() - mean.view(1, -1, 1, 1)).abs() + c_
    actual, dgamma = kernels.bn_backward(g, y, vectors, total, product, count, overwrite=False)
    assert actual.dtype == dtype
    assert_within(actual, exact, sum_tolerance(exact, dtype, 8, magnitude))
    assert torch.equal(actual.isnan(), theirs.isnan())
    assert_within(dgamma, exact_dgamma, sum_tolerance(exact_dgamma, torch.float32, 1, exact_dgamma.abs()))


@each_dtype
def test_repeats_are_bit_equal(dtype, monkeypatch):
    use_small_tiles(monkeypatch)
    conv = CONVS["stride 2"]
    x, dy, weight, one = conv.x(dtype), conv.dy(dtype), conv.weight(dtype), gate("of a raw one", conv.c)
    for call in (
        lambda: kernels.dgrad(dy, weight, conv.geometry(), x, one, x),
        lambda: kernels.wgrad(dy, x, one.affine, weight, conv.geometry()),
        lambda: kernels.tail_backward(x, x, x, one.mean, x, one.mean),
        lambda: kernels.tail_pool_backward(nhwc(x[:, :, ::2, ::2]), x, one.affine, one.mean),
    ):
        assert _same(call(), call())


def test_any_strides():
    """NCHW, a slice of a wider image, and a weight in either layout: float32, beside narrower images too."""
    conv = CONVS["odd sizes and channels"]
    for dtype in (torch.float32, torch.float16):
        x, dy = conv.x(dtype).contiguous(), conv.dy(dtype).contiguous()
        wide = torch.cat([dy, dy], dim=3)[:, :, :, 1 : dy.shape[3] + 1]
        for one in (dy, wide):
            for weight in (conv.weight(torch.float32), nhwc(conv.weight(torch.float32))):
                check_dgrad(conv, dtype, "of a raw one", True, x, weight, one)
        check_wgrad(conv, dtype, True, x)


def test_offsets_of_64_bits(monkeypatch, tile):
    """Tensors of 2^31 elements do not fit a test; the arithmetic that they use does."""
    monkeypatch.setattr(operands, "_INT32_ELEMENTS", 0)
    for name in ("stride 2", "2 groups", "7x7/2, 3 channels"):
        check_dgrad(CONVS[name], torch.float32, "of a raw one", True)
        check_wgrad(CONVS[name], torch.float32, False)
    test_tail_backward(True, 2, 1, 17, 5, 7, torch.float32, None)
    test_tail_pool_backward(True, 1, 17, 7, 9, torch.float32, None)
    test_bn_backward(1, 17, 5, 7, torch.float32, None)


def test_empty_tensors_get_the_definition():
    x, dy, weight = torch.empty(0, 4, 5, 5), torch.empty(0, 8, 5, 5), torch.ones(8, 4, 1, 1)
    v = torch.ones(4)
    assert kernels.dgrad(dy, weight, Geometry(), x, Gate(Affine(v, v), v), None).g.shape == x.shape
    assert torch.equal(kernels.wgrad(dy, x, None, weight, Geometry()), torch.zeros(8, 4, 1, 1))
    assert kernels.tail_backward(x, x, x, v, None, None)[0].total.shape == (4,)
    assert kernels.bn_backward(x, x, torch.ones(4, 4), v, v, 1, overwrite=True)[0].shape == x.shape


def _affine(channels: int) -> Affine:
    scale = torch.linspace(0.5, 1.5, channels)
    shift = torch.linspace(-0.5, 0.5, channels) + 0.01
    scale[0], shift[0] = 0.0, 0.5  # a zero-initialised batch norm
    return Affine(scale, shift)


def _away_from_zero(x: Tensor, affine: Affine) -> Tensor:
    """With no value so near ReLU's threshold that float32 and float64 could take it for different signs."""
    scale, shift = (v.view(1, -1, 1, 1) for v in affine)
    x = torch.where((x * scale + shift).abs() < 0.05, x + 1, x)
    return torch.where(x.abs() < 0.05, x + 0.1, x)


def _double(value: Any) -> Any:
    """Tensors in float64, inside tuples too."""
    if isinstance(value, Tensor):
        return value.double()
    if isinstance(value, tuple):
        values = map(_double, value)
        return type(value)(*values) if hasattr(value, "_fields") else tuple(values)
    return value


def _same(a: Any, b: Any) -> bool:
    """Bit for bit."""
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and torch.equal(a.nan_to_num(12345.0), b.nan_to_num(12345.0))
    return a is b is None or (len(a) == len(b) and all(map(_same, a, b)))
