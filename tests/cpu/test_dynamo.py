"""``torch.compile``: by our backend, and of accelerated models. All are compared with stock PyTorch, run eagerly."""

import copy
import gc
import importlib
import logging
import os
import re
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
import torch._inductor.utils
import torch.nn.functional as F
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch.autograd import forward_ad
from torch.profiler import profile
from torchvision.models import resnet

import resnet_fast
from resnet_fast import accelerate, dynamo, network
from resnet_fast.dynamo import backend
from resnet_fast.kernels.native import inference as native
from tests.cpu.small_models import (
    accelerated,
    built,
    images,
    randomise_norms,
    relative_error,
    short_resnet,
    small_resnet,
)

ROOT = Path(__file__).parents[2]
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
EAGER = {"rest": "eager"}


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def fused(caplog):
    """What the backend says: (convolutions fused, convolutions, whether that is one native program) of each graph."""
    caplog.set_level(logging.INFO, "resnet_fast")

    def said() -> list[tuple[int, int, bool]]:
        found = [re.match(r"(\d+) of (\d+) conv.*?(native)?( program)?$", one.getMessage()) for one in caplog.records]
        return [(int(one[1]), int(one[2]), bool(one[3])) for one in found if one]

    return said


class Block(nn.Module):
    """Somebody's block, with a gate that we do not know."""

    def __init__(self, channels: int = 8, gate: bool = True) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.conv2, self.norm2 = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)
        self.gate = gate

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        if self.gate:
            y = y * torch.sigmoid(y.mean((2, 3), keepdim=True))
        return torch.relu(y + x)


class Net(nn.Module):
    """All in functions, as many write it, with a ``view`` by the size of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.blocks = (
            nn.Conv2d(3, 8, 3, 2, 1),
            nn.BatchNorm2d(8),
            nn.Sequential(Block(gate=False)),
        )
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.norm(self.conv(x))), 2)
        x = F.adaptive_avg_pool2d(self.blocks(x), 1)
        return self.fc(F.dropout(x.view(x.size(0), -1), 0.1, self.training))


def net(kind: type = Net, **kwargs: Any) -> nn.Module:
    return built(lambda: randomise_norms(kind(**kwargs))).eval()


def ops_of(run: Any) -> list[str]:
    """The fused ops that ``run()`` calls."""
    with profile() as seen:
        run()
    return [event.name.partition("::")[2] for event in seen.events() if event.name.startswith("resnet_fast::")]


def steps(model: nn.Module, call: Any, batches: list[Tensor]) -> Any:
    """Results, gradients and what is left after a few steps of training."""
    optimiser = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)
    seen: list[Any] = []
    for x in batches:
        optimiser.zero_grad()
        x = x.clone().requires_grad_()
        y = call(x)
        y.square().sum().backward()
        seen += [y.detach(), x.grad, [one.grad.clone() for one in model.parameters() if one.requires_grad]]
        optimiser.step()
    return seen, list(model.state_dict().values())


# --- inference --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("without_gradients", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize(
    "make",
    [
        small_resnet,
        lambda: small_resnet(resnet.Bottleneck, groups=2, width_per_group=32),
        lambda: randomise_norms(pytest.importorskip("timm").create_model("resnet14t", num_classes=5)).eval(),
        net,
    ],
    ids=["basic", "bottleneck", "timm", "functions"],
)
def test_whole_network(make, without_gradients, fused):
    """One native program, whatever the layout, and no Inductor."""
    model = make()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    with without_gradients():
        for x in (images(), images().to(memory_format=torch.channels_last)):
            result, expected = compiled(x), model(x)
            assert relative_error(result, expected) < TOLERANCE[x.dtype]
            assert result.stride() == expected.stride()
        assert not ops_of(lambda: compiled(x))  # not op by op
    convolutions = sum(isinstance(module, nn.Conv2d) for module in model.modules())
    assert fused() == [(convolutions, convolutions, True)] * 2
    assert not torch._dynamo.utils.counters["inductor"]


@pytest.mark.parametrize("rest", ["inductor", "eager"])
def test_what_is_unknown(rest, fused):
    """The second batch norm ends in a gate: its convolution is fused with it, and the rest runs by somebody else."""
    model, x = net(Block), images(2, 8, 12, 12)
    compiled = torch.compile(model, backend=backend, fullgraph=True, options={"rest": rest})
    with torch.no_grad():
        assert relative_error(compiled(x), model(x)) < TOLERANCE[x.dtype]
        assert ops_of(lambda: compiled(x)) == ["conv_bn_act"] * 2
    assert fused() == [(2, 2, False)]
    assert bool(torch._dynamo.utils.counters["inductor"]) == (rest == "inductor")


def test_graph_break(fused):
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Block(gate=False), Block(gate=False)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            torch._dynamo.graph_break()
            return self.second(x)

    model, x = net(Broken), images(2, 8, 12, 12)
    compiled = torch.compile(model, backend=backend)
    with torch.no_grad():
        assert relative_error(compiled(x), model(x)) < TOLERANCE[x.dtype]
    assert fused() == [(2, 2, True)] * 2


@pytest.mark.parametrize("dynamic", [True, None], ids=["dynamic", "marked"])
@pytest.mark.parametrize("make", [small_resnet, net, lambda: net(Block)], ids=["resnet", "view", "gate"])
def test_dynamic_batch(make, dynamic, fused):
    """One graph for all sizes of batches."""
    model = make()
    channels = next(model.parameters()).shape[1]
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=dynamic, options=EAGER)
    with torch.no_grad():
        for batch in (2, 3, 5):
            x = images(batch, channels, 32, 48)
            if dynamic is None:
                torch._dynamo.mark_dynamic(x, 0)
            assert relative_error(compiled(x), model(x)) < TOLERANCE[x.dtype]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert [whole for *_, whole in fused()] == [not isinstance(model, Block)]


def test_a_number_that_changes():
    """With ``dynamic=True`` a norm's eps is an input of the graph; what we made of it is for the one that it was."""
    model, x = net(Block), images(2, 8, 12, 12)
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=True, options=EAGER)
    with torch.no_grad():
        before = compiled(x)
        model.norm1.eps = 0.5
        assert relative_error(compiled(x), model(x)) < TOLERANCE[x.dtype]
        assert relative_error(compiled(x), before) > 1e-3


