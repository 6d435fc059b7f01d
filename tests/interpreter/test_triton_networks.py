"""Whole networks through the Triton kernels, against torchvision in float64.

The walk over torchvision's modules is written out here and calls the kernels directly, so that this test depends on
nothing but them.
"""

import copy

import pytest
import torch
import torchvision
from torch import nn

from resnet_fast.kernels.triton import table as kernels
from tests.interpreter.checking import assert_as_good_as_pytorch


def random_resnet(name: str) -> nn.Module:
    """A torchvision ResNet whose batch norms have random parameters and statistics, in eval mode.

    The statistics are of the order that random weights produce, so that activations neither vanish nor explode.
    """
    model = getattr(torchvision.models, name)().eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.0)
                module.bias.normal_(0.0, 0.2)
                module.running_mean.normal_(0.0, 0.2)
                module.running_var.uniform_(0.5, 2.0)
    return model


def conv_bn(x, conv: nn.Conv2d, bn: nn.BatchNorm2d, residual=None, relu: bool = True) -> torch.Tensor:
    return kernels.conv_bn_act(
        x, conv.weight, *_folded(bn), residual, conv.stride, conv.padding, conv.dilation, conv.groups, relu
    )


def _folded(bn: nn.BatchNorm2d) -> tuple[torch.Tensor, torch.Tensor]:
    scale = bn.weight.float() / (bn.running_var.float() + bn.eps).sqrt()
    return scale, bn.bias.float() - bn.running_mean.float() * scale


def forward(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    x = kernels.stem(x, model.conv1.weight, *_folded(model.bn1))
    for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
        for block in stage:
            identity = x if block.downsample is None else conv_bn(x, *block.downsample, relu=False)
            y = conv_bn(x, block.conv1, block.bn1)
            if hasattr(block, "conv3"):
                y = conv_bn(y, block.conv2, block.bn2)
                x = conv_bn(y, block.conv3, block.bn3, identity)
            else:
                x = conv_bn(y, block.conv2, block.bn2, identity)
    return kernels.head(x, model.fc.weight, model.fc.bias)


@pytest.mark.parametrize(
    ("name", "size", "batch", "dtype"),
    [
        ("resnet18", 64, 2, torch.float32),
        ("resnet18", 64, 2, torch.float16),
        ("resnet18", 64, 2, torch.bfloat16),
        ("resnet18", 224, 1, torch.float32),
        ("resnet50", 64, 2, torch.float32),
        ("resnet50", 64, 1, torch.bfloat16),
        ("resnext50_32x4d", 64, 1, torch.float32),
    ],
    ids=lambda value: str(value).removeprefix("torch."),
)
@torch.no_grad()
def test_network(name, size, batch, dtype):
    model = random_resnet(name).to(dtype, memory_format=torch.channels_last)
    x = torch.randn(batch, 3, size, size).to(dtype)
    exact = copy.deepcopy(model).double()(x.double())
    assert_as_good_as_pytorch(forward(model, x), model(x), exact)
