"""int8 files: where the pairs stand, what runtimes make of them, how exact they are, and which layers fall back."""

import collections
import json
import logging

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from torch import nn
from torchvision.models import resnet

from resnet_fast.bench.norms import randomise_batch_norm
from resnet_fast.cli import main
from resnet_fast.export import VerificationError, export_onnx, tensorrt, verify_onnx
from resnet_fast.export.metadata import Metadata
from resnet_fast.export.quantise import quantise
from resnet_fast.export.quantise.cpu import needs_reduced_range
from resnet_fast.export.quantise.layers import find_layers
from tests.cpu.trained import SIZE, Trained, exported


def saved(model, path):
    ir.save(model, path)
    return path


def run(path, images, optimised=None):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if optimised is not None:
        options.optimized_model_filepath = str(optimised)
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return session.run(None, {"input": images.numpy()})[0].astype(np.float64)


def relative(found, expected):
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


# --- where the pairs stand --------------------------------------------------------------------------------------------


def shortened(model):
    """Two stages of four are quicker to export, and have every kind of block."""
    model.fc = nn.Linear(model.layer2[0].bn2.num_features if not hasattr(model.layer2[0], "bn3") else 512, 10)
    model.layer3 = model.layer4 = nn.Identity()
    return model


def torchvision_resnet(block, **kwargs):
    return shortened(resnet.ResNet(block, [2, 1, 1, 1], **kwargs))


def pooled_shortcut():
    """What timm's resnet50d is made of."""
    timm_resnet = pytest.importorskip("timm").models.resnet
    stem = {"stem_width": 32, "stem_type": "deep"}
    return shortened(timm_resnet.ResNet(timm_resnet.Bottleneck, [2, 1, 1, 1], avg_down=True, **stem))


def other_stem():
    model = torchvision_resnet(resnet.BasicBlock)
    model.conv1, model.maxpool = nn.Conv2d(3, 64, 3, 1, 1), nn.Identity()
    return model


ARCHITECTURES = {
    "basic": lambda: torchvision_resnet(resnet.BasicBlock),
    "bottleneck": lambda: torchvision_resnet(resnet.Bottleneck),
    "resnext": lambda: torchvision_resnet(resnet.Bottleneck, groups=32, width_per_group=4),
    "wide": lambda: torchvision_resnet(resnet.Bottleneck, width_per_group=128),
    "pooled shortcut": pooled_shortcut,
    "other stem": other_stem,
}


