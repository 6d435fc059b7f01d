"""``benchmarks/layers.py``: real workers, short rounds."""

import json

import numpy as np
import pytest
import torch

from benchmarks import layers
from benchmarks.layer_report import KINDS
from resnet_fast import accelerate
from resnet_fast.bench import unavailable
from resnet_fast.kernels.native import library
from resnet_fast.kernels.native.inference import conv_shape


@pytest.fixture(autouse=True)
def needs():
    for name in (layers.OURS, layers.PEER):
        if reason := unavailable(name):
            pytest.skip(reason)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def shape(x, weight, stride=1, padding=0, groups=1, relu=True, pool=False):
    return conv_shape(x, weight, (stride, stride), (padding, padding), (1, 1), groups, relu, pool)


STEM = shape((2, 3, 40, 33), (64, 3, 7, 7), 2, 3, pool=True)
SHAPES = {
    "stem": STEM,
    "1x1": shape((1, 8, 9, 5), (16, 8, 1, 1), 2, relu=False),
    "3x3": shape((2, 16, 7, 7), (24, 16, 3, 3), 1, 1),
    "3x3/2": shape((1, 16, 9, 9), (16, 16, 3, 3), 2, 1),
    "grouped": shape((1, 64, 8, 8), (64, 2, 3, 3), 1, 1, groups=32),
    "fc": shape((3, 20, 1, 1), (10, 20, 1, 1), relu=False),
    "other": shape((1, 8, 9, 9), (8, 8, 5, 5), 1, 2),
}


@pytest.mark.parametrize("name", SHAPES)
def test_both_compute_the_same_layer(name):
    """Ours is planned with the very shape, ONNX Runtime's has the same result."""
    import onnxruntime

    given = SHAPES[name]
    assert layers.kind(given) == name
    assert name in KINDS
    layer = layers.module(given, seed=1)
    images = torch.randn(given.n, given.c, given.h, given.w)
    model = layers.onnx_model(given, layer).SerializeToString()
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    with torch.inference_mode():
        expected = layer(images).numpy()
        ours = accelerate(layer)
        images = images.contiguous(memory_format=torch.channels_last)
        ours(images)
        with library.recorded() as timings:
            ours(images)
    assert [bytes(timing.shape) for timing in timings] == [bytes(given)]
    (theirs,) = session.run(None, {"input": images.contiguous().numpy()})
    assert theirs.shape == expected.shape
    np.testing.assert_allclose(theirs, expected, rtol=1e-4, atol=1e-4)


def test_operations_and_bytes_by_hand():
    assert layers.flops(STEM) == 2 * 2 * 20 * 17 * 64 * 7 * 7 * 3
    assert layers.moved_bytes(STEM) == 4 * (2 * 40 * 33 * 3 + 64 * 7 * 7 * 3 + 2 * 10 * 9 * 64)
    # A quarter of the pixels, at even places: 5 of 9 rows, 3 of 5 columns.
    assert layers.flops(SHAPES["1x1"]) == 2 * 5 * 3 * 16 * 8
    assert layers.moved_bytes(SHAPES["1x1"]) == 4 * (5 * 3 * 8 + 16 * 8 + 5 * 3 * 16)
    assert layers.flops(SHAPES["grouped"]) == 2 * 8 * 8 * 64 * 3 * 3 * 2
    assert layers.moved_bytes(SHAPES["grouped"]) == 4 * (8 * 8 * 64 + 64 * 3 * 3 * 2 + 8 * 8 * 64)


def test_resnet18(tmp_path, capsys):
    files = {kind: tmp_path / f"layers.{kind}" for kind in ("json", "markdown", "svg")}
    options = [text for kind, path in files.items() for text in (f"--{kind}", str(path))]
    quick = ["--model", "resnet18", "--size", "32", "--threads", "1", "--rounds", "1", "--seconds", "0"]
    assert layers.main([*quick, *options]) == 0
    result = json.loads(files["json"].read_text())
    (workload,) = result["workloads"]
    entries = workload["layers"]
    assert sum(entry["count"] for entry in entries) == 20 + 1
    assert sum(entry["share"] for entry in entries) == pytest.approx(1)
    assert {entry["kind"] for entry in entries} == {"stem", "3x3", "3x3/2", "1x1", "fc"}
    stem, fc = entries[0], entries[-1]
    assert (stem["input"], stem["output"]) == ([1, 32, 32, 3], [1, 8, 8, 64])
    assert (stem["window"], stem["stride"], stem["pool"], stem["relu"]) == ([7, 7], [2, 2], True, True)
    assert (fc["input"], fc["output"], fc["flops"]) == ([1, 1, 1, 512], [1, 1, 1, 1000], 2 * 512 * 1000)
    (block,) = (entry for entry in entries if entry["input"] == [1, 8, 8, 64] and entry["kind"] == "3x3")
    assert (block["count"], block["flops"]) == (4, 2 * 8 * 8 * 64 * 64 * 9)
    for entry in entries:
        assert entry["intensity"] == pytest.approx(entry["flops"] / entry["bytes"])
        assert entry["gflops"] == pytest.approx(entry["flops"] / entry["network_ms"] / 1e6)
        assert entry["ratio"] == pytest.approx(entry["onnxruntime_ms"] / entry["alone_ms"])
        assert [provider["status"] for provider in entry["providers"]] == ["ok", "ok"]
    assert {"cpu", "cores", "isa", "packages"} <= set(result["machine"])
    assert result["threads"] == workload["threads"] == 1
    assert result["peak_gflops"] > 0
    assert result["bandwidth_gb_s"] > 0
    assert {"load_before", "load_after", "rounds", "seconds", "seed"} <= set(result)
    text = files["markdown"].read_text()
    assert result["machine"]["cpu"] in text
    assert "8x8x64 → 64, 3x3, ReLU" in text
    assert text.count("\n| ") == len(entries) + 2
    assert "<svg" in files["svg"].read_text()
    assert "ORT/ours" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "resnet99"], "--model: no model is called 'resnet99'"),
        (["--model", "alexnet", "--size", "64"], "--model alexnet: it does not run as one native program"),
        (["--batch", "0"], "argument --batch: '0', expected a whole number of at least 1"),
        (["--seconds", "nan"], "argument --seconds: 'nan', expected a number of at least 0"),
        (["--svg", "nowhere/x.svg"], "argument --svg: 'nowhere/x.svg', whose folder does not exist"),
    ],
)
def test_bad_arguments_are_named(arguments, said, capsys):
    with pytest.raises(SystemExit) as end:
        layers.main(arguments)
    assert end.value.code == 2
    assert said in capsys.readouterr().err
