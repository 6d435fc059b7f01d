"""Quantisation-aware training: what is rounded, and to what; ranges; what stays of the model, and its surroundings."""

import copy
import pickle

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import resnet

import resnet_fast
from resnet_fast.finetune import Settings, qat, recipe
from resnet_fast.finetune.freezing import Frozen
from tests.cpu.finetune.test_finetune import assert_same
from tests.cpu.small_models import SEED, fused_calls, images, randomise_norms, small_resnet

pytestmark = pytest.mark.usefixtures("one_thread")

X = images(4, 3, 32, 32)


def prepared(model, batches=(X,)):
    qat.prepare_qat(model)
    qat.calibrate(model, batches)
    return model


# --- the numbers --------------------------------------------------------------------------------------------------


def block_of(kind, projection):
    """A residual block in float64, with ranges that clamp a few numbers, and images for it."""
    torch.manual_seed(SEED)
    inputs, planes, stride = (16, 8, 2) if projection else (8 * kind.expansion, 8, 1)
    outputs = planes * kind.expansion
    shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
    block = randomise_norms(kind(inputs, planes, stride, shortcut if projection else None)).double().eval()
    x = images(1, inputs, 9, 9, seed=1).double()
    prepared(block, [x])
    qat.set_ranges(block, {key: 0.8 * amax for key, amax in qat.ranges(block).items()})
    return block, x


EPS = 2.0**-24  # float32's unit of rounding: PyTorch rounds an integer times its scale to it, in float64 too


def integers(x, scale, error=0.0):
    """``x``, known up to ``error``, in int8 by its ``scale``, float32. As float64, where sums of products are exact."""
    steps = x / scale.double()
    # Nothing is so near to the middle of two integers that it matters: not for ``error``, nor whether one divides by
    # the scale or, as PyTorch, multiplies by its reciprocal in float32.
    unsure = 129 * EPS + error / scale.double()
    assert ((steps.clamp(-129, 129) % 1 - 0.5).abs() > unsure).all()
    return steps.round().clamp(-128, 127)


def in_integers(conv, bn, x, amax, error=0.0):
    """int8 convolution, int32 sums, batch norm in float64; and how far PyTorch's result may be from it."""
    x_scale = torch.tensor(amax) / 127  # float32
    weight = conv.weight.detach()
    w_scale = weight.abs().amax((1, 2, 3)).float() / 127
    xq, wq = integers(x, x_scale, error), integers(weight, w_scale.view(-1, 1, 1, 1))
    geometry = conv.stride, conv.padding, conv.dilation, conv.groups
    accumulators, magnitudes = F.conv2d(xq, wq, None, *geometry), F.conv2d(xq.abs(), wq.abs(), None, *geometry)
    assert torch.equal(accumulators, accumulators.round()) and magnitudes.max() < 2**31
    scales = (x_scale.double() * w_scale.double()).view(-1, 1, 1)
    slope = (bn.weight / (bn.running_var + bn.eps).sqrt()).detach().view(-1, 1, 1)
    y = (accumulators * scales - bn.running_mean.view(-1, 1, 1)) * slope + bn.bias.detach().view(-1, 1, 1)
    # Both factors of each product are rounded to float32; of the rounding to float64, which is 2^29 times as fine,
    # there is less than one more EPS.
    return y, 3 * EPS * (magnitudes * scales * slope).max().item()


