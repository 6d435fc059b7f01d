"""The steps of a quantised model: those of the exported file, on both that can run them."""

import copy
import itertools

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import resnet_fast
from resnet_fast import network
from resnet_fast.export import export_onnx
from resnet_fast.graph.ranges import Ranges, quantise
from resnet_fast.kernels.native import abi, library
from resnet_fast.kernels.symmetric import quantised_weight, scale_of
from tests.cpu.quantize.networks import IMAGES, SIZE, by_ops, each_model, quantised
from tests.cpu.small_models import images, small_resnet

native = pytest.mark.skipif(library.unavailable() is not None, reason=str(library.unavailable()))

FLIPS = 1e-3
"""The share of numbers that may be rounded to the neighbouring step. The file's sums in float32 are off by less than a
thousandth of a step, and so few lie that near to the middle between two."""


def file_of(model, int8, path):
    """The exported file with the ranges of the quantised model, its numbers in 8 bits among its outputs."""
    ranges = resnet_fast.quantisation_of(int8).largest
    export_onnx(model, path, precision="int8", ranges=ranges, input_size=(3, SIZE, SIZE), verify=False)
    file = onnx.load(path)
    for node in file.graph.node:
        if node.op_type == "QuantizeLinear":
            file.graph.output.append(onnx.helper.make_tensor_value_info(node.output[0], onnx.TensorProto.INT8, None))
    return file


def run(file, x):
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(file.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, {"input": x.numpy()}), strict=True))


def read(file):
    """By path of a layer: the names of the int8 tensors that it reads, and that are added to its result."""
    producers = {name: node for node in file.graph.node for name in node.output}
    found = {}
    for node in file.graph.node:
        if node.op_type not in ("Conv", "Gemm"):
            continue
        dequantised = producers[node.input[0]]
        following = [other for other in file.graph.node if node.output[0] in other.input]
        residual = None
        if [other.op_type for other in following] == ["Add"]:
            (other,) = set(following[0].input) - {node.output[0]}
            residual = producers[other].input[0] if other.endswith("_dequantised") else None
        found[tuple(producers[node.input[1]].input[0].removesuffix(".weight_int8").split("."))] = (
            dequantised.input[0],
            residual,
        )
    return found


@each_model
def test_each_layer_is_that_of_the_exported_file(name, tmp_path, monkeypatch):
    """Given the file's own numbers, each layer's are the same, up to one step where they lie in the middle of two."""
    model, int8 = quantised(name)
    file = file_of(model, int8, tmp_path / "m.onnx")
    numbers, names = run(file, IMAGES), read(file)
    logits = by_ops(monkeypatch, int8, IMAGES)
    program = network.last_plan(int8)._program
    assert {step.path for step, *_ in program._calls if step.path} == set(names)

    def flat(name):
        array = torch.from_numpy(numbers[name])
        return (array.permute(0, 2, 3, 1) if array.dim() == 4 else array).reshape(-1)

    expected = {}  # what each value should be
    for step, *_ in program._calls:
        if step.path:
            image, residual = names[step.path]
            expected[step.x] = flat(image)
            if residual is not None:
                expected[step.residual] = flat(residual)
    compared = 0
    for step, call, _ in program._calls:
        if not step.path or step.y not in expected:
            continue
        found = call(expected[step.x], expected.get(step.residual))
        difference = (found.int() - expected[step.y].int()).abs()
        assert difference.max() <= 1, step.path
        assert (difference > 0).double().mean() <= FLIPS, step.path
        compared += 1
    assert compared >= len(names) // 3  # the others' results are pooled, or the logits
    # The logits: each number that the last layer reads may be one step off.
    last, call, _ = program._calls[-1]
    weight, scale, _ = call.args[1:]
    allowed = (weight.flatten(1).double().abs().sum(1) * scale).max()
    assert (logits - torch.from_numpy(numbers["logits"])).abs().max() <= allowed
    found = call(expected[last.x], None).view(logits.shape)
    np.testing.assert_allclose(found.numpy(), numbers["logits"], atol=1e-5 * np.abs(numbers["logits"]).max())


