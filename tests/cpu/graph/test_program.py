"""The tracer must see what a forward does, and must refuse what it cannot reproduce.

Each network here is small and awkward in one way. It must give the stock result fused (or, where the comment says so,
must not be fused), whatever layout the input comes in.
"""

import operator
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import resnet_fast
from resnet_fast.graph.program import Program
from tests.cpu.small_models import accelerated, fused_calls, images, randomise_norms, relative_error

X = images(2, 8, 10, 12)


class Net(nn.Module):
    """Two convolutions with their norms; the forward is the test's."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv1, self.bn1 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.eval()
        randomise_norms(self)


def network(forward, **children):
    cls = type("Awkward", (Net,), {"forward": forward})
    model = cls()
    for name, child in children.items():
        setattr(model, name, child)
    return randomise_norms(model).eval()


def check(forward, expected_ops=None, x=X, **children):
    stock = network(forward, **children)
    fast = resnet_fast.accelerate(stock, inplace=False)
    given = x.clone()
    expected, result = stock(x.clone()), fast(given)
    assert relative_error(result, expected) < 1e-5
    for one, other in zip(torch.utils._pytree.tree_leaves(result), torch.utils._pytree.tree_leaves(expected)):
        assert not isinstance(other, torch.Tensor) or one.stride() == other.stride()
    calls = fused_calls(lambda: fast(x.clone()))
    if expected_ops is not None:
        assert len(calls) == expected_ops
    return fast, given


# --- shapes of addition


def test_every_way_to_write_an_addition():
    def residual(add):
        return lambda self, x: self.relu(add(self.bn1(self.conv1(x)), x))

    ways = [
        operator.add,
        lambda a, b: b + a,
        torch.add,
        lambda a, b: a.add(b),
        lambda a, b: a.add_(b),
        operator.iadd,
    ]
    for way in ways:
        fast, _ = check(residual(way), expected_ops=1)
        assert "add" in str(resnet_fast.explain(fast).rows[0].steps)


@pytest.mark.parametrize(
    "relu", [F.relu, torch.relu, torch.relu_, lambda y: y.relu(), lambda y: F.relu(y, inplace=True)]
)
def test_every_way_to_write_a_relu(relu):
    fast, _ = check(lambda self, x: relu(self.bn1(self.conv1(x))), expected_ops=1)
    (step,) = resnet_fast.explain(fast).rows[0].steps
    assert step.startswith("conv1+bn1+relu: ")


def test_alpha_is_no_plain_addition():
    check(lambda self, x: torch.add(self.bn1(self.conv1(x)), x, alpha=0.5))


def test_adding_to_the_input_in_place_writes_to_the_input():
    def forward(self, x):
        x += self.bn1(self.conv1(x))
        return F.relu(x)

    stock = network(forward)
    fast, given = check(forward, expected_ops=0)
    assert resnet_fast.explain(fast).rows[0].reason == "its forward writes to its input"
    reference = X.clone()
    stock(reference)
    assert relative_error(given, reference) < 1e-6


@pytest.mark.parametrize("add", [operator.add, operator.iadd])
def test_a_sum_with_itself(add):
    def forward(self, x):
        y = self.bn1(self.conv1(x))
        return F.relu(add(y, y))

    check(forward)


def test_residual_that_broadcasts():
    def forward(self, x):
        return F.relu(self.bn1(self.conv1(x)) + x.mean((2, 3), keepdim=True))

    check(forward)


def test_branch_smaller_than_the_residual():
    """A pooled branch added to the full-size input: the sum is larger than the convolution's output."""

    def forward(self, x):
        return F.relu(self.bn1(self.conv1(F.adaptive_avg_pool2d(x, 1))) + x)

    check(forward)


def test_both_operands_are_convolutions():
    def forward(self, x):
        return self.relu(self.bn1(self.conv1(x)) + self.bn2(self.conv2(x)))

    check(forward, expected_ops=2)


def _shortcut_last(self, x):
    return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + self.bn3(self.conv3(x)))


