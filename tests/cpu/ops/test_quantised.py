"""The ops on 8-bit numbers as PyTorch sees them, what makes their operands, and the definition against ONNX Runtime."""

import math
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

from resnet_fast import ops, quantised
from resnet_fast.kernels.contract import Case
from resnet_fast.kernels.native import library
from resnet_fast.kernels.reference.quantised import MOST_PRODUCTS, RANGE

INT8, FP8 = RANGE
conv_quantised = torch.ops.resnet_fast.conv_quantised

each_dtype = pytest.mark.parametrize("dtype", RANGE, ids=["int8", "fp8"])


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def random(shape: tuple, dtype: torch.dtype) -> torch.Tensor:
    return torch.randint(-128, 128, shape).to(dtype)


def arguments(dtype: torch.dtype = INT8, **changed: Any) -> dict[str, Any]:
    """Of the op."""
    given = {
        "x": random((2, 16, 6, 5), dtype).contiguous(memory_format=torch.channels_last),
        "weight": random((8, 16, 3, 3), dtype),
        "scale": (torch.rand(8) + 0.5) / 65536,
        "shift": torch.randn(8),
        "residual": random((2, 8, 6, 5), dtype),
        "residual_scale": 0.01,
        "out_scale": 2 / RANGE[dtype][1],
        "stride": [1, 1],
        "padding": [1, 1],
        "dilation": [1, 1],
        "groups": 1,
        "relu": False,
        "out_dtype": dtype,
    }
    assert set(changed) <= set(given)
    return given | changed


# --- the definition ---------------------------------------------------------------------------------------------------


def onnx_graph(given: dict[str, Any], x_scale: float, weight_scale: torch.Tensor) -> onnx.ModelProto:
    """DequantizeLinear, Conv, Add, Relu, QuantizeLinear, with int8 images, as explicit quantisation has it."""

    def constant(name: str, value: Any, dtype: Any = np.float32) -> onnx.TensorProto:
        return onnx.numpy_helper.from_array(np.asarray(value, dtype), name)

    constants = [
        constant("weight", given["weight"].numpy(), np.int8),
        constant("bias", given["shift"].numpy()),
        constant("x_scale", x_scale),
        constant("weight_scale", weight_scale.numpy()),
        constant("residual_scale", given["residual_scale"]),
        constant("out_scale", given["out_scale"]),
        constant("zero", 0, np.int8),
        constant("zeros", np.zeros(len(weight_scale)), np.int8),
    ]
    nodes = [
        helper.make_node("DequantizeLinear", ["x", "x_scale", "zero"], ["xf"]),
        helper.make_node("DequantizeLinear", ["weight", "weight_scale", "zeros"], ["wf"], axis=0),
        helper.make_node("DequantizeLinear", ["residual", "residual_scale", "zero"], ["rf"]),
        helper.make_node("Conv", ["xf", "wf", "bias"], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("Add", ["c", "rf"], ["a"]),
        helper.make_node("Relu", ["a"], ["y"]),
        helper.make_node("QuantizeLinear", ["y", "out_scale", "zero"], ["q"]),
    ]

    def image(name: str, shape: Any) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, TensorProto.INT8, list(shape))

    graph = helper.make_graph(
        nodes,
        "residual",
        [image("x", given["x"].shape), image("residual", given["residual"].shape)],
        [image("q", given["residual"].shape)],
        constants,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)


