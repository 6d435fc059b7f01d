"""``conv_chain`` as PyTorch sees it, and rows of bottlenecks: where they are found, and when blocks run one by one.

On the CPU no implementation has a kernel for the op, so blocks run one by one. Most tests here say otherwise, by
``chained``; the op is then its two convolutions.
"""

import copy
import pickle
from typing import Optional

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.models import resnet

import resnet_fast
from resnet_fast import network
from resnet_fast.graph import functional
from resnet_fast.graph.bottleneck_pairs import bottlenecks_of
from resnet_fast.graph.state import state_of
from resnet_fast.kernels.native import library
from resnet_fast.kernels.reference import inference as reference
from tests.cpu.small_models import accelerated, fused_calls, images, randomise_norms, relative_error

conv_chain = torch.ops.resnet_fast.conv_chain

X = images(2, 3, 32, 40)
TOLERANCE = 1e-5  # as in test_ecosystem.py


def rows_of(model: nn.Module) -> list[list[str]]:
    return [[".".join(path) for path in row.blocks] for row in bottlenecks_of(state_of(model).eval)]


def bottlenecks(layers: tuple = (3, 2, 1, 1), **kwargs) -> nn.Module:
    torch.manual_seed(0)
    return randomise_norms(resnet.ResNet(resnet.Bottleneck, list(layers), num_classes=7, **kwargs)).eval()


@pytest.fixture
def chained(monkeypatch):
    monkeypatch.setattr(functional, "chained", lambda *args: True)


# --- the op -----------------------------------------------------------------------------------------------------------


def operands(dtype: torch.dtype, leaves: bool = False, n: int = 2) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((n, 5, 3, 4), (9, 5, 1, 1), (9,), (9,), (n, 9, 3, 4), (6, 9, 1, 1), (6,), (6,))
    vector = torch.promote_types(dtype, torch.float32)
    tensors = [torch.randn(s, generator=generator).to(dtype if len(s) == 4 else vector) for s in shapes]
    return [tensor.requires_grad_(leaves) for tensor in tensors]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("leaves", [False, True])
