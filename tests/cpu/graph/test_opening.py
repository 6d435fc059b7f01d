"""Modules that are a layer and more, rows of layers in small modules, and convolutions without a norm: what libraries
write, computed as PyTorch does it, in both modes, with gradients and buffers."""

import copy
import pickle
import warnings
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from timm.layers import (
    BatchNormAct2d,
    ConvNormAct,
    FrozenBatchNormAct2d,
    SyncBatchNormAct,
    convert_sync_batchnorm,
    freeze_batch_norm_2d,
)
from torch import nn
from torch.ao.nn.intrinsic import ConvBnReLU2d, ConvReLU2d
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.ops import FrozenBatchNorm2d

import resnet_fast
from tests.cpu.small_models import fused_calls, images, randomise_norms, relative_error

X = images(3, 8, 10, 12).double()


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def outcome(model, training, x=X):
    """Result, gradients of the input and of all parameters, and the state afterwards."""
    model.train(training)
    x = x.clone().requires_grad_()
    y = model(x)
    (y.square() * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    gradients = [p.grad for p in model.parameters()]
    # In one vector: that of a bias before batch statistics is 0, but for rounding.
    joined = torch.cat([g.flatten() for g in gradients if g is not None])
    return y.detach(), x.grad, joined, [g is None for g in gradients], list(model.state_dict().values())


def check(model, convolutions, x=X):
    """In float64, where only rounding is left, and nothing but the ops of fused convolutions runs them."""
    stock = randomise_norms(model).double()
    fast = resnet_fast.accelerate(stock, inplace=False)
    explanation = resnet_fast.explain(fast)
    assert explanation.fused == convolutions, explanation
    named = [path for path, conv in fast.named_modules() if isinstance(conv, nn.modules.conv._ConvNd)]
    assert len(explanation.obstacles) == len(named) - convolutions
    for training in (False, True):
        results = [outcome(copy.deepcopy(one), training, x) for one in (fast, stock)]
        assert relative_error(*results) < 1e-11
        assert fused_calls(partial(copy.deepcopy(fast).train(training), x))
    with torch.no_grad():
        narrow = fast.float().eval()(x.float())
        assert relative_error(narrow.double(), stock.eval()(x)) < 1e-5
    return fast.double(), explanation


class Block(nn.Module):
    """Two convolutions with norms that may activate, and a shortcut."""

    def __init__(self, norm, last, **conv):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(8, 8, 3, padding=1, bias=False, **conv), norm(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, **conv), last(8)

    def forward(self, x):
        y = self.bn1(self.conv1(x))
        return F.relu(self.bn2(self.conv2(y)) + x)


def _no_act(channels):
    return BatchNormAct2d(channels, apply_act=False)


# --- norms with an activation ---


class OwnBatchNorm(nn.BatchNorm2d):
    def forward(self, x):
        return F.leaky_relu(super().forward(x), 0.1)


@pytest.mark.parametrize(
    "norm",
    [
        BatchNormAct2d,
        lambda c: BatchNormAct2d(c, act_layer=nn.SiLU),
        lambda c: BatchNormAct2d(c, eps=0.3, momentum=0.7, affine=False),
        lambda c: BatchNormAct2d(c, drop_layer=lambda: nn.Dropout(0.0)),
        lambda c: freeze_batch_norm_2d(BatchNormAct2d(c, eps=0.2)),
        lambda c: convert_sync_batchnorm(BatchNormAct2d(c)),
        OwnBatchNorm,
    ],
    ids=["act", "silu", "settings", "dropout", "frozen", "sync", "subclass"],
)
@pytest.mark.filterwarnings("ignore")
def test_norm_and_activation(norm):
    model = Block(norm, _no_act)
    if isinstance(model.bn1, SyncBatchNormAct):  # whose own forward wants a GPU in training mode
        fast = resnet_fast.accelerate(randomise_norms(model).double(), inplace=False).eval()
        assert resnet_fast.explain(fast).fused == 2
        assert relative_error(fast(X), model.eval()(X)) < 1e-12
        return
    fast, explanation = check(model, 2)
    assert explanation.rows[0].training.count("conv1+bn1") == 1


def test_one_op_for_a_block_in_training():
    fast, _ = check(Block(BatchNormAct2d, _no_act), 2)
    assert fused_calls(lambda: fast.train()(X)) == ["residual_block"]
    assert fused_calls(lambda: fast.eval()(X)) == ["conv_bn_act", "conv_bn_act"]


def test_frozen_in_training():
    """In evaluation mode while its model trains: the running statistics count, and stay."""
    model = randomise_norms(Block(BatchNormAct2d, _no_act)).double()
    fast = resnet_fast.accelerate(model, inplace=False)
    results = []
    for one in (fast, model):
        one.train()
        one.bn1.eval()
        y = one(X)
        y.sum().backward()
        gradients = torch.cat([p.grad.flatten() for p in one.parameters()])
        results.append((y, gradients, list(one.buffers())))
    assert relative_error(*results) < 1e-11
    assert fused_calls(lambda: fast(X)) == ["residual_block"]


def test_changes_count():
    """Settings, activations and classes that change after acceleration; and hooks."""
    model = randomise_norms(Block(BatchNormAct2d, _no_act)).double().eval()
    fast = resnet_fast.accelerate(model, inplace=False)

    def both(change):
        for one in (model, fast):
            change(one)
        assert relative_error(fast(X), model(X)) < 1e-12

    both(lambda one: setattr(one.bn1, "eps", 0.5))
    both(lambda one: setattr(one.bn1, "act", nn.Tanh()))
    both(lambda one: one.bn1.running_mean.add_(1.0))
    both(lambda one: setattr(one, "bn1", randomise_norms(OwnBatchNorm(8)).double().eval()))
    assert resnet_fast.explain(fast).fused == 2
    both(lambda one: setattr(one, "bn1", nn.GroupNorm(2, 8).double()))
    assert resnet_fast.explain(fast).fused == 1
    seen = []
    both(lambda one: one.bn2.register_forward_hook(lambda *_: seen.append(1)))
    assert len(seen) == 2
    assert resnet_fast.explain(fast).rows[0].reason == "bn2 has hooks"


class Doubled(nn.BatchNorm2d):
    """Does something else in each mode."""

    def forward(self, x):
        y = super().forward(x)
        return y if self.training else 2 * y


class Batch(nn.BatchNorm2d):
    """Calls the function with other things than its own."""

    def forward(self, x):
        return F.batch_norm(x, None, None, self.weight, self.bias, True, 0.0, self.eps)


class Remembering(nn.BatchNorm2d):
    def forward(self, x):
        self.last = x
        return super().forward(x)


@pytest.mark.parametrize("norm", [Doubled, Batch, Remembering, nn.InstanceNorm2d])
def test_what_is_no_batch_norm_stays(norm):
    model = Block(norm, nn.BatchNorm2d)
    fast, explanation = check(model, 1)
    (said,) = explanation.obstacles.values()
    assert said.startswith("is followed by bn1")
    assert hasattr(fast.bn1, "last") == (norm is Remembering)


# --- norms by what they compute ---


class CopiedFrozenBatchNorm(nn.Module):
    """As in DETR, and in Hugging Face's models."""

    def __init__(self, n):
        super().__init__()
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((n,), value))

    def forward(self, x):
        scale = self.weight.reshape(1, -1, 1, 1) * (self.running_var.reshape(1, -1, 1, 1) + 1e-5).rsqrt()
        return x * scale + (self.bias.reshape(1, -1, 1, 1) - self.running_mean.reshape(1, -1, 1, 1) * scale)


