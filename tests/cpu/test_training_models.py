"""Whole models and awkward blocks in training: results, gradients and buffers are those of the stock modules."""

import copy
import operator
from collections.abc import Callable

import pytest
import timm
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torchvision.models import resnet
from torchvision.ops import FrozenBatchNorm2d

import resnet_fast
from tests.cpu.graph.test_program import network
from tests.cpu.ops.residual_blocks import WINOGRAD, assert_as_precise, over_seeds, saved, usual
from tests.cpu.small_models import (
    SEED,
    accelerated,
    built,
    fused_calls,
    images,
    randomise_norms,
    relative_error,
    small_resnet,
)

pytestmark = pytest.mark.usefixtures("one_thread")

EPS = torch.finfo(torch.float32).eps


def train(model: nn.Module, x: Tensor, steps: int = 2) -> dict[str, Tensor]:
    """By name: every step's output and gradients, the input's too, and all buffers at the end."""
    optimiser = torch.optim.SGD(model.parameters(), lr=0.01)
    found: dict[str, Tensor] = {}
    for step in range(steps):
        torch.manual_seed(step)  # dropout, drop path
        given = x.detach().requires_grad_()
        results = torch.utils._pytree.tree_leaves(model(given + 0.1 * step))
        optimiser.zero_grad()
        sum((result.sin() * (i + 1)).sum() for i, result in enumerate(results)).backward()
        found |= {f"step {step}, output {i}": result.detach() for i, result in enumerate(results)}
        found[f"step {step}, d x"] = given.grad
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found |= {f"step {step}, d {name}": gradient.clone() for name, gradient in gradients.items()}
        optimiser.step()
    return found | {name: buffer.clone().double() for name, buffer in model.named_buffers()}


def check(stock: nn.Module, x: Tensor, blocks: int) -> nn.Module:
    """In float64, and that ``blocks`` calls of the op make a forward pass."""
    stock = stock.double().train()
    fast = resnet_fast.accelerate(stock, inplace=False)
    calls = fused_calls(lambda: copy.deepcopy(fast)(x.double()))
    assert calls.count("residual_block") == blocks, calls
    expected, actual = train(stock, x.double()), train(fast, x.double())
    assert actual.keys() == expected.keys()
    for name, right in expected.items():
        # Batch norm takes a bias out again: what is left of its gradient is rounding.
        error = (actual[name] - right).abs().max()
        assert error <= 1e-9 * right.abs().max() + 1e-11, f"{name} is off by {error:.3g} of {right.abs().max():.3g}"
    return fast


# --- models -----------------------------------------------------------------------------------------------------------


def _timm(name: str, **options) -> nn.Module:
    return built(_drawn, name, **options)


def _drawn(name: str, **options) -> nn.Module:
    return randomise_norms(timm.create_model(name, num_classes=7, **options))


MODELS = {
    "basic": (small_resnet, 5),
    "bottleneck": (lambda: small_resnet(resnet.Bottleneck), 5),
    "resnext": (lambda: small_resnet(resnet.Bottleneck, groups=4, width_per_group=8), 5),
    "wide": (lambda: small_resnet(resnet.Bottleneck, width_per_group=96), 5),
    "dilated": (lambda: small_resnet(resnet.Bottleneck, replace_stride_with_dilation=(False, True, True)), 5),
    "zero-init": (lambda: small_resnet(resnet.Bottleneck, zero_init_residual=True), 5),
    "frozen class": (lambda: small_resnet(norm_layer=FrozenBatchNorm2d), None),
    "group norm": (lambda: small_resnet(norm_layer=lambda c: nn.GroupNorm(4, c)), 0),
    "resnet18": (lambda: randomise_norms(resnet.resnet18(num_classes=7)), 9),
    "our resnet18": (lambda: randomise_norms(resnet_fast.resnet18(num_classes=7)), 9),
    "timm resnet10t": (lambda: _timm("resnet10t"), None),
    "timm resnet14t": (lambda: _timm("resnet14t"), None),
    "timm resnet18d": (lambda: _timm("resnet18d"), None),
    "timm seresnet18": (lambda: _timm("seresnet18"), None),
    "timm ecaresnet26t": (lambda: _timm("ecaresnet26t"), None),
    "timm resnetblur18": (lambda: _timm("resnetblur18"), None),
    "timm drop path": (lambda: _timm("resnet18", drop_path_rate=0.5), None),
    "timm drop block": (lambda: _timm("resnet18", drop_block_rate=0.2), None),
}