@native
@each_model
@pytest.mark.parametrize("shape", [(2, 3, 32, 32), (1, 3, 33, 65), (5, 3, 64, 17)])
def test_both_that_run_the_steps_give_the_same_bits(name, shape, monkeypatch):
    _, int8 = quantised(name)
    x = images(*shape)
    result = int8(x)
    plan = network.last_plan(int8)
    assert plan.native and not plan.refusals
    assert torch.equal(by_ops(monkeypatch, int8, x), result)
    assert not network.last_plan(int8).native
    # In channels_last there is no step that changes the order, and nothing else differs.
    assert torch.equal(int8(x.contiguous(memory_format=torch.channels_last)), result)
    assert torch.equal(int8(x), result)  # again, where the numbers of another program were


@native
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_and_images_at_a_time_do_not_matter(threads, monkeypatch):
    _, int8 = quantised("bottleneck")
    x = images(7, 3, 64, 64)
    expected = torch.cat([int8(one) for one in x.split(1)])
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    monkeypatch.setattr(network.schedule, "_cache", lambda: 1 << 18)
    try:
        assert torch.equal(int8(x), expected)
        assert network.last_plan(int8).split.images < 7
    finally:
        torch.set_num_threads(before)


# --- where they stand -------------------------------------------------------------------------------------------------


NHWC = IMAGES.contiguous(memory_format=torch.channels_last)


def kinds(model, x=IMAGES):
    """The steps of a call, convolutions by what they read and write."""
    model(x)
    names = {abi.QUANTISE: "quantise", abi.DEQUANTISE: "dequantise", abi.MAX_POOL: "max", abi.AVG_POOL: "mean"}
    names |= {abi.TO_NHWC: "nhwc", abi.TO_NCHW: "nchw", abi.ADD: "add"}
    found = []
    for step in network.last_plan(model).steps:
        before = "int8" if step.in_int8 else "float"
        after = "float" if step.y.scale is None else "int8"
        found.append(names.get(step.kind, f"{before} conv {after}" if step.path else "?"))
        assert step.shape.dtype == (abi.INT8 if step.in_int8 else abi.FLOAT32)
    return found


def with_ranges(model, ranges):
    """Quantised with these ranges, whatever a calibration would say."""
    model = resnet_fast.accelerate(model.eval().requires_grad_(False))
    quantise(model, {path: Ranges(*values) for path, values in ranges.items()}, {"layers": []})
    return model


def test_nothing_stands_between_int8_layers():
    _, int8 = quantised("basic")
    body = ["int8 conv int8"] * 11  # the max-pool is the stem's
    assert kinds(int8) == ["quantise", "nhwc", *body, "int8 conv float", "mean", "quantise", "int8 conv float"]


def test_a_pool_between_int8_layers_is_in_int8():
    _, int8 = quantised("without norms")
    convolutions = ["int8 conv int8", "int8 conv int8", "max", "int8 conv float"]
    assert kinds(int8) == ["quantise", "nhwc", *convolutions, "mean", "quantise", "int8 conv float"]
    assert network.last_plan(int8).steps[4].in_int8


def test_what_is_averaged_is_dequantised_where_it_is_int8_alone():
    _, int8 = quantised("pooled shortcut")
    found = kinds(int8)
    assert found.count("dequantise") == 3 and found.count("mean") == 3 + 1
    for before, pool, after in zip(found, found[1:], found[2:], strict=False):
        assert pool != "mean" or (before, after) == ("dequantise", "quantise") or before == "int8 conv float"