# --- parameters that change -------------------------------------------------------------------------------------------


def _optimise(model: nn.Module) -> None:
    model.train()
    with torch.enable_grad():
        model(images()).square().sum().backward()
    torch.optim.AdamW(model.parameters(), 0.1).step()
    model.eval()


def _recalibrate(model: nn.Module) -> None:
    """Only the running statistics move."""
    model.train()(3 * images() + 1)
    model.eval()


def _swap(model: nn.Module) -> None:
    model.fc.weight.data = torch.ones_like(model.fc.weight)


def _replace(model: nn.Module) -> None:
    model.norm.weight = nn.Parameter(torch.full_like(model.norm.weight, 2))


def _share(model: nn.Module) -> None:
    """Another parameter with the same memory, whose writes do not show in the first one's version."""
    conv = model.blocks[0].conv1
    model.__dict__["kept"] = conv.weight
    conv.weight = nn.Parameter(conv.weight.data)
    conv.weight[-1].mul_(9)


CHANGES = {
    "optimiser": _optimise,
    "recalibration": _recalibrate,
    "load_state_dict": lambda model: model.load_state_dict(randomise_norms(Net(), 7).state_dict()),
    "in place": lambda model: model.blocks[0].conv1.weight.mul_(2),
    "data": _swap,
    "another": _replace,
    "shared": _share,
}


@pytest.mark.parametrize("rest", ["plan", "ops"])
@pytest.mark.parametrize("change", CHANGES)
def test_parameters_may_change(change, rest, monkeypatch):
    if rest == "ops":
        monkeypatch.setattr(network, "plan_for", lambda *_: None)
    model = net()
    compiled = torch.compile(model, backend=backend, options=EAGER)
    with torch.no_grad():
        before = compiled(images())
        CHANGES[change](model)
        result = compiled(images())
        assert relative_error(result, model(images())) < TOLERANCE[result.dtype]
        assert relative_error(result, before) > 1e-3


def test_other_parameters_in_the_same_graph(fused):
    """Dynamo runs a graph for all modules of one class; the program is for those of one module."""
    models = [randomise_norms(Block(gate=False).eval(), seed) for seed in range(3)]
    x = images(2, 8, 12, 12)
    with torch.no_grad():
        expected = [model(x) for model in models]
        for model in models:
            model.compile(backend=backend)
        for _ in range(2):
            results = [model(x) for model in models]
            assert relative_error(results, expected) < TOLERANCE[x.dtype]
    assert fused() == [(2, 2, True)]