@pytest.mark.parametrize("name", MODELS)
def test_models(name):
    build, blocks = MODELS[name]
    stock, x = build(), images(3, 3, 64, 64)
    if blocks is None:
        fast = copy.deepcopy(accelerated(stock)).double().train()
        blocks = fused_calls(lambda: fast(x.double())).count("residual_block")
        assert blocks >= 4
    check(stock, x, blocks)


float32 = pytest.mark.parametrize("name", ["basic", "bottleneck", "resnext", "timm resnet18d"])


def _stock_runs(name: str, prepare=lambda model: None) -> Callable[[int], dict]:
    """For ``over_seeds``: one step of the stock model in channels_last, changed by ``prepare``."""

    def run(seed: int) -> dict:
        model = MODELS[name][0]().train().to(memory_format=torch.channels_last)
        prepare(model)
        return train(model, images(2, 3, 64, 64, seed=seed).to(memory_format=torch.channels_last), 1)

    return run


def _exact_runs(name: str) -> Callable[[int], dict]:
    return lambda seed: train(MODELS[name][0]().double().train(), images(2, 3, 64, 64, seed=seed).double(), 1)


def _fused_runs(name: str) -> Callable[[int], dict]:
    return lambda seed: train(accelerated(MODELS[name][0]()).train(), images(2, 3, 64, 64, seed=seed), 1)


@float32
def test_chains_err_at_most_twice_as_much_as_stock(name, monkeypatch):
    """On the definition of the primitives, whose convolutions are stock's: what is left is the chains' own error."""
    monkeypatch.setenv("RESNET_FAST_IMPLEMENTATION", "reference")
    fused, stock, exact = (over_seeds(runs(name), 7) for runs in (_fused_runs, _stock_runs, _exact_runs))
    assert_as_precise(fused, stock, exact, 16 * EPS, usual)


@float32
def test_kernels_err_no_more_than_winograd_may(name):
    """At most as much as stock modules whose convolutions err as Winograd's algorithm does.

    It is allowed ``WINOGRAD`` for the worst value of many; the usual one is off by a tenth of that.
    """

    def inexact(model: nn.Module) -> None:
        generator = torch.Generator().manual_seed(SEED)

        def err(_, __, y: Tensor) -> Tensor:
            noise = 2 * torch.rand(y.shape, generator=generator) - 1
            return y + WINOGRAD / 5 * y.detach().abs().max() * noise

        for conv in model.modules():
            if isinstance(conv, nn.Conv2d):
                conv.register_forward_hook(err)

    fused, exact = over_seeds(_fused_runs(name), 3), over_seeds(_exact_runs(name), 3)
    allowed = over_seeds(_stock_runs(name, inexact), 3)
    for key, right in exact.items():
        error, bound = usual(fused[key] - right), usual(allowed[key] - right)
        assert error <= bound + 16 * EPS * usual(right), f"{key} is off by {error:.3g}, allowed are {bound:.3g}"


@pytest.mark.parametrize("name", ["basic", "bottleneck", "timm resnet18d"])
def test_norms_in_eval_mode_while_training(name):
    """Statistics stand still, the affine parameters learn; in every second norm, so that blocks are mixed."""
    stock = MODELS[name][0]().train()
    for still in (slice(None), slice(0, None, 2)):
        for norm in [m for m in stock.modules() if isinstance(m, nn.BatchNorm2d)][still]:
            norm.eval()
        x = images(3, 3, 64, 64)
        stock = stock.double()
        expected, actual = train(copy.deepcopy(stock), x.double()), train(accelerated(stock), x.double())
        assert max(relative_error(actual[name], right) for name, right in expected.items()) < 1e-9
        stock.train()


