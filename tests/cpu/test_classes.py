"""The class of an accelerated module: whoever asks sees the class that it was made from, and its code as it is now."""

import abc
import copy
import pickle
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.models import resnet
from torchvision.models.feature_extraction import create_feature_extractor

import resnet_fast
from resnet_fast.graph.conditions import Accelerated
from tests.cpu.small_models import images, randomise_norms, relative_error, small_resnet

X = images(4, 3, 64, 64)


def assert_close(result: torch.Tensor, expected: torch.Tensor) -> None:
    assert relative_error(result.double(), expected.double()) < 1e-4  # Winograd's, in a whole network


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)))


class Heir(Net):
    def forward(self, x):
        return super(self.__class__, self).forward(x)


@pytest.mark.parametrize("training", [False, True])
def test_the_class_is_the_stock_one(training):
    """``super(self.__class__, self)``, as old code has it, would come back to the same forward for ever."""
    fast = resnet_fast.accelerate(randomise_norms(Heir()).train(training))
    stock = resnet_fast.restore(fast, inplace=False)
    assert isinstance(fast, Accelerated) and isinstance(fast, Heir)
    assert fast.__class__ is Heir and type(stock) is Heir
    assert_close(fast(X), stock(X))
    assert_close(torch.jit.trace(fast, X, check_trace=False)(X), stock(X))  # by the stock forward
    fast.conv.register_forward_hook(lambda *args: None)
    assert_close(fast(X), stock(X))


def test_no_hook_of_a_class_is_told():
    """Registries that ``__init_subclass__`` or a metaclass keeps, and keywords that they require."""
    made = []

    class Meta(abc.ABCMeta):
        def __new__(meta, name, bases, namespace, **keywords):
            made.append(name)
            return super().__new__(meta, name, bases, namespace, **keywords)

        def __init__(cls, name, bases, namespace, **keywords):
            super().__init__(name, bases, namespace)
            made.append(cls)

    class Registered(Net, metaclass=Meta):
        def __init_subclass__(cls, *, key, **keywords):
            super().__init_subclass__(**keywords)
            made.append(key)

    class Mine(Registered, key="mine"):
        pass

    before = list(made)
    model = Mine().eval()
    expected = model(X)
    assert_close(resnet_fast.accelerate(model)(X), expected)
    assert made == before
    assert isinstance(model, Mine) and isinstance(model, Accelerated) and not isinstance(model, dict)


# --- patched code -----------------------------------------------------------------------------------------------------


class Mine(Net):
    """To be patched."""

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)))


class Holds(nn.Module):
    """Opens, or calls, what may be patched."""

    def __init__(self) -> None:
        super().__init__()
        self.mine, self.conv, self.bn, self.act = Mine(), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU()

    def forward(self, x):
        return self.act(self.bn(self.conv(self.mine(x))))