@pytest.mark.parametrize("projection", [False, True], ids=["identity", "projection"])
@pytest.mark.parametrize("kind", [resnet.BasicBlock, resnet.Bottleneck])
def test_block_computes_what_integers_do(kind, projection):
    block, x = block_of(kind, projection)
    ranges = qat.ranges(block)
    pairs = [(getattr(block, f"conv{i}"), getattr(block, f"bn{i}")) for i in (1, 2, 3) if hasattr(block, f"conv{i}")]
    h, error = in_integers(*pairs[0], x, ranges["conv1.input"])
    for i, pair in enumerate(pairs[1:], 2):
        h, error = in_integers(*pair, h.relu(), ranges[f"conv{i}.input"], error)
    shortcut, shortcut_error = x, 0.0
    if projection:
        shortcut, shortcut_error = in_integers(*block.downsample, x, ranges["downsample.0.input"])
    scale = torch.tensor(ranges[f"conv{len(pairs)}.residual"]) / 127
    rounded = integers(shortcut, scale, shortcut_error) * scale.double()
    assert (rounded.abs() < shortcut.abs() - scale).any()  # something is clamped
    with torch.no_grad():
        difference = block(x) - F.relu(h + rounded)
    assert difference.abs().max() <= error + EPS * rounded.abs().max()


def test_gradients_go_straight_through_and_stop_at_the_clamp():
    one = qat.FakeQuantise(torch.device("cpu")).eval()
    one.amax.fill_(2.0)
    one.known = True
    # Rounded to -128 and 127 at most, so from -128.5 to 127.5 steps.
    steps = torch.tensor([-200.0, -128.6, -128.4, -127.0, -0.3, 0.0, 60.5, 127.4, 127.6, 1000.0])
    x = (steps * 2 / 127).requires_grad_()
    y = one(x)
    y.backward(torch.full_like(x, 3.0))
    assert torch.equal(x.grad, 3 * torch.tensor([0.0, 0, 1, 1, 1, 1, 1, 1, 0, 0]))
    torch.testing.assert_close(y * 127 / 2, torch.tensor([-128.0, -128, -128, -127, 0, 0, 60, 127, 127, 127]))


def test_weights_have_a_scale_for_each_channel_and_all_of_them_learn():
    weight = images(3, 2, 3, 3) * torch.tensor([1e-3, 1.0, 0.0]).view(-1, 1, 1, 1)
    weight.requires_grad_()
    rounded = qat.fake_quantise_weight(weight)
    rounded.sum().backward()
    assert torch.equal(weight.grad, torch.ones_like(weight))
    scale = weight.detach().abs().amax((1, 2, 3), keepdim=True) / 127
    assert ((rounded - weight).abs() <= scale * (0.5 + 2.0**-16)).all()  # 127 ulp of float32
    assert torch.equal(rounded[2], torch.zeros(2, 3, 3))
    torch.testing.assert_close(rounded.abs().amax((1, 2, 3)), weight.abs().amax((1, 2, 3)))  # each has its own 127


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_to_the_same_integers(dtype):
    one = qat.FakeQuantise(torch.device("cpu")).eval()
    one.amax.fill_(1.5)
    one.known = True
    x = images(2, 3, 8, 8).to(dtype)
    assert torch.equal(one(x), one(x.float()).to(dtype))


# --- what is rounded ----------------------------------------------------------------------------------------------


def expected_keys(model):
    """From the ATen graph of the stock model in eval mode, as an exporter sees it."""
    program = torch.export.export(copy.deepcopy(model).eval(), (X,))
    parameters = program.graph_signature.inputs_to_parameters
    graph = program.graph
    convs = {node: parameters[node.args[1].name].removesuffix(".weight")
             for node in graph.nodes if str(node.target).startswith("aten.conv2d")}  # fmt: skip
    linears = [node for node in graph.nodes if node.target is torch.ops.aten.linear.default]
    keys = {f"{path}.input" for path in convs.values()}
    keys |= {f"{parameters[node.args[1].name].removesuffix('.weight')}.input" for node in linears}
    for node in graph.nodes:
        if str(node.target).startswith("aten.add"):
            behind = [conv_behind(operand, convs) for operand in node.args[:2]]
            main = [path for path in behind if path and "downsample" not in path and "shortcut" not in path]
            keys |= {f"{path}.residual" for path in main or filter(None, behind)}
    return keys


def conv_behind(node, convs):
    passed = ("aten.batch_norm", "aten.dropout")
    while str(node.target).startswith(passed) and len(node.users) == 1:
        node = node.args[0]
    return convs.get(node) if len(node.users) == 1 else None


