"""What quantize refuses: an error that names argument, value and expectation, and a model that is as it was."""

import copy

import pytest
import torch
from torch import nn

import resnet_fast
from resnet_fast.export import export_onnx
from resnet_fast.graph.conditions import Accelerated
from tests.cpu.quantize.networks import IMAGES, quantised
from tests.cpu.small_models import small_resnet

NAN = IMAGES.clone()
NAN[2, 1, 3, 4] = torch.nan


def _trains(model):
    model.layer2.train()
    return model


def _holds_nan(model):
    with torch.no_grad():
        model.layer3[0].bn1.weight[2] = torch.nan
    return model


def _same(model):
    return model


BAD = {
    "neither images nor ranges": (_same, {"calibration": None}, ValueError, "calibration is None and ranges is None"),
    "no images": (_same, {"calibration": IMAGES[:0]}, ValueError, r"calibration has shape \[0, 3, 32, 32\], expected"),
    "an empty list": (_same, {"calibration": []}, ValueError, "calibration is empty, expected images"),
    "no folder": (_same, {"calibration": "/nowhere"}, (ValueError, FileNotFoundError), "/nowhere"),
    "no kind of images": (_same, {"calibration": 3}, TypeError, "calibration is int, expected a path, a tensor or"),
    "NaN in an image": (_same, {"calibration": NAN}, ValueError, r"calibration\[2\] is an image with NaN or infinity"),
    "images of another size": (
        *(_same, {"input_size": (3, 16, 16)}, ValueError),
        r"calibration\[0\] is an image of shape \[3, 32, 32\], expected \[3, 16, 16\]",
    ),
    "validation with NaN": (_same, {"validation": NAN}, ValueError, r"validation\[2\] is an image with NaN"),
    "another dtype": (_same, {"dtype": "int4"}, ValueError, "dtype is 'int4', expected 'int8'"),
    "a dtype of torch": (_same, {"dtype": torch.int8}, ValueError, "dtype is torch.int8, expected 'int8'"),
    "another method": (_same, {"calibration_method": "best"}, ValueError, "calibration_method is 'best', expected max"),
    "a drop below 0": (_same, {"max_accuracy_drop": -1}, ValueError, "max_accuracy_drop is -1, expected 0 to 100"),
    "a drop without images": (
        *(_same, {"calibration": None, "ranges": "own", "max_accuracy_drop": 1}, ValueError),
        "which max_accuracy_drop is measured with",
    ),
    "training mode": (lambda model: model.train(), {}, ValueError, "model is in training mode, expected eval mode"),
    "a part in training mode": (_trains, {}, ValueError, "model has 'layer2' in training mode, expected eval mode"),
    "NaN in a weight": (
        _holds_nan,
        {},
        ValueError,
        "model has NaN or infinity in layer3.0.bn1.weight, expected finite",
    ),
    "half precision": (lambda model: model.half(), {}, ValueError, "model has .* in torch.float16, expected"),
    "no module": (lambda model: "resnet18", {}, TypeError, "model is a str, expected a torch.nn.Module"),
    "no classifier": (lambda model: nn.Conv2d(3, 3, 1).eval(), {}, TypeError, "model gives shape"),
    "nothing to quantise": (
        lambda model: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval(),
        *({"input_size": (3, 32, 32)}, ValueError, "no convolution and no fully connected layer"),
    ),
    "ranges for other layers": (
        *(_same, {"ranges": {"layer9.conv1.input": 1.0}}, ValueError),
        "ranges has 'layer9.conv1.input', expected names of this model, as 'conv1.input'",
    ),
    "a range of 0": (
        *(_same, {"ranges": {"conv1.input": 0.0}}, ValueError),
        "ranges has 0.0 for 'conv1.input', expected a finite number above 0",
    ),
    "a range of NaN": (_same, {"ranges": {"fc.input": float("nan")}}, ValueError, "ranges has nan for 'fc.input'"),
    "a range that is text": (_same, {"ranges": {"fc.input": "2"}}, ValueError, "ranges has '2' for 'fc.input'"),
    "a missing range": (
        *(_same, {"calibration": None, "ranges": {"conv1.input": 1.0}}, ValueError),
        "ranges has no 'layer1.0.conv1.input' and calibration is None",
    ),
    "ranges that are a list": (_same, {"ranges": [1.0]}, TypeError, "ranges is a list, expected names and numbers"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("inplace", [False, True])
def test_bad_input(name, inplace):
    change, given, error, message = BAD[name]
    given = {"calibration": IMAGES, **given}
    if given.get("ranges") == "own":
        given["ranges"] = resnet_fast.quantisation_of(quantised()[1]).largest
    model = change(small_resnet())
    before = copy.deepcopy(model)
    with pytest.raises(error, match=message):
        resnet_fast.quantize(model, inplace=inplace, **given)
    if isinstance(model, nn.Module):
        assert not any(isinstance(module, Accelerated) for module in model.modules())
        assert [module.training for module in model.modules()] == [module.training for module in before.modules()]
        assert all(parameter.requires_grad for parameter in model.parameters())
        for (key, one), other in zip(model.state_dict().items(), before.state_dict().values(), strict=True):
            assert torch.equal(one.nan_to_num(), other.nan_to_num()), key


def test_a_report_of_another_model_or_target(tmp_path):
    model, int8 = quantised()
    file = export_onnx(
        *(model, tmp_path / "m.onnx"),
        **{"precision": "int8", "calibration": IMAGES, "target": "cpu", "input_size": (3, 32, 32), "verify": False},
    )
    with pytest.raises(ValueError, match="ranges is the report of an export for 'cpu', expected one of symmetric"):
        resnet_fast.quantize(model, ranges=file.quantisation)
    other = nn.Sequential(nn.Conv2d(3, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)).eval()
    with pytest.raises(ValueError, match="expected names of this model"):
        resnet_fast.quantize(other, ranges=resnet_fast.quantisation_of(int8))


def test_without_onnx_runtime_only_ranges_will_do(monkeypatch):
    import sys

    model, int8 = quantised()
    ranges = resnet_fast.quantisation_of(int8).largest
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert torch.equal(resnet_fast.quantize(model, ranges=ranges)(IMAGES), int8(IMAGES))
    with pytest.raises(ImportError, match="onnxruntime"):
        resnet_fast.quantize(model, IMAGES)