@pytest.fixture(scope="module", params=ARCHITECTURES)
def placed(request, tmp_path_factory):
    """A network in float32, and the path of its int8 file."""
    torch.manual_seed(0)
    model = ARCHITECTURES[request.param]()
    randomise_batch_norm(model, 0)
    folder = tmp_path_factory.mktemp("placed")
    program = exported(model, folder / "float.onnx")
    images = torch.randn(8, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    result = quantise(program, Metadata("Net", (3, SIZE, SIZE)), calibration=images)
    return folder / "float.onnx", saved(result.model, folder / "int8.onnx"), result.report


def test_pairs_stand_where_tensorrt_wants_them(placed):
    original, graph = (onnx.load(path).graph for path in placed[:2])
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    producers = {name: node for node in graph.node for name in node.output}
    readers = collections.defaultdict(list)
    for node in graph.node:
        for name in node.input:
            readers[name].append(node)

    def dequantised_image(name):
        """``name`` comes out of a pair with one positive scale and a zero point of 0."""
        dequantise = producers.get(name)
        if dequantise is None or dequantise.op_type != "DequantizeLinear":
            return False
        quantise = producers.get(dequantise.input[0])
        if quantise is None:  # a weight
            return False
        assert quantise.op_type == "QuantizeLinear"
        assert list(quantise.input[1:]) == list(dequantise.input[1:])
        scale, zero = (constants[each] for each in quantise.input[1:])
        assert scale.shape == () and scale > 0
        assert zero.dtype == np.int8 and zero == 0
        return True

    layers = [node for node in graph.node if node.op_type in ("Conv", "Gemm")]
    assert len(layers) == sum(node.op_type in ("Conv", "Gemm") for node in original.node)
    for layer in layers:
        assert dequantised_image(layer.input[0]), layer.name
        weight = producers[layer.input[1]]
        assert weight.op_type == "DequantizeLinear"
        integers, scales = constants[weight.input[0]], constants[weight.input[1]]
        assert integers.dtype == np.int8 and np.abs(integers).max() == 127
        assert scales.shape == integers.shape[:1] and (scales > 0).all()
        assert [attribute.i for attribute in weight.attribute if attribute.name == "axis"] == [0]
        assert len(weight.input) == 2 or not constants[weight.input[2]].any()
        assert all(constants[bias].dtype == np.float32 for bias in layer.input[2:])  # no pair on a bias
        # Its result goes to a ReLU, to an Add, or, from a shortcut, through a pair to an Add.
        (following,) = [node.op_type for node in readers[layer.output[0]]] or ["output"]
        shortcut = "downsample" in weight.input[0]
        assert following == ("output" if layer.op_type == "Gemm" else "QuantizeLinear" if shortcut else following)
        assert following in ("Relu", "Add", "QuantizeLinear", "output")
    adds = [node for node in graph.node if node.op_type == "Add"]
    assert len(adds) == 3  # one for each block
    for add in adds:
        last, identity = sorted(add.input, key=dequantised_image)
        assert producers[last].op_type == "Conv"
        assert "downsample" not in producers[producers[last].input[1]].input[0]
        assert dequantised_image(identity)
        assert [node.op_type for node in readers[add.output[0]]] == ["Relu"]
    quantised = [node.input[0] for node in graph.node if node.op_type == "QuantizeLinear"]
    assert len(quantised) == len(set(quantised))  # one pair serves all readers
    for pool in (node for node in graph.node if node.op_type == "AveragePool"):
        assert dequantised_image(pool.input[0])  # it stands beside a convolution that reads the same
    assert not [name for name, array in constants.items() if array.ndim > 1 and array.dtype != np.int8]


def test_weights_are_rounded_to_the_nearest(placed):
    exact = {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(placed[0]).graph.initializer}
    found = {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(placed[1]).graph.initializer}
    for name, weight in exact.items():
        if weight.ndim < 2:
            assert np.array_equal(found[name], weight)
            continue
        scales = found[f"{name}_scale"].reshape(-1, *[1] * (weight.ndim - 1)).astype(np.float64)
        assert np.abs(found[f"{name}_int8"] * scales - weight).max() <= 0.5001 * scales.max()
        per_channel = np.abs(weight).reshape(len(weight), -1).max(1) / 127
        np.testing.assert_allclose(found[f"{name}_scale"], per_channel, rtol=1e-6)


def test_tensorrt_takes_every_convolution_as_int8(placed):
    if not tensorrt.available():
        pytest.skip("the extra tensorrt is not installed")
    report = tensorrt.build(placed[1], opt_batch=2, max_batch=4)
    convolutions = sum(node.op_type == "Conv" for node in onnx.load(placed[1]).graph.node)
    assert report.int8_convolutions == report.convolutions == convolutions


def test_layers_have_the_modules_paths(placed):
    report = placed[2]
    assert [layer.precision for layer in report.layers] == ["int8"] * len(report.layers)
    by_path = {layer.path: layer for layer in report.layers}
    last = "conv2" if "layer1.0.conv3" not in by_path else "conv3"
    assert set(by_path["layer1.1." + last].ranges) == {"input", "residual"}
    assert set(by_path["layer1.1.conv1"].ranges) == {"input"}
    # The block's input is what its identity branch adds.
    assert by_path["layer1.1." + last].ranges["residual"] == by_path["layer1.1.conv1"].ranges["input"]


# --- a trained network ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return Trained(tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="module", params=["tensorrt", "cpu"])
def int8(request, trained, tmp_path_factory):
    result = quantise(
        trained.program,
        trained.metadata,
        calibration=trained.calibration,
        target=request.param,
        validation=torch.utils.data.TensorDataset(trained.digits, trained.labels),
    )
    return saved(result.model, tmp_path_factory.mktemp("int8") / f"{request.param}.onnx"), result


def test_accuracy_error_and_size(trained, int8):
    path, result = int8
    onnx.checker.check_model(path, full_check=True)
    before, logits = trained.accuracy(trained.digit_logits), run(path, trained.digits)
    assert before > 85  # it has learnt something that could be lost
    assert before - trained.accuracy(logits) <= 0.5
    assert relative(logits, trained.digit_logits) <= 0.05
    assert relative(run(path, trained.photographs), trained.photograph_logits) <= 0.05
    assert path.stat().st_size <= 0.27 * trained.path.stat().st_size
    # What was reported is what is true.
    judgement = result.report.judgement
    assert result.report.judged_by == "validation"
    assert judgement.images == len(trained.digits)
    assert 100 * judgement.accuracy == pytest.approx(trained.accuracy(logits))
    assert 100 * judgement.float_accuracy == pytest.approx(before)
    assert judgement.drop == pytest.approx(before - trained.accuracy(logits))
    assert judgement.logit_error == pytest.approx(relative(logits, trained.digit_logits), rel=1e-3)
    assert judgement.agreement == (logits.argmax(1) == trained.digit_logits.argmax(1)).mean()


def test_images_do_not_depend_on_their_batch(trained, int8):
    path, _ = int8
    whole = run(path, trained.digits[:7])
    for batch in (1, 2):
        parts = np.concatenate([run(path, part) for part in trained.digits[:7].split(batch)])
        # Sums in float32 that another order of summation moves over the edge of a step of int8.
        assert relative(parts, whole) <= 0.01


@pytest.mark.parametrize("method", ["max", "percentile", "entropy"])
def test_methods_of_calibration(trained, method, tmp_path):
    result = quantise(trained.program, trained.metadata, calibration=trained.calibration, calibration_method=method)
    path = saved(result.model, tmp_path / "m.onnx")
    assert result.report.method == method
    assert relative(run(path, trained.digits), trained.digit_logits) <= 0.05


def test_cpu_target_fuses_all_and_is_more_exact_than_onnxruntimes_own(trained, tmp_path):
    """Beside what quantize_static makes with per_channel and its defaults, from the same images."""
    from onnxruntime.quantization import CalibrationDataReader, quantize_static

    class Reader(CalibrationDataReader):
        batches = iter(trained.calibration.split(64))

        def get_next(self):
            batch = next(self.batches, None)
            return None if batch is None else {"input": batch.numpy()}

    logging.disable(logging.WARNING)
    quantize_static(trained.path, tmp_path / "theirs.onnx", Reader(), per_channel=True)
    logging.disable(logging.NOTSET)
    level = logging.getLogger().level
    result = quantise(trained.program, trained.metadata, calibration=trained.calibration, target="cpu")
    assert logging.getLogger().level == level
    ours = saved(result.model, tmp_path / "ours.onnx")
    logits = run(ours, trained.digits, tmp_path / "optimised.onnx")
    theirs = run(tmp_path / "theirs.onnx", trained.digits, tmp_path / "theirs_optimised.onnx")
    if not needs_reduced_range():  # where 7 bits are needed, theirs overflows instead
        assert relative(logits, trained.digit_logits) < relative(theirs, trained.digit_logits)
    counts, their_counts = (
        collections.Counter(node.op_type for node in onnx.load(tmp_path / name).graph.node)
        for name in ("optimised.onnx", "theirs_optimised.onnx")
    )
    assert counts["QLinearConv"] == 12
    assert counts["QLinearAdd"] == 4
    assert counts["QGemm"] == 1
    assert counts["QuantizeLinear"] == 1  # of the input
    assert not counts.keys() & {"Conv", "FusedConv", "Relu", "Add", "MaxPool", "Gemm", "DequantizeLinear"}
    assert their_counts["QLinearConv"] < 12  # why signed activations are slower


def test_weights_of_7_bits_where_8_would_overflow(trained, monkeypatch):
    monkeypatch.setattr("resnet_fast.export.quantise.pipeline.needs_reduced_range", lambda: True)
    result = quantise(trained.program, trained.metadata, calibration=trained.calibration, target="cpu")
    assert result.report.reduce_range
    constants = [value.const_value.numpy() for value in result.model.graph.initializers.values()]
    weights = [array for array in constants if array.ndim > 1]
    assert weights
    assert max(np.abs(array.astype(int)).max() for array in weights) <= 64


# --- layers that fall back --------------------------------------------------------------------------------------------


def lopsided(program, factor):
    """The same network, but one channel before ``layer2.0.conv2`` is so large that 8 bits leave nothing of the others.

    A ReLU lets a positive factor through, so the next convolution can take it back.
    """
    program = program.clone()
    for name, place, multiple in (
        ("conv1.weight", 5, factor),
        ("conv1.bias", 5, factor),
        ("conv2.weight", (slice(None), 5), 1 / factor),
    ):
        value = program.graph.initializers[f"layer2.0.{name}"]
        array = value.const_value.numpy().copy()
        array[place] *= multiple
        value.const_value = ir.tensor(array, name=value.name)
    return program


@pytest.mark.parametrize(
    ("target", "other", "expected"),
    [
        ("tensorrt", "fp16", {"layer2.0.conv2"}),
        # ONNX Runtime's convolution also writes 8 bits, so the layer before is spoilt as much.
        ("cpu", "fp32", {"layer2.0.conv1", "layer2.0.conv2"}),
    ],
)
def test_the_layer_that_int8_spoils_falls_back(trained, target, other, expected, tmp_path):
    few = slice(None, None, 4)
    result = quantise(
        lopsided(trained.program, 2000),
        trained.metadata,
        calibration=trained.calibration[:64],
        calibration_method="max",
        target=target,
        validation=torch.utils.data.TensorDataset(trained.digits[few], trained.labels[few]),
        max_accuracy_drop=1.0,
    )
    report = result.report
    assert report.judgement.drop <= 1
    assert {layer.path: layer.precision for layer in report.layers if layer.precision != "int8"} == dict.fromkeys(
        expected, other
    )
    errors = sorted(report.layers, key=lambda layer: layer.logit_error)
    assert {layer.path for layer in errors[-len(expected) :]} == expected
    path = saved(result.model, tmp_path / "m.onnx")
    labels = trained.labels[few].numpy()
    before, after = (
        100 * (logits.argmax(1) == labels).mean()
        for logits in (trained.digit_logits[few], run(path, trained.digits[few]))
    )
    assert before - after == pytest.approx(report.judgement.drop)
    said = json.loads(result.model.metadata_props["quantisation"])
    assert set(said["fall_back"]) == set(report.fall_back) == expected
    if target == "tensorrt" and tensorrt.available():
        built = tensorrt.build(path, opt_batch=2, max_batch=4)
        assert built.int8_convolutions == built.convolutions - 1


@pytest.mark.parametrize("target", ["tensorrt", "cpu"])
def test_int8_does_spoil_that_network(trained, target):
    result = quantise(
        lopsided(trained.program, 2000),
        trained.metadata,
        calibration=trained.calibration[:64],
        calibration_method="max",
        target=target,
        validation=torch.utils.data.TensorDataset(trained.digits[::4], trained.labels[::4]),
    )
    assert result.report.judgement.drop > 2
    assert result.report.fall_back == ()


def test_every_layer_in_half_precision(trained, tmp_path):
    """No pair is left, and casts only where float32 is: at the input, the four Adds and the output."""
    from resnet_fast.export.quantise.placement import place

    copy = trained.program.clone()
    layers = find_layers(copy.graph)
    place(copy, layers, {}, [layer.path for layer in layers])
    path = saved(copy, tmp_path / "m.onnx")
    onnx.checker.check_model(path, full_check=True)
    counts = collections.Counter(node.op_type for node in copy.graph)
    assert not counts["QuantizeLinear"] + counts["DequantizeLinear"]
    assert {tensor.dtype for tensor in copy.graph.initializers.values()} == {ir.DataType.FLOAT16}
    assert [value.name for value in copy.graph.outputs] == ["logits"]
    assert copy.graph.outputs[0].dtype == ir.DataType.FLOAT
    # Eleven roundings of 2**-11 in a row, and as many again within the sums that follow them.
    assert relative(run(path, trained.digits), trained.digit_logits) <= 22 * 2.0**-11
    assert trained.program.graph.outputs[0].dtype == ir.DataType.FLOAT  # the original is as it was
    assert {value.dtype for node in trained.program.graph for value in node.outputs} == {ir.DataType.FLOAT}


def test_drop_that_cannot_be_had(trained):
    """A channel beyond float16: the only layers that could fall back do not help."""
    arguments = {"calibration": trained.calibration[:64], "calibration_method": "max", "max_accuracy_drop": 0.5}
    with pytest.raises(ValueError, match=r"is 0\.5, but the drop is .* even without a quantised layer"):
        quantise(lopsided(trained.program, 1e6), trained.metadata, **arguments)


# --- given ranges -----------------------------------------------------------------------------------------------------


def test_given_ranges_go_before_calibration(trained):
    names = [name for layer in find_layers(trained.program.graph) for name in layer.range_names]
    ranges = dict.fromkeys(names, 3.0)
    ranges["layer1.0.conv2.residual"] = 5.0  # the same tensor as layer1.0.conv1.input
    result = quantise(trained.program, trained.metadata, ranges=ranges)
    assert result.report.judgement is None
    assert result.report.method is None
    reported = {
        f"{layer.path}.{kind}": limits for layer in result.report.layers for kind, limits in layer.ranges.items()
    }
    assert reported == {name: (-amax, amax) for name, amax in ranges.items()}
    scales = {
        value.const_value.numpy().item()
        for value in result.model.graph.initializers.values()
        if value.name.endswith("_scale") and not value.shape
    }
    assert scales == {np.float32(3 / 127).item(), np.float32(5 / 127).item()}
    some = {"conv1.input": 1.25}
    mixed = quantise(trained.program, trained.metadata, calibration=trained.calibration, ranges=some).report
    assert mixed.layers[0].ranges["input"] == (-1.25, 1.25)
    assert mixed.layers[1].ranges["input"] != (-1.25, 1.25)


# --- export_onnx and the command line ---------------------------------------------------------------------------------


def tiny():
    torch.manual_seed(0)
    tail = (nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), *tail)