class Shortcuts(nn.Module):
    """Blocks as people write them: an empty Sequential, a block around a function, a projection that is added to."""

    class Basic(nn.Module):
        def __init__(self, channels, stride=1):
            super().__init__()
            self.conv1, self.bn1 = nn.Conv2d(channels, 8, 3, stride, 1), nn.BatchNorm2d(8)
            self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, 1, 1), nn.BatchNorm2d(8)
            self.shortcut = nn.Sequential()
            if stride > 1:
                self.shortcut = nn.Sequential(nn.Conv2d(channels, 8, 1, stride), nn.BatchNorm2d(8))

        def forward(self, x):
            out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
            return F.relu(self.shortcut(x) + out)

    class Around(nn.Module):
        def __init__(self, function):
            super().__init__()
            self.function = function

        def forward(self, x):
            return x + self.function(x)

    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(
            nn.Conv2d(3, 8, 3, bias=False),
            self.Basic(8),
            self.Basic(8, 2),
            self.Around(nn.Sequential(nn.Conv2d(8, 4, 1), nn.ReLU(), nn.Conv2d(4, 8, 1), nn.BatchNorm2d(8))),
        )

    def forward(self, x):
        return self.blocks(x).mean((2, 3))


TIMM = timm.models.resnet
MODELS = {
    "basic": lambda: small_resnet(),
    "bottleneck": lambda: resnet.ResNet(resnet.Bottleneck, [2, 1, 1, 1], num_classes=7),
    "ours": lambda: resnet_fast.accelerate(resnet_fast.ResNet(resnet_fast.BasicBlock, [1, 2, 1, 1])),
    "timm": lambda: timm.create_model("test_resnet"),
    "timm deep": lambda: TIMM.ResNet(
        TIMM.Bottleneck, (2, 1, 1, 1), stem_type="deep", avg_down=True, drop_path_rate=0.3
    ),
    "timm se": lambda: TIMM.ResNet(TIMM.BasicBlock, (2, 1, 1, 1), block_args={"attn_layer": "se"}),
    "own": Shortcuts,
}


@pytest.mark.parametrize("name", MODELS)
def test_every_convolution_and_every_shortcut_has_a_range(name):
    stock = MODELS[name]().eval()
    keys = expected_keys(resnet_fast.restore(stock, inplace=False))
    ranges = qat.ranges(prepared(stock))
    assert ranges.keys() == keys
    assert all(isinstance(amax, float) and 0 <= amax < float("inf") for amax in ranges.values())


def test_ranges_are_those_of_the_float_model():
    """Of what the layers really read, and the additions: recorded in the stock model."""
    model = small_resnet()
    model.layer1.append(resnet.BasicBlock(64, 64).eval())  # with an identity
    seen = {}
    for path, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_pre_hook(lambda _, args, key=f"{path}.input": seen.update({key: args[0]}))
    for path, block in model.named_modules():
        if isinstance(block, resnet.BasicBlock):
            hook = lambda block, args, key=f"{path}.conv2.residual": seen.update(  # noqa: E731
                {key: args[0] if block.downsample is None else block.downsample(args[0])}
            )
            block.register_forward_pre_hook(hook)
    with torch.no_grad():
        model(X)
    expected = {key: tensor.abs().max().item() for key, tensor in seen.items()}
    assert qat.ranges(prepared(model)) == expected
    assert expected["layer1.1.conv1.input"] == expected["layer1.1.conv2.residual"]


def test_only_what_is_asked_for():
    model = qat.prepare_qat(small_resnet(), linear=False)
    qat.calibrate(model, [X])
    assert not [key for key in qat.ranges(model) if key.startswith("fc")] and type(model.fc) is nn.Linear


