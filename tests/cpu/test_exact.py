"""``exact()``: every convolution, in inference and training, as near to float64 as PyTorch's own."""

import copy

import pytest
import torch
from torch import nn

import resnet_fast
from resnet_fast.kernels.native import library, planner
from tests.cpu.small_models import relative_error

pytestmark = pytest.mark.skipif(library.unavailable() is not None, reason="needs the native kernels")

SEEDS = range(4)


def _layer(seed: int, stride: int = 1) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(128, 128, 3, stride, padding=1, bias=False), nn.BatchNorm2d(128), nn.ReLU())


def _errors(training: bool, seed: int, stride: int = 1) -> tuple[float, float]:
    """(PyTorch's, ours), of outputs and gradients of one layer, against float64."""
    stock = _layer(seed, stride).train(training)
    fast = resnet_fast.accelerate(stock, inplace=False)
    x = torch.randn(2, 128, 28, 28).to(memory_format=torch.channels_last)
    results = []
    for model, image in ((copy.deepcopy(stock).double(), x.double()), (stock, x), (fast, x)):
        image = image.detach().clone().requires_grad_(training)
        y = model(image)
        if not training:
            with torch.no_grad():
                y = model(image)
            results.append([y.double()])
            continue
        (y * y).sum().backward()
        results.append([y.detach().double(), image.grad.double(), model[0].weight.grad.double()])
    return relative_error(results[1], results[0]), relative_error(results[2], results[0])


@pytest.mark.parametrize("training", [False, True])
def test_as_exact_as_pytorch(training):
    """Design: at most twice PyTorch's error; Winograd's is several times that, or the switch would be for nothing."""
    usual = [_errors(training, seed) for seed in SEEDS]
    with resnet_fast.exact():
        exact = [_errors(training, seed) for seed in SEEDS]
    assert sum(ours for _, ours in exact) <= 2 * sum(stock for stock, _ in exact)
    assert sum(ours for _, ours in usual) > 2 * sum(stock for stock, _ in usual)


def test_back_through_a_stride():
    """There Winograd's algorithm serves only the gradient of the input."""
    with resnet_fast.exact():
        exact = [_errors(True, seed, stride=2) for seed in SEEDS]
    assert sum(ours for _, ours in exact) <= 2 * sum(stock for stock, _ in exact)


def test_it_holds_until_it_is_taken_back():
    """As a function and as a context manager; plans that were made before are made again."""
    model, x = resnet_fast.accelerate(_layer(0).eval()), torch.randn(1, 128, 28, 28)
    with torch.no_grad():
        usual = model(x)
        resnet_fast.exact()
        try:
            assert planner.exact()
            exact = model(x)
            assert not torch.equal(usual, exact)
            with resnet_fast.exact(False):
                assert torch.equal(model(x), usual)
            assert torch.equal(model(x), exact)
        finally:
            resnet_fast.exact(False)
        assert torch.equal(model(x), usual)
