"""The demo, through the same code with a smaller network on smaller photographs."""

import base64
import functools
import json
import re

import numpy as np
import onnxruntime
import pytest
import torch

from resnet_fast import network, ops
from resnet_fast.bench import measure
from resnet_fast.bench.machine import describe
from resnet_fast.bench.norms import freeze_batch_norm
from resnet_fast.cli import main
from resnet_fast.cli.demo.digits import LearntDigits
from resnet_fast.cli.demo.photographs import photographs
from resnet_fast.cli.demo.report import _sentence, _untimed, write_report
from resnet_fast.cli.demo.study import learnt, study
from resnet_fast.finetune.digits import CLASSES, digits
from resnet_fast.kernels.contract import Case
from resnet_fast.models.named import build

REDUCED = ["--model", "resnet18", "--size", "64", "--providers", "ours,eager", "--rounds", "1", "--seconds", "0"]


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "new" / "folder"
    code = main(["demo", "--out", str(folder), "--epochs", "3", "--threads", "1", *REDUCED])
    return code, folder, json.loads((folder / "report.json").read_text())


def test_all_checks_pass(outcome):
    code, folder, report = outcome
    checks = [check for part in report["studies"] for check in part["checks"]]
    assert [check["name"] for check in checks if not check["passed"]] == []
    assert code == 0
    assert report["passed"]
    assert len(checks) == 15
    assert report["training"]["best_accuracy"] >= 0.95
    assert sorted(path.name for path in folder.iterdir()) == [
        "digits",
        "digits.onnx",
        "report.html",
        "report.json",
        "resnet18.onnx",
    ]


def test_exported_network_knows_its_digits(outcome):
    _, folder, report = outcome
    data = digits(report["seed"])
    runtime = onnxruntime.InferenceSession(folder / "digits.onnx", providers=["CPUExecutionProvider"])
    said = runtime.get_modelmeta().custom_metadata_map
    assert json.loads(said["classes"]) == [str(digit) for digit in range(10)]
    pixels = ((data.test_images + 1) * 127.5).round()  # as finetune sees them
    (logits,) = runtime.run(None, {"input": (pixels / 127.5 - 1).numpy()})
    accuracy = float((logits.argmax(1) == data.test_labels.numpy()).mean())
    assert accuracy == pytest.approx(report["training"]["best_accuracy"])


def test_what_next_can_be_done(outcome, tmp_path, monkeypatch):
    """The command in the report that needs no files of the user's."""
    _, folder, _ = outcome
    monkeypatch.chdir(tmp_path)
    command = re.search(r"<pre>resnet-fast (export .*?)</pre>", (folder / "report.html").read_text(), re.DOTALL)[1]
    assert main(command.replace("\\\n", " ").split()) == 0
    assert (tmp_path / "digits-fp16.onnx").exists()


def test_report_is_one_honest_file(outcome):
    _, folder, report = outcome
    page = (folder / "report.html").read_text()
    links = [link for link in re.findall(r"""(?:src|href)=["']([^"']*)""", page) if not link.startswith(("data:", "#"))]
    assert links == ["digits/curves.png", "digits/confusion.png"]  # and to the documents from within a checkout alone
    assert all((folder / link).is_file() for link in links)
    assert not re.search(r"url\((?!#)", page)
    assert "The weights are random" in page
    assert report["machine"]["cpu"] in page
    assert page.count("<svg") == 2
    assert not re.search(r"<svg.*?#[0-9a-f]{6}\b.*?</svg>", re.sub(r'(id|href|url)[=(]"?#\w+', "", page), re.DOTALL)
    assert "GPU" not in page
    photographed = {entry["provider"]: entry for entry in report["studies"][1]["bench"]["providers"]}
    first, *_ = re.findall(r'<div class="tile"><b.*?>(.*?)</b>', page)
    assert first == f"{photographed['eager']['ratio']:.2f}×"
    for part in report["studies"]:
        for entry in part["bench"]["providers"]:
            assert f"{entry['median_ms']:.2f}" in page
    picture = re.search(r'data:image/png;base64,([^"]+)"', page)[1]
    assert base64.b64decode(picture).startswith(b"\x89PNG")


