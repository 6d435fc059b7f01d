"""Gradients of a step in float32, where rounding turns a ReLU or another pixel wins a max-pool: right given which.

A ReLU whose input lies within rounding of zero lets its gradient through in one precision and not in another, and one
of them among few pixels changes whole gradients by 1e-3 to 1e-1, PyTorch's own as well. So float64 computes the
gradient with the ReLUs and winners of the step that is checked, which must have turned only such ones.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Optional

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models import resnet

import resnet_fast
from resnet_fast.kernels.contract import Affine
from resnet_fast.kernels.native import library
from resnet_fast.kernels.reference.training import activate
from resnet_fast.ops.block_backward import _states
from resnet_fast.ops.residual_block import block_of
from tests.cpu.small_models import accelerated, images, randomise_norms, relative_error

pytestmark = pytest.mark.skipif(library.unavailable() is not None, reason="needs the native kernels")

SEEDS = range(3)
TWICE = 2  # design: at most twice PyTorch's error
WINOGRAD = 5 * TWICE  # whose transforms round up to five times as coarsely


class Encoder(nn.Module):
    """Two stages of a ResNet, and what came before each of them."""

    def __init__(self, block: type) -> None:
        super().__init__()
        net = resnet.ResNet(block, [1, 1, 1, 1])
        self.stem, self.pool = nn.Sequential(net.conv1, net.bn1, net.relu), net.maxpool
        self.layer1, self.layer2 = net.layer1, net.layer2

    def forward(self, x: Tensor) -> list[Tensor]:
        half = self.stem(x)
        quarter = self.layer1(self.pool(half))
        return [half, quarter, self.layer2(quarter)]


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder(resnet.BasicBlock)
        self.ups = nn.ModuleList([nn.ConvTranspose2d(128, 64, 2, 2), nn.ConvTranspose2d(64, 64, 2, 2)])
        self.decoders = nn.ModuleList(self.decoder(128, 64) for _ in self.ups)
        self.head = nn.Conv2d(64, 3, 1)

    @staticmethod
    def decoder(inputs: int, outputs: int) -> nn.Module:
        norms = [nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)]
        convs = [nn.Conv2d(c, outputs, 3, padding=1, bias=False) for c in (inputs, outputs)]
        return nn.Sequential(convs[0], norms[0], nn.ReLU(inplace=True), convs[1], norms[1], nn.ReLU(inplace=True))

    def forward(self, x: Tensor) -> Tensor:
        *skips, y = self.encoder(x)
        for up, decoder in zip(self.ups, self.decoders):
            y = decoder(torch.cat([up(y), skips.pop()], 1))
        classes = torch.arange(len(x), device=x.device).view(-1, 1, 1) % 3
        return F.cross_entropy(self.head(y), classes.expand(-1, *y.shape[2:]))


class SimSiam(nn.Module):
    """Two views of each picture, each to be predicted from the other (Chen and He 2021)."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder(resnet.Bottleneck)
        self.projector = self.mlp(512, 64, nn.BatchNorm1d(64, affine=False))
        self.predictor = self.mlp(64, 16)

    @staticmethod
    def mlp(size: int, inner: int, *last: nn.Module) -> nn.Module:
        linear = [nn.Linear(size, inner, bias=False), nn.Linear(inner, 64, bias=False)]
        return nn.Sequential(linear[0], nn.BatchNorm1d(inner), nn.ReLU(), linear[1], *last)

    def forward(self, x: Tensor) -> Tensor:
        one, other = (self.projector(self.encoder(view)[-1].mean((2, 3))) for view in (x, x.flip(3)))
        pairs = ((self.predictor(one), other.detach()), (self.predictor(other), one.detach()))
        return -sum(F.cosine_similarity(*pair).mean() for pair in pairs) / 2


# --- which ReLUs and pixels let through -------------------------------------------------------------------------------


class Decision(NamedTuple):
    """Of a ReLU where it lets through, and its input if that was seen; of a max-pool its winners."""

    taken: Tensor
    x: Optional[Tensor] = None