class Swapped(nn.BatchNorm2d):
    """Frozen, in a way of its own."""

    def forward(self, x):
        return F.batch_norm(x, self.running_mean, self.running_var, self.bias, self.weight, False, 0.0, 0.1)


class LearnedAffine(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.alpha, self.beta = nn.Parameter(torch.rand(n, 1, 1)), nn.Parameter(torch.rand(1, n, 1, 1))

    def forward(self, x):
        return self.beta + x * self.alpha


class FrozenInTheDtypeOfTheImage(CopiedFrozenBatchNorm):
    def forward(self, x):
        scale = self.weight * self.running_var.rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale.reshape(1, -1, 1, 1).to(x.dtype) + shift.reshape(1, -1, 1, 1).to(x.dtype)


class TwoWays(CopiedFrozenBatchNorm):
    """As in detectron2."""

    def forward(self, x):
        if x.requires_grad:
            scale = self.weight * (self.running_var + 1e-3).rsqrt()
            bias = self.bias - self.running_mean * scale
            return x * scale.reshape(1, -1, 1, 1).to(x.dtype) + bias.reshape(1, -1, 1, 1).to(x.dtype)
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, training=False, eps=1e-3)


@pytest.mark.parametrize(
    "norm", [CopiedFrozenBatchNorm, LearnedAffine, FrozenInTheDtypeOfTheImage, TwoWays, Swapped, FrozenBatchNormAct2d]
)
def test_affine(norm):
    last = (lambda c: norm(c, apply_act=False)) if norm is FrozenBatchNormAct2d else norm
    fast, _ = check(Block(norm, last), 2)
    ops = 1 if norm is FrozenBatchNormAct2d else 2  # without a ReLU between the convolutions
    assert fused_calls(lambda: fast.train()(X)) == ["residual_block"] * ops