def test_a_graph_keeps_no_model_alive(monkeypatch):
    """Neither the parameters, nor the program that was made of them."""
    made = []
    monkeypatch.setattr(dynamo, "accelerate", lambda model: made.append(weakref.ref(accelerate(model))) or made[-1]())
    model = net()
    with torch.no_grad():
        torch.compile(model, backend=backend)(images())
    made += map(weakref.ref, model.parameters())
    assert all(reference() is not None for reference in made)
    del model
    gc.collect()
    assert not any(reference() is not None for reference in made)


# --- training ---------------------------------------------------------------------------------------------------------


def _freeze(model: nn.Module) -> None:
    """The first stage, as detectors do: its norms normalise by running statistics, its parameters do not learn."""
    model.layer1.eval()
    for parameter in (*model.conv1.parameters(), *model.layer1[0].parameters()):
        parameter.requires_grad_(False)


@pytest.mark.parametrize(
    ("rest", "prepare"),
    [
        ("eager", nn.Module.train),
        ("inductor", nn.Module.train),
        ("eager", nn.Module.eval),
        ("eager", _freeze),
    ],
    ids=["eager", "inductor", "eval mode", "frozen"],
)
def test_training(rest, prepare, fused):
    """Results, gradients, running statistics and counters, in float64, of batches of several sizes."""
    batches = [images(n, 3, 32, 32).double() for n in (4, 2, 5)]
    model = short_resnet()
    prepare(model)
    stock = copy.deepcopy(model)
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=True, options={"rest": rest})
    assert relative_error(steps(model, compiled, batches), steps(stock, stock, batches)) < TOLERANCE[torch.float64]
    assert set(fused()) == {(8, 8, False)}
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


# --- what must stay as it is ------------------------------------------------------------------------------------------


class Switches(Block):
    """Convolutions under other settings than what follows them."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            y = self.conv1(x)
        y = F.relu(self.norm1(y.float()))
        with torch.no_grad():
            y = self.conv2(y)
        return F.relu(self.norm2(y) + x)


class SwitchesBetween(Block):
    """A convolution, its norm and its ReLU, with a switch that could be jumped over."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(x)
        torch.set_grad_enabled(False)
        y = self.norm1(y)
        torch.set_grad_enabled(True)
        return self.norm2(self.conv2(F.relu(y))) + x


class WritesToItsInput(Block):
    def forward(self, x: Tensor) -> Tensor:
        x[:, 0].mul_(2)
        return super().forward(x)


class MakesItsWeight(Block):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm1(F.conv2d(x, self.conv1.weight.tanh(), padding=1)))


class OneNormTwice(Block):
    """By batch statistics, which move the running ones, and then by these."""

    def forward(self, x: Tensor) -> Tensor:
        norm = self.norm1
        y = F.batch_norm(self.conv1(x), norm.running_mean, norm.running_var, norm.weight, norm.bias, True, 0.5)
        return F.relu(F.batch_norm(self.conv2(y), norm.running_mean, norm.running_var, norm.weight, norm.bias))


