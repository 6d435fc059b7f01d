"""Gradients that have gradients, and many at once: as the stock model's, whatever an input was computed from."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import resnet

from tests.cpu.small_models import accelerated, images, randomise_norms, short_resnet

pytestmark = pytest.mark.usefixtures("one_thread")

X = images(3, 3, 24, 24).double()


class Block(nn.Module):
    """What ``between`` does stands between the convolutions, ``shortcut`` beside both."""

    def __init__(self, channels: int, between: nn.Module, shortcut: nn.Module, gate: bool = False) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.between, self.shortcut = between, shortcut
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.gate = nn.Linear(channels, channels) if gate else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.between(F.relu(self.bn1(self.conv1(x))))))
        if self.gate is not None:
            y = y * torch.sigmoid(self.gate(y.mean((2, 3))))[..., None, None]
        return F.relu(y + self.shortcut(x))


def _projection(channels: int, *before: nn.Module) -> nn.Module:
    return nn.Sequential(*before, nn.Conv2d(channels, channels, 1, bias=False), nn.BatchNorm2d(channels))


class Net(nn.Module):
    def __init__(self, *blocks: nn.Module, times: int = 1) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8)
        self.blocks, self.times, self.fc = nn.Sequential(*blocks), times, nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.conv(x)))
        for _ in range(self.times):
            x = self.blocks(x)
        return self.fc(x.mean((2, 3)))


def _tied() -> nn.Module:
    net = Net(*(Block(8, nn.Identity(), _projection(8)) for _ in range(2)))
    first, second = net.blocks
    second.conv1.weight = second.conv2.weight = first.conv2.weight = first.conv1.weight
    second.bn2.weight, second.bn2.bias = first.bn1.weight, first.bn1.bias
    return net


MODELS = {
    "torchvision, basic": lambda: short_resnet(resnet.BasicBlock),
    "torchvision, bottleneck": lambda: short_resnet(resnet.Bottleneck),
    "average-pool shortcut": lambda: Net(Block(8, nn.Identity(), _projection(8, nn.AvgPool2d(3, 1, 1)))),
    "timm, resnet18d": lambda: timm.create_model("resnet18d", num_classes=3),
    "dropout between": lambda: Net(
        Block(8, nn.Dropout2d(0.4), nn.Identity()), Block(8, nn.Dropout2d(0.4), _projection(8))
    ),
    "leaky between": lambda: Net(Block(8, nn.LeakyReLU(0.2), nn.Identity()), Block(8, nn.SiLU(), _projection(8))),
    "gate before the addition": lambda: Net(Block(8, nn.Identity(), nn.Identity(), gate=True)),
    "blocks in a loop": lambda: Net(Block(8, nn.Identity(), nn.Identity()), times=3),
    "tied weights": _tied,
}


def _made(name: str, training: bool) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    stock = randomise_norms(MODELS[name]()).double().train(training)
    return stock, accelerated(copy.deepcopy(stock))


def _derivatives(model: nn.Module, once: bool) -> dict[str, Tensor]:
    """By name: first derivatives with a graph of their own, and unless ``once``, the second ones along themselves."""
    torch.manual_seed(1)
    x = X.clone().requires_grad_()
    named = {"x": x, **dict(model.named_parameters())}
    first = torch.autograd.grad(model(x).sin().sum(), list(named.values()), create_graph=True)
    found = {f"d {name}": gradient.detach() for name, gradient in zip(named, first)}
    if not once:
        along = sum((gradient * gradient.detach()).sum() for gradient in first)
        second = torch.autograd.grad(along, list(named.values()), allow_unused=True)
        found |= {f"dd {name}": gradient for name, gradient in zip(named, second) if gradient is not None}
    return found


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("name", MODELS)
def test_both_derivatives(name, training):
    stock, fast = _made(name, training)
    expected, actual = (_derivatives(model, once=False) for model in (stock, fast))
    assert actual.keys() == expected.keys()
    for key, right in expected.items():
        # What rounding leaves of a gradient that is zero, as a bias's before a norm, is of the size of the others.
        allowed = 1e-9 * right.abs().max() + 1e-12 * max(one.abs().max() for one in expected.values())
        assert (actual[key] - right).abs().max() <= allowed, key


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("name", ["torchvision, basic", "average-pool shortcut"])
def test_many_gradients_at_once(name, training):
    """Of ``torch.autograd.functional.jacobian(vectorize=True)``, and of ``is_grads_batched``, which it goes through."""
    stock, fast = _made(name, training)
    expected, actual = (
        torch.autograd.functional.jacobian(lambda x, model=model: model(x).sum(0), X, vectorize=True)
        for model in (stock, fast)
    )
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


def test_a_penalty_on_gradients():
    """Of the parameters, as ``loss.backward(create_graph=True)`` leaves them."""
    results = []
    for model in _made("average-pool shortcut", True):
        model(X).square().sum().backward(create_graph=True)
        penalty = sum(p.grad.square().sum() for p in model.parameters())
        results.append(torch.autograd.grad(penalty, model.conv.weight)[0])
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-12)