class Gate(LearnedAffine):
    """Makes its shift of the image."""

    def forward(self, x):
        return x * self.alpha + self.beta * x.mean((2, 3), keepdim=True)


class TwoNorms(TwoWays):
    """Another one with gradients than without."""

    def forward(self, x):
        if x.requires_grad:
            return x * self.weight.reshape(1, -1, 1, 1) + self.bias.reshape(1, -1, 1, 1)
        return super().forward(x)


class OtherInTraining(CopiedFrozenBatchNorm):
    def forward(self, x):
        return super().forward(x) if self.training else super().forward(x) * 2 + self.bias.reshape(1, -1, 1, 1)


class Unlike(CopiedFrozenBatchNorm):
    def forward(self, x):
        scale = self.weight if self.training else self.running_var
        return x * scale.reshape(1, -1, 1, 1) + self.bias.reshape(1, -1, 1, 1)


class PerPixel(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.alpha, self.beta = nn.Parameter(torch.rand(1, 1, 10, 12)), nn.Parameter(torch.rand(1, 1, 10, 12))

    def forward(self, x):
        return x * self.alpha + self.beta


@pytest.mark.parametrize("norm", [Gate, PerPixel, TwoNorms, OtherInTraining, Unlike])
def test_what_is_not_affine_stays(norm):
    check(Block(norm, nn.BatchNorm2d), 1)


# --- a norm inside a convolution, wrappers ---


class ConvWithNorm(nn.Conv2d):
    """As in detectron2."""

    def __init__(self, *args, norm=None, activation=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.norm, self.activation = norm, activation

    def forward(self, x):
        with warnings.catch_warnings(record=True):
            if x.numel() == 0:
                assert not isinstance(self.norm, nn.SyncBatchNorm)
        x = F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
        if self.norm is not None:
            x = self.norm(x)
        if self.activation is not None:
            x = self.activation(x)
        return x


class Detectron(nn.Module):
    def __init__(self, norm=nn.BatchNorm2d):
        super().__init__()
        self.conv1 = ConvWithNorm(8, 4, 1, bias=False, norm=norm(4))
        self.conv2 = ConvWithNorm(4, 4, 3, padding=2, dilation=2, norm=norm(4))
        self.conv3 = ConvWithNorm(4, 16, 1, bias=False, norm=norm(16))
        self.shortcut = ConvWithNorm(8, 16, 1, bias=False, norm=norm(16))
        self.out = ConvWithNorm(16, 8, 3, activation=F.relu)

    def forward(self, x):
        y = F.relu_(self.conv1(x))
        y = self.conv3(F.relu_(self.conv2(y)))
        y += self.shortcut(x)
        return self.out(F.relu_(y))


def test_function_of_a_child_changes():
    model = randomise_norms(Detectron()).double().eval()
    fast = resnet_fast.accelerate(model, inplace=False)
    for activation in (F.relu, F.silu, F.relu):
        for one in (model, fast):
            one.out.activation = activation
        assert relative_error(fast(X), model(X)) < 1e-12


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, TwoWays])
def test_norm_inside_a_convolution(norm):
    fast, _ = check(Detectron(norm), 5)
    assert fused_calls(lambda: fast.train()(X)).count("residual_block") == 2


class ConvLayer(nn.Module):
    """As in Hugging Face's ResNet, and OpenMMLab's ConvModule."""

    def __init__(self, channels, activation):
        super().__init__()
        self.convolution = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.normalization = nn.BatchNorm2d(channels)
        self.activation = nn.ReLU() if activation else nn.Identity()

    def forward(self, x):
        return self.activation(self.normalization(self.convolution(x)))


