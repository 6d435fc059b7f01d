"""The whole network as one native program: the stock results, in one call, as long as nothing has changed."""

import copy
import gc
import pickle
import random
import threading
import weakref
from collections import OrderedDict, deque

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from torch import fx, nn
from torchvision.models import resnet

import resnet_fast
from resnet_fast import network
from resnet_fast.graph.program import STATE
from resnet_fast.graph.state import state_of
from resnet_fast.kernels import packing
from resnet_fast.kernels.native import abi, library, planner
from resnet_fast.network import memory, schedule
from resnet_fast.network.lowering import Lowering
from resnet_fast.network.steps import Image, Storage
from tests.cpu.small_models import SEED, images, randomise_norms, relative_error, small_resnet

pytestmark = pytest.mark.skipif(library.unavailable() is not None, reason=str(library.unavailable()))

TOLERANCE = 5e-5  # Winograd's, against float64
X = images()


@pytest.fixture
def runs(monkeypatch):
    """How many operations each program that ran had."""
    counts = []
    run = library.run

    def counted(ops, count, buffers, threads):
        counts.append(count)
        run(ops, count, buffers, threads)

    monkeypatch.setattr(library, "run", counted)
    return counts


def planned(model, x=X):
    """An accelerated copy that has run ``x`` as one program."""
    fast = resnet_fast.accelerate(model.eval(), inplace=False)
    with torch.inference_mode():
        fast(x)
    assert isinstance(network.last_plan(fast), network.Plan), network.last_plan(fast)
    return fast


def check(fast, stock, x=X, tolerance=TOLERANCE):
    """One call of ``fast`` against ``stock`` in float64; layout and kind of the results as well."""
    with torch.inference_mode():
        result, expected = fast(x), copy.deepcopy(stock).double()(x.double())
    results, expecteds = (torch.utils._pytree.tree_leaves(value) for value in (result, expected))
    for y, other in zip(results, expecteds):
        if isinstance(other, torch.Tensor):
            assert relative_error(y.double(), other) < tolerance
            assert y.is_contiguous() == other.is_contiguous()
            assert y.dtype == torch.float32
        else:
            assert y == other
    return result


def one_program(fast, runs, x=X):
    runs.clear()
    with torch.inference_mode():
        fast(x)
    return len(runs) == 1


# --- the models people have -------------------------------------------------------------------------------------------

MODELS = [
    *("resnet18", "resnet34", "resnet50", "resnext50_32x4d", "wide_resnet50_2"),
    *("timm:resnet18", "timm:resnet50d", "timm:resnet26t", "timm:resnext50_32x4d", "timm:resnetrs50"),
]
UNPLANNED = {"timm:resnetrs50"}  # squeeze-and-excitation


@pytest.mark.parametrize("name", MODELS)
def test_models(name, runs):
    torch.manual_seed(SEED)
    if name.startswith("timm:"):
        stock = timm.create_model(name.removeprefix("timm:"), pretrained=False)
    else:
        stock = torchvision.models.get_model(name, weights=None)
    randomise_norms(stock).eval()
    fast = resnet_fast.accelerate(stock, inplace=False)
    for x in (images(1, 3, 64, 64), images(2, 3, 33, 47).contiguous(memory_format=torch.channels_last)):
        check(fast, stock, x)
        assert one_program(fast, runs, x) == (name not in UNPLANNED), network.last_plan(fast)


@pytest.mark.parametrize("block", [resnet.BasicBlock, resnet.Bottleneck])
@pytest.mark.parametrize("size", [(1, 3, 1, 1), (1, 3, 32, 32), (3, 3, 33, 65), (2, 3, 64, 17)])
def test_sizes(block, size, runs):
    stock = small_resnet(block)
    fast = planned(stock, images(*size))
    check(fast, stock, images(*size, seed=1))
    assert one_program(fast, runs, images(*size))


INPUTS = {
    "contiguous": X,
    "channels_last": X.contiguous(memory_format=torch.channels_last),
    "sliced": images(4, 3, 70, 70)[1:3, :, 3:67, 5:69],
    "stepped": images(2, 3, 64, 128)[..., ::2],
    "expanded": images(1, 3, 64, 64).expand(2, 3, 64, 64),
    "transposed": X.transpose(2, 3),
    "channels of six": images(2, 6, 64, 64)[:, 1:4],
    "pixels of a larger channels_last": images(2, 4, 64, 64).contiguous(memory_format=torch.channels_last)[:, :3],
}


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("take", ["whole", "layer2"])
def test_input_layouts(name, take, runs):
    stock = small_resnet()
    x = INPUTS[name]
    if take == "layer2":
        stock, x = stock.layer2[0], torch.cat([x] * 22, 1)[:, :64] if name == "contiguous" else x.repeat(1, 22, 1, 1)
        x = x[:, :64] if x.shape[1] != 64 else x
    fast = planned(stock, x)
    check(fast, stock, x)
    assert one_program(fast, runs, x)


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_input_channels(channels, runs):
    stock = small_resnet()
    stock.conv1 = nn.Conv2d(channels, 64, 7, 2, 3, bias=False)
    fast = planned(stock, images(2, channels, 40, 40))
    check(fast, stock, images(2, channels, 40, 40, seed=1))
    assert one_program(fast, runs, images(2, channels, 40, 40))


