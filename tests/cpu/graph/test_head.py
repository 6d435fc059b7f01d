"""The head of a classifier, global average pool and fully connected layer, as one op: the op itself, and where it is
found in the models people have."""

import re
from typing import Optional

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

import resnet_fast
from resnet_fast import network, ops
from resnet_fast.kernels.contract import Case
from resnet_fast.kernels.native import library
from resnet_fast.kernels.reference import inference as reference
from tests.cpu.ops.cases import HALF, SERVED, assert_close, cpu_implementations, dtype_name, nhwc
from tests.cpu.small_models import accelerated, fused_calls, images, randomise_norms, relative_error, small_resnet

head = torch.ops.resnet_fast.head

pytestmark = pytest.mark.usefixtures("one_thread")

each_dtype = pytest.mark.parametrize("dtype", SERVED, ids=dtype_name)
SHAPES = [(2, 512, 7, 7, 1000), (1, 17, 15, 10, 10), (3, 33, 1, 1, 5), (1, 1, 2, 3, 1)]


def inputs(n: int, c: int, h: int, w: int, k: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """x in channels_last, weight and bias, such that the results are of the order of 1."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, c, h, w, generator=generator) + 0.5
    weight, bias = torch.randn(k, c, generator=generator) / c**0.5, torch.randn(k, generator=generator)
    return [nhwc(x.to(dtype)), weight.to(dtype), bias.to(dtype)]


def stock(x: Tensor, weight: Tensor, bias: Optional[Tensor]) -> Tensor:
    return F.linear(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1), weight, bias)


# --- the op -----------------------------------------------------------------------------------------------------------


@each_dtype
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", cpu_implementations())
def test_op(name, shape, dtype, monkeypatch):
    """As exact as two sums in float32 with the mean rounded in between, with and without a bias, in any layout."""
    monkeypatch.setenv("RESNET_FAST_IMPLEMENTATION", name)
    x, weight, bias = inputs(*shape, dtype)
    mean, eps, eps32 = x.double().abs().mean((2, 3)), torch.finfo(dtype).eps, torch.finfo(torch.float32).eps
    terms = shape[1] + shape[2] * shape[3] + 2
    for vector in (bias, None):
        exact = stock(x.double(), weight.double(), None if vector is None else vector.double())
        magnitude = mean @ weight.double().abs().T + (0 if vector is None else vector.double().abs())
        for image in (x, x.contiguous(), torch.cat([x, x], 3)[..., : shape[3]]):
            y = head(image, weight, vector)
            assert y.dtype == dtype
            assert y.is_contiguous()
            assert_close(y, exact, eps / 2 * exact.abs() + (eps / 2 + terms**0.5 * eps32) * magnitude)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_and_inf_stay_in_their_image(value):
    x, weight, bias = inputs(3, 40, 5, 3, 20)
    x[1, 7, 2, 1] = value
    y = head(x, weight, bias)
    assert y[[0, 2]].isfinite().all()
    assert not y[1].isfinite().any()


def test_who_serves():
    """On a CPU the native kernels' pool and PyTorch's own product, else the definition; oneDNN has nothing to add."""
    case = Case("head", "cpu", torch.float32, 512, 1000)
    assert ops.implementation_for(case) == ("native" if library.unavailable() is None else "reference")
    assert ops.IMPLEMENTATIONS["onednn"].supports(case)
    assert ops.implementation_for(case._replace(dtype=torch.float64)) == "reference"


@pytest.mark.parametrize("gradients", [False, True], ids=["inference", "gradients"])
@pytest.mark.parametrize("with_bias", [False, True], ids=["no bias", "bias"])
def test_opcheck(with_bias, gradients):
    tensors = [t.requires_grad_(gradients) for t in inputs(2, 6, 5, 4, 3)]
    torch.library.opcheck(head.default, (*tensors[:2], tensors[2] if with_bias else None))


def test_gradcheck():
    leaves = [t.double().requires_grad_() for t in inputs(2, 3, 2, 3, 4)]
    assert torch.autograd.gradcheck(head, leaves)
    assert torch.autograd.gradgradcheck(head, leaves)
    assert torch.autograd.gradcheck(lambda x, w: head(x, w, None), leaves[:2])


@pytest.mark.parametrize("needed", range(3))
def test_each_gradient_alone(needed):
    leaves = inputs(2, 6, 5, 4, 3)
    leaves[needed].requires_grad_()
    head(*leaves).square().sum().backward()
    copies = [leaf.detach().clone() for leaf in leaves]
    copies[needed].requires_grad_()
    stock(*copies).square().sum().backward()
    torch.testing.assert_close(leaves[needed].grad, copies[needed].grad)
    assert all(leaf.grad is None for i, leaf in enumerate(leaves) if i != needed)


@pytest.mark.parametrize("dtype", HALF, ids=dtype_name)
def test_autocast(dtype):
    """As a linear layer under autocast: a half-precision result, float32 gradients for float32 parameters. A layer in
    the other half precision is cast too."""
    leaves = [t.requires_grad_() for t in inputs(2, 24, 3, 3, 5)]
    x, weight, bias = (t.detach() for t in leaves)
    with torch.autocast("cpu", dtype):
        y = head(*leaves)
        other = {torch.bfloat16: torch.float16, torch.float16: torch.bfloat16}[dtype]
        assert head(x.to(dtype), weight.to(other), bias.to(other)).dtype == dtype
        assert head(x.double(), weight.double(), bias.double()).dtype == torch.float64
        expected = stock(x.to(dtype), weight, bias)
    assert y.dtype == expected.dtype == dtype
    torch.testing.assert_close(y, expected)
    y.float().square().sum().backward()
    assert [leaf.grad.dtype for leaf in leaves] == [torch.float32] * 3


def test_empty_batch_meta_tensors_and_results_in_place():
    x, weight, bias = inputs(2, 6, 5, 4, 3)
    assert head(x[:0], weight, bias).shape == (0, 3)
    meta = head(x.to("meta"), weight.to("meta"), bias.to("meta"))
    assert (meta.shape, meta.dtype, meta.stride()) == ((2, 3), torch.float32, (3, 1))
    head(x.requires_grad_(), weight, bias).add_(1).sum().backward()


ERRORS: dict[str, tuple[dict, str]] = {
    "x of 2 dimensions": ({"x": torch.ones(2, 6)}, r"x.*\[2, 6\].*4 dimensions"),
    "weight of other channels": ({"weight": torch.ones(3, 5)}, r"weight.*\[3, 5\].*\[K, 6\].*\[2, 6, 5, 4\]"),
    "weight of 4 dimensions": ({"weight": torch.ones(3, 6, 1, 1)}, r"weight.*\[3, 6, 1, 1\].*\[K, 6\]"),
    "bias of another length": ({"bias": torch.ones(4)}, r"bias.*\[4\].*\[3\]"),
    "x wider than weight": ({"x": torch.ones(2, 6, 5, 4).double()}, r"x.*float64.*weight.*float32"),
    "x of integers": ({"x": torch.ones(2, 6, 5, 4, dtype=torch.int64)}, r"x.*int64.*floating-point"),
    "bias of integers": ({"bias": torch.ones(3, dtype=torch.int32)}, r"bias.*int32.*floating-point"),
    "weight on another device": ({"weight": torch.ones(3, 6, device="meta")}, r"weight.*meta.*cpu"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    """RuntimeError, as from the stock pair, naming the argument, what it is and what was expected."""
    changed, message = ERRORS[name]
    arguments = {"x": torch.ones(2, 6, 5, 4), "weight": torch.ones(3, 6), "bias": torch.ones(3), **changed}
    with pytest.raises(RuntimeError, match=f"(?s){message}"):
        head(*arguments.values())


# --- where it is found ------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """A convolution, a pool and a linear layer; what is between them is the test's."""

    def __init__(self, forward=None, **children: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.bn, self.pool = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(8, 5)
        for name, child in children.items():
            setattr(self, name, child)
        self.between = forward
        randomise_norms(self).eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.between(self, self.pool(F.relu(self.bn(self.conv(x)))))


class OtherLinear(nn.Linear):
    """Of a quantiser, or with an adapter, say."""


X = images(2, 3, 9, 8)
FOUND = {
    "torch.flatten": Net(lambda self, y: self.fc(torch.flatten(y, 1))),
    "torch.flatten, all named": Net(lambda self, y: self.fc(torch.flatten(y, start_dim=1, end_dim=-1))),
    "method": Net(lambda self, y: self.fc(y.flatten(1))),
    "module": Net(lambda self, y: self.fc(self.flatten(y)), flatten=nn.Flatten()),
    "dropout": Net(lambda self, y: self.fc(self.dropout(y.flatten(1))), dropout=nn.Dropout(0.5)),
    "identities": Net(lambda self, y: self.fc(self.one(self.two(y).flatten(1))), one=nn.Identity(), two=nn.Identity()),
    "Sequential": Net(lambda self, y: self.fc(y.flatten(1)), fc=nn.Sequential(nn.Dropout(0.2), nn.Linear(8, 5))),
    "no bias": Net(lambda self, y: self.fc(y.flatten(1)), fc=nn.Linear(8, 5, bias=False)),
    "more after it": Net(lambda self, y: self.fc(y.flatten(1)).softmax(1)),
}
LEFT_ALONE = {
    "view": Net(lambda self, y: self.fc(y.view(y.size(0), -1))),
    "flatten of all": Net(lambda self, y: self.fc(y.flatten(2).flatten(1))),
    "features are used twice": Net(lambda self, y: [(f := y.flatten(1)), self.fc(f)]),
    "functional dropout": Net(lambda self, y: self.fc(F.dropout(y.flatten(1), 0.5, self.training))),
    "ReLU between": Net(lambda self, y: self.fc(self.relu(y.flatten(1))), relu=nn.ReLU()),
    "pool of 2x2": Net(lambda self, y: self.fc(y.flatten(1)), pool=nn.AdaptiveAvgPool2d(2), fc=nn.Linear(32, 5)),
    "another linear layer": Net(lambda self, y: self.fc(y.flatten(1)), fc=OtherLinear(8, 5)),
}


@pytest.mark.parametrize("name", FOUND)
def test_found(name):
    check(FOUND[name], ["conv_bn_act", "head"])


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_left_alone(name):
    net = LEFT_ALONE[name]
    check(net, ["conv_bn_act"] + ["global_avg_pool"] * (name != "pool of 2x2"))


def check(net: nn.Module, expected: list[str]) -> nn.Module:
    """The stock results in the stock layout, by these ops, and as one native program where there is one."""
    fast = accelerated(net)
    with torch.no_grad():
        given = net(X)
        assert relative_error(fast(X), given) < 1e-6
        assert fused_calls(lambda: fast(X)) == expected
    if (
        library.unavailable() is None
        and "head" in expected
        and "softmax" not in str(fast._resnet_fast_state.eval.source)
    ):
        assert isinstance(network.last_plan(fast), network.Plan), network.last_plan(fast)
    return fast


def test_a_timm_like_pool_is_left_alone():
    timm = pytest.importorskip("timm")
    model = randomise_norms(timm.create_model("resnet18", num_classes=7)).eval()
    assert "head" not in fused_calls(lambda: accelerated(model)(images()))


def test_classifier_in_a_sequential():
    """Of a network that is no ResNet, with a second linear layer after the first."""
    model = randomise_norms(torchvision.models.mobilenet_v3_small(num_classes=7)).eval()
    fast = accelerated(model)
    with torch.no_grad():
        assert fused_calls(lambda: fast(images())).count("head") == 1
        assert relative_error(fast(images()), model(images())) < 1e-4


# --- what changes between calls ---------------------------------------------------------------------------------------


def _half_and_half(model: nn.Module) -> None:
    model.fc.double()


CHANGES = {
    "forward hook": lambda model: model.fc.register_forward_hook(lambda module, args, output: output * 2),
    "pre-hook": lambda model: model.fc.register_forward_pre_hook(lambda module, args: (args[0] + 1,)),
    "weight_norm": lambda model: nn.utils.parametrizations.weight_norm(model.fc),
    "spectral_norm, old": lambda model: nn.utils.spectral_norm(model.fc),
    "instance forward": lambda model: setattr(model.fc, "forward", lambda x: x[:, :3]),
    "Identity": lambda model: setattr(model, "fc", nn.Identity()),
    "Sequential": lambda model: setattr(model, "fc", nn.Sequential(nn.ReLU(), nn.Linear(512, 3))),
    "another size": lambda model: setattr(model, "fc", nn.Linear(512, 3)),
    "a weight": lambda model: model.fc.weight.data.mul_(2),
    "another dtype": _half_and_half,
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_linear_layer_counts_and_costs_nothing_else(name):
    """Everything before it stays fused, stem and pool included."""
    models = [small_resnet(), accelerated(small_resnet())]
    with torch.no_grad():
        models[1](images())
        for model in models:
            torch.manual_seed(0)
            CHANGES[name](model)
            model.eval()
        if name == "another dtype":
            for model in models:
                with pytest.raises(RuntimeError):
                    model(images())
            return
        torch.manual_seed(0)
        expected = models[0](images())
        torch.manual_seed(0)
        assert relative_error(models[1](images()), expected) < 1e-5
        calls = fused_calls(lambda: models[1](images()))
    last = "head" if name in ("another size", "a weight") else "global_avg_pool"
    assert (calls[0], calls[-1]) == ("stem", last)


def test_dropout_switched_on_by_hand():
    """Monte Carlo dropout: on in eval mode."""
    net = FOUND["dropout"]
    fast = accelerated(net)
    for model in (net, fast):
        model.dropout.train()
    try:
        with torch.no_grad():
            torch.manual_seed(0)
            expected = net(X)
            torch.manual_seed(0)
            assert relative_error(fast(X), expected) < 1e-6
            assert fused_calls(lambda: fast(X)) == ["conv_bn_act", "global_avg_pool"]
            (row,) = resnet_fast.explain(fast).rows
        assert row.steps[-1] == "pool+flatten+dropout+fc: one by one, for dropout drops out (training mode)"
    finally:
        net.dropout.eval()


def test_training_mode_is_left_alone():
    model = accelerated(small_resnet()).train()
    calls = fused_calls(lambda: model(images()))
    assert calls[-1] == "global_avg_pool"
    assert "head" not in calls


def test_explain():
    model = accelerated(small_resnet())
    served = ops.implementation_for(Case("head", "cpu", torch.float32, 1, 1))
    row = resnet_fast.explain(model).rows[0]
    assert row.status == "fused"
    assert row.steps[-1] == f"avgpool+flatten+fc: {served}"
    model.fc.register_forward_hook(lambda *_: None)
    row = resnet_fast.explain(model).rows[0]
    assert row.status == "fused"
    assert row.steps[-1] == "avgpool+flatten+fc: one by one, for fc has hooks"
    in_training = accelerated(FOUND["dropout"]).train()
    assert re.fullmatch(r"pool\+flatten\+dropout\+fc: \w+", resnet_fast.explain(in_training).rows[0].steps[-1])


# --- PyTorch around it ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["torch.flatten", "Sequential"])
def test_compile_and_export(name):
    """One graph with the op in it, for batches other than the example's."""
    net = FOUND[name]
    fast = accelerated(net)
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(fast, fullgraph=True, backend="aot_eager", dynamic=True)
        program = torch.export.export(fast, (X,), dynamic_shapes={"x": {0: torch.export.Dim("batch")}})
        assert sum("resnet_fast.head" in str(node.target) for node in program.graph.nodes) == 1
        for batch in (2, 3, 5):
            x = images(batch, 3, 9, 8)
            assert relative_error(compiled(x), net(x)) < 1e-6
            assert relative_error(program.module()(x), net(x)) < 1e-6


def test_gradients_of_an_accelerated_model():
    stock_model, fast = small_resnet(), accelerated(small_resnet())
    for model in (stock_model, fast):
        model(images()).square().sum().backward()
    assert "head" in fused_calls(lambda: fast(images()))
    grads = [[p.grad for p in model.parameters()] for model in (fast, stock_model)]
    assert relative_error(*grads) < 1e-5


@pytest.mark.parametrize("dtype", HALF, ids=dtype_name)
def test_half_models_round_as_the_stock_pair(dtype):
    """The mean is rounded to half precision before the product, as a pool of its own rounds it."""
    x, weight, bias = inputs(2, 64, 7, 7, 10, dtype)
    torch.testing.assert_close(head(x, weight, bias), stock(x, weight, bias), rtol=torch.finfo(dtype).eps, atol=1e-3)
    assert torch.equal(reference.head(x, weight, bias), stock(x, weight, bias))
