"""float16 and bfloat16 files: what is in them, and that they compute what the model does."""

import copy

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from resnet_fast.bench.norms import randomise_batch_norm
from resnet_fast.export import VerificationError, export_onnx
from resnet_fast.export.compare import compare
from resnet_fast.export.precision import PRECISIONS, folded, nearest, rounded
from resnet_fast.export.runner import Runner

LOW = ("fp16", "bf16")
TYPES = {"fp16": onnx.TensorProto.FLOAT16, "bf16": onnx.TensorProto.BFLOAT16, "fp32": onnx.TensorProto.FLOAT}
SIZE = (3, 40, 48)


def tiny(channels=8, classes=10):
    """No ResNet, but quick to export; a residual Add and a folded batch norm are in it."""
    torch.manual_seed(0)

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)

        def forward(self, x):
            return torch.relu(self.bn(self.conv(x)) + x)

    model = nn.Sequential(
        nn.Conv2d(3, channels, 3),
        nn.ReLU(),
        Block(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(channels, classes),
    )
    randomise_batch_norm(model, 0)
    return model.eval()


@pytest.fixture(scope="module", params=LOW)
def exported(request, tmp_path_factory):
    """A model, its file and what was said about it."""
    model, path = tiny(), tmp_path_factory.mktemp(request.param) / "m.onnx"
    return model, path, export_onnx(model, path, precision=request.param, input_size=SIZE, tensorrt=False)


def weights_of(path):
    return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}


# --- rounding -------------------------------------------------------------------------------------------------------


def test_float64_is_rounded_once():
    generator = np.random.default_rng(0)
    values = generator.standard_normal(200_000) * np.exp2(generator.integers(-24, 15, 200_000))
    # Just beside the middle between two float16: float32 takes them for the middle, and rounds to even from there.
    middles = np.spacing(values[:1000].astype(np.float16)) / 2 + values[:1000].astype(np.float16).astype(np.float64)
    values = np.concatenate(
        [values, middles * (1 + 2.0**-40), middles * (1 - 2.0**-40), [0, -0.0, np.inf, 1e300, 65519]]
    )
    found = nearest(torch.from_numpy(values), torch.float16).numpy()
    with np.errstate(over="ignore"):
        expected = values.astype(np.float16)  # NumPy rounds float64 to float16 directly
    assert np.array_equal(found, expected)
    assert not np.array_equal(torch.from_numpy(values).half().numpy(), expected)  # else this would prove nothing