def test_empty_batch_and_errors_go_the_old_way(runs):
    stock = small_resnet()
    fast = planned(stock)
    runs.clear()
    with torch.inference_mode():
        assert fast(X[:0]).shape == (0, 7)
        for wrong in (X[0], images(2, 4, 64, 64), X.double(), None):
            with pytest.raises((RuntimeError, ValueError, TypeError)):
                fast(wrong)
        with pytest.raises(TypeError):
            fast(X, X)
    assert one_program(fast, runs)


def test_half_precision_goes_the_old_way():
    fast = planned(small_resnet()).bfloat16()
    with torch.inference_mode():
        assert fast(X.bfloat16()).dtype == torch.bfloat16


def test_weights_converted_after_planning():
    """``double()`` replaces the data of the same parameters, and ``float()`` brings them back."""
    stock = small_resnet()
    fast = planned(stock)
    with torch.inference_mode():
        fast.double()
        assert relative_error(fast(X.double()), stock.double()(X.double())) < 1e-12
        with pytest.raises(RuntimeError):
            fast(X)
    check(fast.float(), stock.float())


# --- results are the caller's -----------------------------------------------------------------------------------------


def test_results_are_not_overwritten(runs):
    fast = planned(small_resnet())
    inputs = [images(seed=seed) for seed in range(4)]
    with torch.inference_mode():
        results = [fast(x) for x in inputs]
        kept = [y.clone() for y in results]
        given = [x.clone() for x in inputs]
        again = [fast(x) for x in inputs]
    assert all(map(torch.equal, results, kept))
    assert all(map(torch.equal, results, again))
    assert all(map(torch.equal, inputs, given))
    assert len({y.data_ptr() for y in results}) == len(results)


def test_results_are_ordinary_tensors():
    fast = planned(small_resnet())
    with torch.no_grad():
        y = fast(X)
    assert not y.is_inference()
    assert not y.requires_grad
    y.add_(1)
    with torch.inference_mode():
        assert fast(X).is_inference()
        assert fast(x=X).shape == y.shape


def test_default_dtype_and_device_of_the_caller_do_not_matter():
    fast, stock = planned(small_resnet()), small_resnet()
    torch.set_default_dtype(torch.float64)
    try:
        check(fast, stock)
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.device("meta"):
        check(fast, stock)


def test_threads_share_a_model():
    stock = small_resnet()
    fast = planned(stock)
    inputs = [images(1 + i % 2, 3, 48, 48, seed=i) for i in range(6)]
    with torch.inference_mode():
        expected = [stock(x) for x in inputs]
    wrong = []

    def work(i):
        with torch.inference_mode():
            for _ in range(10):
                error = relative_error(fast(inputs[i]), expected[i])
                if not error < TOLERANCE:
                    wrong.append((i, error))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_number_of_threads_is_obeyed(monkeypatch):
    fast, stock = planned(small_resnet()), small_resnet()
    seen = []
    run = library.run
    monkeypatch.setattr(library, "run", lambda *args: (seen.append(args[3]), run(*args)))
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            check(fast, stock)
    finally:
        torch.set_num_threads(before)
    assert seen == [1, 2, 3, 1]


# --- what changes between calls ---------------------------------------------------------------------------------------


def _sgd(model):
    model.train()
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    model(X).square().mean().backward()
    optimiser.step()
    model.eval()


def _fused_adam(model):
    """Writes without raising versions."""
    optimiser = torch.optim.Adam(model.parameters(), lr=0.01, fused=True)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimiser.step()
    model.zero_grad()


def _forward_in_training_mode(model):
    """Changes the running statistics and nothing else."""
    model.train()
    with torch.no_grad():
        model(X)
    model.eval()


def _no_grad(change):
    def changed(model):
        with torch.no_grad():
            change(model)

    return changed


def _assign(model):
    model.load_state_dict({k: v.clone() for k, v in small_resnet(seed=9).state_dict().items()}, assign=True)


def _swap_layers(model):
    model.layer1[0].conv1, model.layer1[0].conv2 = model.layer1[0].conv2, model.layer1[0].conv1


def _new_data(model):
    model.layer1[0].conv1.weight.data = model.layer1[0].conv1.weight.data * 1.5