class Layered(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = nn.Sequential(layer(8, True), layer(8, False))
        self.shortcut = layer(8, False)
        self.activation = nn.ReLU()

    def forward(self, x):
        residual = x
        x = self.layer(x)
        x += self.shortcut(residual)
        return self.activation(x)


@pytest.mark.parametrize(
    "layer", [ConvLayer, lambda c, act: ConvNormAct(c, c, 3, apply_act=act)], ids=["hugging face", "timm"]
)
def test_addition_across_wrappers(layer):
    fast, explanation = check(Layered(layer), 3)
    assert fused_calls(lambda: fast.train()(X)) == ["residual_block"]
    assert len(fused_calls(lambda: fast.eval()(X))) == 3
    (row,) = explanation.rows
    assert any(step.partition(":")[0].endswith("+add+relu") for step in row.steps)


def test_wrapper_with_a_hook():
    """Then it runs as it is, and what is around it too; its neighbours run fused by themselves."""
    model = randomise_norms(Layered(ConvLayer)).double().eval()
    fast = resnet_fast.accelerate(model, inplace=False)
    seen = []
    fast.layer[1].register_forward_hook(lambda module, args, y: seen.append(y.clone()))
    assert relative_error(fast(X), model(X)) < 1e-12
    assert relative_error(seen, [model.layer(X)]) < 1e-12
    assert resnet_fast.explain(fast).fused == 3


# --- convolutions without a norm ---


class Plain(nn.Module):
    def __init__(self, **conv):
        super().__init__()
        self.conv1 = nn.Conv2d(8, 8, 3, **conv)
        self.conv2 = nn.Conv2d(8, 8, 3, **conv)
        self.fc = nn.Conv2d(8, 4, 1)

    def forward(self, x):
        y = F.relu(self.conv1(x))
        return torch.sigmoid(self.fc(F.relu(self.conv2(y) + x)))


@pytest.mark.parametrize(
    "conv", [{"padding": 1}, {"padding": "same", "dilation": 2}, {"padding": 1, "bias": False}], ids=str
)
def test_without_norm(conv):
    fast, explanation = check(Plain(**conv), 2)
    assert explanation.obstacles == {"fc": "is followed by sigmoid: no batch norm, addition or ReLU"}
    assert fused_calls(lambda: fast.train()(X)) == ["residual_block"]


def test_padding_by_a_word():
    assert check(nn.Sequential(nn.Conv2d(8, 8, 3, padding="valid"), nn.BatchNorm2d(8)), 1)
    block = nn.Sequential(nn.Conv2d(8, 8, (3, 1), padding="same", dilation=3), nn.BatchNorm2d(8), nn.ReLU())
    assert check(block, 1)
    uneven = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 4, padding="same"), nn.ReLU())
    _, explanation = check(uneven, 1)
    assert explanation.obstacles == {"2": "pads more on one side than on the other"}


def test_folded():
    stock = Block(nn.BatchNorm2d, nn.BatchNorm2d)
    randomise_norms(stock).eval()
    model = Block(nn.Identity, nn.Identity)
    model.conv1 = fuse_conv_bn_eval(stock.conv1, stock.bn1)
    model.conv2 = fuse_conv_bn_eval(stock.conv2, stock.bn2)
    check(model, 1)  # nothing is between the first and the second


@pytest.mark.parametrize("layers", [ConvReLU2d, ConvBnReLU2d])
def test_intrinsic(layers):
    parts = [nn.Conv2d(8, 8, 3), *([nn.BatchNorm2d(8)] if layers is ConvBnReLU2d else []), nn.ReLU()]

    class Quantisable(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layers(*parts)

        def forward(self, x):
            return self.layer(x)

    check(Quantisable(), 1)


class PastCall(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)

    def forward(self, x):
        return F.relu(self.bn.forward(self.conv.forward(x)))


def test_layers_called_by_their_forward():
    fast, _ = check(PastCall(), 1)
    fast.eval().conv = nn.Conv2d(8, 8, 3, padding_mode="reflect", padding=1).double()
    fast.bn = nn.GroupNorm(2, 8).double()
    assert relative_error(fast(X), F.relu(fast.bn(fast.conv(X)))) < 1e-12


def test_unfused_layers_called_by_their_forward():
    class Halves(PastCall):
        def forward(self, x):
            return F.silu(self.conv.forward(x)), super().forward(x), self.bn.forward(x)

    fast = resnet_fast.accelerate(randomise_norms(Halves()).double().eval())
    for norm in (fast.bn, nn.InstanceNorm2d(8), nn.Identity()):
        fast.bn = norm
        expected = F.silu(fast.conv(X)), F.relu(norm(fast.conv(X))), norm(X)
        assert relative_error(fast(X), expected) < 1e-12


# --- around blocks ---


class OptionA(nn.Module):
    """He et al.'s parameter-free shortcut, as the CIFAR ResNets write it."""

    class Lambda(nn.Module):
        def __init__(self, function):
            super().__init__()
            self.function = function

        def forward(self, x):
            return self.function(x)

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(8, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16)
        self.conv2, self.bn2 = nn.Conv2d(16, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.shortcut = self.Lambda(lambda x: F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4)))

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return F.relu(out)


