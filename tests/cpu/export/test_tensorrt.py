"""What TensorRT-RTX, which builds on any machine, makes of exported files, and how its refusals arrive."""

import os
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import onnx
import onnxruntime.quantization as ort_quantization
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torchvision.models import resnet

from resnet_fast.bench.norms import randomise_batch_norm
from resnet_fast.export import MissingPackageError, export_onnx, tensorrt
from resnet_fast.export.tensorrt import EngineError

pytestmark = pytest.mark.skipif(
    not tensorrt.available(), reason="the TensorRT-RTX wheels (extra `tensorrt`) are not installed"
)


def export(folder: Path, block=resnet.BasicBlock, precision="fp32", biases=True, **kwargs) -> Path:
    torch.manual_seed(0)
    model = resnet.ResNet(block, [1, 1, 1, 1], num_classes=10, **kwargs)
    if biases:
        randomise_batch_norm(model, 0)
    path = folder / f"{block.__name__}.onnx"
    export_onnx(model, path, precision=precision, input_size=(3, 64, 64), verify=False)
    return path


@pytest.fixture(scope="module")
def basic(tmp_path_factory):
    return export(tmp_path_factory.mktemp("basic"))


class Noise(ort_quantization.CalibrationDataReader):
    """Two batches to calibrate on."""

    def __init__(self):
        generator = np.random.default_rng(0)
        self.batches = iter([{"input": generator.standard_normal((2, 3, 64, 64), np.float32)} for _ in range(2)])

    def get_next(self):
        return next(self.batches, None)


def counts(path: Path) -> dict[str, int]:
    """Operators of the file."""
    nodes = [node.op_type for node in onnx.load(path).graph.node]
    return {name: nodes.count(name) for name in set(nodes)}


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_every_relu_and_add_is_inside_a_convolution(precision, basic, tmp_path):
    path = basic if precision == "fp32" else export(tmp_path, precision=precision)
    report = tensorrt.build(path)
    inside = counts(path)
    assert report.convolutions == inside["Conv"] == 12
    assert report.fused == inside["Relu"] == 9
    assert report.fused_add == inside["Add"] == 4
    assert report.int8_convolutions == report.fused_int8_add == report.int8_tails == 0
    word = {"fp32": "Float", "fp16": "Half", "bf16": "BFloat16"}[precision]
    assert {next(iter(layer.inputs.values())) for layer in report.layers if layer.is_convolution} == {word}
    bytes_per_weight = 4 if precision == "fp32" else 2
    weights = sum(np.prod(tensor.dims) for tensor in onnx.load(path).graph.initializer)
    assert weights * bytes_per_weight < report.size < weights * bytes_per_weight * 1.25
    assert 0 < report.seconds < 600
    assert 12 < report.kernels < len(report.layers)


@pytest.mark.parametrize(
    "options",
    [
        {"groups": 8, "width_per_group": 8, "replace_stride_with_dilation": [False, True, True]},
        {"precision": "fp16", "biases": False},  # some convolutions of 1x1 become products of matrices
    ],
    ids=str,
)
def test_bottlenecks(options, tmp_path):
    path = export(tmp_path, resnet.Bottleneck, **options)
    report = tensorrt.build(path, min_batch=2, opt_batch=2, max_batch=2)
    inside = counts(path)
    assert report.convolutions == inside["Conv"] == 17
    assert (report.fused, report.fused_add) == (inside["Relu"], inside["Add"]) == (13, 4)


def test_int8(basic, tmp_path):
    """Scales per channel: TensorRT-RTX leaves scale, Add and ReLU to one kernel after each convolution."""
    options = {"ActivationSymmetric": True, "QuantizeBias": False, "AddQDQPairToWeight": True}
    ort_quantization.quantize_static(
        basic, tmp_path / "q.onnx", Noise(), per_channel=True, op_types_to_quantize=["Conv"], extra_options=options
    )
    report = tensorrt.build(tmp_path / "q.onnx")
    assert report.convolutions == report.int8_convolutions == 12
    assert report.fused + report.int8_tails == 12
    assert report.size < 0.4 * basic.stat().st_size


def test_refusals_name_the_node(basic, tmp_path):
    """The default of ONNX Runtime's quantiser: an int32 bias."""
    ort_quantization.quantize_static(basic, tmp_path / "q.onnx", Noise(), op_types_to_quantize=["Gemm"])
    with pytest.raises(EngineError) as error:
        tensorrt.build(tmp_path / "q.onnx")
    text = str(error.value)
    assert f"cannot parse {str(tmp_path / 'q.onnx')!r}: node 'fc.bias_DequantizeLinear' (DequantizeLinear)" in text
    assert "input has type Int32" in text
    assert "cudaError" not in text