def _vector_to_parameters(model):
    """As ``nn.utils.vector_to_parameters`` does it, into the memory that is there."""
    for parameter in model.parameters():
        parameter.data.view(-1)[parameter.numel() // 2 :] *= 0.5


CHANGES = {
    "optimiser": _sgd,
    "fused optimiser": _fused_adam,
    "running statistics": _forward_in_training_mode,
    "load_state_dict": lambda model: model.load_state_dict(small_resnet(seed=9).state_dict()),
    "load_state_dict, assign": _assign,
    "copy_": _no_grad(lambda model: model.layer2[0].conv1.weight.copy_(model.layer2[0].conv1.weight * 2)),
    "one element": _no_grad(lambda model: model.layer2[0].conv2.weight[-1, -1, -1, -1].add_(100)),
    ".data.mul_": lambda model: model.layer3[0].conv1.weight.data.mul_(1.5),
    ".data =": _new_data,
    ".data[0] =": lambda model: model.fc.weight.data.__setitem__(0, torch.randn(512)),
    ".data[5] =": lambda model: model.layer2[0].conv2.weight.data.__setitem__(5, 0),
    ".data[:, 5] =": lambda model: model.layer2[0].conv2.weight.data.__setitem__((slice(None), 5), 0),
    ".data[100:] +=": lambda model: model.layer4[0].bn1.running_mean.data[100:].add_(1),
    "numpy": lambda model: np.multiply(model.fc.bias.detach().numpy(), 2, out=model.fc.bias.detach().numpy()),
    "vector_to_parameters": _vector_to_parameters,
    "norm's weight": _no_grad(lambda model: model.bn1.weight.mul_(1.5)),
    "norm's bias": _no_grad(lambda model: model.layer4[0].bn2.bias.add_(0.5)),
    "norm's buffer": lambda model: model.layer4[0].bn1.running_var.mul_(3),
    "norm's buffer, replaced": lambda model: setattr(model.bn1, "running_mean", torch.full((64,), 0.5)),
    "norm's eps": lambda model: setattr(model.layer1[0].bn1, "eps", 0.5),
    "linear": _no_grad(lambda model: model.fc.bias.add_(1)),
    "parameter replaced": lambda model: setattr(model.fc, "weight", nn.Parameter(model.fc.weight.detach() * 2)),
    "stride": lambda model: setattr(model.layer1[0].conv1, "padding", (1, 1)),
    "layer replaced": lambda model: setattr(model, "fc", nn.Linear(512, 3)),
    "block replaced": lambda model: model.layer2.__setitem__(0, nn.Conv2d(64, 128, 1, 2)),
    "block appended": lambda model: model.layer4.append(copy.deepcopy(model.layer4[0]._modules["bn2"])),
    "layers swapped": _swap_layers,
    "pool's settings": lambda model: setattr(model.layer2[0].relu, "inplace", False),
    "norm removed": lambda model: setattr(model.layer1[0], "bn1", nn.Identity()),
    "branch removed": lambda model: setattr(model.layer2[0], "downsample", None),
    "frozen norm": lambda model: setattr(model.layer3[0], "bn1", torchvision.ops.FrozenBatchNorm2d(256)),
    "channels_last weights": lambda model: model.to(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changes_are_seen(name):
    fast, stock = planned(small_resnet()), small_resnet()
    with torch.inference_mode():
        before = fast(X)
    for model in (fast, stock):
        torch.manual_seed(0)
        CHANGES[name](model)
    if name == "branch removed":
        with pytest.raises(RuntimeError), torch.inference_mode():
            fast(X)
        return
    after = check(fast, stock, tolerance=1e-4)  # a training step differs in the last bits of the gradients
    harmless = name in ("stride", "pool's settings", "channels_last weights")
    assert torch.equal(before, after) == harmless
    check(fast, stock, tolerance=1e-4)


def test_writes_that_nothing_can_see_need_clear_all():
    """One element, in the middle of what contents.py leaves out."""
    fast, stock = planned(small_resnet()), small_resnet()
    before = check(fast, stock)
    for model in (fast, stock):
        model.layer1[0].conv1.weight.data.view(-1)[100] += 100
    with torch.inference_mode():
        assert torch.equal(fast(X), before), "seen now: clear_all may go"
    packing.clear_all()
    check(fast, stock)


def test_parameters_of_a_planned_model_can_be_swapped():
    fast, stock = planned(small_resnet()), small_resnet()
    check(fast, stock)
    for model in (fast, stock):
        torch.utils.swap_tensors(model.fc.weight, nn.Parameter(model.fc.weight.detach() * 2))
    check(fast, stock)


class _Sparse(nn.Module):
    """Every 5000th pixel of an image, after a ReLU of all."""

    def __init__(self, add: bool) -> None:
        super().__init__()
        self.conv, self.bn, self.add = nn.Conv2d(1, 1, 1, 5000), nn.BatchNorm2d(1), add

    def forward(self, x):
        return self.bn(self.conv(torch.add(x, x) if self.add else torch.relu(x)))


@pytest.mark.parametrize("add", [False, True])
def test_an_image_that_32_bits_cannot_count_is_not_planned(add):
    """The kernels would have taken its size modulo 2^32. One pixel stands for all: planning reads none."""
    fast = resnet_fast.accelerate(_Sparse(add).eval())
    pixel = torch.ones(1, 1, 1, 1)
    with torch.inference_mode():
        assert network.plan_for(fast, (pixel.expand(1, 1, 46300, 46300),), {}) is not None
        assert network.plan_for(fast, (pixel.expand(1, 1, 46400, 46400),), {}) is None
    assert "32 bits, and a size is 2152960000" in network.last_plan(fast)


def _hook(register):
    def change(model):
        seen = []
        getattr(model.layer1[0].bn1, register)(lambda *args: seen.append(1))
        return seen

    return change


def _instance_forward(model):
    bn = model.layer1[0].bn1
    seen = []
    forward = type(bn).forward
    bn.forward = lambda x: (seen.append(1), forward(bn, x))[1]
    return seen


def _block_forward(model):
    block = model.layer3[0]
    seen = []
    block.forward = lambda x: (seen.append(1), type(block).forward(block, x))[1]
    return seen


OBSERVERS = {
    "forward hook": _hook("register_forward_hook"),
    "forward pre-hook": _hook("register_forward_pre_hook"),
    "instance forward": _instance_forward,
    "instance forward of a block": _block_forward,
}


@pytest.mark.parametrize("name", OBSERVERS)
def test_observers_set_after_planning_are_called(name, runs):
    fast, stock = planned(small_resnet()), small_resnet()
    seen = OBSERVERS[name](fast)
    for call in range(1, 3):
        check(fast, stock)
        assert len(seen) == call
    assert not one_program(fast, runs)
    assert "no single program" in resnet_fast.explain(fast).network


def test_hooks_removed_again(runs):
    fast = planned(small_resnet())
    handle = fast.layer4[0].conv2.register_forward_hook(lambda *_: None)
    assert not one_program(fast, runs)
    handle.remove()
    assert one_program(fast, runs)


def test_hook_dictionary_replaced():
    """As some libraries do to get rid of hooks."""
    fast = planned(small_resnet())
    seen = []
    fast.layer1[0].bn1._forward_hooks = type(fast.layer1[0].bn1._forward_hooks)()
    fast.layer1[0].bn1.register_forward_hook(lambda *_: seen.append(1))
    with torch.inference_mode():
        fast(X)
    assert seen == [1]


def test_hooks_on_the_model_itself_run():
    fast, stock = planned(small_resnet()), small_resnet()
    for model in (fast, stock):
        model.register_forward_hook(lambda module, args, output: output * 2)
    check(fast, stock)


def test_global_hooks(runs):
    fast = planned(small_resnet())
    names = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: names.append(type(module).__name__))
    try:
        assert not one_program(fast, runs)
    finally:
        handle.remove()
    assert "Conv2d" in names
    assert one_program(fast, runs)


@pytest.mark.parametrize("part", ["", "layer2", "layer1.0", "layer1.0.bn1"])
def test_training_flags(part, runs):
    fast, stock = planned(small_resnet()), small_resnet()
    for model in (fast, stock):
        model.get_submodule(part).train()
    runs.clear()
    with torch.inference_mode():
        assert relative_error(fast(X), stock(X)) < TOLERANCE
    assert len(runs) != 1
    assert relative_error(list(fast.buffers()), list(stock.buffers())) < TOLERANCE
    for model in (fast, stock):
        model.eval()
    check(fast, stock)
    assert one_program(fast, runs)


def test_dropout(runs):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.drop, self.fc = small_resnet(), nn.Dropout(0.5), nn.Linear(7, 3)
            self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x):
            return self.fc(self.drop(self.body(self.bn(self.conv(x)))))

    torch.manual_seed(0)
    stock = Net().eval()
    fast = planned(stock)
    check(fast, stock)
    assert one_program(fast, runs)
    fast.drop.train()
    with torch.inference_mode():
        assert not torch.equal(fast(X), fast(X))


def test_modes_that_need_the_layers(runs):
    fast = planned(small_resnet())
    runs.clear()
    assert fast(X).requires_grad
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert fast(X).dtype == torch.bfloat16
    with torch.inference_mode():
        traced = torch.jit.trace(fast, X, check_trace=False)
    assert "conv" in str(traced.inlined_graph)
    assert all(count == 1 for count in runs)
    assert one_program(fast, runs)


def test_another_implementation_on_request(runs, monkeypatch):
    fast, stock = planned(small_resnet()), small_resnet()
    monkeypatch.setenv("RESNET_FAST_IMPLEMENTATION", "reference")
    check(fast, stock)
    runs.clear()
    assert not one_program(fast, runs)
    monkeypatch.setenv("RESNET_FAST_IMPLEMENTATION", "native")
    assert one_program(fast, runs)


def test_without_the_library(monkeypatch):
    monkeypatch.setattr(library, "unavailable", lambda: "not there")
    stock = small_resnet()
    fast = resnet_fast.accelerate(stock, inplace=False)
    with torch.inference_mode():
        fast(X)
    assert network.last_plan(fast) is None
    check(fast, stock)


# --- copies and lifetimes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "twin", [copy.deepcopy, copy.copy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "copy", "pickle"]
)
def test_copies_plan_for_themselves(twin, runs):
    fast, stock = planned(small_resnet()), small_resnet()
    other = twin(fast)
    check(other, stock)
    assert one_program(other, runs)
    assert network.last_plan(other) is not network.last_plan(fast)


