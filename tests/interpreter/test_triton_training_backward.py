"""Training's backward kernels against their definition in float64, in every dtype, every access checked (guard.py)."""

from typing import Any, NamedTuple, Optional

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_fast.kernels import reference_training as reference
from resnet_fast.kernels.reference_training import Affine, Gate, Geometry, Gradient
from resnet_fast.kernels.triton import launch, tiles
from resnet_fast.kernels.triton import training_backward as kernels
from tests.interpreter.checking import assert_as_good_as_pytorch, assert_within, sum_tolerance

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SMALL = tiles.Tile(rows=32, columns=16, reduction=16, warps=4, stages=1, split=False)

pytestmark = pytest.mark.usefixtures("guarded")
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


@pytest.fixture(params=["default", "small"])
def tile(request, monkeypatch):
    """The default puts a whole small problem into one tile. Small ones cut it along every dimension, with tails."""
    if request.param == "small":
        use_small_tiles(monkeypatch)


def use_small_tiles(monkeypatch) -> None:
    monkeypatch.setattr(tiles, "pick", lambda *problem: SMALL)
    monkeypatch.setattr(kernels, "_part_size", lambda pixels, programs, step, target: 2 * step)
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
        return _away_from_zero(_nhwc(torch.randn(self.n, self.c, self.h, self.w)), _affine(self.c)).to(dtype)

    def weight(self, dtype: torch.dtype) -> Tensor:
        terms = self.k // self.groups * self.kernel[0] * self.kernel[1]
        return (torch.randn(self.k, self.c // self.groups, *self.kernel) / terms**0.5).to(dtype)

    def dy(self, dtype: torch.dtype) -> Tensor:
        y = F.conv2d(torch.empty(self.n, self.c, self.h, self.w), self.weight(torch.float32), None, *self.geometry())
        return _nhwc(torch.randn(y.shape).to(dtype))


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
    "depthwise, prime": Conv(1, 37, 4, 3, 74, stride=(2, 2), groups=37),
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
@pytest.mark.parametrize("name", ["stride 2", "1x1, odd channels", "2 groups"])
def test_dgrad_gates(name, kind, residual, dtype, monkeypatch):
    use_small_tiles(monkeypatch)
    check_dgrad(CONVS[name], dtype, kind, residual)


@each_dtype
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ["round", "stride 2", "1x1/2", "2 groups"])
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
    rest = _nhwc(torch.randn(x.shape).to(dtype)) if residual else None
    one = gate(kind, conv.c)
    arguments = dy, weight, conv.geometry(), x, one, rest
    actual = kernels.dgrad(*arguments)
    exact = reference.dgrad(*_double((dy, weight.to(dtype), *arguments[2:])))
    magnitude = reference.dgrad(*_double((dy.abs(), weight.to(dtype).abs())), *_double((conv.geometry(), x, one, rest)))
    terms = weight[:, 0].numel() + 1
    check_gradient(actual, exact, terms, magnitude.g, x, one)
    if all(t.isfinite().all() for t in (dy, x)):
        assert_as_good_as_pytorch(actual.g, reference.dgrad(*arguments).g, exact.g)
    again = kernels.dgrad(*arguments)
    assert _same(again, actual)


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


def _nhwc(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)