IMAGES = torch.randn(9, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("dynamic_batch", "target"), [(True, "tensorrt"), (False, "cpu")])
def test_export_and_verification(dynamic_batch, target, tmp_path):
    path = tmp_path / "m.onnx"
    model = tiny()
    arguments = {"input_size": (3, 16, 16), "precision": "int8", "calibration": IMAGES, "target": target}
    result = export_onnx(model, path, dynamic_batch=dynamic_batch, **arguments)
    assert result.precision == "int8"
    assert set(result.max_errors) == ({1, 2, 7} if dynamic_batch else {1})
    with torch.inference_mode():
        largest = model.eval()(IMAGES).abs().max().item()
    assert max(result.max_errors.values()) < 0.05 * largest
    assert result.quantisation.images == 9
    assert result.quantisation.judged_by == "calibration"
    assert (result.engine is not None) == (tensorrt.available() and target == "tensorrt")
    file = onnx.load(path)
    said = {entry.key: entry.value for entry in file.metadata_props}
    assert (said["precision"], said["target"]) == ("int8", target)
    assert json.loads(said["quantisation"])["calibration_images"] == 9
    assert said["producer"] == file.producer_name == "resnet_fast"
    assert [entry.version for entry in file.opset_import if entry.domain == ""] == [18]

    again = verify_onnx(path, model)
    assert again.max_errors == result.max_errors
    assert (again.engine is None) == (result.engine is None)
    assert verify_onnx(path, tensorrt=False).method is not None
    with torch.no_grad():
        model[-1].weight.neg_()
    with pytest.raises(VerificationError, match="from float64 PyTorch at batch 1"):
        verify_onnx(path, model, tensorrt=False)