def test_opcheck(dtype, leaves):
    torch.library.opcheck(conv_chain.default, tuple(operands(dtype, leaves)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_is_its_two_convolutions(dtype):
    """To the last bit, whatever serves them."""
    x, *first, residual, next_weight, next_scale, next_shift = inputs = operands(dtype)
    geometry = ((1, 1), (0, 0), (1, 1), 1, True)
    out = torch.ops.resnet_fast.conv_bn_act(x, *first, residual, *geometry)
    z = torch.ops.resnet_fast.conv_bn_act(out, next_weight, next_scale, next_shift, None, *geometry)
    for actual, expected in zip(conv_chain(*inputs), (out, z)):
        assert torch.equal(actual, expected)
        assert actual.is_contiguous(memory_format=torch.channels_last)


def test_definition(monkeypatch):
    monkeypatch.setenv("RESNET_FAST_IMPLEMENTATION", "reference")
    inputs = operands(torch.float64)
    x, weight, scale, shift, residual, next_weight, next_scale, next_shift = inputs

    def affine(y, scale, shift):
        return y * scale[:, None, None] + shift[:, None, None]

    out = F.relu(affine(F.conv2d(x, weight), scale, shift) + residual)
    expected = (out, F.relu(affine(F.conv2d(out, next_weight), next_scale, next_shift)))
    for found in (conv_chain(*inputs), reference.conv_chain(*inputs)):
        for actual, exact in zip(found, expected):
            torch.testing.assert_close(actual, exact, rtol=1e-13, atol=1e-13)


def test_gradcheck():
    inputs = operands(torch.float64, leaves=True)
    assert torch.autograd.gradcheck(conv_chain, inputs)
    assert torch.autograd.gradgradcheck(conv_chain, inputs, fast_mode=True)


@pytest.mark.parametrize("result", [0, 1])
def test_gradients_of_one_result_alone(result):
    inputs, others = operands(torch.float64, leaves=True), operands(torch.float64, leaves=True)
    conv_chain(*inputs)[result].square().sum().backward()
    reference.conv_chain(*others)[result].square().sum().backward()
    for position, (one, other) in enumerate(zip(inputs, others)):
        if result == 0 and position >= 5:
            assert one.grad is None
            continue
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("needed", range(8))
def test_each_gradient_alone(needed):
    inputs, everything = operands(torch.float64), operands(torch.float64, leaves=True)
    inputs[needed].requires_grad_()
    for tensors in (inputs, everything):
        out, z = conv_chain(*tensors)
        (out.square().sum() + z.square().sum()).backward()
    torch.testing.assert_close(inputs[needed].grad, everything[needed].grad, rtol=1e-12, atol=1e-12)


def test_autocast():
    """As a convolution under autocast: half-precision results, float32 gradients for float32 parameters."""
    inputs = operands(torch.float32, leaves=True)
    with torch.autocast("cpu", torch.bfloat16):
        out, z = conv_chain(*inputs)
    assert out.dtype == z.dtype == torch.bfloat16
    (out.float().sum() + z.float().sum()).backward()
    assert [leaf.grad.dtype for leaf in inputs] == [torch.float32] * 8


def test_empty_batch():
    inputs = operands(torch.float32, leaves=True, n=0)
    out, z = conv_chain(*inputs)
    assert (out.shape, z.shape) == ((0, 9, 3, 4), (0, 6, 3, 4))
    (out.sum() + z.sum()).backward()
    assert not any(leaf.grad.any() for leaf in inputs)


BAD: dict[str, tuple[int, Optional[torch.Tensor], str]] = {
    "channels": (0, torch.ones(2, 4, 3, 4), "x has 4 channels .*, expected 5"),
    "3x3 weight": (1, torch.ones(9, 5, 3, 3), r"weight has shape \[9, 5, 3, 3\], expected \[K, C, 1, 1\]"),
    "short scale": (2, torch.ones(8), r"scale has shape \[8\], expected \[9\]"),
    "half shift": (3, torch.ones(9).half(), "shift is torch.float16, expected float32 or float64"),
    "small residual": (4, torch.ones(2, 9, 3, 3), r"residual has shape \[2, 9, 3, 3\], expected"),
    "3x3 next_weight": (5, torch.ones(6, 9, 3, 3), r"next_weight has shape \[6, 9, 3, 3\]"),
    "next_weight's channels": (5, torch.ones(6, 8, 1, 1), "the second convolution .*: x has 9 channels .*, expected 8"),
    "double next_weight": (5, torch.ones(6, 9, 1, 1).int(), "second convolution .*weight is torch.int32"),
    "short next_shift": (7, torch.ones(5), r"second convolution .*: shift has shape \[5\], expected \[6\]"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_operands(name):
    position, wrong, message = BAD[name]
    inputs = operands(torch.float32)
    inputs[position] = wrong
    for tensors in (inputs, [tensor.to("meta") for tensor in inputs]):
        with pytest.raises(RuntimeError, match=message):
            conv_chain(*tensors)


def test_on_modules():
    """``functional.conv_chain``, also of what the op does not take: then it is two ops."""
    torch.manual_seed(0)
    convs = [nn.Conv2d(8, 16, 1), nn.Conv2d(16, 8, 1, bias=False)]
    norms = [randomise_norms(nn.BatchNorm2d(size)).eval() for size in (16, 8)]
    x, residual = images(2, 8, 5, 6), images(2, 16, 5, 6, seed=1)

    def check(expected_calls, residual=residual):
        out = F.relu(norms[0](convs[0](x)) + residual)
        expected = out, F.relu(norms[1](convs[1](out)))
        arguments = (x, convs[0], norms[0], residual, convs[1], norms[1])
        assert relative_error(functional.conv_chain(*arguments), expected) < TOLERANCE
        assert fused_calls(lambda: functional.conv_chain(*arguments)) == expected_calls

    with torch.no_grad():
        check(["conv_chain"])
        check(["conv_bn_act"] * 2, images(2, 16, 1, 1))  # broadcasts
        check(["conv_bn_act"] * 2, residual.half())
        convs[1].stride = (2, 1)
        check(["conv_bn_act"] * 2)


# --- where rows are found -------------------------------------------------------------------------------------------


def test_rows_of_torchvision_and_timm():
    fast = resnet_fast.accelerate(torchvision.models.resnet50())
    blocks = [[f"layer{stage}.{i}" for i in range(n)] for stage, n in enumerate((3, 4, 6, 3), 1)]
    assert rows_of(fast) == blocks
    assert rows_of(resnet_fast.accelerate(timm.create_model("resnet50"))) == blocks
    assert rows_of(resnet_fast.ResNet(resnet_fast.Bottleneck, [2, 1, 1, 3])) == [
        ["layer1.0", "layer1.1"],
        ["layer4.0", "layer4.1", "layer4.2"],
    ]
    assert bottlenecks_of(state_of(fast).training) == []
    (pair, *_) = bottlenecks_of(state_of(fast).eval)[0].pairs
    assert pair == (("layer1", "0", "conv3"), ("layer1", "1", "conv1"))
    assert bottlenecks_of(state_of(fast).eval)[3].widths == ((512, 512), (512, 512))


@pytest.mark.parametrize("name", ["resnetblur50", "resnet26t"])
@torch.no_grad()
def test_bottlenecks_with_layers_of_their_own(name, chained):
    """Blurring, dropping out: what is no fused op is called in its place."""
    stock = randomise_norms(timm.create_model(name)).eval()
    fast = accelerated(stock)
    assert sorted({path.split(".")[0] for row in rows_of(fast) for path in row}) == [f"layer{i}" for i in (1, 2, 3, 4)]
    for layout in (torch.contiguous_format, torch.channels_last):
        x = X.contiguous(memory_format=layout)
        assert relative_error(fast(x), stock(x)) < TOLERANCE
    calls = fused_calls(lambda: fast(X))
    assert calls.count("conv_chain") == sum(len(row) - 1 for row in rows_of(fast))


def test_networks_without_rows():
    """Blocks of two 3x3 convolutions; squeeze and excitation between the last one and the sum."""
    for model in (torchvision.models.resnet18(), timm.create_model("seresnet50")):
        assert rows_of(accelerated(model.eval())) == []


class Reduce(nn.Module):
    """A bottleneck as people write it, with names of its own."""

    def __init__(self, channels, width):
        super().__init__()
        self.a, self.c = nn.Conv2d(channels, width, 1), nn.Conv2d(width, 64, 1)
        self.b = nn.Conv2d(width, width, 3, 1, 1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(size) for size in (width, width, 64))
        self.shortcut = nn.Identity()
        if channels != 64:
            self.shortcut = nn.Sequential(nn.Conv2d(channels, 64, 1, bias=False), nn.BatchNorm2d(64))

    def forward(self, x):
        y = F.relu(self.norms[0](self.a(x)))
        y = F.relu(self.norms[1](self.b(y)))
        return F.relu(self.norms[2](self.c(y)) + self.shortcut(x))


class Hand(nn.Module):
    def __init__(self, forward=None):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 32, 3, 2, 1), nn.BatchNorm2d(32), nn.ReLU())
        self.body = nn.Sequential(Reduce(32, 16), Reduce(64, 24), nn.Identity(), Reduce(64, 16), Reduce(64, 17))
        self.walk = forward or (lambda self, x: self.body(x))

    def forward(self, x):
        return self.walk(self, self.stem(x))


def hand(forward=None) -> nn.Module:
    torch.manual_seed(0)
    return randomise_norms(Hand(forward)).eval()


def test_hand_written_bottlenecks(chained):
    stock = hand()
    fast = accelerated(stock)
    assert rows_of(fast) == [["body.0", "body.1"], ["body.3", "body.4"]]
    for layout in (torch.contiguous_format, torch.channels_last):
        x = X.contiguous(memory_format=layout)
        result, expected = fast(x), stock(x)
        assert relative_error(result, expected) < TOLERANCE
        assert result.stride() == expected.stride()
    assert fused_calls(lambda: fast(X)).count("conv_chain") == 2


def _both(self, x):
    middle = self.body[0](x)
    return self.body[1](middle), middle


def _written_to(self, x):
    middle = self.body[0](x)
    middle += 1
    return self.body[1](middle)


def _twice(self, x):
    return self.body[1](self.body[1](self.body[0](x)))


def _elsewhere(self, x):
    y = self.body[0](x)
    x.relu_()
    return self.body[1](y) + x.mean()


@pytest.mark.parametrize(
    ("forward", "rows"), [(_both, []), (_written_to, []), (_elsewhere, []), (_twice, [["body.0", "body.1", "body.1"]])]
)
def test_what_is_between_blocks(forward, rows, chained):
    stock = hand(forward)
    fast = accelerated(stock)
    assert rows_of(fast) == rows
    assert relative_error(fast(X), stock(X)) < TOLERANCE


# --- what a row computes --------------------------------------------------------------------------------------------


@torch.no_grad()
def test_on_the_cpu_nothing_changes():
    fast = accelerated(bottlenecks())
    calls = fused_calls(lambda: fast(X))
    assert calls.count("conv_bn_act") == sum(isinstance(m, nn.Conv2d) for m in fast.modules()) - 1
    assert "conv_chain" not in calls
    assert "in one kernel" not in str(resnet_fast.explain(fast))
    fast(X)
    if library.unavailable() is None:
        assert "one native program" in str(network.last_plan(fast))


@pytest.mark.parametrize("name", ["plain", "grouped", "own", "frozen"])
def test_chained_is_stock(name, chained):
    """Results and gradients in float64, where only a wrong formula shows."""
    kwargs = {
        "grouped": {"groups": 4, "width_per_group": 8, "replace_stride_with_dilation": [False, True, True]},
        "frozen": {"norm_layer": torchvision.ops.FrozenBatchNorm2d},
    }.get(name, {})
    stock = bottlenecks(**kwargs).double()
    fast = accelerated(stock)
    if name == "own":
        fast = resnet_fast.ResNet(resnet_fast.Bottleneck, [3, 2, 1, 1], num_classes=7).double().eval()
        fast.load_state_dict(stock.state_dict())
    gradients = []
    for model in (stock, fast):
        x = X.double().requires_grad_()
        y = model(x)
        y.square().sum().backward()
        gradients.append([y, x.grad, *(p.grad for p in model.parameters())])
    assert relative_error(gradients[1], gradients[0]) < 1e-10
    calls = fused_calls(lambda: fast(X.double()))
    assert calls.count("conv_chain") == 3
    assert calls.count("conv_bn_act") == sum(isinstance(m, nn.Conv2d) for m in fast.modules()) - 1 - 2 * 3


def test_autocast_of_a_network(chained):
    stock = bottlenecks()
    fast = accelerated(stock)
    precise = copy.deepcopy(stock).double()(X.double())
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert fused_calls(lambda: fast(X)).count("conv_chain") == 3
        errors = [relative_error(model(X).double(), precise) for model in (stock, fast)]
    assert errors[1] <= 2 * errors[0]


@pytest.mark.parametrize(("backend", "grad"), [("aot_eager", True), ("inductor", False)])
def test_compiled(backend, grad):
    """The graph holds the op whatever the device; which implementation runs is decided in it."""
    stock, graphs = bottlenecks((2, 1, 1, 1)), []
    fast = accelerated(stock)

    def recorded(module, inputs):
        graphs.append([str(node.target) for node in module.graph.nodes])
        return torch._dynamo.lookup_backend(backend)(module, inputs)

    torch._dynamo.reset()
    compiled = torch.compile(fast, fullgraph=True, backend=recorded)
    with torch.set_grad_enabled(grad):
        for x in (X, images(3, 3, 48, 32)):
            assert relative_error(compiled(x), stock(x)) < TOLERANCE
    assert sum("conv_chain" in target for target in graphs[0]) == 1


def test_exported():
    stock = bottlenecks((2, 1, 1, 1))
    dynamic = {"x": {0: torch.export.Dim("batch")}}
    program = torch.export.export(accelerated(stock), (X,), dynamic_shapes=dynamic)
    targets = [str(node.target) for node in program.graph.nodes]
    assert sum(target.startswith("resnet_fast.conv_chain") for target in targets) == 1
    for batch in (1, 5):
        x = images(batch, 3, 32, 40)
        assert relative_error(program.module()(x), stock(x)) < TOLERANCE


# --- when blocks run one by one ---------------------------------------------------------------------------------------

CHAINS_LEFT = {"neither": 3, "layer1": 1, "layer2": 2}  # when the row of that stage is refused


def _hook(path):
    return lambda model: model.get_submodule(path).register_forward_hook(lambda *_: None)


def _backward_hook(model):
    model.layer2[0].register_full_backward_hook(lambda *_: None)


def _training(path):
    return lambda model: model.get_submodule(path).train()


def _forward_on_the_instance(model):
    block = model.layer1[0]
    block.forward = lambda x: type(block).forward(block, x) * 2


def _relu(model):
    model.layer1[1].relu = nn.GELU()


def _stride(model):
    model.layer2[1].conv1.stride = (2, 2)
    model.layer2[1].downsample = nn.MaxPool2d(1, 2)


def _restored(model):
    if hasattr(model.layer2[1], "stock_class"):
        resnet_fast.restore(model.layer2[1])


def _replaced(model):
    torch.manual_seed(1)
    model.layer2[1] = randomise_norms(resnet.BasicBlock(512, 512)).eval()


def _appended(model):
    torch.manual_seed(1)
    model.layer2.append(nn.Conv2d(512, 512, 1))


def _norm(model):
    model.layer1[1].bn1 = nn.GroupNorm(8, 64)


REFUSED = {
    "nothing": (lambda model: None, "neither"),
    "hook on a block": (_hook("layer1.1"), "layer1"),
    "hook on a child": (_hook("layer2.0.conv2"), "layer2"),
    "hook on the downsample": (_hook("layer2.0.downsample"), "layer2"),
    "hook on a block without a row": (_hook("layer3.0"), "neither"),
    "backward hook": (_backward_hook, "layer2"),
    "a block in training mode": (_training("layer1.2"), "layer1"),
    "a norm in training mode": (_training("layer1.0.bn2"), "layer1"),
    "a forward on the instance": (_forward_on_the_instance, "layer1"),
    "another activation": (_relu, "layer1"),
    "another norm": (_norm, "layer1"),
    "another stride": (_stride, "layer2"),
    "a restored block": (_restored, "layer2"),
    "a replaced block": (_replaced, "layer2"),
    "a layer after the row": (_appended, "neither"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name, chained):
    change, stage = REFUSED[name]
    stock = bottlenecks()
    fast = accelerated(stock)
    with torch.no_grad():
        fast(X)
        change(stock)
        change(fast)
        for _ in range(2):  # before and after programs were made anew
            assert relative_error(fast(X), stock(X)) < TOLERANCE
            assert fused_calls(lambda: fast(X)).count("conv_chain") == CHAINS_LEFT[stage]


def test_hooks_fire_once_each(chained):
    fast = accelerated(bottlenecks())
    seen = []
    for name, module in fast.named_modules():
        if name in ("layer1.0", "layer1.1", "layer1.1.conv1", "layer2"):
            module.register_forward_hook(lambda *_, name=name: seen.append(name))
    fast(X)
    assert seen == ["layer1.0", "layer1.1.conv1", "layer1.1", "layer2"]


def test_global_hooks(chained):
    stock, seen = bottlenecks(), []
    fast = accelerated(stock)
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module).__name__))
    try:
        fast(X)
        ours = list(seen)
        seen.clear()
        stock(X)
    finally:
        handle.remove()
    assert ours == seen