class WithoutBatch(Block):
    """One image of three dimensions, which a batch norm takes as a function."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.rows = nn.BatchNorm2d(12)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.rows
        y = self.conv1(x[0])
        return F.relu(F.batch_norm(y, rows.running_mean, rows.running_var, rows.weight, rows.bias)) + x


class MapsOverImages(Block):
    def forward(self, x: Tensor) -> Tensor:
        return torch.func.vmap(lambda image: F.relu(self.norm2(self.conv2(image))))(x[None].repeat(2, 1, 1, 1, 1))


class Differentiates(Block):
    def forward(self, x: Tensor) -> Tensor:
        return torch.func.grad(lambda image: F.relu(self.norm2(self.conv2(image))).square().sum())(x)


@pytest.mark.parametrize(
    ("kind", "fusable"),
    [
        (Switches, 0),
        (SwitchesBetween, 1),
        (WritesToItsInput, 0),
        (MakesItsWeight, 0),
        (OneNormTwice, 0),
        (WithoutBatch, 0),
        (MapsOverImages, 0),
        (Differentiates, 0),
    ],
)
def test_near_misses(kind, fusable, fused):
    model, x = net(kind, gate=False), images(2, 8, 12, 12)
    stock, ours, theirs = copy.deepcopy(model), x.clone(), x.clone()
    result = torch.compile(model, backend=backend, fullgraph=True, options=EAGER)(ours)
    expected = stock(theirs)
    assert relative_error(result, expected) < TOLERANCE[x.dtype]
    assert torch.equal(ours, theirs)
    assert relative_error(list(model.buffers()), list(stock.buffers())) < TOLERANCE[x.dtype]
    assert [number for number, *_ in fused()] == [fusable]
    gradients = []
    for one, y in ((model, result), (stock, expected)):
        y.square().sum().backward()
        gradients.append([parameter.grad for parameter in one.parameters() if parameter.grad is not None])
    assert relative_error(*gradients) < TOLERANCE[x.dtype]


def test_one_norm_for_two_convolutions(fused):
    """Its running statistics come from the shortcut first, and then from the main path."""

    class Shared(Block):
        def forward(self, x: Tensor) -> Tensor:
            shortcut = self.norm1(self.conv1(x))
            return F.relu(self.norm1(self.conv2(x)) + shortcut)

    model, x = net(Shared).train(), images(2, 8, 12, 12)
    stock = copy.deepcopy(model)
    result = torch.compile(model, backend=backend, fullgraph=True, options=EAGER)(x)
    assert relative_error(result, stock(x)) < TOLERANCE[x.dtype]
    assert relative_error(list(model.buffers()), list(stock.buffers())) < TOLERANCE[x.dtype]
    assert fused() == [(2, 2, False)]


def _dual(call: Any, x: Tensor) -> Tensor:
    with torch.no_grad(), forward_ad.dual_level():
        return forward_ad.unpack_dual(call(forward_ad.make_dual(x, x.cos()))).tangent


def _twice(call: Any, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(call(x).square().sum(), x, create_graph=True)
    return torch.autograd.grad(first.square().sum(), x)[0]


TRANSFORMS = {
    "grad": lambda call, x: torch.func.grad(lambda one: call(one).square().sum())(x),
    "vmap": lambda call, x: torch.func.vmap(call)(x[None].repeat(2, 1, 1, 1, 1)),
    "jvp": lambda call, x: torch.func.jvp(call, (x,), (x.cos(),))[1],
    "dual": _dual,
    "double backward": _twice,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_transforms_around(transform):
    model, x = net(Block), images(2, 8, 12, 12)
    compiled = torch.compile(model, backend=backend, options=EAGER)
    assert relative_error(transform(compiled, x), transform(model, x)) < TOLERANCE[x.dtype]


def test_momentum_that_depends_on_the_count(fused):
    """A norm with ``momentum=None`` averages over all batches."""
    model = short_resnet()
    model.bn1.momentum = None
    stock, batches = copy.deepcopy(model), [images(2, 3, 32, 32).double()] * 2
    compiled = torch.compile(model, backend=backend, options=EAGER)
    assert relative_error(steps(model, compiled, batches), steps(stock, stock, batches)) < TOLERANCE[torch.float64]
    assert sum(number for number, *_ in fused()) < 16


# --- options, and its name --------------------------------------------------------------------------------------------


def test_options(monkeypatch):
    with pytest.raises(Exception, match=r"rest.*'nothing'"):
        torch.compile(net(), backend=backend, options={"rest": "nothing"})(images())
    given = {}
    monkeypatch.setattr(
        "torch._inductor.compile_fx.compile_fx", lambda module, _, **kwargs: given.update(kwargs) or module
    )
    torch.compile(net(), backend=backend, mode="max-autotune")(images())
    assert given["config_patches"]["max_autotune"]
    torch._dynamo.reset()
    torch.compile(net(), backend=backend, options={"epilogue_fusion": False})(images())
    assert given["config_patches"] == {"epilogue_fusion": False}


def test_found_by_its_name(tmp_path):
    """As pip leaves what pyproject.toml says, in a process that has imported nothing of ours."""
    section = re.search(
        r'\[project.entry-points."(torch_dynamo_backends)"\]\n(.*?)\n\n', (ROOT / "pyproject.toml").read_text(), re.S
    )
    folder = tmp_path / "found_by_its_name-1.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: found-by-its-name\nVersion: 1\n")
    (folder / "entry_points.txt").write_text(f"[{section[1]}]\n{section[2].replace(chr(34), '')}\n")
    program = """