def test_a_replica_with_parameters_of_its_own():
    """Data parallelism copies ``__dict__``, program and all."""
    block = planned(small_resnet().layer1[0], images(2, 64, 9, 9))
    replica = block._replicate_for_data_parallel()
    replica._modules = {name: copy.deepcopy(child) for name, child in block._modules.items()}
    with torch.no_grad():
        replica.conv1.weight.mul_(2)
    stock = small_resnet().layer1[0]
    check(block, stock, images(2, 64, 9, 9))
    with torch.no_grad():
        stock.conv1.weight.mul_(2)
    check(replica, stock, images(2, 64, 9, 9))


def test_restore_drops_the_plan(runs):
    fast = resnet_fast.restore(planned(small_resnet()))
    assert STATE not in fast.__dict__
    assert not one_program(fast, runs)


def test_the_model_dies_at_once():
    """A plan makes no reference cycle: weights go when the last reference to the model does."""
    fast = planned(small_resnet())
    block = planned(small_resnet().layer1[0], images(1, 64, 8, 8))
    gc.collect()
    gc.disable()
    try:
        dead = [weakref.ref(fast), weakref.ref(network.last_plan(fast)), weakref.ref(block)]
        del fast, block
        assert [reference() for reference in dead] == [None] * 3
    finally:
        gc.enable()