def test_a_block_added_to_a_row(chained):
    """A structure that has changed is looked at again."""
    stock = bottlenecks()
    fast = accelerated(stock)
    torch.manual_seed(1)
    block = randomise_norms(resnet.Bottleneck(512, 128)).eval()
    stock.layer2.append(block)
    fast.layer2.append(resnet_fast.accelerate(block, inplace=False))
    assert relative_error(fast(X), stock(X)) < TOLERANCE
    assert fused_calls(lambda: fast(X)).count("conv_chain") == 4


def test_a_changed_block_is_joined_again(chained):
    fast, stock = accelerated(bottlenecks()), bottlenecks()
    for model in (fast, stock):
        model.layer1[1].note = "a setting, so the block's program is made anew"
    fast(X)
    assert relative_error(fast(X), stock(X)) < TOLERANCE
    assert fused_calls(lambda: fast(X)).count("conv_chain") == 3


@pytest.mark.parametrize("remake", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_have_rows(remake, chained):
    model = remake(accelerated(bottlenecks()))
    assert rows_of(model) == [["layer1.0", "layer1.1", "layer1.2"], ["layer2.0", "layer2.1"]]
    assert fused_calls(lambda: model(X)).count("conv_chain") == 3


def test_weights_changed_later_count(chained):
    fast, other = accelerated(bottlenecks()), randomise_norms(bottlenecks(), seed=3)
    with torch.inference_mode():
        fast(X)
    fast.load_state_dict(other.state_dict())
    assert relative_error(fast(X), other(X)) < TOLERANCE


def test_accelerated_twice_and_restored(chained):
    model = resnet_fast.accelerate(resnet_fast.accelerate(bottlenecks()))
    assert len(rows_of(model)) == 2
    resnet_fast.restore(model)
    assert fused_calls(lambda: model(X)) == []


def test_bad_input_raises_as_block_by_block(chained):
    """Said of the row's first convolution."""
    fast = resnet_fast.accelerate(hand(lambda self, x: self.body(torch.cat([x, x], 1))), inplace=False)
    with pytest.raises(RuntimeError, match=r"x has 64 channels .*, expected 32"):
        fast(X)