class OptionA(nn.Module):
    """The parameter-free shortcut of He et al. 2015: no module gives what is added."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 0, 5)))


class PreActivation(nn.Module):
    """He et al. 2016: a batch norm reads what is added."""

    def __init__(self):
        super().__init__()
        self.bn, self.conv = nn.BatchNorm2d(3), nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x):
        return x + self.conv(F.relu(self.bn(x)))


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x):
        return self.conv(x) if x.sum() > 0 else x


class Repeated(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.shared = nn.Conv2d(3, 3, 1), nn.ReLU()

    def forward(self, x):
        return self.conv(self.shared(x).sigmoid()) + self.shared(x)


class OwnConv2d(nn.Conv2d):
    pass


class Beside(nn.Module):
    """A block that can be prepared, and ``odd``."""

    def __init__(self, odd):
        super().__init__()
        self.plain, self.odd = resnet.BasicBlock(3, 3), odd

    def forward(self, x):
        return self.odd(self.plain(x))


def with_own_forward():
    conv = nn.Conv2d(3, 3, 1)
    conv.forward = conv.forward
    return conv


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (OptionA, r"odd \(OptionA\) adds 'pad' to odd.conv, expected the module's first input or what a child of it"),
        (PreActivation, r"odd \(PreActivation\) adds 'x' to odd.conv, and 'bn' reads it too"),
        (Branching, r"odd \(Branching\) has convolutions, and what it adds to them is not known: .* not be traced"),
        (Repeated, r"odd \(Repeated\) adds 'shared_1' to odd.conv, expected a child that is called once only"),
        (
            lambda: OwnConv2d(3, 3, 1),
            r"model has a tests.cpu.finetune.test_qat.OwnConv2d at odd, expected a plain nn.Conv2d",
        ),
        (with_own_forward, r"model has a .*\.Conv2d at odd, with a forward set on the instance, expected a plain"),
    ],
    ids=["option a", "pre-activation", "branching", "repeated", "own conv", "own forward"],
)
def test_what_cannot_be_done_is_refused_and_nothing_has_changed(make, said):
    model = Beside(make())
    before = [(module, type(module), set(module.__dict__), list(module._modules)) for module in model.modules()]
    with pytest.raises(ValueError, match=said):
        qat.prepare_qat(model)
    after = [(module, type(module), set(module.__dict__), list(module._modules)) for module in model.modules()]
    assert after == before
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_other_arguments_are_refused():
    for function in (qat.prepare_qat, qat.remove_qat):
        with pytest.raises(TypeError, match=r"model is a int, expected a torch.nn.Module"):
            function(5)
    with pytest.raises(ValueError, match="model is a Sequential without convolutions"):
        qat.prepare_qat(nn.Sequential(nn.Linear(3, 3)))
    with pytest.raises(ValueError, match="prepared for quantisation-aware training already"):
        qat.prepare_qat(qat.prepare_qat(small_resnet()))
    for function in (qat.ranges, lambda model: qat.calibrate(model, [X]), lambda model: qat.observe(model, True)):
        with pytest.raises(ValueError, match="model is a ResNet that is not prepared"):
            function(small_resnet())
    model = qat.prepare_qat(small_resnet())
    with pytest.raises(ValueError, match=r"the range of conv1.input is not known yet"):
        qat.ranges(model)
    with pytest.raises(RuntimeError, match="a range is not known yet: call calibrate"):
        model(X)


# --- ranges -------------------------------------------------------------------------------------------------------


def test_calibration_is_the_mean_over_batches_and_can_be_repeated():
    model = qat.prepare_qat(small_resnet()).train()
    model.layer1.eval()
    modes = [module.training for module in model.modules()]
    statistics = model.bn1.running_mean.clone()
    assert qat.calibrate(model, iter([X, 3 * X, 5 * X])) == 3
    first = qat.ranges(model)
    assert first["conv1.input"] == pytest.approx(3 * X.abs().max().item(), rel=1e-6)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(model.bn1.running_mean, statistics)
    qat.calibrate(model, [X, 3 * X, 5 * X])
    assert qat.ranges(model) == first


@pytest.mark.parametrize(
    ("batches", "error", "said"),
    [
        ([], ValueError, "batches is empty"),
        ([X, X * float("inf")], ValueError, "conv1.input is not finite on some image"),
        ([X, X[:, :2]], RuntimeError, "channels"),
    ],
    ids=["none", "infinite", "two channels"],
)
def test_calibration_that_fails_leaves_the_ranges(batches, error, said):
    model = prepared(small_resnet())
    before, logits = qat.ranges(model), model(X)
    with pytest.raises(error, match=said):
        qat.calibrate(model, batches)
    assert qat.ranges(model) == before and torch.equal(model(X), logits)


def test_a_layer_that_eval_mode_does_not_call_is_named():
    class Auxiliary(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.aux = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

        def forward(self, x):
            return self.conv(x)

    with pytest.raises(ValueError, match=r"aux.input has no range: in eval mode the model does not call that layer"):
        qat.calibrate(qat.prepare_qat(Auxiliary()), [X])


def test_ranges_follow_training_until_they_are_frozen():
    model = prepared(small_resnet()).train()
    amax = X.abs().max()
    with torch.no_grad():
        model(2 * X)
        followed = qat.ranges(model)
        assert followed["conv1.input"] == pytest.approx(1.01 * amax.item(), rel=1e-6)
        model(float("inf") * X)  # as fp16 at times
        assert qat.ranges(model)["conv1.input"] == followed["conv1.input"]
        before = qat.ranges(model)
        model.eval()(2 * X)
        qat.observe(model, False)
        model.train()(2 * X)
        assert qat.ranges(model) == before
        qat.observe(model, True)
        model(2 * X)
        assert qat.ranges(model)["conv1.input"] > before["conv1.input"]


def changed(ranges, **changes):
    return {key: amax for key, amax in {**ranges, **changes}.items() if amax is not None}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"conv1.input": None}, "ranges lack conv1.input; expected one for each of the model's 17"),
        ({"conv7.input": 1.0}, "ranges have conv7.input, which the model has not"),
        ({"conv1.input": -1.0}, "ranges has -1.0 for conv1.input, expected a finite number, 0 or more"),
        ({"fc.input": float("nan")}, "ranges has nan for fc.input"),
        ({"fc.input": "wide"}, "ranges has 'wide' for fc.input"),
        (
            {"layer1.0.conv1.input": 0.5},
            "0.5 for layer1.0.conv1.input and .* for layer1.0.conv2.residual, .* one tensor",
        ),
    ],
)
def test_wrong_ranges_are_refused(changes, said):
    model = prepared(small_resnet())
    before = qat.ranges(model)
    with pytest.raises(ValueError, match=said):
        qat.set_ranges(model, changed(before, **changes))
    assert qat.ranges(model) == before
    other = qat.prepare_qat(small_resnet(seed=4))
    qat.set_ranges(other, before)
    assert qat.ranges(other) == before


# --- with the rest of the package, and PyTorch's ------------------------------------------------------------------


def step(model, x=X):
    """A step of SGD with frozen statistics; the gradients."""
    frozen = Frozen(model, statistics=True)
    frozen.train()
    optimiser = torch.optim.SGD(model.parameters(), 0.05)
    F.cross_entropy(model(x), torch.arange(len(x)) % 7).backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    optimiser.step()
    optimiser.zero_grad()
    model.eval()
    return gradients


def test_names_and_tensors_stay_torchvisions():
    model = small_resnet()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    parameters = list(model.parameters())
    prepared(model)
    assert_same(before, dict(model.state_dict()), "state_dict")
    assert all(one is other for one, other in zip(model.parameters(), parameters, strict=True))
    step(model)
    fresh = small_resnet(seed=1)
    fresh.load_state_dict(model.state_dict())
    model.load_state_dict(before)


@pytest.mark.parametrize("block", [resnet.BasicBlock, resnet.Bottleneck])
def test_accelerated_blocks_round_too_and_are_fused_again_afterwards(block):
    stock = small_resnet(block)
    fast = resnet_fast.accelerate(small_resnet(block))
    with torch.no_grad():
        assert fused_calls(lambda: fast.train()(X)) and fused_calls(lambda: fast.eval()(X))  # its programs are made
        stock.train()(X)
        fast.load_state_dict(stock.state_dict())
        fast.eval(), stock.eval()
    in_float = fast(X)
    prepared(fast), prepared(stock)
    with torch.no_grad():
        logits = []
        assert fused_calls(lambda: logits.append(fast(X))) == []
        assert torch.equal(logits[0], stock(X))
    rounding = (logits[0] - in_float).abs().max() / in_float.abs().max()
    assert 1e-4 < rounding < 0.2  # of 8 bits, so that it was rounded at all
    assert any("FakeQuantisedConv2d" in str(row.reason) for row in resnet_fast.explain(fast).rows)

    calls = []
    gradients = []
    calls += fused_calls(lambda: gradients.append(step(fast)))
    assert calls == [] and all(map(torch.equal, gradients[0], step(stock)))
    assert_same(fast.state_dict(), stock.state_dict(), "after a step")

    qat.remove_qat(fast)
    fresh = resnet_fast.accelerate(small_resnet(block))
    fresh.load_state_dict(fast.state_dict())
    with torch.no_grad():
        assert fused_calls(lambda: fast(X))
        assert torch.equal(fast(X), fresh(X))


def test_removal_leaves_no_trace():
    model, fresh = small_resnet(), small_resnet()
    step(prepared(model))
    assert qat.remove_qat(model) is model
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(model(X), fresh(X))
    for (path, one), (other_path, other) in zip(model.named_modules(), fresh.named_modules(), strict=True):
        assert path == other_path and type(one) is type(other)
        assert one.__dict__.keys() == other.__dict__.keys()
        assert one._buffers.keys() == other._buffers.keys()
        assert not one._forward_hooks and not one._forward_pre_hooks
    prepared(model)


def test_other_hooks_survive():
    model, seen = small_resnet(), []
    model.layer1[0].register_forward_pre_hook(lambda *_: seen.append("pre"))
    model.layer2[0].downsample[1].register_forward_hook(lambda *_: seen.append("post"))
    qat.remove_qat(prepared(model))
    seen.clear()
    model(X)
    assert seen == ["pre", "post"]


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
def test_copies_have_ranges_of_their_own(copied):
    model = prepared(resnet_fast.accelerate(small_resnet()))
    other = copied(model)
    before, logits = qat.ranges(model), model(X)
    assert qat.ranges(other) == before and torch.equal(other(X), logits)
    qat.set_ranges(other, {key: amax / 4 for key, amax in before.items()})
    assert qat.ranges(model) == before and torch.equal(model(X), logits)
    alone = small_resnet()
    qat.set_ranges(qat.prepare_qat(alone), qat.ranges(other))
    assert torch.equal(other(X), alone(X)) and not torch.equal(other(X), logits)


def test_an_average_of_weights_averages_the_ranges():
    model = prepared(small_resnet())
    ema = recipe.average(model, 0.5)
    low = qat.ranges(model)
    ema.update_parameters(model)  # the first takes all
    qat.set_ranges(model, {key: 3 * amax for key, amax in low.items()})
    ema.update_parameters(model)  # 2 / 11 of the average, the rest of the new
    averaged = qat.ranges(ema.module)
    for key, amax in low.items():
        assert averaged[key] == pytest.approx((2 * amax + 9 * 3 * amax) / 11, rel=1e-6)


def test_the_learning_rate_is_a_hundredth():
    model = small_resnet()
    for opt, lr in (("adamw", 1e-5), ("sgd", 5e-4)):
        assert recipe.optimizer(model, Settings(qat=True, opt=opt)).param_groups[0]["lr"] == pytest.approx(lr)
    assert recipe.optimizer(model, Settings(qat=True, lr=0.3)).param_groups[0]["lr"] == 0.3