class Recorder(TorchDispatchMode):
    """The decisions of a forward, stock or fused, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.decisions: list[Decision] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._opname in ("relu", "relu_"):  # which may write over its input
            self.decisions.append(Decision(args[0] > 0, args[0].to(torch.float64, copy=True)))
        result = func(*args, **(kwargs or {}))
        if func._opname == "max_pool2d_with_indices":
            self.decisions.append(Decision(result[1]))
        elif func._opname == "residual_block":
            self.decisions += _decisions(args, *result)
        return result


def _decisions(args: Any, out: Tensor, _: Any, saved: list[Tensor]) -> Iterator[Decision]:
    """Of a fused block. In float64, scale times value plus shift has the sign that it has when rounded once."""
    x, residual, *plain = args
    block = block_of(*plain)
    states = _states(block, x, residual, saved)[: len(block.main)]
    for state in states[1:]:
        yield Decision(_activated(*state.image) > 0)
    last = states[-1]
    if block.pool:
        activated = _activated(last.y, last.norm.affine).float()
        yield Decision(activated > 0)
        yield Decision(F.max_pool2d(activated, 3, 2, 1, return_indices=True)[1])
    elif block.relu:
        yield Decision(out > 0)


def _activated(y: Tensor, affine: Optional[Affine]) -> Tensor:
    return activate(y.double(), None if affine is None else Affine(*(vector.double() for vector in affine)))


@contextmanager
def forced(decisions: list[Decision]) -> Iterator[None]:
    """ReLUs and max-pools decide as they did then."""
    left = iter(decisions)

    def relu(x: Tensor, inplace: bool = False) -> Tensor:
        return x * next(left).taken

    def max_pool2d(x: Tensor, *_: Any, **__: Any) -> Tensor:
        winners = next(left).taken
        return x.flatten(2).gather(2, winners.flatten(2)).view_as(winners)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "relu", relu)
        patch.setattr(F, "max_pool2d", max_pool2d)
        yield
    assert next(left, None) is None


# --- a step -----------------------------------------------------------------------------------------------------------


class Step(NamedTuple):
    gradients: list[Tensor]
    decisions: list[Decision]


def _step(model: nn.Module, x: Tensor) -> Step:
    with Recorder() as recorder:
        loss = model(x)
    loss.backward()
    return Step([parameter.grad.double() for parameter in model.parameters()], recorder.decisions)


def _turned(decisions: list[Decision], precise: list[Decision]) -> list[float]:
    """For each ReLU the largest input, in float64, of which it decides otherwise than float64, of its largest input."""
    return [
        ((one.taken != other.taken) * other.x).abs().max().item() / other.x.abs().max().item()
        for one, other in zip(decisions, precise, strict=True)
        if other.x is not None
    ]


def _rounding(decisions: list[Decision], precise: list[Decision]) -> list[float]:
    """For each ReLU how far its inputs are off, of its largest input."""
    return [
        relative_error(one.x, other.x) for one, other in zip(decisions, precise, strict=True) if other.x is not None
    ]


@pytest.mark.parametrize("make", [UNet, SimSiam])
def test_gradient_given_the_same_decisions(make: Callable[[], nn.Module]):
    factors = {"stock": 1, "exact": TWICE, "usual": WINOGRAD}
    errors = dict.fromkeys(factors, 0.0)
    for seed in SEEDS:
        torch.manual_seed(seed)
        stock = randomise_norms(make(), seed).train()
        x = images(4, 3, 48, 48, seed=seed)
        precise = _step(copy.deepcopy(stock).double(), x.double())
        steps = {"stock": _step(copy.deepcopy(stock).to(memory_format=torch.channels_last), x)}
        for name in ("exact", "usual"):
            with resnet_fast.exact(name == "exact"):
                steps[name] = _step(accelerated(stock), x)
        rounding = _rounding(steps["stock"].decisions, precise.decisions)
        for name, step in steps.items():
            for furthest, error in zip(_turned(step.decisions, precise.decisions), rounding, strict=True):
                assert furthest <= factors[name] * error
            with forced(step.decisions):
                right = _step(copy.deepcopy(stock).double(), x.double())
            errors[name] += relative_error(step.gradients, right.gradients)
    assert all(errors[name] <= factor * errors["stock"] for name, factor in factors.items()), errors