def test_bfloat16_is_rounded_to_the_nearer_neighbour():
    values = torch.randn(10_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    middles = values.bfloat16().double() * (1 + 2.0**-9)
    values = torch.cat([values, middles * (1 + 2.0**-40), middles * (1 - 2.0**-40)])
    found = nearest(values, torch.bfloat16)
    step = torch.full_like(found, torch.inf)
    for neighbour in (found.nextafter(step), found.nextafter(-step)):
        assert bool(((found.double() - values).abs() <= (neighbour.double() - values).abs()).all())


def test_weights_are_the_folded_ones_rounded(exported):
    model, path, result = exported
    precision = result.precision
    network = folded(model, SIZE, dynamic_batch=True)
    assert next(network.parameters()).dtype == torch.float64
    expected = dict(rounded(network, PRECISIONS[precision]).named_parameters())
    conv, norm = model[2].conv, model[2].bn
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    weight = nearest(conv.weight.double() * scale.view(-1, 1, 1, 1), PRECISIONS[precision].dtype)
    torch.testing.assert_close(expected["2.conv.weight"], weight.detach(), rtol=PRECISIONS[precision].eps, atol=0)
    found = weights_of(path)
    for name, value in expected.items():
        assert np.array_equal(found[name].astype(np.float64), value.detach().double().numpy()), name
    assert model[2].conv.weight.dtype == torch.float32


@pytest.mark.parametrize("where", ["weight", "bias", "folded"])
def test_overflow_is_an_error_that_names_the_layer(where, tmp_path):
    model = tiny()
    with torch.no_grad():
        if where == "folded":
            model[2].bn.running_var[1] = 1e-12  # 1e-5 is added
            model[2].bn.weight[1] = 1e4
        else:
            getattr(model[0], where).view(-1)[3] = -7e4
    name = {"weight": "0.weight", "bias": "0.bias", "folded": "2.conv.weight"}[where]
    message = rf"precision is 'fp16', whose largest number is 65504, but {name} reaches "
    with pytest.raises(ValueError, match=message):
        export_onnx(model, tmp_path / "m.onnx", precision="fp16", input_size=SIZE)
    assert list(tmp_path.iterdir()) == []
    rounded(folded(model, SIZE, dynamic_batch=True), PRECISIONS["bf16"])  # whose range is that of float32


def test_activations_that_overflow_are_noticed(tmp_path):
    model = tiny()
    with torch.no_grad():
        model[0].weight.mul_(6e4)
        model[2].conv.weight.mul_(1e3)
        model[5].weight.mul_(1e-7)
    with pytest.raises(VerificationError, match="in which fp16 PyTorch itself gives results that are not finite"):
        export_onnx(model, tmp_path / "m.onnx", precision="fp16", input_size=SIZE)
    assert list(tmp_path.iterdir()) == []
    export_onnx(model, tmp_path / "m.onnx", precision="bf16", input_size=SIZE, tensorrt=False)


# --- files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("io_dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("precision", LOW)
def test_input_output_and_weights_have_their_types(precision, io_dtype, tmp_path):
    result = export_onnx(
        tiny(), tmp_path / "m.onnx", precision=precision, io_dtype=io_dtype, input_size=SIZE, tensorrt=False
    )
    file = onnx.load(tmp_path / "m.onnx")
    assert result.opset == (22 if precision == "bf16" else 18)
    assert {tensor.data_type for tensor in file.graph.initializer} == {TYPES[precision]}
    for value, name in ((file.graph.input[0], "input"), (file.graph.output[0], "logits")):
        assert value.name == name
        assert value.type.tensor_type.elem_type == TYPES[io_dtype]
        assert value.type.tensor_type.shape.dim[0].dim_param == "batch"
    # Nothing but the border is converted.
    assert result.op_counts.get("Cast", 0) == (0 if precision == io_dtype else 2)
    assert set(result.max_errors) == {1, 2, 7}
    assert max(result.max_errors.values()) <= result.tolerance
    said = {entry.key: entry.value for entry in file.metadata_props}
    assert (said["precision"], said["io_dtype"]) == (precision, io_dtype)


def test_float32_file_takes_float16(tmp_path):
    model = tiny()
    export_onnx(model, tmp_path / "m.onnx", io_dtype="fp16", input_size=SIZE)
    runtime = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    images = torch.randn(3, *SIZE, generator=torch.Generator().manual_seed(0)).half()
    (found,) = runtime.run(None, {"input": images.numpy()})
    assert found.dtype == np.float16
    # Each result is rounded to float16 once; the rest is float32's.
    expected = model(images.float()).detach().numpy()
    np.testing.assert_allclose(found, expected, rtol=2.0**-11, atol=1e-6)


def test_static_batch(tmp_path):
    result = export_onnx(
        tiny(), tmp_path / "m.onnx", precision="bf16", input_size=SIZE, dynamic_batch=False, tensorrt=False
    )
    assert set(result.max_errors) == {1}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"precision": "fp8"}, "precision is 'fp8', expected one of fp32, fp16, bf16"),
        ({"precision": "bf16", "opset": 21}, "opset is 21, expected an integer of at least 22 for bf16"),
        ({"precision": "bf16", "io_dtype": "bf16"}, "io_dtype is 'bf16', expected one of fp32, fp16"),
        ({"top_k": 0}, "top_k is 0, expected an integer from 1 to 10"),
        ({"top_k": 11}, "top_k is 11, expected an integer from 1 to 10"),
    ],
)
def test_bad_arguments(arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        export_onnx(tiny(), tmp_path / "m.onnx", input_size=SIZE, **arguments)
    assert list(tmp_path.iterdir()) == []


# --- softmax and top-k ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("precision", "io_dtype", "softmax"), [("fp32", "fp32", False), ("fp16", "fp16", True), ("bf16", "fp32", True)]
)
def test_softmax_and_top_k(precision, io_dtype, softmax, tmp_path):
    model = tiny()
    result = export_onnx(
        model,
        tmp_path / "m.onnx",
        precision=precision,
        io_dtype=io_dtype,
        input_size=SIZE,
        softmax=softmax,
        top_k=3,
        tensorrt=False,
    )
    first = "probabilities" if softmax else "logits"
    outputs = {value.name: value.type.tensor_type for value in onnx.load(tmp_path / "m.onnx").graph.output}
    assert list(outputs) == [first, "scores", "classes"]
    assert [kind.elem_type for kind in outputs.values()] == [TYPES[io_dtype]] * 2 + [onnx.TensorProto.INT64]
    images = torch.randn(4, *SIZE, generator=torch.Generator().manual_seed(1))
    given = Runner(tmp_path / "m.onnx", PRECISIONS[precision])(images.numpy())
    logits = model(images).detach().double()
    expected = logits.softmax(1) if softmax else logits
    assert np.abs(given[first] - expected.numpy()).max() <= result.tolerance
    assert given["scores"].shape == given["classes"].shape == (4, 3)
    assert np.array_equal(np.take_along_axis(given[first], given["classes"], 1), given["scores"])
    if precision == "fp32":
        assert np.array_equal(given["classes"], expected.topk(3).indices.numpy())
    if softmax:
        assert np.abs(given[first].sum(1) - 1).max() <= 10 * PRECISIONS[io_dtype].eps


