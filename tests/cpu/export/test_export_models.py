"""Models as people have them: wrapped, pruned, with other people's norms and poolings, with other channels."""

import copy
import warnings

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.optim.swa_utils import AveragedModel

from resnet_fast.export import export_onnx, verify_onnx
from resnet_fast.export.precision import folded
from tests.cpu.small_models import small_resnet

pytestmark = pytest.mark.usefixtures("one_thread")

SIZE = (3, 64, 64)


class GeneralisedMean(nn.Module):
    """GeM, as people write it."""

    def __init__(self, learnt):
        super().__init__()
        self.p = nn.Parameter(torch.ones(1) * 3) if learnt else 3.0

    def forward(self, x):
        return F.avg_pool2d(x.clamp(min=1e-6).pow(self.p), (x.size(-2), x.size(-1))).pow(1.0 / self.p)


class FrozenNorm(nn.Module):
    """DETR's, which no class of torchvision or PyTorch stands for."""

    def __init__(self, channels):
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(channels) + 0.5)

    def forward(self, x):
        weight, bias, mean, variance = (
            tensor.reshape(1, -1, 1, 1) for tensor in (self.weight, self.bias, self.running_mean, self.running_var)
        )
        scale = weight * (variance + 1e-5).rsqrt()
        return x * scale + (bias - mean * scale)


class Grey(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x.repeat(1, 3, 1, 1))


def with_gem(learnt):
    model = small_resnet()
    model.avgpool = GeneralisedMean(learnt)
    return model


def pruned():
    model = small_resnet()
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            prune.l1_unstructured(module, "weight", amount=0.5)
    prune.random_structured(model.conv1, "weight", amount=0.3, dim=0)  # two masks in one container
    model(torch.randn(1, *SIZE))
    return model


def normalised():
    model = small_resnet()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.weight_norm(model.conv1)
        nn.utils.spectral_norm(model.layer1[0].conv1)
    parametrizations.weight_norm(model.layer2[0].conv1)
    return model.eval()


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("learnt", [True, False])
def test_generalised_mean_in_low_precision(learnt, precision, tmp_path):
    result = export_onnx(with_gem(learnt), tmp_path / "m.onnx", precision=precision, input_size=SIZE, tensorrt=False)
    assert set(result.max_errors) == {1, 2, 7}


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_frozen_norms_of_others_are_folded(precision, tmp_path):
    torch.manual_seed(0)
    model = small_resnet(norm_layer=FrozenNorm)
    result = export_onnx(model, tmp_path / "m.onnx", precision=precision, input_size=SIZE, tensorrt=False)
    assert "Mul" not in result.op_counts and result.op_counts["Add"] == 4


def test_standardised_weights_are_constants(tmp_path):
    class Standardised(nn.Conv2d):
        def forward(self, x):
            mean, deviation = self.weight.mean((1, 2, 3), keepdim=True), self.weight.std((1, 2, 3), keepdim=True)
            return F.conv2d(x, (self.weight - mean) / (deviation + 1e-5), None, self.stride, self.padding)

    model = small_resnet()
    model.conv1 = Standardised(3, 64, 7, 2, 3, bias=False)
    result = export_onnx(model, tmp_path / "m.onnx", precision="fp16", input_size=SIZE, tensorrt=False)
    assert set(result.op_counts) <= {"Conv", "Relu", "Add", "MaxPool", "GlobalAveragePool", "Flatten", "Gemm", "Cast"}