def test_few_plans_are_kept():
    fast, stock = planned(small_resnet()), small_resnet()
    plans = [weakref.ref(network.last_plan(fast))]
    for size in range(32, 44):
        check(fast, stock, images(1, 3, size, size))
        plans.append(weakref.ref(network.last_plan(fast)))
    gc.collect()
    assert 1 < sum(plan() is not None for plan in plans) <= 5


def test_shapes_share_packed_weights():
    fast = planned(small_resnet())
    packs = {}
    for batch in (1, 2, 3):
        with torch.inference_mode():
            fast(images(batch, 3, 64, 64))
        for step in network.last_plan(fast).steps:
            if step.pack is not None:
                packs.setdefault((step.path, step.algorithm), set()).add(step.pack.weight.data_ptr())
    assert all(len(addresses) == 1 for addresses in packs.values())


# --- networks of other shapes -----------------------------------------------------------------------------------------


def test_detection_backbone(runs):
    body = torchvision.models.resnet50(norm_layer=torchvision.ops.FrozenBatchNorm2d)
    backbone = torchvision.models.detection.backbone_utils._resnet_fpn_extractor(body, 3)
    stock = randomise_norms(backbone).eval()
    fast = resnet_fast.accelerate(stock, inplace=False)
    x = images(1, 3, 64, 96)
    result = check(fast.body, stock.body, x)
    assert list(result) == ["0", "1", "2", "3"]
    assert type(result) is OrderedDict
    assert one_program(fast.body, runs, x)
    check(fast, stock, x)
    check(fast.body, stock.body, x.contiguous(memory_format=torch.channels_last))


def test_blocks_of_an_unplanned_network_are_planned(runs):
    stock = torchvision.models.segmentation.fcn_resnet50(weights=None, weights_backbone=None)
    randomise_norms(stock).eval()
    fast = resnet_fast.accelerate(stock, inplace=False)
    check(fast, stock, images(1, 3, 64, 64))
    assert isinstance(network.last_plan(fast.backbone), network.Plan)


class Block(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, stride, 1), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.AvgPool2d(stride, ceil_mode=True), nn.Conv2d(inputs, outputs, 1))

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return F.relu(out)


class Head(nn.Module):
    """A container that nothing is fused in."""

    def __init__(self, channels):
        super().__init__()
        self.pool, self.flatten, self.linear = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 5)

    def forward(self, x):
        return self.linear(self.flatten(self.pool(x)))


class UserNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 20, 3, 1, 1, bias=False), nn.BatchNorm2d(20)
        self.layers = nn.Sequential(Block(20, 20, 1), Block(20, 36, 2), Block(36, 36, 1))
        self.head, self.auxiliary = Head(36), nn.Linear(36 * 4, 3)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1, ceil_mode=True)
        x = self.layers(x)
        y = F.avg_pool2d(x, x.shape[2] // 2)
        return {"main": self.head(x), "features": x, "aux": self.auxiliary(y.view(y.size(0), -1))}


def _follows_sizes() -> bool:
    try:
        fx.symbolic_trace(lambda x: F.avg_pool2d(x, x.shape[2] // 2))
    except TypeError:  # PyTorch 2.8
        return False
    return True


@pytest.mark.skipif(not _follows_sizes(), reason="fx cannot follow a pooling whose window an image decides")
@pytest.mark.parametrize("size", [16, 24])
def test_a_network_of_ones_own(size, runs):
    torch.manual_seed(0)
    stock = randomise_norms(UserNet()).eval()
    x = images(2, 3, size, size)
    fast = planned(stock, x)
    check(fast, stock, x)
    assert one_program(fast, runs, x)


@pytest.mark.parametrize("algorithm", ["gemm", "winograd2", "winograd4"])
def test_convolutions_without_norm_and_bias(algorithm, runs):
    """The kernels take a shift that is never null."""
    torch.manual_seed(0)
    conv, plain = nn.Conv2d(3, 20, 3, padding=1, bias=False), nn.Conv2d(20, 9, 3, padding=1, bias=False)
    stock = nn.Sequential(conv, nn.BatchNorm2d(20), nn.ReLU(), plain).eval()
    x = images(2, 3, 16, 16)
    with planner.forced(algorithm):
        fast = planned(stock, x)
        check(fast, stock, x)
        assert one_program(fast, runs, x)
        assert network.last_plan(fast).algorithms == {("0",): algorithm, ("3",): algorithm}


class Router(nn.Module):
    """Nothing is fused in it, and its forward depends on a list, whose changes are watched."""

    def __init__(self):
        super().__init__()
        self.layers, self.order = nn.ModuleList([nn.MaxPool2d(2), nn.ReLU()]), [0]

    def forward(self, x):
        for i in self.order:
            x = self.layers[i](x)
        return x


def test_a_list_that_is_changed_makes_another_plan():
    torch.manual_seed(0)
    stock = randomise_norms(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), Router())).eval()
    fast = resnet_fast.accelerate(stock, inplace=False)
    check(fast, stock)
    for model in (fast, stock):
        model[2].order.append(1)
    before = network.last_plan(fast)
    check(fast, stock)
    assert isinstance(network.last_plan(fast), network.Plan) and network.last_plan(fast) is not before


class Awkward(nn.Module):
    def __init__(self, forward):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.bn, self.relu = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True)
        self.pool, self.plain = nn.MaxPool2d(3, 2, 1), nn.Conv2d(6, 4, 1)
        self.compute = forward
        randomise_norms(self).eval()

    def forward(self, x):
        return self.compute(self, x)


