"""The command line knows int8 in PyTorch: quantize, verify and bench."""

import json

import numpy as np
import pytest
import torch

import resnet_fast
from resnet_fast.bench import runner
from resnet_fast.bench.providers import INT8, provider
from resnet_fast.cli import main
from tests.cpu.small_models import images

IMAGES = images(4, 3, 32, 32)


def test_quantize_writes_what_load_quantized_reads(tmp_path, capsys):
    np.save(tmp_path / "images.npy", IMAGES.numpy())
    output, report = tmp_path / "m.safetensors", tmp_path / "report.json"
    arguments = ["--num-classes", "5", "--size", "32", "--calibration", str(tmp_path / "images.npy"), "--sensitivity"]
    assert main(["quantize", "resnet18", str(output), *arguments, "--json", str(report)]) == 0
    printed = capsys.readouterr().err
    assert "21 of 21 layers in int8" in " ".join(printed.split())
    assert "with one layer in int8" in " ".join(printed.split())
    int8 = resnet_fast.load_quantized(resnet_fast.resnet18(num_classes=5), output)
    assert int8(IMAGES).shape == (4, 5)
    found = json.loads(report.read_text())
    assert found["model"] == "resnet18" and found["quantisation"]["images"] == 4
    assert [layer["path"] for layer in found["quantisation"]["layers"]] == [
        layer.path for layer in resnet_fast.quantisation_of(int8).layers
    ]
    # The ranges again, from a file, without images.
    ranges = tmp_path / "ranges.json"
    ranges.write_text(json.dumps(resnet_fast.quantisation_of(int8).largest))
    again = ["--num-classes", "5", "--size", "32", "--ranges", str(ranges)]
    assert main(["quantize", "resnet18", str(tmp_path / "again.pt"), *again]) == 0
    other = resnet_fast.load_quantized(resnet_fast.resnet18(num_classes=5), tmp_path / "again.pt")
    assert torch.equal(other(IMAGES), int8(IMAGES))


def test_quantize_says_what_is_wrong(tmp_path, capsys):
    assert main(["quantize", "resnet18", str(tmp_path / "m.onnx")]) == 2
    assert "expected a name that ends in .safetensors" in " ".join(capsys.readouterr().err.split())
    assert main(["quantize", "resnet18", str(tmp_path / "m.pt")]) == 1
    assert "calibration is None and ranges is None" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_verify(tmp_path, capsys):
    report = tmp_path / "report.json"
    assert main(["verify", "resnet18", "--precision", "int8", "--size", "32", "--json", str(report)]) == 0
    assert "21 of 21 layers in int8" in " ".join(capsys.readouterr().err.split())
    found = json.loads(report.read_text())
    (check,) = found["models"]["resnet18"]
    assert found["precision"] == "int8" and check["kind"] == "int8" and check["passed"]
    assert 0 < check["error"] <= check["limit"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["verify", "m.onnx", "--precision", "int8"],
        ["verify", "resnet18", "--precision", "int8", "--layers"],
        ["bench", "resnet18", "--precision", "int8", "--training"],
        ["bench", "resnet18", "--precision", "int8", "--providers", "ncnn"],
    ],
)
def test_what_does_not_fit_int8_is_wrong_usage(arguments, capsys):
    assert main(arguments) == 2
    assert capsys.readouterr().err


def test_bench_times_ours_in_int8(tmp_path, capsys):
    report = tmp_path / "report.json"
    arguments = ["--precision", "int8", "--size", "32", "--rounds", "1", "--seconds", "0", "--threads", "1"]
    assert main(["bench", "resnet18", *arguments, "--json", str(report)]) == 0
    capsys.readouterr()
    (workload,) = json.loads(report.read_text())["workloads"]
    assert workload["dtype"] == "int8"
    by_name = {entry["provider"]: entry for entry in workload["providers"]}
    assert set(by_name) == set(INT8) and {entry["status"] for entry in by_name.values()} == {"ok"}
    assert by_name["ours_int8"]["ratio"] == 1.0
    assert by_name["ours_int8"]["error"] > 1e-4 > by_name["ours"]["error"]  # it is in int8


def test_a_wrong_result_is_not_timed_in_int8_either(tmp_path):
    np.save(tmp_path / runner.REFERENCE, np.array([[1.0, -1.0]]))
    np.save(tmp_path / "ours_int8.npy", np.array([[0.4, -1.0]]))
    given = runner.Measurement("ours_int8", provider("ours_int8").title, "ok")
    assert runner._checked(given, tmp_path).status == "inaccurate"