@pytest.mark.parametrize("optimised", [False, True], ids=["step by step", "fused"])
def test_int8_is_what_onnx_runtime_computes(optimised):
    """One step apart at most, where float32 rounding moves a number over the middle between two steps."""
    onnxruntime = pytest.importorskip("onnxruntime")
    x_scale, weight_scale = 0.02, torch.rand(8) / 1000 + 0.0005
    given = arguments(relu=True, scale=x_scale * weight_scale, out_scale=0.02)
    options = onnxruntime.SessionOptions()
    levels = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimised else levels.ORT_DISABLE_ALL
    model = onnx_graph(given, x_scale, weight_scale).SerializeToString()
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    feeds = {name: given[name].contiguous().numpy() for name in ("x", "residual")}
    theirs = torch.from_numpy(session.run(None, feeds)[0]).double()
    ours = conv_quantised(**given).double()
    steps = conv_quantised(**given | {"out_dtype": torch.float32}).double() / given["out_scale"]
    near_a_tie = (steps % 1 - 0.5).abs() < 1e-3
    assert near_a_tie.double().mean() < 0.01
    assert ours.unique().numel() > 50
    assert (ours == 127).any()
    assert torch.equal(ours[~near_a_tie], theirs[~near_a_tie])
    assert (ours - theirs).abs().max() <= 1


def test_quantise_rounds_half_to_even_and_saturates():
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 126.5, 127.5, 1e30, torch.inf, -128.5, -129.0, -torch.inf, torch.nan])
    q = quantised.quantise(2 * x.view(1, -1, 1, 1), 2.0)
    assert q.flatten().tolist() == [0, 2, 2, 0, -2, 126, 127, 127, 127, -128, -128, -128, -128]
    q = quantised.quantise(x.view(1, -1, 1, 1) * 4, 1.0, FP8)
    assert q.flatten().tolist()[7:12] == [448.0, 448.0, -448.0, -448.0, -448.0]
    assert q.flatten()[-1].isnan()


def test_a_max_pool_may_come_before_or_after():
    """Why the first layer is quantised after it: the same numbers from a quarter of the pixels."""
    x = torch.randn(2, 16, 9, 8)
    pooled = nn.functional.max_pool2d(x, 3, 2, 1)
    before = nn.functional.max_pool2d(quantised.quantise(x, 0.02).float(), 3, 2, 1)
    assert torch.equal(quantised.quantise(pooled, 0.02).float(), before)


# --- the ops ----------------------------------------------------------------------------------------------------------


@each_dtype
def test_opcheck(dtype):
    """Of fp8 only what compares no results: PyTorch has no allclose for it."""
    strided = arguments(dtype, residual=None, out_dtype=torch.float16, stride=[2, 2])
    fake = ("test_faketensor", "test_autograd_registration")
    for op, args in (
        (conv_quantised, tuple(arguments(dtype).values())),
        (conv_quantised, tuple(strided.values())),
        (torch.ops.resnet_fast.quantise, (torch.randn(1, 3, 4, 5), 0.1, dtype)),
        (torch.ops.resnet_fast.dequantise, (strided["x"], 0.1, torch.bfloat16)),
    ):
        torch.library.opcheck(op.default, args, **({} if dtype == INT8 else {"test_utils": fake}))


@each_dtype
def test_compile_and_export_see_one_op(dtype):
    given = arguments(dtype)

    class Layer(nn.Module):
        def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
            return conv_quantised(**given | {"x": x, "residual": residual})

    images = given["x"], given["residual"]
    expected = Layer()(*images).double()
    compiled = torch.compile(Layer(), backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(*images).double(), expected)
    exported = torch.export.export(Layer(), images)
    assert [node.target for node in exported.graph.nodes if node.op == "call_function"].count(
        conv_quantised.default
    ) == 1
    assert torch.equal(exported.module()(*images).double(), expected)


