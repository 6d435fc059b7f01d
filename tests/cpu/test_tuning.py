"""``tune``: what was measured is used, by this process and the next, and a bad file of choices does no harm."""

import contextlib
import json
import os
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn

import resnet_fast
from resnet_fast import network, tune, tuning
from resnet_fast.kernels.choices import Choices
from resnet_fast.kernels.native import abi, library, planner
from resnet_fast.kernels.triton.tuning import measuring
from resnet_fast.kernels.triton.tuning import planner as gpu_planner
from tests.fake_gpu import on_gpu

pytestmark = pytest.mark.skipif(library.unavailable() is not None, reason=str(library.unavailable()))

IMAGES = (2, 3, 20, 20)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("RESNET_FAST_CACHE", str(tmp_path))
    planner.choices.forget()
    gpu_planner.choices.forget()
    planner.changed()
    yield tmp_path
    planner.choices.forget()
    gpu_planner.choices.forget()
    planner.changed()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 32, 3, bias=False), nn.BatchNorm2d(32)
        self.conv2, self.bn2 = nn.Conv2d(32, 48, 3, padding=1), nn.BatchNorm2d(48)

    def forward(self, x):
        return torch.relu(self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return resnet_fast.accelerate(Net().eval())


def _algorithm(model, images):
    with torch.inference_mode():
        model(images)
    return [text.rsplit(" ", 1)[1] for row in resnet_fast.explain(model).rows for text in row.steps]


def test_choices_hold_for_this_process_and_the_next(model, folder):
    images = torch.randn(IMAGES)
    result = tune(model, images, calls=2)
    assert [choice.shape.split(" ")[0] for choice in result.choices] == ["2x20x20x3", "2x18x18x32"]
    for choice in result.choices:
        assert {"gemm", "winograd2", "winograd4", "onednn"} <= set(choice.milliseconds)
        assert choice.milliseconds[choice.algorithm] == min(choice.milliseconds.values())
        assert planner.choices.measured(planner.machine(), choice.shape) == choice.algorithm
    assert str(result).count("\n") == 1
    # Turn every choice to what neither measuring nor the rule would give, and ask a process of its own.
    path = planner.choices.path()
    assert path.parent == folder
    content = json.loads(path.read_text())
    for mine in content["machines"].values():
        mine.update(dict.fromkeys(mine, "winograd2"))
    path.write_text(json.dumps(content))
    command = (
        "import torch; from tests.cpu.test_tuning import *; from tests.cpu.test_tuning import _algorithm;"
        f"torch.set_num_threads({torch.get_num_threads()});"
        f"print(_algorithm(resnet_fast.accelerate(Net().eval()), torch.randn({IMAGES})))"
    )
    run = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "['winograd2', 'winograd2']"


def test_choices_are_for_a_shape_and_a_number_of_threads(model):
    images, threads = torch.randn(IMAGES), torch.get_num_threads()
    before = _algorithm(model, images)
    other = next(name for name in ("winograd2", "gemm") if name != before[1])
    shape = abi.Shape(abi.FLOAT32, 2, 18, 18, 32, 18, 18, 48, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1, 0)
    planner.choices.add(planner.machine(), {planner.describe(shape, threads + 1): other})
    planner.changed()
    assert _algorithm(model, images) == before
    planner.choices.add(planner.machine(), {planner.describe(shape, threads): other})
    planner.changed()
    assert _algorithm(model, images) == [before[0], other]
    assert _algorithm(model, torch.randn(1, 3, 20, 20))[1] == planner._rule(
        abi.Shape(abi.FLOAT32, 1, 18, 18, 32, 18, 18, 48, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1, 0), threads
    )


def test_where_pytorch_is_fastest_it_serves_single_layers_and_our_best_a_plan(model, monkeypatch):
    images = torch.randn(IMAGES)
    seconds = {"onednn": 1e-9, "winograd2": 1e-8}  # less than any convolution takes
    recorded = library.recorded

    @contextlib.contextmanager
    def faster():
        with recorded() as operations:
            yield operations
            operations[:] = [op._replace(seconds=seconds.get(op.algorithm, 1.0)) for op in operations]

    with monkeypatch.context() as patched:
        patched.setattr(library, "recorded", faster)
        result = tune(model, images, calls=1)
    assert [choice.algorithm for choice in result.choices] == ["onednn", "onednn"]
    with torch.inference_mode():
        model(images)
        assert set(network.last_plan(model).algorithms.values()) == {"winograd2"}
    shape = abi.Shape(abi.FLOAT32, 2, 18, 18, 32, 18, 18, 48, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1, 0)
    assert planner.choose(shape, torch.get_num_threads()) == "onednn"


@pytest.mark.parametrize("algorithm", planner.CANDIDATES)
def test_every_algorithm_gives_the_result(model, algorithm):
    images = torch.randn(IMAGES)
    with torch.inference_mode(), planner.forced(algorithm):
        y = model(images)
    exact = resnet_fast.restore(model, inplace=False).double()(images.double())
    assert (y - exact).abs().max() <= 5e-5 * exact.abs().max()


DAMAGED = {
    "empty": "",
    "truncated": '{"format": 1, "machines": {"a": {"b": "ge',
    "another format": '{"format": 99, "machines": {}}',
    "no machines": '{"format": 1}',
    "a list": "[]",
    "machines is a list": '{"format": 1, "machines": []}',
    "a machine is a text": '{"format": 1, "machines": {"a": "gemm"}}',
    "a choice is a number": '{"format": 1, "machines": {"a": {"b": 1}}}',
    "binary": "\x00\x01",
}


@pytest.mark.parametrize("text", DAMAGED.values(), ids=DAMAGED.keys())
def test_a_damaged_file_is_ignored_with_a_warning_and_replaced(model, text):
    images = torch.randn(IMAGES)
    before = _algorithm(model, images)
    planner.choices.path().write_text(text)
    planner.choices.forget()
    planner.changed()
    with pytest.warns(UserWarning, match="is ignored"):
        assert _algorithm(model, images) == before
    with pytest.warns(UserWarning, match="is ignored"):
        planner.choices.add(planner.machine(), {"some shape": "gemm"})
    planner.choices.forget()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert planner.choices.measured(planner.machine(), "some shape") == "gemm"


def test_a_choice_that_nobody_knows_is_ignored(model):
    images = torch.randn(IMAGES)
    before = _algorithm(model, images)
    shape = abi.Shape(abi.FLOAT32, 2, 18, 18, 32, 18, 18, 48, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1, 0)
    for algorithm in ("of the future", "grouped"):  # the second is known, and does not cover the shape
        planner.choices.add(planner.machine(), {planner.describe(shape, torch.get_num_threads()): algorithm})
        planner.changed()
        assert _algorithm(model, images) == before


def test_other_machines_keep_their_choices():
    path = planner.choices.path()
    path.write_text(json.dumps({"format": 1, "machines": {"another": {"shape": "gemm"}}}))
    planner.choices.add(planner.machine(), {"shape": "winograd4"})
    machines = json.loads(path.read_text())["machines"]
    assert machines == {"another": {"shape": "gemm"}, planner.machine(): {"shape": "winograd4"}}
    assert sorted(os.listdir(path.parent)) == [path.name, f"{path.name}.lock"], "a partial file is left"


def test_a_file_that_cannot_be_written(folder, monkeypatch):
    (folder / "file").write_text("")
    monkeypatch.setenv("RESNET_FAST_CACHE", str(folder / "file" / "below"))
    planner.choices.forget()
    with pytest.warns(UserWarning, match="is ignored"), pytest.raises(OSError, match="file"):
        planner.choices.add(planner.machine(), {"shape": "winograd4"})
    assert planner.choices.measured(planner.machine(), "shape") == "winograd4"


def test_on_a_gpu_each_problem_is_measured_once_and_kept(model, monkeypatch):
    """The GPU is not there: what the model would ask for, the clock and the measurement are given."""
    half = (torch.float16, "half", 2, 32, 9, 8, 48, (3, 3), (1, 1), (1, 1), (1, 1), 1)
    first = gpu_planner.Problem("sm_90", *half, residual=False, relu=True)
    second = first._replace(relu=False)
    measured = []

    @contextlib.contextmanager
    def recorded():
        yield [first, second, first]

    def measure(problem, device, timer, runs):
        assert (device, timer, runs) == (torch.device("cuda", 0), "a clock", 3)
        measured.append(problem)
        return measuring.Measurement(problem, "cudnn fused", {"cudnn fused": 0.5}, {"triton": "spills"})

    monkeypatch.setattr(gpu_planner, "recorded", recorded)
    monkeypatch.setattr(gpu_planner, "machine", lambda index: f"GPU {index}")
    monkeypatch.setattr(measuring, "measure", measure)
    monkeypatch.setattr(measuring, "Events", lambda device: "a clock")
    model.forward = lambda x: x
    result = tune(model, on_gpu(torch.randn(IMAGES)), calls=3)
    assert measured == [first, second]
    assert [choice.shape for choice in result.choices] == [first.key(), second.key()]
    assert str(result).count("rejected: triton: spills") == 2
    assert gpu_planner.choices.measured("GPU 0", second.key()) == "cudnn fused"
    assert gpu_planner.choices.path() != planner.choices.path()
    monkeypatch.setattr(gpu_planner, "recorded", lambda: contextlib.nullcontext([]))
    with pytest.raises(ValueError, match="no convolution in the Triton kernels"):
        tune(model, on_gpu(torch.randn(IMAGES)))


def test_what_ends_tuning_on_a_gpu_costs_only_the_rest(model, monkeypatch):
    half = (torch.float16, "half", 2, 32, 9, 8, 48, (3, 3), (1, 1), (1, 1), (1, 1), 1)
    first = gpu_planner.Problem("sm_90", *half, residual=False, relu=True)

    def measure(problem, device, timer, runs):
        if problem != first:
            raise KeyboardInterrupt
        return measuring.Measurement(problem, "cudnn fused", {"cudnn fused": 0.5})

    monkeypatch.setattr(gpu_planner, "recorded", lambda: contextlib.nullcontext([first, first._replace(n=64)]))
    monkeypatch.setattr(gpu_planner, "machine", lambda index: f"GPU {index}")
    monkeypatch.setattr(measuring, "measure", measure)
    monkeypatch.setattr(measuring, "Events", lambda device: "a clock")
    model.forward = lambda x: x
    choices, before = tuning.tuned(model, on_gpu(torch.randn(IMAGES))), gpu_planner.version
    assert next(choices).algorithm == "cudnn fused"
    assert gpu_planner.choices.measured("GPU 0", first.key()) == "cudnn fused"
    assert gpu_planner.version > before
    with pytest.raises(KeyboardInterrupt):
        next(choices)
    gpu_planner.choices.forget()
    assert gpu_planner.choices.measured("GPU 0", first.key()) == "cudnn fused"


def test_errors(model):
    images = torch.randn(IMAGES)
    with pytest.raises(TypeError, match="model is a str"):
        tune("resnet18", images)
    with pytest.raises(ValueError, match="not accelerated"):
        tune(Net().eval(), images)
    with pytest.raises(ValueError, match="training mode"):
        tune(model.train(), images)
    model.eval()
    with pytest.raises(ValueError, match="calls is 0"):
        tune(model, images, calls=0)
    with pytest.raises(ValueError, match="no convolution"):
        tune(model.double(), images.double(), calls=1)
    assert planner._forced is None


ADDING = """
import sys
from resnet_fast.kernels.choices import Choices

choices = Choices("many.json")
for number in range(40):
    choices.forget()
    choices.add("machine", {f"{sys.argv[1]} {number}": "gemm"})
"""


def test_choices_of_several_processes_are_all_kept(tmp_path):
    environment = {**os.environ, "RESNET_FAST_CACHE": str(tmp_path)}
    processes = [subprocess.Popen([sys.executable, "-c", ADDING, name], env=environment) for name in "abc"]
    assert [process.wait(timeout=300) for process in processes] == [0, 0, 0]
    kept = json.loads((tmp_path / "many.json").read_text())["machines"]["machine"]
    assert len(kept) == 120


def test_a_file_nested_too_deeply_does_no_harm(tmp_path, monkeypatch):
    monkeypatch.setenv("RESNET_FAST_CACHE", str(tmp_path))
    (tmp_path / "deep.json").write_text("[" * 100_000 + "]" * 100_000)
    choices = Choices("deep.json")
    with pytest.warns(UserWarning, match="deep.json is ignored"):
        assert choices.measured("machine", "problem") is None
    with pytest.warns(UserWarning, match="deep.json is ignored"):
        choices.add("machine", {"problem": "gemm"})
    assert Choices("deep.json").measured("machine", "problem") == "gemm"