def _shortcut_first(self, x):
    return F.relu(self.bn3(self.conv3(x)) + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


def _added_to_the_shortcut(self, x):
    y = self.bn3(self.conv3(x))
    y += self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
    return F.relu(y)


@pytest.mark.parametrize(
    ("forward", "end", "in_training"),
    [(_shortcut_last, "conv2", 1), (_shortcut_first, "conv2", 1), (_added_to_the_shortcut, "conv3", 2)],
)
def test_which_convolution_ends_in_the_addition(forward, end, in_training):
    """The main path's, which has more of them, whichever is written first; but what is added to in place keeps it."""
    fast, _ = check(forward, expected_ops=3, conv3=nn.Conv2d(8, 8, 1), bn3=nn.BatchNorm2d(8))
    (step,) = (step for step in resnet_fast.explain(fast).rows[0].steps if "add" in step)
    assert step.startswith(f"{end}+")
    assert fused_calls(lambda: fast.train()(X)) == ["residual_block"] * in_training


def test_scalar_addition_is_left_alone():
    check(lambda self, x: F.relu(self.bn1(self.conv1(x)) + 1.5), expected_ops=1)


# --- values used twice, and writes in between


def test_output_of_the_norm_used_twice():
    def forward(self, x):
        y = self.bn1(self.conv1(x))
        return F.relu(y) + self.bn2(self.conv2(y))

    check(forward)


def test_output_of_the_convolution_used_twice():
    def forward(self, x):
        y = self.conv1(x)
        return self.bn1(y) + y

    check(forward, expected_ops=0)


def test_in_place_relu_between_a_convolution_and_its_sum():
    """Pre-activation style: ``x`` is overwritten after the convolution read it. Moving that would be wrong."""

    def forward(self, x):
        x = x * 2
        y = self.conv1(x)
        identity = self.relu(x)
        return self.bn1(y) + identity

    check(forward)


def test_pre_activation_block():
    def forward(self, x):
        out = self.conv1(F.relu(self.bn1(x)))
        return self.conv2(F.relu(self.bn2(out))) + x

    fast, _ = check(forward, expected_ops=2)
    steps = resnet_fast.explain(fast).rows[0].steps
    assert [step.partition(":")[0] for step in steps] == ["conv1+bn2+relu", "conv2+add"]


def test_modules_used_twice():
    def forward(self, x):
        x = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn1(self.conv1(x)))

    check(forward, expected_ops=2)


# --- what is not arithmetic


def test_writing_attributes_is_refused():
    """Grad-CAM style code stores activations: a program would not, and tracing must not leave its proxies behind."""

    def forward(self, x):
        self.features = self.relu(self.bn1(self.conv1(x)))
        return self.features

    fast, _ = check(forward, expected_ops=0)
    assert "writes to the attribute 'features'" in resnet_fast.explain(fast).rows[0].reason
    assert isinstance(fast.features, torch.Tensor)


def test_appending_to_a_list_is_refused():
    def forward(self, x):
        y = self.relu(self.bn1(self.conv1(x)))
        self.seen.append(y)
        return y

    model = network(forward)
    model.seen = []
    resnet_fast.accelerate(model)
    assert model.seen == []
    model(X)
    assert len(model.seen) == 1
    assert isinstance(model.seen[0], torch.Tensor)


def test_control_flow_on_values_is_refused():
    def forward(self, x):
        y = self.relu(self.bn1(self.conv1(x)))
        return y if y.sum() > 0 else -y

    fast, _ = check(forward, expected_ops=0)
    assert "could not be traced" in resnet_fast.explain(fast).rows[0].reason


def test_control_flow_on_training_is_traced_as_in_eval():
    def forward(self, x):
        y = self.relu(self.bn1(self.conv1(x)))
        return F.dropout(y, 0.5, self.training) * (100 if self.training else 1)

    model = network(forward).train()
    resnet_fast.accelerate(model)
    assert model.training
    model.eval()
    assert relative_error(model(X), network(forward)(X)) < 1e-5
    assert fused_calls(lambda: model(X)) == ["conv_bn_act"]


def test_a_setting_changed_later_counts():
    def forward(self, x):
        y = self.relu(self.bn1(self.conv1(x)))
        return y + x if self.use_residual else y

    model = network(forward)
    model.use_residual = True
    resnet_fast.accelerate(model)
    with_residual = model(X)
    model.use_residual = False
    assert relative_error(with_residual - model(X), X) < 1e-5
    assert fused_calls(lambda: model(X)) == ["conv_bn_act"]


def test_a_child_added_later_counts():
    def forward(self, x):
        y = self.relu(self.bn1(self.conv1(x)))
        return y if getattr(self, "attention", None) is None else self.attention(y)

    model = network(forward)
    resnet_fast.accelerate(model)
    before = model(X)
    model.attention = nn.Sigmoid()
    assert relative_error(model(X), before.sigmoid()) < 1e-5


def test_structured_results_and_several_inputs():
    def forward(self, x, scale=2.0, *, mask=None):
        y = self.relu(self.bn1(self.conv1(x))) * scale
        return {"out": y, "all": [y, (x if mask is None else x * mask)]}

    fast, _ = check(forward)
    stock = network(forward)
    mask = torch.rand(2, 1, 10, 12)
    assert relative_error(fast(X, 3.0, mask=mask), stock(X, 3.0, mask=mask)) < 1e-5


def test_kinds_of_dictionaries():
    class Output(dict):
        pass

    for kind in (dict, OrderedDict, Output):
        stock = network(lambda self, x, kind=kind: kind(out=self.bn1(self.conv1(x))))
        fast = resnet_fast.accelerate(stock, inplace=False)
        result = fast(X)
        assert type(result) is kind
        assert relative_error(result["out"], stock(X)["out"]) < 1e-5
        assert len(fused_calls(lambda fast=fast: fast(X))) == (kind is not Output)