# --- what verification finds ----------------------------------------------------------------------------------------


def test_mistakes_too_small_for_the_precision_are_found(exported, tmp_path):
    """The bias of one class is two steps away from what it should be: far below the precision's error."""
    model, original, result = exported
    precision, path = result.precision, tmp_path / "m.onnx"
    network = folded(model, SIZE, dynamic_batch=True)
    file = onnx.load(original)
    tensor = next(tensor for tensor in file.graph.initializer if tensor.name == "5.bias")
    wrong = onnx.numpy_helper.to_array(tensor).copy()
    wrong[4] *= 1 + 2 * PRECISIONS[precision].eps
    tensor.CopyFrom(onnx.numpy_helper.from_array(wrong, tensor.name))
    onnx.save(file, path)
    assert 2 * PRECISIONS[precision].eps * abs(float(wrong[4])) < result.tolerance / 4
    with pytest.raises(VerificationError, match=r"the graph in float32 is .* expected at most"):
        compare(path, model, network, (1, 2))


def test_wrong_folding_is_found(exported):
    original, path, _ = exported
    network = folded(original, SIZE, dynamic_batch=True)
    model = copy.deepcopy(original)
    with torch.no_grad():
        model[2].bn.bias[0] += 1e-6  # which is nothing in float16
    with pytest.raises(VerificationError, match="the folded network in float64 is"):
        compare(path, model, network, (1, 2))


def test_bfloat16_runs_as_bfloat16(tmp_path):
    """The graph that stands in for ONNX Runtime's missing kernels rounds where PyTorch in bfloat16 does."""
    model = tiny()
    result = export_onnx(model, tmp_path / "m.onnx", precision="bf16", input_size=SIZE, tensorrt=False)
    assert "rounded to bfloat16" in result.method
    with pytest.raises(Exception, match="NOT_IMPLEMENTED"):  # the day it has them, they should be used
        onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    images = torch.randn(5, *SIZE, generator=torch.Generator().manual_seed(2))
    network = rounded(folded(model, SIZE, dynamic_batch=True), PRECISIONS["bf16"])
    with torch.inference_mode():
        expected = network(images.bfloat16()).float().numpy()
        unrounded = network.float()(images).numpy()
    emulated, exact = (
        Runner(tmp_path / "m.onnx", PRECISIONS["bf16"], exact=exact)(images.numpy())["logits"]
        for exact in (False, True)
    )
    assert np.array_equal(emulated, torch.from_numpy(emulated).bfloat16().float().numpy())
    # Sums in another order, and so, here and there, the neighbouring bfloat16.
    assert np.abs(emulated - expected).max() <= 2 * PRECISIONS["bf16"].eps * np.abs(expected).max()
    assert np.mean(emulated == expected) > 0.5
    assert np.abs(exact - unrounded).max() <= 1e-5 * np.abs(unrounded).max()
    assert np.abs(emulated - exact).max() > 100 * np.abs(exact - unrounded).max()