import logging, torch, torchvision
logging.basicConfig(level=logging.INFO)
with torch.no_grad():
    torch.compile(torchvision.models.resnet18().eval(), backend="resnet_fast")(torch.ones(1, 3, 32, 32))
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert "20 of 20 convolutions fused, and the whole graph is one native program" in run.stderr


# --- accelerated models -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune"])
def test_accelerated_then_compiled(mode):
    """By Inductor; each weight is packed once."""
    model = net(Block)
    fast = accelerated(model)
    compiled = torch.compile(fast, mode=mode, fullgraph=True)
    x = images(2, 8, 12, 12)
    with torch.inference_mode():
        assert relative_error(compiled(x), model(x)) < TOLERANCE[x.dtype]
        assert ops_of(lambda: compiled(x)) == ["conv_bn_act"] * 2


def test_weights_are_packed_once(monkeypatch):
    """A compiled graph folds the batch norms in every call; what was packed for the same numbers is found again."""
    packs, pack = [], native.library.pack
    monkeypatch.setattr(
        native.library, "pack", lambda *args, **kwargs: packs.append(pack(*args, **kwargs)) or packs[-1]
    )
    model, x = net(Block), images(2, 8, 12, 12)
    compiled = torch.compile(accelerated(model), backend="aot_eager")
    for without_gradients in (torch.no_grad, torch.inference_mode):
        packs.clear()
        with without_gradients():
            for _ in range(3):
                compiled(x)
        assert len(packs) in (0, 2)
    with torch.no_grad():
        for norm in (model.norm1, compiled.norm1):
            norm.running_var[-1] *= 4
        assert relative_error(compiled(x), model(x)) < TOLERANCE[x.dtype]
    assert len(packs) == 1


@pytest.mark.parametrize("inplace", [True, False])
def test_compiled_then_accelerated(inplace):
    """The model inside is accelerated, and dynamo sees that it has changed."""
    model, x = net(Block), images(2, 8, 12, 12)
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager")
    with torch.no_grad():
        compiled(x)
        fast = resnet_fast.accelerate(compiled, inplace)
        assert (fast is compiled) == inplace
        fast(x)
        assert ops_of(lambda: fast(x)) == ["conv_bn_act"] * 2
        assert relative_error(fast(x), model(x)) < TOLERANCE[x.dtype]
        assert resnet_fast.explain(fast).fused == 2
        resnet_fast.restore(fast)
        fast(x)
        assert not ops_of(lambda: fast(x))


def test_accelerated_then_our_backend():
    model, x = small_resnet(), images()
    compiled = torch.compile(accelerated(model), backend=backend, options=EAGER)
    with torch.no_grad():
        assert relative_error(compiled(x), model(x)) < TOLERANCE[x.dtype]
        assert len(ops_of(lambda: compiled(x))) == 13


def test_cuda_graphs_leave_out_what_packs():
    """What an op packs in its first call, it would have in the memory of Inductor's CUDA graphs, to be overwritten."""
    importlib.import_module("resnet_fast.quantised")
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("resnet_fast::")]
    ops = {name.partition("::")[2]: getattr(torch.ops.resnet_fast, name.partition("::")[2]).default for name in names}
    without_weights = {"global_avg_pool", "quantise", "dequantise"}
    assert without_weights < set(ops)
    for name, op in ops.items():
        assert (torch.Tag.cudagraph_unsafe in op.tags) == (name not in without_weights), name


def test_inductor_knows_what_to_leave_out():
    """Of a training step's graphs, forward and backward, each has an op that Inductor takes for unsafe."""
    seen = []

    def compiler(module: torch.fx.GraphModule, _: Any) -> Any:
        with torch._inductor.config.patch(graph_partition=False):
            node = torch._inductor.utils.get_first_incompatible_cudagraph_node(module)
        seen.append(str(node and node.target).partition(".")[0])
        return make_boxed_func(module.forward)

    aot = aot_autograd(fw_compiler=compiler, partition_fn=min_cut_rematerialization_partition)  # Inductor's
    model = accelerated(net(Block)).train()
    y = torch.compile(model, backend=aot)(images(2, 8, 12, 12))
    y.sum().backward()
    assert seen == ["resnet_fast"] * 2