def test_empty_batch():
    stock = small_resnet().train()
    fast = accelerated(stock)
    blocks = [(stock.layer1[0], fast.layer1[0]), (stock.layer2[0], fast.layer2[0])]
    for one, other in blocks:
        x = torch.randn(0, 64, 8, 8)
        assert one(x).shape == other(x).shape
        for (name, buffer), found in zip(one.named_buffers(), other.buffers()):
            assert torch.equal(buffer, found), name


def test_one_value_per_channel_changes_nothing():
    """It is raised in the last stage: the running statistics before it have moved, as stock's have."""
    stock = small_resnet(resnet.Bottleneck).train()
    fast = accelerated(stock)
    with pytest.raises(ValueError, match="more than 1 value per channel") as expected:
        stock(images(1, 3, 32, 32))
    with pytest.raises(ValueError, match="more than 1 value per channel") as raised:
        fast(images(1, 3, 32, 32))
    assert str(raised.value) == str(expected.value)
    assert torch.equal(fast.layer4[0].bn1.running_mean, small_resnet(resnet.Bottleneck).layer4[0].bn1.running_mean)


# --- frozen stages ----------------------------------------------------------------------------------------------------


class Stem(nn.Module):
    """A network's first stages."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.stages = nn.Sequential(model.conv1, model.bn1, model.relu, model.maxpool, model.layer1)

    def forward(self, x):
        return self.stages(x)


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, FrozenBatchNorm2d])
def test_frozen_stages_save_nothing(norm):
    """As detection freezes them: no parameter learns, norms normalise by running statistics."""
    frozen = Stem(small_resnet(resnet.Bottleneck, norm_layer=norm)).requires_grad_(False)
    fast = accelerated(frozen).train()
    for module in fast.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    x = images(2, 3, 64, 64)
    assert saved(lambda: fast(x)) == 0
    assert not fast(x).requires_grad
    assert "residual_block_backward" not in fused_calls(lambda: fast(x))


def test_a_model_with_frozen_stages_saves_less():
    model = accelerated(small_resnet(resnet.Bottleneck)).train()
    x = images(2, 3, 64, 64)
    everything = saved(lambda: model(x))
    parameters = sum(4 * p.numel() for p in model.parameters())  # kept in any case, by reference
    stock = saved(lambda: small_resnet(resnet.Bottleneck).train()(x)) - parameters
    assert everything - parameters < 0.75 * stock
    for stage in (model.conv1, model.bn1, model.layer1):
        stage.requires_grad_(False)
        for module in stage.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
    rest = saved(lambda: model(x))
    activations = 2 * 4 * 16 * 16 * (64 + 64 + 64)  # layer1's: its input and two raw results; its output stays
    assert rest <= everything - activations
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    model(x).sum().backward()
    assert learning == {name for name, p in model.named_parameters() if p.grad is not None}


# --- graphs in which putting convolutions together could be wrong -----------------------------------------------------

X = images(4, 8, 10, 12)


def _unit(self, i: int, x: Tensor) -> Tensor:
    return getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(x))


def _net(forward) -> nn.Module:
    """With a third convolution, to 8 channels like the others."""
    torch.manual_seed(1)
    return network(forward, conv3=nn.Conv2d(8, 8, 1), bn3=nn.BatchNorm2d(8)).train()


GRAPHS = {}
"""By name: the forward, and how many calls of the op it may become."""


def graph(blocks: int):
    def register(forward):
        GRAPHS[forward.__name__] = (forward, blocks)
        return forward

    return register


@graph(1)
def block_with_a_shortcut(self, x):
    y = self.relu(_unit(self, 1, x))
    return self.relu(_unit(self, 2, y) + _unit(self, 3, x))


@graph(1)
def shortcut_first(self, x):
    identity = _unit(self, 3, x)
    return F.relu(identity + _unit(self, 2, self.relu(_unit(self, 1, x))))


@graph(3)
def shortcut_of_two_sums(self, x):
    """Put into both blocks, it would be computed twice, and its running statistics would move twice."""
    identity = _unit(self, 3, x)
    return F.relu(_unit(self, 1, x) + identity) * F.relu(_unit(self, 2, x) + identity)


@graph(2)
def shortcut_that_is_returned(self, x):
    identity = _unit(self, 3, x)
    return F.relu(_unit(self, 2, F.relu(_unit(self, 1, x))) + identity), identity


@graph(1)
def shortcut_of_two_convolutions(self, x):
    """The longer side is the main one."""
    identity = _unit(self, 2, F.relu(_unit(self, 1, x)))
    return F.relu(_unit(self, 3, x) + identity)


@graph(2)
def two_convolutions_on_either_side(self, x):
    """One norm is in both, and its running statistics depend on which side comes first."""
    identity = self.bn1(self.conv2(F.relu(self.bn2(self.conv1(x)))))
    return F.relu(_unit(self, 3, F.relu(_unit(self, 1, x))) + identity)


@graph(2)
def shortcut_first_with_a_norm_of_the_main_side(self, x):
    return F.relu(self.bn1(self.conv3(x)) + _unit(self, 2, F.relu(_unit(self, 1, x))))


@graph(2)
def intermediate_that_is_returned(self, x):
    y = self.relu(_unit(self, 1, x))
    return self.relu(_unit(self, 2, y) + x), y


@graph(2)
def intermediate_that_is_the_shortcut(self, x):
    y = self.relu(_unit(self, 1, x))
    return F.relu(_unit(self, 2, y) + y)


@graph(2)
def intermediate_that_feeds_both(self, x):
    y = F.relu(_unit(self, 1, x))
    return F.relu(_unit(self, 2, y) + _unit(self, 3, y))


@graph(3)
def input_overwritten_between(self, x):
    """The first convolution may not move past the write, to its ReLU: that is a step of its own."""
    z = x * 1
    y = _unit(self, 1, z.clone())
    z.add_(1)
    return F.relu(_unit(self, 2, F.relu(y)) + z) + _unit(self, 3, z)


@graph(2)
def sum_reads_what_is_overwritten(self, x):
    z = x * 1
    out = _unit(self, 2, self.relu(_unit(self, 1, x)))
    z.add_(1)
    return _unit(self, 3, F.relu(out + z))


@graph(1)
def sum_with_alpha(self, x):
    return torch.add(_unit(self, 2, F.relu(_unit(self, 1, x))), x, alpha=0.5)


@graph(1)
def sum_in_place(self, x):
    out = _unit(self, 2, F.relu(_unit(self, 1, x)))
    out += x
    return self.relu(out)


@graph(2)
def sum_into_the_shortcut(self, x):
    identity = _unit(self, 3, x)
    identity += _unit(self, 2, F.relu(_unit(self, 1, x)))
    return self.relu(identity)


@graph(1)
def same_norm_twice(self, x):
    """Its running statistics move twice, the second time from where the first one left them."""
    return F.relu(self.bn1(self.conv2(F.relu(self.bn1(self.conv1(x))))) + x)


@graph(1)
def same_convolution_twice(self, x):
    return F.relu(self.bn2(self.conv1(F.relu(self.bn1(self.conv1(x))))) + x)


@graph(2)
def same_block_twice(self, x):
    for _ in range(2):
        x = F.relu(_unit(self, 2, F.relu(_unit(self, 1, x))) + x)
    return x


@graph(1)
def main_and_shortcut_share_the_norm(self, x):
    return F.relu(self.bn1(self.conv1(x)) + self.bn1(self.conv3(x)))


@graph(2)
def relu6_between(self, x):
    return F.relu(_unit(self, 2, F.relu6(_unit(self, 1, x))) + x)


@graph(2)
def leaky_relu_between(self, x):
    return F.relu(_unit(self, 2, F.leaky_relu(_unit(self, 1, x))) + x)


@graph(2)
def dropout_between(self, x):
    """Of whole channels: what is drawn for pixels follows the layout, with stock modules as well."""
    return F.relu(_unit(self, 2, F.dropout2d(F.relu(_unit(self, 1, x)), 0.5, self.training)) + x)


@graph(2)
def attention_between(self, x):
    y = F.relu(_unit(self, 1, x))
    return F.relu(_unit(self, 2, y * y.mean((2, 3), keepdim=True).sigmoid()) + x)


@graph(1)
def branch_on_training(self, x):
    out = _unit(self, 2, F.relu(_unit(self, 1, x)))
    return F.relu(out + x) if self.training else F.relu(out)


@graph(1)
def shortcut_that_broadcasts(self, x):
    return F.relu(_unit(self, 2, F.relu(_unit(self, 1, x))) + x.mean((2, 3), keepdim=True))


@graph(2)
def projection_that_broadcasts(self, x):
    """One unit has fewer pixels than the other, and the sum the pixels of the larger one."""
    return F.relu(_unit(self, 2, F.relu(_unit(self, 1, x))) + _unit(self, 3, x[:, :, :1, :1]))


@graph(2)
def main_path_that_broadcasts(self, x):
    return F.relu(_unit(self, 3, x) + _unit(self, 2, F.relu(_unit(self, 1, x.mean((2, 3), keepdim=True)))))


@graph(1)
def pool_of_a_block(self, x):
    return F.max_pool2d(F.relu(_unit(self, 2, F.relu(_unit(self, 1, x)))), 3, 2, 1)


@graph(1)
def no_shortcut(self, x):
    return _unit(self, 2, F.relu(_unit(self, 1, x)))


@graph(3)
def dense(self, x):
    """DenseNet's way: every result is read by all that follow."""
    y = F.relu(_unit(self, 1, x))
    z = F.relu(_unit(self, 2, y))
    return torch.cat([x, y, z, F.relu(_unit(self, 3, y + z))], 1)


