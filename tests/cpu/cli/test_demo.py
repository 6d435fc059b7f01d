"""The demo, through the same code with a smaller network on smaller photographs."""

import base64
import json
import re

import numpy as np
import onnxruntime
import pytest
import torch

from resnet_fast import network
from resnet_fast.bench.machine import describe
from resnet_fast.cli import main
from resnet_fast.cli.demo.data import digits, photographs
from resnet_fast.cli.demo.report import _sentence, write_report
from resnet_fast.cli.demo.study import BenchSettings, study
from resnet_fast.cli.demo.training import History, accuracy_of, calibrate, digits_network
from resnet_fast.models.named import build
from resnet_fast.ops import inference as ops

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
    assert report["training"]["accuracy"][-1] >= 0.95
    assert sorted(path.name for path in folder.iterdir()) == [
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
    (logits,) = runtime.run(None, {"input": data.test_images.numpy()})
    accuracy = float((logits.argmax(1) == data.test_labels.numpy()).mean())
    assert accuracy == pytest.approx(report["training"]["accuracy"][-1])


def test_report_is_one_honest_file(outcome):
    _, folder, report = outcome
    page = (folder / "report.html").read_text()
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", page)
    assert not re.search(r"url\((?!#)", page)
    assert "The weights are random" in page
    assert report["machine"]["cpu"] in page
    assert page.count("<svg") == 5
    assert "GPU" not in page
    for part in report["studies"]:
        for entry in part["bench"]["providers"]:
            assert f"{entry['median_ms']:.2f}" in page
    picture = re.search(r'data:image/png;base64,([^"]+)"', page)[1]
    assert base64.b64decode(picture).startswith(b"\x89PNG")


def test_wrong_kernel_fails_the_checks_and_the_report(monkeypatch, tmp_path):
    name = ops.implementation_for(ops.Case("conv_bn_act", "cpu", torch.float32, 64, 64, (3, 3), (1, 1), (1, 1)))
    implementation = ops.IMPLEMENTATIONS[name]
    right = implementation.conv_bn_act

    def wrong(x, weight, scale, shift, *rest):
        return right(x, weight, scale, shift + 0.01, *rest)

    monkeypatch.setattr(implementation, "conv_bn_act", wrong)
    # A network that is one native program calls no op.
    monkeypatch.setattr(network, "plan_for", lambda *_: None)
    data, pictures = digits(0), photographs(32)
    settings = BenchSettings(providers=[], threads=1, rounds=1, seconds=0)
    result = study(
        "a study", digits_network(0).eval(), data.test_images, onnx=tmp_path / "m.onnx", bench=settings, bench_batch=1
    )
    failed = [check.name for check in result.checks if not check.passed]
    assert "The accelerated model's error against float64 is single precision's own" in failed
    assert "Every block by itself is as exact as the stock block" in failed
    assert not [name for name in failed if "ONNX" in name]  # the export goes by the stock model
    content = {"seed": 0, "threads": 1, "seconds": 1.0, "load_before": None, "machine": describe()}
    history = {"loss": [1.0], "accuracy": [0.5], "seconds": 1.0}
    report = write_report(tmp_path, {**content, "training": history}, data, pictures, result, result)
    assert not report["passed"]
    assert report["checks_passed"] == report["checks"] - 2 * len(failed)
    assert (tmp_path / "report.html").read_text().count("FAILED") == 2 * len(failed)
    assert not json.loads((tmp_path / "report.json").read_text())["passed"]


def test_network_that_learnt_too_little_fails():
    assert accuracy_of(History([1.0], [0.95], 1.0)).passed
    assert not accuracy_of(History([1.0, 0.5], [0.99, 0.9499], 1.0)).passed


def test_data_is_real_and_normalised():
    data = digits(0)
    assert len(data.train_images) + len(data.test_images) == 1797
    assert data.train_images.min() == -1
    assert data.train_images.max() <= 1
    assert torch.bincount(data.test_labels).min() >= 43  # as many of each class as the whole has
    pictures = photographs(96)
    assert pictures.images.shape == (8, 3, 96, 96)
    assert len({picture.tobytes() for picture in pictures.pictures}) == 8
    assert all(picture.shape == (96, 96, 3) and np.ptp(picture) > 100 for picture in pictures.pictures)


def test_calibration_sets_the_statistics_of_the_images():
    model = build("resnet18")
    images = photographs(64).images
    seen = {}
    model.conv1.register_forward_hook(lambda _, args, result: seen.update(conv1=result.clone()))
    calibrate(model, images)
    torch.testing.assert_close(model.bn1.running_mean, seen["conv1"].mean((0, 2, 3)))
    torch.testing.assert_close(model.bn1.running_var, seen["conv1"].var((0, 2, 3)))
    assert model.bn1.momentum == 0.1
    assert not model.training


@pytest.mark.parametrize(
    ("ratio", "words"), [(2.0, "2.00 times as fast"), (1.01, "about the same"), (0.5, "slower, at 0.50 times")]
)
def test_comparison_is_worded_whichever_way_it_went(ratio, words):
    ours = {"provider": "ours", "title": "resnet_fast", "median_ms": 10.0, "ratio": 1.0}
    peer = {"provider": "openvino", "title": "OpenVINO", "median_ms": 10 * ratio, "ratio": ratio}
    assert words in _sentence({"providers": [ours, peer]})
