"""Small networks with every kind of block, quantised once."""

import copy
import functools

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import resnet

import resnet_fast
from tests.cpu.small_models import images, randomise_norms, small_resnet

SIZE = 32
IMAGES = images(8, 3, SIZE, SIZE)


def pooled_shortcut() -> nn.Module:
    """What timm's resnet50d is made of: a stem of three convolutions, shortcuts that average."""
    timm_resnet = pytest.importorskip("timm").models.resnet
    torch.manual_seed(0)
    deep = {"stem_width": 16, "stem_type": "deep", "avg_down": True}
    return randomise_norms(timm_resnet.ResNet(timm_resnet.Bottleneck, [1, 1, 1, 1], num_classes=7, **deep)).eval()


def without_norms() -> nn.Module:
    """Convolutions with biases, a pool that is not the stem's, and dead channels."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1),
        nn.ReLU(),
        nn.Conv2d(16, 24, 3, padding=2, dilation=2),
        nn.BatchNorm2d(24),
        nn.ReLU(),
        nn.MaxPool2d(2, 2, ceil_mode=True),
        nn.Conv2d(24, 16, (1, 3), bias=False, groups=4),
        nn.BatchNorm2d(16),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 7),
    )
    with torch.no_grad():
        model[2].weight[3] = 0
    return randomise_norms(model).eval()


MODELS = {
    "basic": small_resnet,
    "bottleneck": lambda: small_resnet(resnet.Bottleneck),
    "resnext": lambda: small_resnet(resnet.Bottleneck, groups=8, width_per_group=8),
    "pooled shortcut": pooled_shortcut,
    "without norms": without_norms,
}

each_model = pytest.mark.parametrize("name", MODELS)


def quantised(name: str = "basic") -> tuple[nn.Module, nn.Module]:
    """A network in float32, and in int8: copies."""
    return copy.deepcopy(_kept(name))


@functools.cache
def _kept(name: str) -> tuple[nn.Module, nn.Module]:
    model = MODELS[name]()
    return model, resnet_fast.quantize(model, IMAGES)


def by_ops(monkeypatch: pytest.MonkeyPatch, model: nn.Module, x: Tensor) -> Tensor:
    """The result of the same steps as calls of ops, which the definition serves."""
    with monkeypatch.context() as patch:
        patch.setenv("RESNET_FAST_IMPLEMENTATION", "reference")
        return model(x)