@graph(1)
def sum_with_itself(self, x):
    y = _unit(self, 2, F.relu(_unit(self, 1, x)))
    return F.relu(y + y)


@graph(2)
def shortcut_of_what_is_computed_later(self, x):
    """The shortcut reads a tensor that is made after the main convolutions."""
    out = _unit(self, 2, F.relu(_unit(self, 1, x)))
    return F.relu(out + _unit(self, 3, x.sin().clone().mul_(2)))


@pytest.mark.parametrize("name", GRAPHS)
def test_graphs(name):
    forward, blocks = GRAPHS[name]
    for layout in (torch.contiguous_format, torch.channels_last):
        check(_net(forward), X.contiguous(memory_format=layout), blocks)


@pytest.mark.parametrize("pool", [nn.MaxPool2d(3, 2, 1), nn.MaxPool2d(2)], ids=str)
@pytest.mark.parametrize("channels", [8, 32])
def test_pool_after_a_block(channels, pool):
    """Of an expand layer, too."""
    layers = [nn.Conv2d(8, channels, 1), nn.BatchNorm2d(channels), nn.ReLU(inplace=True), pool]
    check(nn.Sequential(*layers), X, 1)


def test_settings_are_read_at_every_call():
    stock = _net(block_with_a_shortcut).double()
    fast = resnet_fast.accelerate(stock, inplace=False)
    for change in (
        lambda m: m.bn1.eval(),
        lambda m: m.bn2.train(),
        lambda m: setattr(m.bn3, "momentum", None),
        lambda m: setattr(m.bn3, "eps", 0.1),
        lambda m: m.conv2.requires_grad_(False),
        lambda m: setattr(m.bn2, "track_running_stats", False),
    ):
        for model in (stock, fast):
            change(model)
        expected, actual = train(stock, X.double(), 1), train(fast, X.double(), 1)
        assert expected.keys() == actual.keys()
        assert all((actual[k] - v).abs().max() <= 1e-9 * v.abs().max() + 1e-11 for k, v in expected.items())


