"""Training's passes over whole images on every instruction set, against their definition in float64."""

from typing import Any

import pytest
import torch
from torch import Tensor

from resnet_fast.kernels.contract import Affine, Case, Gate, Gradient
from resnet_fast.kernels.native import passes
from resnet_fast.kernels.reference import training as reference
from tests.native.harness import Poisoned
from tests.native.pass_cases import SHAPES, Data, Memory, each, everything, make

EPS = torch.finfo(torch.float32).eps


def _exact(operand: Any) -> Any:
    return each(Tensor.double, operand)


def _check(actual: Tensor, args: tuple, definition, size) -> None:
    """At most twice as far from the definition in float64 as the definition in float32, and a few eps of ``size``."""
    exact, pytorch = definition(*_exact(args)), definition(*args)
    allowed = 2 * (pytorch - exact).abs().nan_to_num(0, 0, 0).max() if exact.numel() else 0
    _check_close(actual, exact, allowed + 4 * EPS * size)


def _check_close(actual: Tensor, exact: Tensor, allowed) -> None:
    assert actual.dtype == torch.float32
    assert actual.shape == exact.shape
    finite = exact.isfinite()
    torch.testing.assert_close(actual[~finite].double(), exact[~finite], equal_nan=True)
    wrong = ~((actual - exact).abs() <= allowed)[finite]
    assert not wrong.any(), f"{int(wrong.sum())} of {wrong.numel()} are off by up to {(actual - exact).abs().max()}"


def _check_gradient(actual: Gradient, args: tuple, definition, *factors: tuple[Tensor, Tensor]) -> None:
    """``g`` and its sums. ``factors``: what the products are with, and its mean."""
    exact = definition(*_exact(args))
    _check_close(actual.g, exact.g, 4 * EPS * exact.g.abs())
    sizes = [exact.g.abs().sum((0, 2, 3))]
    sizes += [(exact.g * (_exact(y) - mean.view(1, -1, 1, 1))).abs().sum((0, 2, 3)) for y, mean in factors]
    for name, size in zip(("total", "product"), sizes):
        if getattr(actual, name) is None:
            continue
        _check(getattr(actual, name), args, lambda *args, name=name: getattr(definition(*args), name), size)


def _channels(vector: Tensor) -> Tensor:
    return vector.view(1, -1, 1, 1)


@pytest.fixture(params=[False, True], ids=["aligned", "misaligned"])
def memory(request, monkeypatch):
    memory = Memory(Poisoned(request.param))
    monkeypatch.setattr(passes, "_image", memory.image)
    yield memory
    memory.place.check()


# --- forward ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHAPES)
def test_tail(name, memory, variant):
    data = memory.copy(make(name))
    y, residual, (own_scale, own_shift) = data.y, data.residual, map(_channels, data.residual_affine)
    size = (y * _channels(data.affine.scale)).abs() + _channels(data.affine.shift).abs()
    for added, own in ((None, None), (residual, None), (residual, data.residual_affine)):
        more = 0 if added is None else added.abs() if own is None else (added * own_scale).abs() + own_shift.abs()
        for relu in (False, True):
            args = (y, data.affine, added, own, relu)
            _check(passes.tail(*args), args, reference.tail, size + more)
    assert torch.equal(passes.activate(y, data.affine), reference.activate(y, data.affine))
    assert passes.activate(y, None) is y
    memory.unchanged(*data)


@pytest.mark.parametrize("name", SHAPES)
def test_tail_pool(name, memory, variant):
    data = memory.copy(make(name))
    assert torch.equal(passes.tail_pool(data.y, data.affine), reference.tail_pool(data.y, data.affine))
    memory.unchanged(data.y)


def _statistics(y: Tensor) -> tuple[Tensor, Tensor]:
    mean = y.mean((0, 2, 3))
    return mean, (y - _channels(mean)).square().mean((0, 2, 3))


@pytest.mark.parametrize("offset", [0, 1, -100, 3000])
@pytest.mark.parametrize("name", SHAPES)
def test_statistics(name, offset, memory, variant):
    y = memory.copy(make(name).residual + offset)
    mean, variance = passes.statistics(y)
    exact = _statistics(y.double())
    _check(mean, (y,), lambda y: _statistics(y)[0], y.abs().amax((0, 2, 3)))
    _check_close(variance, exact[1], 4 * EPS * exact[1])
    memory.unchanged(y)