def test_what_is_folded_stays_right_to_the_last_bits():
    """Constants before and behind a convolution, in every order, against the model in float64."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 5, 3, bias=True)
            self.norm = nn.BatchNorm2d(5)
            self.scale = nn.Parameter(torch.randn(5, 1, 1))
            self.shift = nn.Parameter(torch.randn(1))
            self.rows = nn.Parameter(torch.randn(4, 1))

        def forward(self, x):
            y = self.norm(self.scale * self.conv(x) - self.shift)
            z = self.scale - self.conv(x)  # not the convolution less a constant
            w = self.rows * self.conv(x)  # one a row, not one a channel
            return (y + z + w).mean((2, 3))

    torch.manual_seed(0)
    model = Net().eval().double().float()
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    torch.testing.assert_close(
        folded(model, (3, 6, 6), True)(x), copy.deepcopy(model).double()(x), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("make", [pruned, normalised])
def test_weights_that_are_computed_at_each_call(make, tmp_path):
    model = make()
    with torch.inference_mode():
        expected = model(torch.ones(1, *SIZE))
    before = list(model.state_dict())
    export_onnx(model, tmp_path / "m.onnx", input_size=SIZE, tensorrt=False)
    assert list(model.state_dict()) == before
    runtime = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    (found,) = runtime.run(None, {"input": np.ones((1, *SIZE), np.float32)})
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3 * expected.abs().max())
    names = {tensor.name for tensor in onnx.load(tmp_path / "m.onnx").graph.initializer}
    assert {"conv1.weight", "layer1.0.conv1.weight"} <= names


def compiled_in_place(model):
    model.compile()
    return model


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile, AveragedModel, compiled_in_place])
def test_wrappers_are_taken_off(wrap, tmp_path):
    model = wrap(small_resnet())
    export_onnx(model, tmp_path / "m.onnx", input_size=SIZE, verify=False)
    assert verify_onnx(tmp_path / "m.onnx", model, tensorrt=False).max_errors
    said = {entry.key: entry.value for entry in onnx.load(tmp_path / "m.onnx").metadata_props}
    assert said["model"] == "ResNet"


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile])
def test_wrappers_inside_are_taken_off(wrap, tmp_path):
    model = small_resnet()
    model.layer2 = wrap(model.layer2)
    export_onnx(model, tmp_path / "m.onnx", input_size=SIZE, tensorrt=False)
    names = {tensor.name for tensor in onnx.load(tmp_path / "m.onnx").graph.initializer}
    assert "layer2.0.conv1.weight" in names and type(model.layer2) is not nn.Sequential


@pytest.mark.parametrize("wrapped", [False, True])
def test_scripted_models_are_refused_in_one_line(wrapped, tmp_path):
    model = torch.jit.script(small_resnet())
    with pytest.raises(TypeError, match="model is a scripted module, expected the"):
        export_onnx(nn.DataParallel(model) if wrapped else model, tmp_path / "m.onnx", input_size=SIZE)
    assert list(tmp_path.iterdir()) == []


def test_a_forward_may_change_the_channels(tmp_path):
    model = Grey(small_resnet())
    result = export_onnx(
        model, tmp_path / "m.onnx", input_size=(1, 64, 64), mean=[0.5], std=[0.5], preprocess=True, tensorrt=False
    )
    assert result.input_size == (1, 64, 64)
    assert verify_onnx(tmp_path / "m.onnx", model, tensorrt=False).max_errors
    with pytest.raises(ValueError, match=r"input_size is \(2, 64, 64\), expected 3 channels"):
        export_onnx(model, tmp_path / "m.onnx", input_size=(2, 64, 64))


def test_nodes_with_several_results_are_rounded_each(tmp_path):
    class Halves(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)

        def forward(self, x):
            one, other = self.conv(x).split(4, 1)
            return (one * other).mean((2, 3))

    assert export_onnx(Halves(), tmp_path / "m.onnx", precision="bf16", input_size=(3, 9, 9), tensorrt=False).max_errors


def test_a_size_that_the_model_cannot_take_is_named(tmp_path):
    class Picky(nn.Module):
        def forward(self, x):
            assert x.shape[-1] == 7
            return x.flatten(1)

    with pytest.raises(ValueError, match=r"input_size is \(3, 8, 8\), of which Picky computes nothing: "):
        export_onnx(Picky(), tmp_path / "m.onnx", input_size=(3, 8, 8))