def test_a_forward_with_only_optional_inputs_is_left_alone():
    """As Hugging Face writes them; there is no input to trace with. Its children are accelerated all the same."""

    def forward(self, x=None):
        return self.inner(self.relu(self.bn1(self.conv1(x))))

    inner = nn.Sequential(nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4))
    fast, _ = check(forward, expected_ops=1, inner=inner)
    assert "no required parameter" in resnet_fast.explain(fast).rows[0].reason


def test_a_parameter_of_its_own():
    def forward(self, x):
        return self.gamma * self.bn1(self.conv1(x)) + x

    def build():
        model = network(forward)
        model.gamma = nn.Parameter(torch.tensor(0.3))
        return model

    assert relative_error(accelerated(build())(X), build()(X)) < 1e-5


# --- layout


class Viewer(nn.Module):
    """Unknown code that reads the layout of its input."""

    def forward(self, x):
        return x.view(x.shape[0], -1)[:, :16].view(-1, 2, 2, 4)


@pytest.mark.parametrize("x", [X, X[:, :, ::2, 1:], X.expand(2, 8, 10, 12)], ids=["contiguous", "sliced", "expanded"])
def test_unknown_code_sees_the_stock_layout(x):
    def forward(self, x):
        y = self.relu(self.bn1(self.conv1(x)))
        return y.view(y.shape[0], -1), self.viewer(y), y.stride(), y.is_contiguous(), y.reshape(-1)

    check(forward, expected_ops=1, x=x, viewer=Viewer())


def test_results_come_in_the_layout_of_the_input():
    def forward(self, x):
        return self.relu(self.bn1(self.conv1(x)))

    for layout in (torch.contiguous_format, torch.channels_last):
        check(forward, expected_ops=1, x=X.contiguous(memory_format=layout))


# --- Sequential


def test_sequential_networks():
    torch.manual_seed(0)
    stock = nn.Sequential(
        nn.Sequential(nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4), nn.ReLU()),
        nn.Identity(),
        nn.Sequential(nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6), nn.Identity(), nn.ReLU()),
        nn.Flatten(),
    )
    randomise_norms(stock).eval()
    fast = accelerated(stock)
    assert relative_error(fast(X), stock(X)) < 1e-5
    assert fused_calls(lambda: fast(X)) == ["conv_bn_act"] * 2
    assert type(fast[0]) is nn.Sequential
    fast[0].append(nn.Hardtanh(0, 0.1))
    stock[0].append(nn.Hardtanh(0, 0.1))
    assert relative_error(fast(X), stock(X)) < 1e-5


def test_hook_on_an_inlined_sequential_fires():
    model = nn.Sequential(nn.Sequential(nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4)), nn.ReLU()).eval()
    resnet_fast.accelerate(model)
    seen = []
    model[0].register_forward_hook(lambda *_: seen.append(1))
    model(X)
    assert seen == [1]


def test_the_program_can_be_read():
    fast = accelerated(network(lambda self, x: self.relu(self.bn1(self.conv1(x)))))
    program = fast.__dict__["_resnet_fast_state"].eval
    assert isinstance(program, Program)
    assert "conv_bn_act(" in program.source
    assert program.rest == []


# --- what a graph does not record -------------------------------------------------------------------------------------


def _body(self, x):
    return self.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


def test_gradients_switched_off_stay_off():
    def forward(self, x):
        with torch.no_grad():
            x = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(x)))

    fast, _ = check(forward, 0)
    with torch.no_grad():
        resnet_fast.accelerate(fast)  # as well where they are off anyway
    fast.train()(X).sum().backward()
    assert fast.conv1.weight.grad is None
    assert fast.conv2.weight.grad is not None


@pytest.mark.parametrize("kwargs", [{"use_reentrant": False}, {"use_reentrant": True}], ids=str)
def test_checkpoints_are_kept(kwargs):
    def forward(self, x):
        return checkpoint(lambda x: _body(self, x), x, **kwargs)

    fast, _ = check(forward, 0)
    fast.train()(X.clone().requires_grad_()).sum().backward()
    assert fast.bn1.num_batches_tracked == 2  # recomputed


@pytest.mark.parametrize("inside", [False, True])
def test_autocast_of_its_own(inside):
    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            return _body(self, x.float())

    fast, _ = check(forward, 0)
    with torch.autocast("cpu", torch.bfloat16, enabled=not inside):
        assert fast(X).dtype == (torch.bfloat16 if inside else torch.float32)
    assert not torch.is_autocast_enabled("cpu")
    assert torch.get_autocast_dtype("cpu") == torch.bfloat16