@pytest.mark.parametrize("outliers", [1, 8, 64, 700])
def test_statistics_of_an_odd_start(outliers, variant):
    """A start of the image that is far from the rest says nothing about the precision of the rest."""
    torch.manual_seed(0)
    y = torch.randn(1, 19, 1, 20_000)
    y[..., :outliers] += 1e5
    mean, variance = passes.statistics(y)
    exact = _statistics(y.double())
    _check_close(mean, exact[0], 8 * EPS * y.double().abs().mean((0, 2, 3)))
    _check_close(variance, exact[1], 8 * EPS * exact[1])


# --- backward ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHAPES)
def test_gate(name, memory, variant):
    data = make(name)
    for gate in (None, Gate(), Gate(data.affine), Gate(data.affine, data.mean)):
        for residual in (None, data.residual):
            dx, x, added = memory.copy((data.grad, data.y, residual))
            args = (data.grad, data.y, gate, residual)
            actual = passes.gate(dx, x, gate, added)
            assert actual.g.data_ptr() == dx.data_ptr()
            assert (actual.total is None, actual.product is None) == (not gate, not gate or gate.mean is None)
            _check_gradient(actual, args, _gate, (data.y, data.mean))
            memory.unchanged(x, added)


def _gate(dx, x, gate, residual):
    return reference._gated(dx if residual is None else dx + residual, x, gate)


@pytest.mark.parametrize("name", SHAPES)
def test_tail_backward(name, memory, variant):
    data = memory.copy(make(name))
    y, residual = (data.y, data.mean), (data.residual, data.residual_mean)
    none = (None, None)
    for out in (None, data.out):
        for first, second in ((none, none), (y, none), (none, residual), (y, residual)):
            args = (data.grad, out, *first, *second)
            gradient, product = passes.tail_backward(*args)
            assert (gradient.product is None, product is None) == (first is none, second is none)
            assert (gradient.g is data.grad) == (out is None)
            _check_gradient(gradient, args, _first, y)
            if product is not None:  # as the other one is checked
                swapped = (data.grad, out, *second, *first)
                _check_gradient(gradient._replace(product=product), swapped, _first, residual)
    memory.unchanged(*data)


def _first(*args):
    return reference.tail_backward(*args)[0]


@pytest.mark.parametrize("name", SHAPES)
def test_tail_pool_backward(name, memory, variant):
    """The first of equal values gets the gradient: most windows here have some."""
    data = memory.copy(make(name))
    for mean in (None, data.mean):
        args = (data.pooled_grad, data.y, data.affine, mean)
        actual = passes.tail_pool_backward(*args)
        assert (actual.product is None) == (mean is None)
        exact = reference.tail_pool_backward(*_exact(args))
        added = reference.tail_pool_backward(data.pooled_grad.double().abs(), *_exact(args)[1:]).g  # up to four
        _check_close(actual.g, exact.g, 4 * EPS * added)
        _check_gradient(actual._replace(g=exact.g.float()), args, reference.tail_pool_backward, (data.y, data.mean))
    memory.unchanged(*data)


@pytest.mark.parametrize("name", SHAPES)
def test_bn_gradient(name, memory, variant):
    data = make(name)
    copies = memory.copy(data)
    vectors = (data.mean, data.affine.scale, data.slope, data.affine.shift)
    args = (data.grad, data.y, *vectors)
    actual = passes.bn_gradient(copies.grad, copies.y, *vectors, overwrite=True)
    assert actual.data_ptr() == copies.grad.data_ptr()
    size = (_channels(data.affine.scale) * data.grad).abs() + _channels(data.affine.shift).abs()
    size += (_channels(data.slope) * (data.y - _channels(data.mean))).abs()
    _check(actual, args, reference.bn_gradient, size)
    memory.unchanged(copies.y)


