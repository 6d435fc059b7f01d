"""TensorRT-RTX parses and builds what is exported, in every precision and in about half the room."""

import os

import pytest
import torch
from torch import nn
from torchvision.models import resnet

from resnet_fast.bench.norms import randomise_batch_norm
from resnet_fast.export import export_onnx, tensorrt
from resnet_fast.models.named import build

pytestmark = pytest.mark.skipif(
    not tensorrt.available(), reason="the TensorRT-RTX wheels (extra `tensorrt`) are not installed"
)


def small(block, **kwargs):
    torch.manual_seed(0)
    return resnet.ResNet(block, [1, 1, 1, 1], num_classes=10, **kwargs)


SMALL = {
    "basic": lambda: small(resnet.BasicBlock),
    "bottleneck": lambda: small(resnet.Bottleneck),
    "resnext": lambda: small(resnet.Bottleneck, groups=32, width_per_group=4),
    "wide": lambda: small(resnet.Bottleneck, width_per_group=128),
}


@pytest.mark.parametrize("name", SMALL)
def test_every_precision_of_small_networks(name, tmp_path):
    check(SMALL[name](), tmp_path / "m.onnx", (3, 64, 64))


@pytest.mark.skipif("RESNET_FAST_SLOW_TESTS" not in os.environ, reason="minutes of export: set RESNET_FAST_SLOW_TESTS")
@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50_32x4d", "wide_resnet50_2"])
def test_every_precision_of_the_real_networks(name, tmp_path):
    check(build(name), tmp_path / "m.onnx", (3, 224, 224))


def check(model, path, input_size):
    """Each is built, each convolution of the engine is in it, and the smaller ones take half the room, or a quarter."""
    randomise_batch_norm(model, 0)
    expected = sum(isinstance(module, nn.Conv2d) for module in model.modules())
    sizes = {}
    for precision, kind in (("fp32", "Float"), ("fp16", "Half"), ("bf16", "BFloat16")):
        sizes[precision] = export_onnx(model, path, precision=precision, input_size=input_size, verify=False).size
        report = tensorrt.build(path)
        convolutions = [layer for layer in report.layers if layer.is_convolution]
        assert len(convolutions) == expected
        assert all([*layer.constants.values()][:1] == [kind] for layer in convolutions)
    assert max(sizes["fp16"], sizes["bf16"]) <= 0.51 * sizes["fp32"]
    images = torch.rand(2, *input_size, generator=torch.Generator().manual_seed(0))
    settings = {"calibration": images, "calibration_method": "max", "input_size": input_size}
    sizes["int8"] = export_onnx(model, path, precision="int8", verify=False, **settings).size
    report = tensorrt.build(path)
    assert report.int8_convolutions == expected
    # The last layer's bias and the scales stay in float32, which a network of a few layers feels.
    assert sizes["int8"] <= (0.27 if expected > 12 else 0.3) * sizes["fp32"]
    print(f"\n{path.parent.name}: {sizes}, {report.fused_int8_add} fused int8 with Add, {report.int8_tails} tails")