def _written_twice(self, x):
    """The ReLU writes over what is added again."""
    y = self.bn(self.conv(x))
    z = self.relu(self.pool(y))
    return z, y


def _reads_what_was_overwritten(self, x):
    y = self.plain(self.bn(self.conv(x)))
    z = F.relu(y, inplace=True)
    return self.pool(y) + self.pool(z)


AWKWARD = {
    "two results": (_written_twice, True),
    "in place": (_reads_what_was_overwritten, False),
    "the same result twice": (lambda self, x: [y := self.bn(self.conv(x)), y], True),
    "a view as a result": (lambda self, x: (y := self.pool(self.bn(self.conv(x))), y.flatten(1)), None),
    "its input": (lambda self, x: (self.bn(self.conv(x)), x), False),
    "a number": (lambda self, x: (self.bn(self.conv(x)), 3), False),
    "mean": (lambda self, x: self.bn(self.conv(x)).mean((2, 3)), True),
    "mean, dimensions kept": (lambda self, x: self.plain(self.bn(self.conv(x)).mean((2, 3), keepdim=True)), True),
    "convolution without a norm": (lambda self, x: torch.relu(self.plain(self.bn(self.conv(x)))), True),
    "sum of branches": (lambda self, x: self.pool(self.bn(self.conv(x))) + F.max_pool2d(x, 3, 2, 1), True),
    "sum that broadcasts": (lambda self, x: self.bn(self.conv(x)) + x.mean((2, 3), keepdim=True), False),
    "sum with a number": (lambda self, x: F.relu(self.bn(self.conv(x)) + 1), False),
    "average with padding": (lambda self, x: F.avg_pool2d(self.bn(self.conv(x)), 3, 2, 1), False),
    "average of inside pixels": (
        lambda self, x: F.avg_pool2d(self.bn(self.conv(x)), 3, 2, 1, count_include_pad=False),
        True,
    ),
    "average, rounded up": (lambda self, x: F.avg_pool2d(self.bn(self.conv(x)), 2, ceil_mode=True), True),
    "maximum, rounded up": (lambda self, x: F.max_pool2d(self.bn(self.conv(x)), 3, 2, 0, 1, True), True),
    "maximum, dilated": (lambda self, x: F.max_pool2d(self.bn(self.conv(x)), 2, 1, 0, 2), False),
    "dropout in training": (lambda self, x: F.dropout(self.bn(self.conv(x)), 0.0, True), False),
    "softmax": (lambda self, x: self.bn(self.conv(x)).softmax(1), False),
    "reshape": (lambda self, x: self.bn(self.conv(x)).reshape(x.shape[0], -1), True),
    "view": (lambda self, x: self.bn(self.conv(x)).view(-1, 6 * 9 * 11), None),
    "nothing left of the convolution": (lambda self, x: (self.bn(self.conv(x)), self.pool(x))[1], True),
}


@pytest.mark.parametrize("name", AWKWARD)
def test_awkward_forwards(name, runs):
    forward, plannable = AWKWARD[name]
    x = images(2, 6, 9, 11)
    stock = Awkward(forward)
    fast = resnet_fast.accelerate(stock, inplace=False)
    for _ in range(2):
        check(fast, stock, x)
    if plannable is not None:
        assert isinstance(network.last_plan(fast), network.Plan) == plannable, network.last_plan(fast)


def test_small_rectangles_and_strides():
    """Plain networks of random geometry, through the planner and its kernels."""
    generator = random.Random(SEED)
    print("seed", SEED)
    for _ in range(25):
        groups = generator.choice([1, 1, 1, 2, 4])
        c, k = groups * generator.randint(1, 9), groups * generator.randint(1, 20)
        kernel = (generator.randint(1, 4), generator.randint(1, 4))
        settings = {
            "stride": (generator.randint(1, 3), generator.randint(1, 2)),
            "padding": (generator.randint(0, 2), generator.randint(0, 2)),
            "dilation": (generator.randint(1, 2), 1),
            "groups": groups,
        }
        torch.manual_seed(generator.randint(0, 10**9))
        stock = nn.Sequential(nn.Conv2d(c, k, kernel, **settings), nn.BatchNorm2d(k), nn.ReLU(), nn.Conv2d(k, 3, 1))
        randomise_norms(stock).eval()
        x = images(generator.randint(1, 3), c, generator.randint(8, 15), generator.randint(8, 15))
        fast = planned(stock, x)
        check(fast, stock, x)


