"""ResNet and its ten builders: torchvision's signatures, weights, state_dict keys and errors, with a fused forward.

Each builder is also in torchvision's registry, as ``torchvision.models.get_model("fast_resnet50")``.
"""

# No `from __future__ import annotations` here: torchvision's get_model_weights reads the annotation of `weights`.
from collections.abc import Callable
from typing import Any, Optional, TypeVar, Union

from torch import nn
from torchvision.models import resnet
from torchvision.models._api import WeightsEnum, register_model
from torchvision.models._utils import _ovewrite_named_param, handle_legacy_interface
from torchvision.models.resnet import (
    ResNet18_Weights,
    ResNet34_Weights,
    ResNet50_Weights,
    ResNet101_Weights,
    ResNet152_Weights,
    ResNeXt50_32X4D_Weights,
    ResNeXt101_32X8D_Weights,
    ResNeXt101_64X4D_Weights,
    Wide_ResNet50_2_Weights,
    Wide_ResNet101_2_Weights,
)

from resnet_fast.accelerated import accelerated, rebuild
from resnet_fast.graph.conditions import Accelerated
from resnet_fast.models.blocks import BasicBlock, Bottleneck


@accelerated
class ResNet(resnet.ResNet, Accelerated):
    """torchvision's ResNet (He et al. 2015) whose stem, blocks and pooling run fused in eval mode.

    Input ``[N, 3, H, W]`` in NCHW or channels_last, result ``[N, num_classes]``. Arguments and errors are those of
    ``torchvision.models.ResNet``; give it this package's ``BasicBlock`` or ``Bottleneck`` for fused blocks.
    """

    def __init__(
        self,
        block: type[Union[resnet.BasicBlock, resnet.Bottleneck]],
        layers: list[int],
        num_classes: int = 1000,
        zero_init_residual: bool = False,
        groups: int = 1,
        width_per_group: int = 64,
        replace_stride_with_dilation: Optional[list[bool]] = None,
        norm_layer: Optional[Callable[..., nn.Module]] = None,
    ) -> None:
        super().__init__(
            block,
            layers,
            num_classes,
            zero_init_residual,
            groups,
            width_per_group,
            replace_stride_with_dilation,
            norm_layer,
        )
        rebuild(self)


_F = TypeVar("_F", bound=Callable[..., nn.Module])


def _builder(pretrained: WeightsEnum) -> Callable[[_F], _F]:
    """Torchvision's decorators of a builder, typed. ``pretrained=True`` asks for the weights ``pretrained``."""

    def decorate(builder: _F) -> _F:
        legacy: Any = handle_legacy_interface(weights=("pretrained", pretrained))
        registered: Any = register_model(f"fast_{builder.__name__}")(legacy(builder))
        return registered

    return decorate


def _resnet(
    block: type[Union[BasicBlock, Bottleneck]], layers: list[int], weights: Any, progress: bool, **kwargs: Any
) -> ResNet:
    if weights is not None:
        _ovewrite_named_param(kwargs, "num_classes", len(weights.meta["categories"]))
    model = ResNet(block, layers, **kwargs)
    if weights is not None:
        model.load_state_dict(weights.get_state_dict(progress=progress, check_hash=True))
    return model