def test_what_comes_after_may_overwrite_what_stock_lets_it():
    """A result without a ReLU is kept by nobody."""
    check(_net(lambda self, x: operator.iadd(_unit(self, 2, F.relu(_unit(self, 1, x))), 1).mul_(2)), X, 1)


# --- what autograd is asked beside gradients --------------------------------------------------------------------------


def _loss(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().sum()


def test_double_backward():
    stock = _net(block_with_a_shortcut).double()
    fast, found = resnet_fast.accelerate(stock, inplace=False), []
    for model in (stock, fast):
        x = X.double().requires_grad_()
        (first,) = torch.autograd.grad(_loss(model, x), x, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), [x, *model.parameters()], allow_unused=True))
    for one, other in zip(*found):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8 * float(one.abs().max()) + 1e-10)


def test_torch_func_takes_the_stock_way():
    stock = _net(block_with_a_shortcut).double()
    for norm in (stock.bn1, stock.bn2, stock.bn3):
        norm.track_running_stats, norm.running_mean, norm.running_var = False, None, None
        norm.num_batches_tracked = None
    fast, found = resnet_fast.accelerate(stock, inplace=False), []
    for model in (stock, fast):
        parameters = {name: p.detach() for name, p in model.named_parameters()}

        def loss(parameters, x, model=model):
            return torch.func.functional_call(model, parameters, (x,)).square().sum()

        tangents = {name: torch.ones_like(p) for name, p in parameters.items()}
        jvp = torch.func.jvp(lambda p, loss=loss: loss(p, X.double()), (parameters,), (tangents,))
        found.append((torch.func.grad(loss)(parameters, X.double()), jvp))
    assert relative_error(found[1], found[0]) < 1e-9