@pytest.mark.parametrize("algorithm", ["gemm", "winograd2"])
def test_the_planner_is_asked_again(algorithm, runs):
    """Other choices make another plan."""
    fast, stock = planned(small_resnet()), small_resnet()
    with planner.forced(algorithm):
        check(fast, stock)
        assert algorithm in network.last_plan(fast).algorithms.values()
        assert one_program(fast, runs)
    before = network.last_plan(fast)
    check(fast, stock)
    assert network.last_plan(fast) is not before


def test_no_plan_where_pytorchs_convolutions_are_asked_for(runs):
    fast, stock = planned(small_resnet()), small_resnet()
    with planner.forced(planner.ONEDNN):
        check(fast, stock)
        assert not one_program(fast, runs)
    assert one_program(fast, runs)


def test_explain_says_what_ran():
    fast = resnet_fast.accelerate(small_resnet(), inplace=False)
    assert "not planned yet" in resnet_fast.explain(fast).network
    with torch.inference_mode():
        fast(X)
    explanation = resnet_fast.explain(fast)
    assert "one native program" in explanation.network
    assert "[2, 3, 64, 64]" in str(explanation)
    steps = [step for row in explanation.rows for step in row.steps if "conv" in step]
    assert all(step.split(": native ")[1] in abi.ALGORITHMS for step in steps)
    assert explanation.as_dict()["network"] == explanation.network


# --- memory -----------------------------------------------------------------------------------------------------------

INTERVALS = st.lists(
    st.tuples(st.integers(0, 30), st.integers(0, 8), st.integers(1, 5000)).map(
        lambda t: memory.Interval(t[0], t[0] + t[1], t[2])
    ),
    max_size=40,
)


@given(INTERVALS)
def test_values_alive_at_once_lie_apart(intervals):
    offsets, total = memory.assign(intervals)
    assert all(offset % memory.ALIGNMENT == 0 for offset in offsets)
    assert all(offset + interval.size <= total for offset, interval in zip(offsets, intervals))
    placed = list(zip(intervals, offsets))
    for i, (one, at) in enumerate(placed):
        for other, other_at in placed[:i]:
            if one.first <= other.last and other.first <= one.last:
                assert at + one.size <= other_at or other_at + other.size <= at


def test_a_chain_needs_two_places():
    _, total = memory.assign([memory.Interval(i, i + 1, 640) for i in range(20)])
    assert total == 2 * 640


@pytest.mark.parametrize("images_at_a_time", [5, 2, 1])
@pytest.mark.parametrize("block", [resnet.BasicBlock, resnet.Bottleneck])
def test_no_step_writes_over_what_is_read_later(block, images_at_a_time, split_at):
    """The finished program, operation by operation: whatever is read was written by the part that should have."""
    split_at(9, images_at_a_time)
    plan = network.last_plan(planned(small_resnet(block), images(5, 3, 64, 64)))
    written = {}  # byte of the arena, in units of 64 -> (storage, first image, its offset)
    for part, op in zip(plan.parts, plan._ops):
        step = part.step
        for storage, ref in ((step.x, op.x), (step.residual, op.residual)):
            if storage is not None and ref.buffer == 0:
                assert all(_wrote(written, unit, storage, part) for unit in _units(storage, ref, part))
        if op.y.buffer == 0:
            mine = _units(step.y, op.y, part)
            assert op.x.buffer != 0 or not set(_units(step.x, op.x, part)) & set(mine)
            written.update(dict.fromkeys(mine, (step.y, part.first, part.first + part.images)))


def _wrote(written, unit, storage, part):
    """Whether the unit holds that value, of images that the part reads."""
    value, first, end = written[unit]
    return value is storage and part.first <= first and end <= part.first + part.images