def small(folder: Path, nodes, shape, data_type=TensorProto.FLOAT, weights=()) -> Path:
    image = helper.make_tensor_value_info("image", data_type, shape)
    result = helper.make_tensor_value_info("result", TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "small", [image], [result], list(weights))
    imports = [helper.make_opsetid("", 18), helper.make_opsetid("elsewhere", 1)]
    path = folder / "small.onnx"
    onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=10), path)
    return path


def test_an_operator_that_it_does_not_know(tmp_path):
    node = helper.make_node("Unheard", ["image"], ["result"], domain="elsewhere", name="strange")
    with pytest.raises(EngineError, match=r"node 'strange' \(Unheard\).*Plugin"):
        tensorrt.build(small(tmp_path, [node], ["batch", 3, 8, 8]))


@pytest.fixture
def photos(tmp_path):
    """uint8 NHWC of any size."""
    weight = numpy_helper.from_array(np.ones((4, 3, 3, 3), np.float32), "weight")
    nodes = [
        helper.make_node("Cast", ["image"], ["float"], to=TensorProto.FLOAT, name="cast"),
        helper.make_node("Transpose", ["float"], ["planes"], perm=[0, 3, 1, 2], name="transpose"),
        helper.make_node("Conv", ["planes", "weight"], ["features"], name="conv"),
        helper.make_node("GlobalAveragePool", ["features"], ["result"], name="pool"),
    ]
    return small(tmp_path, nodes, ["batch", "height", "width", 3], TensorProto.UINT8, [weight])


def test_preprocessing_inside(photos):
    report = tensorrt.build(photos, image_size=(48, 64), max_batch=8)
    assert report.convolutions == 1
    first = next(layer for layer in report.layers if "image" in layer.inputs)
    assert first.inputs["image"] == "UInt8"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "image_size is None, but input 'image' leaves 2 dimensions open"),
        ({"image_size": (64,)}, r"image_size is \(64,\), expected two positive integers"),
        ({"image_size": (64, 0)}, r"image_size is \(64, 0\), expected two positive integers"),
        ({"image_size": (64, 64), "min_batch": 0}, r"min_batch, opt_batch, max_batch are \(0, 8, 32\)"),
        ({"image_size": (64, 64), "max_batch": 4}, r"min_batch, opt_batch, max_batch are \(1, 8, 4\)"),
        ({"image_size": (64, 64), "opt_batch": 1.5}, r"min_batch, opt_batch, max_batch are \(1, 1.5, 32\)"),
    ],
)
def test_arguments_that_do_not_fit(photos, arguments, message):
    with pytest.raises(ValueError, match=message):
        tensorrt.build(photos, **arguments)


def test_no_onnx_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected an ONNX file"):
        tensorrt.build(tmp_path / "none.onnx")
    for content in (b"", b"\xff\xfe words"):
        (tmp_path / "text.onnx").write_bytes(content)
        with pytest.raises(ValueError, match="which is not an ONNX file"):
            tensorrt.build(tmp_path / "text.onnx")


def test_too_slow(basic):
    with pytest.raises(EngineError, match=r"timeout is 0\.01 s"):
        tensorrt.build(basic, timeout=0.01)


def _children() -> set[int]:
    found = " ".join(path.read_text() for path in Path("/proc/self/task").glob("*/children"))
    return {int(word) for word in found.split()}


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the child process through /proc")
def test_a_crash_is_an_exception(basic):
    """The process that builds dies, as a fault inside TensorRT would end it."""
    before = _children()
    caught = []

    def build():
        try:
            tensorrt.build(basic)
        except EngineError as error:
            caught.append(str(error))

    thread = threading.Thread(target=build)
    thread.start()
    while thread.is_alive():
        for child in _children() - before:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.001)
    thread.join()
    assert caught == [f"TensorRT-RTX ended with status -9 on {str(basic)!r}: it said nothing"]


def test_missing_package(basic, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt_rtx_bindings", None)
    assert not tensorrt.available()
    with pytest.raises(MissingPackageError, match=r"pip install 'resnet-fast\[tensorrt\]'"):
        tensorrt.build(basic)