def test_wrong_kernel_fails_the_checks_and_the_report(monkeypatch, tmp_path):
    name = ops.implementation_for(Case("conv_bn_act", "cpu", torch.float32, 64, 64, (3, 3), (1, 1), (1, 1)))
    implementation = ops.IMPLEMENTATIONS[name]
    right = implementation.conv_bn_act

    def wrong(x, weight, scale, shift, *rest):
        return right(x, weight, scale, shift + 0.01, *rest)

    monkeypatch.setattr(implementation, "conv_bn_act", wrong)
    # A network that is one native program calls no op.
    monkeypatch.setattr(network, "plan_for", lambda *_: None)
    data, pictures = digits(0), photographs(32)
    stock = build("resnet18", num_classes=10)
    nothing = functools.partial(measure, providers=[], threads=1, rounds=1, seconds=0)
    result = study("a study", stock, data.test_images, onnx=tmp_path / "m.onnx", measured=nothing, bench_batch=1)
    failed = [check.name for check in result.checks if not check.passed]
    assert "The accelerated model's error against float64 is single precision's own" in failed
    assert "Every block by itself is as exact as the stock block" in failed
    assert not [name for name in failed if "ONNX" in name]  # the export goes by the stock model
    content = {"seed": 0, "threads": 1, "seconds": 1.0, "load_before": None, "machine": describe()}
    training = {"epochs": 1, "seconds": 1.0, "best_accuracy": 0.5, "history": [{"val_accuracy": 0.5}]}
    pixels = ((data.test_images + 1) * 127.5).byte()
    learnt_digits = LearntDigits(stock, CLASSES, data.test_images, pixels, data.test_labels, training)
    report = write_report(tmp_path, content, learnt_digits, pictures, result, result)
    assert not report["passed"]
    assert report["checks_passed"] == report["checks"] - 2 * len(failed)
    page = (tmp_path / "report.html").read_text()
    assert page.count("FAILED") == 2 * len(failed)
    wrong = [(guess, truth) for guess, truth in zip(result.predictions, data.test_labels.tolist()) if guess != truth]
    shown = re.findall(r"read as (\d),</span><br>is (\d)", page)
    assert shown == [(str(guess), str(truth)) for guess, truth in wrong[:24]]
    assert not json.loads((tmp_path / "report.json").read_text())["passed"]


def test_network_that_learnt_too_little_fails():
    assert learnt(0.95).passed
    assert not learnt(0.9499).passed


def test_data_is_real_and_normalised():
    data = digits(0)
    assert len(data.train_images) + len(data.test_images) == 1797
    assert data.train_images.min() == -1
    assert data.train_images.max() <= 1
    assert torch.bincount(data.test_labels).min() >= 43  # as many of each class as the whole has
    pictures = photographs(96)
    assert pictures.images.shape == (8, 3, 96, 96)
    assert pictures.pictures.shape == (8, 3, 96, 96)
    assert len({picture.numpy().tobytes() for picture in pictures.pictures}) == 8
    assert all(np.ptp(picture.numpy()) > 100 for picture in pictures.pictures)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(
        pictures.images * std.view(3, 1, 1) + mean.view(3, 1, 1), pictures.pictures / 255, atol=1e-6, rtol=0
    )


def test_statistics_are_those_of_the_images():
    model = build("resnet18")
    images = photographs(64).images
    seen = {}
    model.conv1.register_forward_hook(lambda _, args, result: seen.update(conv1=result.clone()))
    freeze_batch_norm(model, images)
    torch.testing.assert_close(model.bn1.running_mean, seen["conv1"].mean((0, 2, 3)))
    torch.testing.assert_close(model.bn1.running_var, seen["conv1"].var((0, 2, 3)))
    assert model.bn1.momentum == 0.1
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize(
    ("ratio", "words"), [(2.0, "2.00 times as fast"), (1.01, "about the same"), (0.5, "slower, at 0.50 times")]
)
def test_comparison_is_worded_whichever_way_it_went(ratio, words):
    ours = {"provider": "ours", "title": "resnet_fast", "median_ms": 10.0, "ratio": 1.0}
    peer = {"provider": "openvino", "title": "OpenVINO", "median_ms": 10 * ratio, "ratio": ratio}
    assert words in _sentence({"providers": [ours, peer]})


def test_what_is_missing_takes_a_line():
    """And what failed is not among what could be installed."""
    absent = [
        {"provider": name, "title": title, "median_ms": None, "status": "missing", "reason": f"{name} is not installed"}
        for name, title in (("openvino", "OpenVINO"), ("MNN", "MNN"))
    ]
    broken = {"provider": "ncnn", "title": "ncnn", "median_ms": None, "status": "failed", "reason": "ended by signal 9"}
    said = _untimed({"providers": [*absent, broken]})
    assert said == "Not timed: OpenVINO, MNN (make demo PEERS=1 installs what is missing); ncnn (ended by signal 9)."
    assert _untimed({"providers": [{**broken, "median_ms": 1.0}]}) == ""
