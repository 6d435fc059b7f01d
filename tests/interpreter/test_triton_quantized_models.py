"""A quantised model whose steps are served by the Triton kernels: the way from ``quantize`` to them on a GPU.

Its layers are those of the definition but for numbers that lie between two steps: the kernels multiply by the
reciprocal of a scale where the definition divides. So may the logits differ by what one step of each number that the
last layer reads is worth.
"""

import torch
from torch import nn
from torchvision.models import resnet

import resnet_fast
from resnet_fast import network
from resnet_fast.kernels.native.inference import conv_shape
from resnet_fast.kernels.triton import device
from resnet_fast.network import torch_program


def _network() -> nn.Module:
    torch.manual_seed(0)
    model = resnet.ResNet(resnet.Bottleneck, [1, 1, 1, 1], num_classes=8, groups=2, width_per_group=16)
    model.layer3 = model.layer4 = nn.Identity()
    model.fc = nn.Linear(512, 8)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.running_mean, 0, 0.1)
    return model.eval()


def test_a_quantised_network_reaches_the_kernels(monkeypatch):
    images = torch.randn(4, 3, 32, 32)
    int8 = resnet_fast.quantize(_network(), images)
    results, algorithms = {}, {}
    for name in ("reference", "triton"):
        monkeypatch.setenv("RESNET_FAST_IMPLEMENTATION", name)
        results[name] = int8(images[:1])
        plan = network.last_plan(int8)
        assert not plan.native and len(plan.in_int8) == len(plan.algorithms)
        algorithms[name] = plan.algorithms
        last, call, _ = plan._program._calls[-1]
    assert set(algorithms["reference"].values()) == {"reference"}
    # A first layer of 3 channels has no kernel; on a GPU it would stay in float32.
    assert {path for path, served in algorithms["triton"].items() if served != "triton"} == {("conv1",)}
    weight, scale, _ = call.args[1:]
    allowed = (weight.flatten(1).double().abs().sum(1) * scale).max()
    assert (results["triton"] - results["reference"]).abs().max() <= allowed
    assert last.in_int8


def test_what_has_no_kernel_on_a_gpu_stays_in_float(monkeypatch):
    """The definition would multiply in float64 there."""
    monkeypatch.setattr(device, "refusal", lambda *_: None)  # a GPU that the kernels know
    cuda = torch.device("cuda", 0)
    stem = conv_shape((1, 3, 32, 32), (16, 3, 7, 7), (2, 2), (3, 3), (1, 1), 1, True, False)
    assert torch_program.refusal(stem, cuda) == "no kernel for it in 8 bits on cuda:0"
    assert torch_program.refusal(stem, torch.device("cpu")) == ""
    wide = conv_shape((1, 64, 8, 8), (64, 64, 3, 3), (1, 1), (1, 1), (1, 1), 1, True, False)
    assert torch_program.refusal(wide, cuda) == ""
