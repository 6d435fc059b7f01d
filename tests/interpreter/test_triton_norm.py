"""What kernels make of statistics, forward and back, against its definition in float64: batch norm's small vectors."""

import pytest
import torch

from resnet_fast.kernels.contract import BatchNorm, Geometry
from resnet_fast.kernels.reference import training as reference
from resnet_fast.kernels.triton import table as kernels
from resnet_fast.kernels.triton import tiles
from tests.interpreter.cases import each_dtype, nhwc

pytestmark = pytest.mark.usefixtures("guarded")


def norm(channels: int, dtype: torch.dtype = torch.float32, eps: float = 1e-5) -> BatchNorm:
    """With a gamma of 0 among them, as a block's last batch norm starts with."""
    scale = torch.linspace(-1.5, 1.5, channels, dtype=dtype)
    scale[0] = 0.0
    return BatchNorm(scale, torch.randn(channels, dtype=dtype), eps)


def exact(norm: BatchNorm) -> BatchNorm:
    return BatchNorm(norm.scale.double(), norm.shift.double(), norm.eps)


@each_dtype
@pytest.mark.parametrize("parts", ["one", "as many as are left", "rounds"])
@pytest.mark.parametrize("k", [32, 17])
def test_normalised(k, parts, dtype, monkeypatch):
    """Of parts that are few enough for the last launch, and that are more."""
    monkeypatch.setitem(tiles.load("interpreter"), "combine", [4, 16, 4])
    sizes = {"one": 2, "as many as are left": 12, "rounds": 40}
    tile = tiles.Tile(rows=32, columns=16, reduction=16, warps=4, stages=1, split=False)
    monkeypatch.setattr(tiles, "pick", lambda *problem: tile)
    x = nhwc(torch.randn(1, 16, 10, sizes[parts]).to(dtype))
    weight = torch.randn(k, 16, 1, 1).to(dtype)
    given = x, None, weight, Geometry()
    one = norm(k, torch.float64 if k == 17 else torch.float32, 1e-3)
    y, vectors, moments = kernels.conv_statistics(*given, one)
    again, mean, variance = kernels.conv_statistics(*given)
    assert torch.equal(y, again)
    assert vectors.dtype == moments.dtype == torch.float32
    values = y.double()
    count = values[:, 0].numel()
    expected = reference.normalised(values.mean((0, 2, 3)), values.var((0, 2, 3), correction=0), exact(one), count)
    torch.testing.assert_close((vectors.double(), moments.double()), expected, rtol=1e-5, atol=2e-6)
    assert torch.equal(vectors[0], mean) and torch.equal(moments[0], mean)
    torch.testing.assert_close(moments[1], variance * (count / (count - 1)), rtol=1e-6, atol=0)


def test_normalised_repeats_to_the_bit_and_shows_nan():
    x, weight = nhwc(torch.randn(2, 16, 6, 6)), torch.randn(24, 16, 1, 1)
    weight[3] = torch.nan
    first, second = (kernels.conv_statistics(x, None, weight, Geometry(), norm(24)._replace(shift=torch.ones(24)))
                     for _ in range(2))  # fmt: skip
    for one, other in zip(first, second):
        assert torch.equal(one.nan_to_num(7.0), other.nan_to_num(7.0))
    assert first[1].isnan().any(0).nonzero().flatten().tolist() == [3]


SHAPES = [(64, 16), (40, 17), (1100, 300)]


def matrices(k: int, c: int) -> tuple:
    """w ``[K, C]``, and mean and covariance of an input."""
    a = torch.randn(4 * c, c) + 0.5
    return torch.randn(k, c) / c**0.5, a.mean(0), torch.cov(a.T, correction=0)


@pytest.mark.parametrize(("k", "c"), SHAPES)
def test_expand_statistics(k, c):
    w, mean, covariance = matrices(k, c)
    one = norm(k)
    *actual, cancels = kernels.expand_statistics(w, mean, covariance, one, 77)
    *expected, _ = reference.expand_statistics(w.double(), mean.double(), covariance.double(), exact(one), 77)
    torch.testing.assert_close([t.double() for t in actual], expected, rtol=2e-5, atol=1e-5)
    assert cancels.shape == () and not cancels


@pytest.mark.parametrize("row", [0, 39])
def test_that_an_expand_layer_cancels(row):
    """One row whose terms take each other out, the first of all or the last."""
    w, mean, _ = matrices(40, 17)
    covariance = torch.ones(17, 17) + 1e-3 * torch.eye(17)
    w[:] = w.abs()
    w[row] -= w[row].mean()
    given = w, mean, covariance, norm(40)
    assert reference.expand_statistics(*given, 77)[2]
    assert kernels.expand_statistics(*given, 77)[2]
    w[row] = w[row - 1]
    assert not kernels.expand_statistics(*given, 77)[2]


def test_a_variance_is_not_negative():
    """Where rounding left it below 0, as it does: eps alone is under the root then."""
    w, mean, covariance = torch.ones(16, 16), torch.zeros(16), -1e-6 * torch.eye(16)
    vectors, _, _ = kernels.expand_statistics(w, mean, covariance, norm(16), 9)
    torch.testing.assert_close(vectors[1], torch.full((16,), 1e-5**-0.5))


@pytest.mark.parametrize(("k", "c"), SHAPES)
def test_expand_backward(k, c):
    w, mean, covariance = matrices(k, c)
    gx, total, vectors = torch.randn(k, c, 1, 1), torch.randn(k), torch.randn(4, k)
    given = gx, w, mean, covariance, vectors, total
    actual = kernels.expand_backward(*given, 12)
    expected = reference.expand_backward(*(t.double() for t in given), 12)
    theirs = reference.expand_backward(*given, 12)
    for one, exactly, their in zip(actual, expected, theirs):
        assert one.shape == exactly.shape
        size = exactly.abs().max()
        allowed = max(2 * float((their.double() - exactly).abs().max() / size), 4 * torch.finfo(torch.float32).eps)
        assert (one.double() - exactly).abs().max() / size <= allowed