@_builder(ResNet18_Weights.IMAGENET1K_V1)
def resnet18(*, weights: Optional[ResNet18_Weights] = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNet-18 (He et al. 2015). Arguments as for ``torchvision.models.resnet18``."""
    weights = ResNet18_Weights.verify(weights)
    return _resnet(BasicBlock, [2, 2, 2, 2], weights, progress, **kwargs)


@_builder(ResNet34_Weights.IMAGENET1K_V1)
def resnet34(*, weights: Optional[ResNet34_Weights] = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNet-34 (He et al. 2015). Arguments as for ``torchvision.models.resnet34``."""
    weights = ResNet34_Weights.verify(weights)
    return _resnet(BasicBlock, [3, 4, 6, 3], weights, progress, **kwargs)


@_builder(ResNet50_Weights.IMAGENET1K_V1)
def resnet50(*, weights: Optional[ResNet50_Weights] = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNet-50 (He et al. 2015). Arguments as for ``torchvision.models.resnet50``."""
    weights = ResNet50_Weights.verify(weights)
    return _resnet(Bottleneck, [3, 4, 6, 3], weights, progress, **kwargs)


@_builder(ResNet101_Weights.IMAGENET1K_V1)
def resnet101(*, weights: Optional[ResNet101_Weights] = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNet-101 (He et al. 2015). Arguments as for ``torchvision.models.resnet101``."""
    weights = ResNet101_Weights.verify(weights)
    return _resnet(Bottleneck, [3, 4, 23, 3], weights, progress, **kwargs)


@_builder(ResNet152_Weights.IMAGENET1K_V1)
def resnet152(*, weights: Optional[ResNet152_Weights] = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNet-152 (He et al. 2015). Arguments as for ``torchvision.models.resnet152``."""
    weights = ResNet152_Weights.verify(weights)
    return _resnet(Bottleneck, [3, 8, 36, 3], weights, progress, **kwargs)


@_builder(ResNeXt50_32X4D_Weights.IMAGENET1K_V1)
def resnext50_32x4d(
    *, weights: Optional[ResNeXt50_32X4D_Weights] = None, progress: bool = True, **kwargs: Any
) -> ResNet:
    """ResNeXt-50 32x4d (Xie et al. 2016). Arguments as for ``torchvision.models.resnext50_32x4d``."""
    weights = ResNeXt50_32X4D_Weights.verify(weights)
    _ovewrite_named_param(kwargs, "groups", 32)
    _ovewrite_named_param(kwargs, "width_per_group", 4)
    return _resnet(Bottleneck, [3, 4, 6, 3], weights, progress, **kwargs)


@_builder(ResNeXt101_32X8D_Weights.IMAGENET1K_V1)
def resnext101_32x8d(
    *, weights: Optional[ResNeXt101_32X8D_Weights] = None, progress: bool = True, **kwargs: Any
) -> ResNet:
    """ResNeXt-101 32x8d (Xie et al. 2016). Arguments as for ``torchvision.models.resnext101_32x8d``."""
    weights = ResNeXt101_32X8D_Weights.verify(weights)
    _ovewrite_named_param(kwargs, "groups", 32)
    _ovewrite_named_param(kwargs, "width_per_group", 8)
    return _resnet(Bottleneck, [3, 4, 23, 3], weights, progress, **kwargs)


@_builder(ResNeXt101_64X4D_Weights.IMAGENET1K_V1)
def resnext101_64x4d(
    *, weights: Optional[ResNeXt101_64X4D_Weights] = None, progress: bool = True, **kwargs: Any
) -> ResNet:
    """ResNeXt-101 64x4d (Xie et al. 2016). Arguments as for ``torchvision.models.resnext101_64x4d``."""
    weights = ResNeXt101_64X4D_Weights.verify(weights)
    _ovewrite_named_param(kwargs, "groups", 64)
    _ovewrite_named_param(kwargs, "width_per_group", 4)
    return _resnet(Bottleneck, [3, 4, 23, 3], weights, progress, **kwargs)


@_builder(Wide_ResNet50_2_Weights.IMAGENET1K_V1)
def wide_resnet50_2(
    *, weights: Optional[Wide_ResNet50_2_Weights] = None, progress: bool = True, **kwargs: Any
) -> ResNet:
    """Wide ResNet-50-2 (Zagoruyko and Komodakis 2016). Arguments as for ``torchvision.models.wide_resnet50_2``."""
    weights = Wide_ResNet50_2_Weights.verify(weights)
    _ovewrite_named_param(kwargs, "width_per_group", 128)
    return _resnet(Bottleneck, [3, 4, 6, 3], weights, progress, **kwargs)


@_builder(Wide_ResNet101_2_Weights.IMAGENET1K_V1)
def wide_resnet101_2(
    *, weights: Optional[Wide_ResNet101_2_Weights] = None, progress: bool = True, **kwargs: Any
) -> ResNet:
    """Wide ResNet-101-2 (Zagoruyko and Komodakis 2016). Arguments as for ``torchvision.models.wide_resnet101_2``."""
    weights = Wide_ResNet101_2_Weights.verify(weights)
    _ovewrite_named_param(kwargs, "width_per_group", 128)
    return _resnet(Bottleneck, [3, 4, 23, 3], weights, progress, **kwargs)