PATCHES = {
    "of the model": (Holds, lambda self, x: self.mine(x) * 2),
    "of a child": (Mine, lambda self, x: self.bn(self.conv(x)) - 1),
    "ReLU's": (nn.ReLU, lambda self, x: x.clamp(min=-0.5)),
    "Conv2d's": (nn.Conv2d, lambda self, x: F.conv2d(x, self.weight * 2, self.bias)),
    "BatchNorm2d's": (nn.BatchNorm2d, lambda self, x: x * self.weight.view(-1, 1, 1)),
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("when", ["before", "after", "and called", "and undone"])
@pytest.mark.parametrize(("cls", "forward"), PATCHES.values(), ids=PATCHES)
def test_a_forward_that_is_patched_into_a_class_is_run(cls, forward, when, training, monkeypatch):
    """As guided backpropagation, relevance propagation and Jupyter's autoreload do it."""
    fast = randomise_norms(Holds()).train(training)
    stock = copy.deepcopy(fast)
    with torch.set_grad_enabled(training):
        if when != "before":
            resnet_fast.accelerate(fast)
        if when in ("and called", "and undone"):
            assert_close(fast(X), stock(X))
        with monkeypatch.context() as context:
            context.setattr(cls, "forward", forward)
            if when == "before":
                resnet_fast.accelerate(fast)
            for _ in range(2):
                assert_close(fast(X), stock(X))
        if when == "and undone":
            assert_close(fast(X), stock(X))


# --- graph modules ----------------------------------------------------------------------------------------------------


def _extractor():
    return create_feature_extractor(randomise_norms(small_resnet()).eval(), {"layer1": "low", "layer4": "high"})


OPERATIONS = {
    "none": lambda module: module,
    "deepcopy": lambda module: copy.deepcopy(module).eval(),  # torchvision's own copies are in training mode
    "pickle": lambda module: pickle.loads(pickle.dumps(module)).eval(),
    "recompile": lambda module: module.recompile() and module,
    "train and eval": lambda module: module.train().eval(),
    "accelerate again": resnet_fast.accelerate,
    "restore": resnet_fast.restore,
}


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
@pytest.mark.parametrize("called", [False, True])
def test_feature_extractors(operation, called):
    """They are graph modules, each of a class of its own, into which they write their code."""
    fast, stock = resnet_fast.accelerate(_extractor()), _extractor()
    with torch.no_grad():
        if called:
            fast(X)
        fast = operation(fast)
        for _ in range(2):
            for name, expected in stock(X).items():
                assert_close(fast(X)[name], expected)
    exact = copy.deepcopy(stock).double().train()
    for name, expected in exact(X.double()).items():
        error, own = (relative_error(model.train()(X)[name].double(), expected) for model in (fast, stock))
        assert error < 10 * own  # Winograd's is 5 times PyTorch's in one layer


def test_a_graph_that_was_changed_is_run():
    fast = resnet_fast.accelerate(torch.fx.symbolic_trace(Net().eval()))
    before = fast(X)
    relu = next(node for node in fast.graph.nodes if node.target is F.relu)
    relu.replace_all_uses_with(relu.args[0])
    fast.graph.erase_node(relu)
    fast.recompile()
    assert fast(X).min() < 0 <= before.min()
    assert_close(fast(X).relu(), before)


# --- files ------------------------------------------------------------------------------------------------------------

LOADS = """
import sys
sys.modules["resnet_fast"] = None  # importing it raises
import torch, torchvision
x, expected = torch.load(sys.argv[2])
torch.serialization.add_safe_globals([torchvision.models.ResNet, torchvision.models.resnet.BasicBlock, torch.nn.Conv2d,
    torch.nn.BatchNorm2d, torch.nn.ReLU, torch.nn.MaxPool2d, torch.nn.AdaptiveAvgPool2d, torch.nn.Linear,
    torch.nn.Sequential])
for weights_only in (False, True):
    model = torch.load(sys.argv[1], weights_only=weights_only)
    assert type(model) is torchvision.models.ResNet and type(model.layer1[0]) is torchvision.models.resnet.BasicBlock
    torch.testing.assert_close(model(x), expected, rtol=1e-3, atol=1e-3)
"""


def test_a_saved_model_is_the_stock_one(tmp_path):
    """``torch.save`` of a whole model writes a file for everybody; other pickles are accelerated again."""
    model = resnet_fast.accelerate(torchvision.models.resnet18().eval())
    with torch.no_grad():
        torch.save((X, model(X)), tmp_path / "expected.pt")
    torch.save(model, tmp_path / "model.pt")
    done = subprocess.run(
        [sys.executable, "-c", LOADS, tmp_path / "model.pt", tmp_path / "expected.pt"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert type(torch.load(tmp_path / "model.pt", weights_only=False)) is resnet.ResNet
    assert isinstance(pickle.loads(pickle.dumps(model)), Accelerated)
    assert isinstance(copy.deepcopy(model), Accelerated)
