"""The benchmark of training: real steps, short rounds; what is saved and what is moved, counted."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from resnet_fast import accelerate
from resnet_fast.bench.norms import norms_of, randomise_batch_norm, settle_relus
from resnet_fast.bench.runner import Measurement, _checked_step
from resnet_fast.bench.traffic import blocks, compare
from resnet_fast.bench.training_step import Step, saved_bytes
from resnet_fast.cli import main
from resnet_fast.models.named import build

QUICK = ["--model", "resnet18", "--batch", "2", "--size", "64", "--rounds", "1", "--seconds", "0", "--threads", "1"]
PROVIDERS = ["--providers", "ours,channels_last"]


def training_model(name: str, **kwargs: int) -> nn.Module:
    model = build(name, **kwargs)
    randomise_batch_norm(model, 0)
    settle_relus(model)
    return model.train()


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", [False, True], ids=["batch", "frozen"])
def test_steps_are_right_timed_and_counted(frozen, tmp_path, capsys):
    target = tmp_path / "t.json"
    arguments = ["bench", "--training", *QUICK, *PROVIDERS, "--json", str(target)]
    assert main([*arguments, *(["--frozen-bn"] if frozen else [])]) == 0
    (workload,) = json.loads(target.read_text())["workloads"]
    assert (workload["training"], workload["frozen_bn"], workload["batch"]) == (True, frozen, 2)
    assert 0 < workload["traffic_bytes"]["ours"] < workload["traffic_bytes"]["stock"]
    for entry in workload["providers"]:
        assert entry["status"] == "ok", entry["reason"]
        assert 0 < entry["error"] < 2e-2
        assert len(entry["rounds_ms"]) == 1
        assert entry["peak_mib"] > 20
    ours, eager = workload["providers"]
    assert eager["saved_ratio"] == 1
    assert ours["saved_ratio"] == ours["saved_bytes"] / eager["saved_bytes"]
    assert 0.3 < ours["saved_ratio"] < 0.7
    assert eager["ratio"] == eager["median_ms"] / ours["median_ms"]
    assert "reads and writes" in capsys.readouterr().err


def test_only_some_providers_train(capsys):
    assert main(["bench", "--training", *QUICK, "--providers", "openvino"]) == 2
    assert "ours, channels_last, compile" in capsys.readouterr().err


def test_frozen_batch_norm_is_of_training(capsys):
    assert main(["bench", *QUICK, "--frozen-bn"]) == 2
    assert "needs --training" in capsys.readouterr().err


# --- the check of a step ----------------------------------------------------------------------------------------------


class Halved(torch.autograd.Function):
    """A gradient that is wrong in one place."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return 0.5 * grad


class OnlyInDouble(nn.Module):
    """Right in float64, in which the reference is made, and wrong in float32."""

    def __init__(self, wrong: str) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(12, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)
        self.wrong = wrong

    def forward(self, x):
        wrong = self.wrong if x.dtype is torch.float32 else ""
        x = self.first(x.flatten(1))
        if wrong == "gradient":
            x = Halved.apply(x)
        if wrong == "statistics":
            x = F.batch_norm(x, None, None, self.norm.weight, self.norm.bias, True)
        else:
            x = self.norm(x)
        x = self.second(x)
        return x * float("nan") if wrong == "nan" else x + 0.001 * torch.arange(4) if wrong == "loss" else x