class Block(nn.Module):
    """Values with several readers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.left, self.right = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        x = torch.relu(self.first(x))
        return self.left(x), self.right(x)


def test_readers_that_agree_on_a_scale_share_what_is_written():
    model = with_ranges(Block(), {"first": (4,), "left": (2,), "right": (2,)})
    assert kinds(model, NHWC) == ["quantise", "int8 conv int8", "int8 conv float", "int8 conv float"]


def test_readers_that_do_not_agree_have_a_quantised_copy_each():
    model = with_ranges(Block(), {"first": (4,), "left": (2,), "right": (3,)})
    branch = ["quantise", "int8 conv float"]
    assert kinds(model, NHWC) == ["quantise", "int8 conv float", *branch, *branch]


def test_a_reader_in_float_keeps_the_value_in_float():
    model = with_ranges(Block(), {"first": (4,), "left": (2,)})
    found = kinds(model, NHWC)
    assert found == ["quantise", "int8 conv float", "quantise", "int8 conv float", "float conv float"]


def test_ranges_of_a_shortcut_may_differ_from_those_of_what_it_shares(monkeypatch):
    model = small_resnet()
    _, int8 = quantised("basic")
    ranges = resnet_fast.quantisation_of(int8).largest
    ranges["layer1.0.conv2.residual"] *= 1.5
    other = resnet_fast.quantize(model, ranges=ranges)
    found = kinds(other)
    assert found.count("quantise") == 2 + 2  # the image, what the last layer reads, and the pool's result, twice
    assert found[2:4] == ["int8 conv float", "max"]  # no kernel pools in float32 what it reads in int8
    assert torch.equal(by_ops(monkeypatch, other, IMAGES), other(IMAGES))


def test_a_sum_takes_no_place_of_a_residual_of_another_size(monkeypatch):
    """The last addition writes float32 where it read int8."""
    _, int8 = quantised("bottleneck")
    assert kinds(int8)[-4:] == ["int8 conv float", "mean", "quantise", "int8 conv float"]
    assert torch.equal(by_ops(monkeypatch, int8, IMAGES), int8(IMAGES))


def test_a_layer_whose_residual_has_no_range_stays_in_float():
    model = small_resnet()
    _, int8 = quantised("basic")
    found = resnet_fast.quantisation_of(int8).largest
    names = {name.rpartition(".")[0] for name in found}
    ranges = {name: (found[f"{name}.input"], found.get(f"{name}.residual")) for name in names}
    ranges["layer2.0.conv2"] = ranges["layer2.0.conv2"][:1]
    partly = with_ranges(copy.deepcopy(model), ranges)
    assert kinds(partly).count("float conv float") == 1
    reasons = network.last_plan(partly).refusals
    assert reasons == {("layer2", "0", "conv2"): "no range is known for what is added to its result"}


# --- weights ----------------------------------------------------------------------------------------------------------


def test_weights_are_rounded_by_channel_and_dead_channels_stay_zero():
    weight = torch.tensor([[1.0, -0.5], [0.0, 0.0], [1e-3, 2e-3]]).view(3, 2, 1, 1)
    integers, scales = quantised_weight(weight)
    assert integers.flatten(1).tolist() == [[127, -64], [0, 0], [64, 127]]  # 63.5 goes to the even one
    assert scales.dtype == torch.float32
    assert scales.tolist() == [scale_of(1.0), 1.0, scale_of(float(weight[2].max()))]


@pytest.mark.parametrize("amax", [1e-44, 1e-30, 3.7, 1e30])
def test_scales_are_float32_and_have_a_reciprocal(amax):
    scale = scale_of(amax)
    assert scale == float(np.float32(scale)) and np.isfinite(np.float32(1 / scale))


@native
def test_memory_of_packs():
    """At most a tenth more than the weights have in int8, for layers whose sizes are those of networks."""
    model = resnet_fast.quantize(resnet_fast.resnet18(num_classes=10).eval(), IMAGES)
    model(IMAGES)
    steps = [step for step in network.last_plan(model).steps if step.path]
    assert all(step.in_int8 for step in steps)
    weights = sum(step.weights.weight.numel() for step in steps)
    assert sum(step.pack.weight.numel() for step in steps) <= 1.1 * weights


def test_every_value_has_one_place(monkeypatch):
    """Values that are alive at once lie apart, whatever the sizes of their numbers."""
    if library.unavailable():
        pytest.skip("no native library")
    _, int8 = quantised("pooled shortcut")
    int8(IMAGES)
    plan = network.last_plan(int8)
    ends = {}
    for part, op in zip(plan.parts, plan._ops, strict=True):
        for value, ref in ((part.step.x, op.x), (part.step.residual, op.residual), (part.step.y, op.y)):
            if value is not None and ref.buffer == 0:
                ends.setdefault(value, (ref.offset, ref.offset + value.bytes))
    last = network.schedule.last_reads(plan.steps)
    first = {step.y: i for i, step in enumerate(plan.steps)}
    for one, other in itertools.combinations(ends, 2):
        together = first[one] < last[other] and first[other] < last[one]
        (start, end), (other_start, other_end) = ends[one], ends[other]
        assert not together or end <= other_start or other_end <= start