# --- NaN and infinities -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_inf(value, variant):
    """They come out where they come out of the definition: of the ReLU as NaN, of the maximum as the last one."""
    data = make("several runs")
    for image in (data.y, data.residual, data.out, data.grad, data.pooled_grad):
        image[0, 3, 2:4, 4], image[1, 36, 0, 0], image[1, 7, -1, -1] = value, value, value
    y, affine, mean = data.y, data.affine, data.mean

    def check(actual, function, *args):
        for mine, exact in zip(actual, function(*_exact(args))):
            if mine is not None:
                _check_close(mine, exact, 1e-4 * exact.abs().nan_to_num(0, 0, 0).max())

    forward = (y, affine, data.residual, data.residual_affine, True)
    check([passes.tail(*forward)], lambda *args: [reference.tail(*args)], *forward)
    check([passes.tail_pool(y, affine)], lambda *args: [reference.tail_pool(*args)], y, affine)
    check(passes.statistics(y), _statistics, y)
    through = (y, Gate(affine, mean), data.residual)
    check(passes.gate(data.grad.clone(), *through), _gate, data.grad, *through)
    backward = (data.grad, data.out, y, mean, None, None)
    check(passes.tail_backward(*backward)[0], _first, *backward)
    pool = (data.pooled_grad, y, affine, mean)
    check(passes.tail_pool_backward(*pool), reference.tail_pool_backward, *pool)
    norm = (y, mean, affine.scale, data.slope, affine.shift)
    normed = passes.bn_gradient(data.grad, *norm, overwrite=False)
    check([normed], lambda *args: [reference.bn_gradient(*args)], data.grad, *norm)


# --- what holds for all -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["odd sizes", "several runs", "every chunk"])
def test_the_same_bits_whatever_the_threads(name, variant):
    """And at every call."""
    data = make(name)
    first = everything(data)
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        for before, after in zip(first, everything(data)):
            assert torch.equal(before, after)


def test_large_results(variant):
    """Written past the caches where they are aligned, as they are not if channels do not fill a vector."""
    torch.manual_seed(0)
    for c, h, w in ((64, 270, 256), (63, 270, 256)):
        y, grad = torch.randint(-8, 9, (1, c, h, w)).float(), torch.randint(-8, 9, (1, c, h, w)).float()
        affine, mean = Affine(torch.ones(c), torch.full((c,), -2.0)), torch.zeros(c)
        out = passes.activate(y, affine)
        assert torch.equal(out, reference.activate(y, affine))
        assert torch.equal(passes.tail_backward(grad, out, y, mean, None, None)[0].g, grad * (out > 0))
        args = (grad[:, :, : h // 2, : w // 2], y, affine, mean)
        assert torch.equal(passes.tail_pool_backward(*args).g, reference.tail_pool_backward(*args).g)


def test_layouts(variant):
    """The same from NCHW images, from parts of larger ones, and from gradients that are one number expanded."""
    data = make("odd sizes")
    larger = Data(*(torch.stack([t, t], -1)[..., 0] if isinstance(t, Tensor) and t.dim() == 4 else t for t in data))
    for before, after in zip(everything(data), everything(larger)):
        assert torch.equal(before, after)
    one = torch.ones(()).expand(data.y.shape)
    args = (one, data.out, data.y, data.mean, None, None)
    _check_gradient(passes.tail_backward(*args)[0], args, _first, (data.y, data.mean))


def test_no_images():
    """Nothing to sum up: a mean of nothing is NaN, a sum 0."""
    y, vector = torch.empty(0, 5, 4, 3), torch.ones(5)
    mean, variance = passes.statistics(y)
    assert mean.isnan().all() and variance.isnan().all()
    assert passes.tail_pool(y, Affine(vector, vector)).shape == (0, 5, 2, 2)
    gradient = passes.tail_pool_backward(torch.empty(0, 5, 2, 2), y, Affine(vector, vector), vector)
    assert torch.equal(gradient.total, torch.zeros(5)) and torch.equal(gradient.product, torch.zeros(5))


def test_refusal():
    case = Case("tail", "cpu", torch.float32, 64, 64)
    assert passes.refusal(case) is None
    assert "cuda" in passes.refusal(case._replace(device="cuda"))
    assert "bfloat16" in passes.refusal(case._replace(dtype=torch.bfloat16))
    assert "channels" in passes.refusal(case._replace(in_channels=2**30))