def test_option_a():
    fast, explanation = check(OptionA(), 2)
    assert "conv2+bn2+add+relu" in str(explanation.rows[0].steps)
    assert fused_calls(lambda: fast.train()(X)) == ["residual_block"]


class AdaptiveConcatPool(nn.Module):
    def __init__(self):
        super().__init__()
        self.average, self.largest = nn.AdaptiveAvgPool2d(1), nn.AdaptiveMaxPool2d(1)

    def forward(self, x):
        return torch.cat([self.largest(x), self.average(x)], 1)


@pytest.mark.parametrize(
    "after",
    [nn.PReLU(8), nn.MaxPool2d(3, 2, ceil_mode=True), nn.AvgPool2d(3, 2, ceil_mode=True), AdaptiveConcatPool()],
    ids=lambda layer: type(layer).__name__,
)
def test_what_follows_is_a_step_of_its_own(after):
    check(nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), after), 1)


@pytest.mark.parametrize("conv", [nn.Conv1d, nn.Conv3d, nn.ConvTranspose2d])
def test_other_convolutions_are_explained(conv):
    explanation = resnet_fast.explain(resnet_fast.accelerate(nn.Sequential(conv(8, 8, 3), nn.ReLU())))
    assert explanation.obstacles == {"0": f"is a {conv.__name__}, not nn.Conv2d"}
    assert conv.__name__ in str(explanation) and "not nn.Conv2d" in str(explanation)


@pytest.mark.parametrize("norm", [FrozenBatchNorm2d, CopiedFrozenBatchNorm, TwoWays, BatchNormAct2d, nn.Identity])
@pytest.mark.parametrize("training", [False, True])
def test_dtypes_under_autocast(norm, training):
    """A frozen norm multiplies by its own tensors, which autocast leaves as wide as they are."""

    class Rows(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.bn1 = nn.Conv2d(8, 8, 3, padding=1), norm(8)
            self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1), norm(8)

        def forward(self, x):
            y = F.relu(self.bn1(self.conv1(x)))
            return y, F.relu(self.bn2(self.conv2(y)) + y)

    stock = randomise_norms(Rows()).train(training)
    fast = resnet_fast.accelerate(stock, inplace=False)
    x = X.float()
    with torch.autocast("cpu", torch.bfloat16):
        results = [one(x) for one in (fast, stock)]
        calls = fused_calls(lambda: fast(x))
    precise = copy.deepcopy(stock).double()(X)
    assert [y.dtype for y in results[0]] == [y.dtype for y in results[1]]
    errors = [relative_error([y.double() for y in result], list(precise)) for result in results]
    # Where the stock norm widens, the fused one has rounded its result, and the convolution's in training mode.
    assert calls and errors[0] <= max(2 * errors[1], torch.finfo(torch.bfloat16).eps)


@pytest.mark.parametrize("norm", [BatchNormAct2d, CopiedFrozenBatchNorm])
def test_compiled_and_exported(norm):
    stock = randomise_norms(Block(norm, norm)).eval()
    fast, x = resnet_fast.accelerate(stock, inplace=False), X.float()
    torch._dynamo.reset()
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    exported = torch.export.export(fast, (x,))
    assert sum("conv_bn_act" in str(node.target) for node in exported.graph.nodes) == 2
    for one in (compiled, exported.module(), pickle.loads(pickle.dumps(fast))):
        assert relative_error(one(x), stock(x)) < 1e-5


def test_buffers_are_read_at_every_call():
    class Gain(Block):
        def forward(self, x):
            return super().forward(x) * self.gain.sqrt()

    stock = Gain(nn.BatchNorm2d, nn.BatchNorm2d)
    stock.register_buffer("gain", torch.tensor(2.0))
    stock = randomise_norms(stock).double().eval()
    fast = resnet_fast.accelerate(stock, inplace=False)
    for one in (stock, fast):
        one.gain.fill_(7.0)
    assert relative_error(fast(X), stock(X)) < 1e-12
    assert fused_calls(lambda: fast(X))