@each_dtype
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": torch.zeros(2, 16, 6, 5)}, "x is torch.float32, expected torch.int8 or torch.float8_e4m3fn"),
        ({"weight": torch.zeros(8, 16, 3, 3)}, "weight is torch.float32, expected the dtype of x"),
        ({"weight": torch.zeros(8, 4, 3, 3)}, "x has 16 channels.*expected 4"),
        ({"groups": 3}, "groups is 3, expected a divisor"),
        ({"scale": torch.ones(8).double()}, "scale is torch.float64, expected torch.float32"),
        ({"shift": torch.ones(9)}, r"shift has shape \[9\], expected \[8\]"),
        ({"residual": torch.zeros(2, 8, 6, 4)}, r"residual has shape \[2, 8, 6, 4\], expected \[2, 8, 6, 5\]"),
        ({"residual": torch.zeros(2, 8, 6, 5).double()}, "residual is torch.float64, expected torch.float16"),
        ({"residual_scale": 0.0}, "residual_scale is 0.0, expected from"),
        ({"out_scale": -1.0}, "out_scale is -1.0, expected from"),
        ({"out_scale": math.nan}, "out_scale is nan, expected from"),
        ({"out_dtype": torch.uint8}, "out_dtype is torch.uint8, expected torch.float16"),
        ({"stride": [0, 1]}, r"stride is \(0, 1\)"),
    ],
)
def test_refusals(changed, message, dtype):
    """Each names the argument, what it is and what was expected; under fake tensors as well."""
    given = arguments(dtype, **changed)
    with pytest.raises(RuntimeError, match=message):
        conv_quantised(**given)
    meta = {name: value.to("meta") if isinstance(value, torch.Tensor) else value for name, value in given.items()}
    with pytest.raises(RuntimeError, match=message):
        conv_quantised(**meta)


def test_sums_that_may_not_fit_are_refused():
    channels = MOST_PRODUCTS // 9 + 1
    given = arguments(x=torch.zeros(1, channels, 3, 3, dtype=INT8), weight=torch.zeros(8, channels, 3, 3, dtype=INT8))
    with pytest.raises(RuntimeError, match=f"{9 * channels} products a sum, expected up to {MOST_PRODUCTS}"):
        conv_quantised(**given | {"residual": None})


def test_refusals_of_quantise_and_dequantise():
    x = torch.zeros(1, 3, 4, 4)
    for call, message in (
        (lambda: quantised.quantise(x.double(), 1.0), "x is torch.float64, expected torch.float16"),
        (lambda: quantised.quantise(x, 0.0), "scale is 0.0"),
        (lambda: quantised.quantise(x, 1.0, torch.uint8), "dtype is torch.uint8, expected torch.int8"),
        (lambda: quantised.quantise(x[0], 1.0), "expected 4 dimensions"),
        (lambda: quantised.dequantise(x, 1.0), "x is torch.float32, expected torch.int8"),
        (lambda: quantised.dequantise(x.to(INT8), 1.0, torch.float64), "dtype is torch.float64"),
    ):
        with pytest.raises(RuntimeError, match=message):
            call()


def test_there_is_no_gradient():
    given = arguments(out_dtype=torch.float32, scale=torch.ones(8, requires_grad=True))
    with pytest.raises(RuntimeError, match="no gradient"):
        conv_quantised(**given).sum().backward()


def test_what_serves_the_cpu():
    case = Case("conv_quantised", "cpu", INT8, 16, 8)
    best = "reference" if library.unavailable() else "native"
    for op in ("conv_quantised", "quantise", "dequantise"):
        assert ops.implementation_for(case._replace(op=op), ops.QUANTISED) == best
        assert ops.implementation_for(case._replace(op=op, dtype=FP8), ops.QUANTISED) == "reference"


# --- what makes operands ----------------------------------------------------------------------------------------------


def test_scale_from_amax():
    assert quantised.scale_from_amax(127.0) == 1.0
    assert quantised.scale_from_amax(torch.tensor(224.0), FP8) == 0.5
    assert quantised.scale_from_amax(0.0) == 1.0
    for amax in (-1.0, math.nan, math.inf, 1e-300):
        with pytest.raises(ValueError, match="amax"):
            quantised.scale_from_amax(amax)
    with pytest.raises(ValueError, match=r"dtype is torch\.uint8"):
        quantised.scale_from_amax(1.0, torch.uint8)