def _units(storage, ref, part):
    size = 4 * storage.size // 5 * part.images
    return range(ref.offset // 64, -(-(ref.offset + size) // 64))


# --- a few images at a time -------------------------------------------------------------------------------------------


@pytest.fixture
def split_at(monkeypatch):
    """Lets plans of batches run their first steps on a few images at a time, whatever their size."""

    def split_at(steps, images):
        planner.changed()
        monkeypatch.setattr(schedule, "split", lambda all_steps, batch, threads: schedule.Split(steps, images))

    yield split_at
    planner.changed()


def same_numbers(stock, x, split_at, splits):
    """The same bits, whatever the split: each image goes through the same arithmetic."""
    fast = resnet_fast.accelerate(stock, inplace=False)
    with torch.inference_mode():
        split_at(0, len(x))
        expected = torch.utils._pytree.tree_leaves(fast(x))
        assert isinstance(network.last_plan(fast), network.Plan), network.last_plan(fast)
        for split in splits:
            split_at(*split)
            results = torch.utils._pytree.tree_leaves(fast(x))
            assert network.last_plan(fast).split == split
            assert all(map(torch.equal, results, expected)), split
            assert all(y.stride() == other.stride() for y, other in zip(results, expected))
    check(fast, stock, x)


@pytest.mark.parametrize("algorithm", ["gemm", "winograd4"])
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("block", [resnet.BasicBlock, resnet.Bottleneck])
def test_any_split_gives_the_same_numbers(block, threads, algorithm, split_at):
    """Every cut: some go through a block, between a value and the sum that it is the residual of."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with planner.forced(algorithm):
            stock, x = small_resnet(block), images(5, 3, 32, 32)
            splits = [(steps, 2) for steps in range(1, 14)] + [(6, 1), (6, 3), (6, 4), (9, 1)]
            same_numbers(stock, x, split_at, splits)
            same_numbers(stock, x.contiguous(memory_format=torch.channels_last), split_at, splits[4:8])
    finally:
        torch.set_num_threads(before)


class Crossing(nn.Module):
    """Early values that are results, and that late steps read: beside their residual's place, and in it."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(5))
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(5))

    def forward(self, x):
        early = F.relu(self.norms[0](self.convs[0](x)))
        y = F.relu(self.norms[1](self.convs[1](early)) + x)
        kept = F.relu(self.norms[2](self.convs[2](y)) + early)
        y = F.relu(self.norms[3](self.convs[3](kept)) + y)
        return [early, {"sum": F.relu(self.norms[4](self.convs[4](y)) + early)}, (y.mean((2, 3)), kept)]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_values_that_cross_the_border(layout, split_at):
    torch.manual_seed(SEED)
    stock = randomise_norms(Crossing()).eval()
    x = images(5, 8, 9, 7).contiguous(memory_format=layout)
    with planner.forced("gemm"):
        same_numbers(stock, x, split_at, [(steps, n) for steps in range(1, 11) for n in (1, 2, 3)])


def test_passing_values_take_less_memory(split_at):
    fast, needs = resnet_fast.accelerate(small_resnet(), inplace=False), []
    for split in ((0, 8), (9, 2), (9, 1)):
        split_at(*split)
        with torch.inference_mode():
            fast(images(8, 3, 64, 64))
        needs.append(network.last_plan(fast).need.size)
    assert needs[0] > needs[1] > needs[2]


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_the_rule_for_splits(name, monkeypatch):
    """Large batches are split in their early stages, small ones and small images not at all."""
    monkeypatch.setattr(schedule, "_cache", lambda: 32 << 20)
    model = resnet_fast.accelerate(torchvision.models.get_model(name, weights=None).eval())
    alone = {}
    for size, batch, wanted in ((224, 16, True), (224, 64, True), (224, 1, False), (32, 16, False)):
        steps = _steps(model, batch, size)
        alone[size, batch] = schedule.split(steps, batch, 1)
        for split in (schedule.split(steps, batch, threads) for threads in (1, 2, 8)):
            assert (split.steps > 0) == wanted
            if wanted:
                assert 0 < split.steps < len(steps) - 2
                assert 0 < split.images <= batch // 2
                assert split.images >= alone[size, batch].images
            else:
                assert split == (0, batch)
    assert alone[224, 64].images == alone[224, 16].images


def _steps(model, batch, size):
    lowering = Lowering(1)
    given = Image((batch, 3, size, size), Storage(batch * 3 * size * size), False)
    result = lowering.graph(model, state_of(model).eval, (given,))
    return schedule.needed(lowering.steps, [result.storage])


def test_memory_is_shared_and_given_up(monkeypatch):
    """One block serves every plan; one that nobody needs any more goes."""
    monkeypatch.setattr(memory, "_free", deque())
    monkeypatch.setattr(memory, "_needs", weakref.WeakSet())
    needs = [memory.Need(size) for size in (1000, 5000)]
    large = memory.take(needs[1])
    memory.give_back(large, needs[1])
    assert memory.take(needs[0]) is large
    memory.give_back(large, needs[0])
    assert memory.take(needs[0]) is large
    needs.pop()
    gc.collect()
    memory.give_back(large, needs[0])
    assert not memory._free


def test_memory_goes_with_the_last_that_needs_it(monkeypatch):
    monkeypatch.setattr(memory, "_free", deque())
    monkeypatch.setattr(memory, "_needs", weakref.WeakSet())
    needs = [memory.Need(size) for size in (1000, 5000)]
    for need in needs:
        memory.give_back(memory.Memory(need.size), need)
    assert [kept.size for kept in memory._free] == [1000, 5000]
    needs.pop()
    del need
    assert [kept.size for kept in memory._free] == [1000]
    needs.clear()
    assert not memory._free


def test_a_model_that_is_gone_leaves_no_memory(monkeypatch):
    monkeypatch.setattr(memory, "_free", deque())
    monkeypatch.setattr(memory, "_needs", weakref.WeakSet())
    model = resnet_fast.accelerate(small_resnet())
    with torch.inference_mode():
        model(images(1, 3, 64, 64))
    assert memory._free
    del model
    gc.collect()
    assert not memory._free


def test_shelf_copies():
    shelf = memory.Shelf()
    tensors = [torch.randint(0, 255, (size,), dtype=torch.uint8) for size in (1, 100, 64, 33 << 20, 7)]
    copies = [shelf.copy(tensor) for tensor in tensors]
    del shelf
    assert all(map(torch.equal, tensors, copies))
    assert all(copy.data_ptr() % 64 == 0 for copy in copies)
