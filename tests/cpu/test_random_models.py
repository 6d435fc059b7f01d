"""Models put together at random from blocks as people write them: whatever a forward does, results are the stock ones.

In float64, where a wrong program cannot pass for rounding and no ReLU flips: outputs, gradients of first and second
order, buffers, random numbers drawn, attributes written; in float32, by the native kernels, the outputs.
"""

import collections
import copy
import random
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from timm.layers import BatchNormAct2d, SEModule
from torch import nn

import resnet_fast
from tests.cpu.small_models import randomise_norms, relative_error

C = 8  # channels, of all blocks' inputs and outputs


def conv(kernel: int = 3, inner: int = C, **options) -> nn.Conv2d:
    return nn.Conv2d(inner, inner, kernel, **{"padding": kernel // 2, "bias": False, **options})


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(conv(), nn.BatchNorm2d(C), nn.ReLU(inplace=True), conv(1), nn.BatchNorm2d(C))

    def forward(self, x):
        return self.body(x)


class Basic(nn.Module):
    """Shortcuts, activations and what stands between the convolutions differ."""

    def __init__(self, shortcut=None, act=F.relu, between=None, before_add=None) -> None:
        super().__init__()
        self.conv1, self.bn1, self.conv2, self.bn2 = conv(), nn.BatchNorm2d(C), conv(), nn.BatchNorm2d(C)
        self.shortcut, self.between, self.before_add = shortcut, between, before_add
        self.act = act if isinstance(act, nn.Module) else None
        self.function = None if self.act else act

    def forward(self, x):
        act = self.act or self.function
        y = act(self.bn1(self.conv1(x)))
        if self.between is not None:
            y = self.between(y)
        y = self.bn2(self.conv2(y))
        if self.before_add is not None:
            y = self.before_add(y)
        y += x if self.shortcut is None else self.shortcut(x)
        return act(y)


class OptionA(nn.Module):
    """A shortcut without parameters, as for CIFAR."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = conv(stride=2), nn.BatchNorm2d(C)

    def forward(self, x):
        shortcut = F.pad(x[:, : C // 2, ::2, ::2], (0, 0, 0, 0, C // 4, C // 4))
        return F.interpolate(F.relu(self.bn(self.conv(x)) + shortcut), x.shape[2:])


class WithAct(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.last, self.norm = conv(groups=2), BatchNormAct2d(C), conv(1), nn.BatchNorm2d(C)

    def forward(self, x):
        return torch.relu(self.norm(self.last(self.bn(self.conv(x)))) + x)


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.conv, self.join = nn.BatchNorm2d(C), conv(padding="same", dilation=2), nn.Conv2d(2 * C, C, 1)

    def forward(self, x):
        return self.join(torch.cat([x, self.conv(F.relu(self.norm(x)))], 1))


class Split(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = conv(inner=C // 2), nn.BatchNorm2d(C // 2)

    def forward(self, x):
        a, b = x.chunk(2, 1)
        return torch.cat([b, F.relu(self.bn(self.conv(a)))], 1)


class Loop(nn.Module):
    """One block several times, with the same weights."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.times = Basic(), 2

    def forward(self, x):
        for _ in range(self.times):
            x = self.block(x)
        return x


class Biased(nn.Module):
    """Convolutions without norms; a norm that was folded already."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.frozen = conv(bias=True), conv(1, bias=True), torchvision.ops.FrozenBatchNorm2d(C)

    def forward(self, x):
        return self.frozen(self.second(self.first(x).relu_())).add(x).relu()


class Views(nn.Module):
    """Writes through views of what a convolution gave."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = conv(), nn.BatchNorm2d(C)

    def forward(self, x):
        y = self.bn(self.conv(x))
        z = y * 1
        z[:, :2].mul_(0.5)
        z[:, 3].sub_(0.1)
        return torch.relu(z)


class Draws(nn.Module):
    """Stochastic depth as it is written by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Plain()

    def forward(self, x):
        if self.training and random.random() < 0.5:
            return x
        return x + self.block(x)


class DrawsTensors(Draws):
    def forward(self, x):
        if not self.training:
            return x + self.block(x)
        return x + self.block(x) * (torch.rand(x.shape[0], 1, 1, 1) < 0.5)


class Counts(nn.Module):
    """A buffer, an attribute and containers that every call writes to."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.calls = conv(), nn.BatchNorm2d(C), 0
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.recent, self.kept = collections.deque(maxlen=2), {}

    def forward(self, x):
        self.calls += 1
        self.steps += 1
        y = torch.relu(self.bn(self.conv(x)))
        self.recent.append(y.detach().mean().item())
        self.kept["mean"] = y.detach().mean()
        return y


class Switches(nn.Module):
    """What it computes hangs on a dictionary, a namespace and a child's attribute, which change between calls."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = conv(), nn.BatchNorm2d(C)
        self.settings, self.options = {"relu": True}, SimpleNamespace(scale=1)
        self.conv.residual = True

    def forward(self, x):
        y = self.bn(self.conv(x)) * self.options.scale
        if self.conv.residual:
            y = y + x
        return F.relu(y) if self.settings["relu"] else y

    def switch(self) -> None:
        self.settings["relu"] = not self.settings["relu"]
        self.options.scale += 1
        self.conv.residual = not self.conv.residual


class Pools(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pool, self.conv, self.bn = nn.MaxPool2d(3, 2, 1, ceil_mode=True), conv(), nn.BatchNorm2d(C, momentum=None)

    def forward(self, x):
        y = F.relu(self.bn(self.conv(self.pool(x))))
        return F.interpolate(y + F.adaptive_avg_pool2d(y, 1), x.shape[2:])


def projection(*before: nn.Module) -> nn.Module:
    return nn.Sequential(*before, conv(1), nn.BatchNorm2d(C))


BLOCKS = {
    "plain": Plain,
    "basic": Basic,
    "projection": lambda: Basic(projection()),
    "average pool before the projection": lambda: Basic(projection(nn.AvgPool2d(3, 1, 1))),
    "squeeze and excitation": lambda: Basic(before_add=SEModule(C, rd_channels=4)),
    "dropout between": lambda: Basic(between=nn.Dropout(0.3)),
    "leaky": lambda: Basic(act=nn.LeakyReLU(0.1)),
    "silu": lambda: Basic(act=F.silu),
    "prelu": lambda: Basic(act=nn.PReLU()),
    "group norm between": lambda: Basic(between=nn.GroupNorm(2, C)),
    "option A": OptionA,
    "BatchNormAct2d": WithAct,
    "dense": Dense,
    "split": Split,
    "loop": Loop,
    "biased": Biased,
    "views": Views,
    "random.random": Draws,
    "torch.rand": DrawsTensors,
    "counts": Counts,
    "switches": Switches,
    "pools": Pools,
}


class Model(nn.Module):
    def __init__(self, names: tuple[str, ...]) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, C, 3, padding=1), nn.BatchNorm2d(C), nn.ReLU())
        self.blocks = nn.ModuleList(BLOCKS[name]() for name in names)
        self.head = nn.Linear(C, 5)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))


def made(names: tuple[str, ...], seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return randomise_norms(Model(names), seed)


def run(model: nn.Module, x: torch.Tensor, training: bool) -> dict[str, torch.Tensor]:
    """All that two steps leave behind."""
    torch.manual_seed(3)
    random.seed(3)
    left = {}
    for step in range(2):
        model.train(training)
        image = x.clone().requires_grad_()
        y = model(image)
        parameters = dict(model.named_parameters())
        # A parameter may be unused, where depth is stochastic; its gradient is None in both.
        first = torch.autograd.grad(
            y.square().sum(), [image, *parameters.values()], create_graph=True, allow_unused=True
        )
        second = torch.autograd.grad(
            sum(one.square().sum() for one in first if one is not None), list(parameters.values()), allow_unused=True
        )
        left[f"output {step}"] = y.detach()
        for name, one, other in zip(["image", *parameters], first, [None, *second]):
            left[f"gradient of {name} {step}"] = one if one is None else one.detach()
            left[f"second gradient of {name} {step}"] = other
        for module in model.modules():
            if isinstance(module, Switches):
                module.switch()
    left |= dict(model.named_buffers())
    left |= {f"{name}.calls": torch.tensor(one.calls) for name, one in model.named_modules() if isinstance(one, Counts)}
    left["random"] = torch.tensor([random.random(), torch.rand(()).item()])
    return left


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True)
@given(
    names=st.lists(st.sampled_from(sorted(BLOCKS)), min_size=1, max_size=3).map(tuple),
    training=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_in_float64(names, training, seed):
    stock = made(names, seed).double()
    fast = copy.deepcopy(stock)
    torch.manual_seed(4)
    random.seed(4)
    before, generators = copy.deepcopy(fast.state_dict()), (random.getstate(), torch.get_rng_state())
    resnet_fast.accelerate(fast)
    assert random.getstate() == generators[0] and torch.equal(torch.get_rng_state(), generators[1])
    assert before.keys() == fast.state_dict().keys()
    assert all(torch.equal(before[name], value) for name, value in fast.state_dict().items())
    x = torch.randn(3, 3, 9, 10, generator=torch.Generator().manual_seed(seed)).double()
    expected, result = run(stock, x, training), run(fast, x, training)
    for name, one in expected.items():
        if one is None:
            assert result[name] is None or not result[name].any(), name
        else:
            assert relative_error(result[name], one) < 1e-8 or torch.allclose(result[name], one, atol=1e-10), name


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True)
@given(names=st.lists(st.sampled_from(sorted(BLOCKS)), min_size=1, max_size=3).map(tuple), seed=st.integers(0, 1000))
def test_in_float32(names, seed):
    stock = made(names, seed).eval()
    fast = resnet_fast.accelerate(copy.deepcopy(stock))
    x = torch.randn(2, 3, 17, 19, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for _ in range(2):
            expected = copy.deepcopy(stock).double()(x.double())
            stock(x)
            assert relative_error(fast(x).double(), expected) < 5e-5  # Winograd's bound, of one layer
            for module in (*stock.modules(), *fast.modules()):
                if isinstance(module, Switches):
                    module.switch()


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", BLOCKS)
def test_each_block_of_its_own(name, training):
    test_in_float64.hypothesis.inner_test((name,), training, 0)
    if not training:
        test_in_float32.hypothesis.inner_test((name,), 0)


def test_most_blocks_are_fused():
    """A test of what is left alone would protect nothing: of all blocks, ours are four convolutions of five."""
    model = resnet_fast.accelerate(made(tuple(BLOCKS), 0).eval())
    found = resnet_fast.explain(model)
    assert found.fused >= 0.8 * found.convolutions, found