class InBfloat16(nn.Module):
    """The same for a model in bfloat16."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16, enabled=x.dtype is torch.float32):
            return self.model(x).to(x.dtype)


def checked(model: nn.Module, images: torch.Tensor, folder: Path) -> Measurement:
    """A step in float32 against the same in float64."""
    labels = torch.arange(len(images)) % 4
    precise = copy.deepcopy(model).double()
    np.savez(folder / "ours.npz", **Step(model, images, labels).first())
    np.savez(folder / "reference.npz", **Step(precise, images.double(), labels).first())
    return _checked_step(Measurement("ours", "", "ok"), folder)


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ("gradient", "gradient of first: relative error 5.0e-01"),
        ("statistics", "statistics of norm"),
        ("loss", "loss"),
        ("nan", "loss: relative error nan"),
    ],
)
def test_a_wrong_step_is_not_timed(wrong, reason, tmp_path):
    torch.manual_seed(0)
    result = checked(OnlyInDouble(wrong).train(), torch.randn(6, 3, 2, 2), tmp_path)
    assert result.status == "inaccurate"
    assert reason in result.reason


def test_bfloat16_is_not_taken_for_float32(tmp_path):
    torch.manual_seed(0)
    images = torch.randn(4, 3, 64, 64)
    assert checked(training_model("resnet18", num_classes=10), images, tmp_path).error < 1e-3
    result = checked(InBfloat16(training_model("resnet18", num_classes=10)), images, tmp_path)
    assert result.status == "inaccurate"
    assert result.error > 5e-2


# --- what is saved ----------------------------------------------------------------------------------------------------


def test_storages_are_counted_once_and_the_model_not_at_all():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1000))

        def forward(self, x):
            y = x.flatten(1) * self.weight  # keeps x and the weight
            y = torch.relu(y)  # keeps its result, which the next one keeps too, in two views of it
            return y[:, :4] * y[:, 4:8]

    images = torch.randn(2, 10, 10, 10)
    probabilities = 2 * 4  # cross-entropy keeps these, beside labels and a sum of weights
    scalars = 8 * 2 + 4
    assert saved_bytes(Twice(), images) == 4 * (2 * 1000 + 2 * 1000 + probabilities) + scalars


@pytest.mark.parametrize(
    ("name", "frozen", "limit"), [("resnet18", False, 0.65), ("resnet50", False, 0.5), ("resnet50", True, 0.45)]
)
def test_what_is_saved_at_batch_16(name, frozen, limit):
    """At the size that is asked for: which layers count as expand layers depends on it."""
    images = torch.randn(16, 3, 224, 224).contiguous(memory_format=torch.channels_last)
    model = build(name).train()
    for norm in norms_of(model):
        norm.train(not frozen)
    eager = saved_bytes(model, images)
    assert saved_bytes(accelerate(model), images) <= limit * eager


# --- what is moved ----------------------------------------------------------------------------------------------------


def moved(model: nn.Module, *shape: int, dtype: torch.dtype = torch.float16) -> dict[str, int]:
    return {name: sum(blocks(moves).values()) for name, moves in compare(model.train(), shape, dtype).items()}


def test_traffic_of_resnet50():
    sizes = moved(build("resnet50"), 128, 3, 224, 224)
    assert sizes["stock"] == pytest.approx(21.7e9, rel=0.01)
    assert sizes["ours"] <= 7.0e9


def test_traffic_of_one_block_by_hand():
    """A bottleneck with the identity, 8 images of 256 channels, 56x56, in float16."""
    model = build("resnet50").train()
    wide, narrow = (2 * 8 * channels * 56 * 56 for channels in (256, 64))
    counted = {name: blocks(moves) for name, moves in compare(model, (8, 3, 224, 224), torch.float16).items()}
    batch_norm, relu, add = 3, 2, 3  # images read and written by each
    reduce = wide + narrow + narrow * (batch_norm + relu)
    middle = 2 * narrow + narrow * (batch_norm + relu)
    expand = narrow + wide + wide * (batch_norm + add + relu)
    assert counted["stock"]["layer1.1"] == reduce + middle + expand
    gram = narrow
    assert counted["ours"]["layer1.1"] == (wide + narrow) + 2 * narrow + gram + (narrow + wide + wide)


def test_strided_projection_reads_the_pixels_that_it_needs():
    moves = compare(build("resnet50").train(), (8, 3, 224, 224), torch.float16)["ours"]
    gram = [move for move in moves if move.block == "layer2.0" and move.op == "gram"]
    assert sorted(move.read for move in gram) == [2 * 8 * channels * 28 * 28 for channels in (128, 256)]


def test_traffic_leaves_the_model_alone():
    model = build("resnet18").train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    moved(model, 2, 3, 64, 64)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_traffic_command(tmp_path, capsys):
    target = tmp_path / "t.json"
    assert main(["traffic", "resnet18", "--batch", "2", "--size", "64", "--json", str(target)]) == 0
    data = json.loads(target.read_text())
    for name in ("stock", "ours"):
        assert data[name]["total"] == sum(data[name]["blocks"].values())
        assert list(data[name]["blocks"]) == [f"layer{stage}.{block}" for stage in range(1, 5) for block in range(2)]
        assert {"block", "op", "read", "written", "other"} == set(data[name]["moves"][0])
    assert "all blocks" in capsys.readouterr().err
    assert main(["traffic", "resnet18", "--dtype", "int8"]) == 2