@each_dtype
@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16])
def test_quantise_weight(source, dtype):
    """Every channel's largest magnitude is the highest number; the others are within half a step of theirs."""
    weight = (torch.randn(24, 4, 3, 3) * torch.logspace(-20, 20, 24).view(-1, 1, 1, 1)).to(source)
    weight[5] = 0
    q, scale = quantised.quantise_weight(weight, dtype)
    assert (q.dtype, scale.dtype, q.shape) == (dtype, torch.float32, weight.shape)
    largest = q.double().abs().amax((1, 2, 3))
    assert largest[5] == 0
    assert (largest[torch.arange(24) != 5] == RANGE[dtype][1]).all()
    wide = scale.double().view(-1, 1, 1, 1)
    error = (q.double() * wide - weight.double()).abs()
    # Half a step of int8; of fp8 half a unit in the fourth bit, or half the smallest subnormal. And float32's division.
    half = wide / 2 if dtype == INT8 else (weight.double().abs() / 16).clamp(min=wide * 2**-10)
    assert (error <= half * (1 + 1e-5)).all()


def test_a_batch_norm_may_be_left_to_the_scale():
    """Multiplied by powers of two, also negative ones, a channel keeps its numbers but for their sign."""
    weight, factor = torch.randn(8, 4, 3, 3), torch.tensor([1.0, -1, 2, -0.5, 4, -8, 0.25, 1])
    q, scale = quantised.quantise_weight(weight)
    folded, folded_scale = quantised.quantise_weight(weight * factor.view(-1, 1, 1, 1))
    assert torch.equal(folded.int(), q.int() * factor.sign().int().view(-1, 1, 1, 1))
    assert torch.equal(folded_scale, scale * factor.abs())


def test_a_weight_with_nan_is_refused():
    weight = torch.ones(4, 4, 1, 1)
    weight[2, 1] = torch.nan
    with pytest.raises(ValueError, match="weight holds NaN or Inf"):
        quantised.quantise_weight(weight)


@each_dtype
def test_conv_bn_act(dtype, monkeypatch):
    """What its parts compute; the weight is quantised once, and again when it has changed."""
    conv, bn = nn.Conv2d(16, 8, 3, 2, 1, bias=True), nn.BatchNorm2d(8).eval()
    for tensor in (bn.weight, bn.bias, bn.running_mean):
        nn.init.normal_(tensor)
    counted = []
    quantise_weight = quantised.quantise_weight
    monkeypatch.setattr(quantised, "quantise_weight", lambda *args: counted.append(1) or quantise_weight(*args))
    x = random((2, 16, 7, 5), dtype)

    def check() -> None:
        y = quantised.conv_bn_act(x, 0.02, conv, bn, relu=True, out_dtype=torch.float32)
        q, scale = quantise_weight(conv.weight, dtype)
        weight = (q.double() * scale.double().view(-1, 1, 1, 1)).float()
        expected = bn(nn.functional.conv2d(x.float() * 0.02, weight, conv.bias, 2, 1)).relu()
        torch.testing.assert_close(y, expected)
        assert not y.requires_grad
        again = quantised.conv_bn_act(x, 0.02, conv, bn, out_scale=0.05)
        lowest, highest = RANGE[dtype]
        if dtype == INT8:
            steps = (expected.double() / 0.05).clamp(lowest, highest)
            assert ((again.double() - steps).abs() <= 0.5 + 1e-3).all()

    check()
    check()
    assert len(counted) == 1
    with torch.no_grad():
        conv.weight.mul_(torch.randn(8, 1, 1, 1))
    check()
    assert len(counted) == 2


def test_conv_bn_act_needs_quantised_images():
    conv, bn = nn.Conv2d(16, 8, 3), nn.BatchNorm2d(8).eval()
    with pytest.raises(RuntimeError, match=r"x is torch\.float32, expected torch\.int8"):
        quantised.conv_bn_act(torch.zeros(1, 16, 5, 5), 1.0, conv, bn)