def test_deterministic_algorithms():
    """Two threads, and to the bit the same twice."""
    torch.set_num_threads(2)
    model, x = accelerated(small_resnet(resnet.Bottleneck)).train(), images(4, 3, 64, 64)
    torch.use_deterministic_algorithms(True)
    try:
        once, again = (train(copy.deepcopy(model), x) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    for name, value in once.items():
        assert torch.equal(value, again[name]), name


def test_checkpointing():
    """The forward pass runs again in backward, whole, and moves the running statistics again, as stock's.

    Stopped early, when nothing more has to be kept, it leaves out those of the last op, where stock leaves out none.
    """
    stock = _net(block_with_a_shortcut).double()
    fast = resnet_fast.accelerate(stock, inplace=False)
    for model in (stock, fast):
        x = X.double().requires_grad_()
        with torch.utils.checkpoint.set_checkpoint_early_stop(False):
            torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False).square().sum().backward()
    for (name, p), q in zip(stock.named_parameters(), fast.parameters()):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-9, atol=1e-9 * float(p.grad.abs().max()) + 1e-11, msg=name)
    assert relative_error(list(fast.buffers()), list(stock.buffers())) < 1e-9


# --- convergence ------------------------------------------------------------------------------------------------------


def _digits_model() -> nn.Module:
    torch.manual_seed(SEED)
    widen = nn.Sequential(nn.Conv2d(16, 32, 1, stride=2, bias=False), nn.BatchNorm2d(32))
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True)),
        resnet.BasicBlock(16, 16),
        resnet.Bottleneck(16, 8, 2, widen),
        resnet.Bottleneck(32, 8),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 10),
    )


def _losses(model: nn.Module, dtype: torch.dtype, steps: int = 200) -> Tensor:
    digits = load_digits()
    x, y = torch.tensor(digits.images / 8 - 1).float().unsqueeze(1), torch.tensor(digits.target)
    x = x.contiguous(memory_format=torch.channels_last)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4)
    generator = torch.Generator().manual_seed(SEED)
    losses = []
    for _ in range(steps):
        batch = torch.randint(len(x), (16,), generator=generator)
        with torch.autocast("cpu", dtype, enabled=dtype is not torch.float32):
            loss = F.cross_entropy(model(x[batch]), y[batch])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.detach())
    return torch.stack(losses).float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_convergence(dtype):
    """The loss curve of stock, as closely as stock itself repeats it from weights that differ by rounding."""
    stock = _digits_model()
    fast, runs = accelerated(stock), []
    for seed in range(3):
        model = copy.deepcopy(stock)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in model.parameters() if seed else ():
                p.mul_(1 + torch.finfo(dtype).eps * torch.randn(p.shape, generator=generator))
        runs.append(_losses(model, dtype))
    losses = _losses(fast, dtype)
    first, *others = runs

    def distance(one: Tensor, other: Tensor, part: slice) -> float:
        return float((one[part].mean() - other[part].mean()).abs())

    for start in range(0, 200, 50):
        part = slice(start, start + 50)
        noise = max(distance(first, other, part) for other in others)
        assert distance(losses, first, part) <= 3 * noise + 0.02, f"steps {start} to {start + 50}"
    assert losses[-50:].mean() < 0.2 * losses[:5].mean()
    torch.testing.assert_close(losses[:3], first[:3], rtol=0, atol=4 * torch.finfo(dtype).eps * 32)