def test_pictures_in_and_best_classes_out(tmp_path):
    """What is calibrated is the network; preprocessing and top-k come around it."""
    pictures = torch.randint(0, 256, (6, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    result = export_onnx(
        tiny(),
        tmp_path / "m.onnx",
        input_size=(3, 16, 16),
        precision="int8",
        calibration=pictures,
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
        preprocess=True,
        top_k=2,
    )
    assert result.quantisation.layers[0].ranges["input"][1] == pytest.approx(2, abs=0.1)
    assert result.op_counts["QuantizeLinear"] == 2
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    given = session.run(None, {"image": pictures.permute(0, 2, 3, 1).contiguous().numpy()})
    assert [value.shape for value in given] == [(6, 10), (6, 2), (6, 2)]


@pytest.fixture(scope="module")
def tiny_program(tmp_path_factory):
    return exported(tiny(), tmp_path_factory.mktemp("tiny") / "m.onnx", 16)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"target": "gpu"}, ValueError, "target is 'gpu', expected tensorrt, cpu"),
        ({"calibration_method": "best"}, ValueError, "calibration_method is 'best', expected max"),
        ({"percentile": 0}, ValueError, "percentile is 0, expected more than 0"),
        ({"max_accuracy_drop": -1}, ValueError, "max_accuracy_drop is -1, expected 0 to 100"),
        ({"calibration": None}, ValueError, "ranges has no '0.input' and calibration is None"),
        ({"ranges": {"0.input": 1.0}, "calibration": None}, ValueError, "ranges has no '5.input' and calibration is"),
        ({"ranges": {"1.input": 1.0}}, ValueError, "ranges has '1.input', expected names of this model, as '0.input'"),
        ({"ranges": {"0.input": float("nan")}}, ValueError, "ranges has nan for '0.input'"),
        ({"ranges": {"0.input": 1.0}, "calibration": None, "target": "cpu"}, ValueError, "calibration is None, expec"),
        ({"calibration": None, "max_accuracy_drop": 1}, ValueError, "which max_accuracy_drop is measured with"),
        ({"calibration": None, "sensitivity": True}, ValueError, "which sensitivity is measured with"),
        ({"calibration": IMAGES[:, :, :8]}, ValueError, r"calibration\[0\] is an image of shape \[3, 8, 16\]"),
        ({"validation": iter(IMAGES)}, TypeError, "validation is an iterator, expected what"),
    ],
)
def test_bad_arguments(tiny_program, arguments, error, message):
    before = ir.to_proto(tiny_program).SerializeToString()
    with pytest.raises(error, match=message):
        quantise(tiny_program, Metadata("Net", (3, 16, 16)), **{"calibration": IMAGES, **arguments})
    assert ir.to_proto(tiny_program).SerializeToString() == before


def test_failure_leaves_the_old_file(tmp_path):
    target = tmp_path / "m.onnx"
    target.write_text("the old file")
    for arguments, message in (
        ({"precision": "int4"}, "precision is 'int4', expected"),
        ({"precision": "fp16", "calibration": IMAGES}, "precision is 'fp16', expected 'int8' with calibration"),
        ({"precision": "int8", "calibration": IMAGES[:, :1]}, "an image of shape"),
    ):
        with pytest.raises(ValueError, match=message):
            export_onnx(tiny(), target, input_size=(3, 16, 16), **arguments)
        assert target.read_text() == "the old file"
        assert list(tmp_path.iterdir()) == [target]


def test_command_line(tmp_path, capsys):
    pytest.importorskip("timm")
    images = np.random.default_rng(0).normal(size=(4, 3, 32, 32)).astype(np.float32)
    np.savez(tmp_path / "images.npz", images=images)
    arguments = ["export", "timm:test_resnet", str(tmp_path / "m.onnx"), "--num-classes", "10", "--size", "32"]
    arguments += ["--precision", "int8", "--sensitivity", "--json", "-"]
    calibration = ["--calibration", str(tmp_path / "images.npz")]
    assert main([*arguments, *calibration, "--calibration-method", "max"]) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert result["quantisation"]["method"] == "max"
    assert result["op_counts"]["QuantizeLinear"] > 5
    layers = result["quantisation"]["layers"]
    assert len(layers) == result["op_counts"]["Conv"] + result["op_counts"]["Gemm"]
    # timm's blocks begin with a last batch norm of 0, so that nothing can be lost in those convolutions.
    assert sum(layer["logit_error"] > 0 for layer in layers) > len(layers) / 2
    assert layers[-2]["path"] in captured.err
    (tmp_path / "r.json").write_text('{"conv1.input": "much"}')
    for wrong in (
        ["--calibration", str(tmp_path / "absent")],
        ["--calibration-method", "best"],
        ["--target", "gpu"],
        ["--ranges", str(tmp_path / "r.json")],
    ):
        assert main([*arguments, *calibration, *wrong]) == 2


def test_ranges_of_a_checkpoint(tmp_path):
    """As quantisation-aware training leaves them."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=10)
    layers = find_layers(exported(model, tmp_path / "m.onnx").graph)
    ranges = {name: 2.0 for layer in layers for name in layer.range_names} | {"fc.input": 3.5}
    torch.save({"model": model.state_dict(), "ranges": ranges, "epoch": 1}, tmp_path / "best.pt")
    arguments = ["export", "timm:test_resnet", str(tmp_path / "m.onnx"), "--num-classes", "10", "--size", "32"]
    arguments += ["--weights", str(tmp_path / "best.pt"), "--precision", "int8", "--json", str(tmp_path / "r.json")]
    assert main(arguments) == 0
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["quantisation"]["layers"][-1]["ranges"] == {"input": [-3.5, 3.5]}
    assert result["quantisation"]["judgement"] is None
