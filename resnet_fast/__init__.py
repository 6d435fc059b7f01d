"""ResNets with convolution, batch norm, residual add and ReLU fused into custom kernels, behind torchvision's API."""

from typing import TYPE_CHECKING, Any

from resnet_fast.accelerate import accelerate, explain, restore
from resnet_fast.cuda_graph import graphed
from resnet_fast.models.blocks import BasicBlock, Bottleneck
from resnet_fast.models.resnet import (
    ResNet,
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
    resnet18,
    resnet34,
    resnet50,
    resnet101,
    resnet152,
    resnext50_32x4d,
    resnext101_32x8d,
    resnext101_64x4d,
    wide_resnet50_2,
    wide_resnet101_2,
)
from resnet_fast.tuning import tune

__all__ = [
    "BasicBlock",
    "Bottleneck",
    "OnnxModel",
    "ResNeXt50_32X4D_Weights",
    "ResNeXt101_32X8D_Weights",
    "ResNeXt101_64X4D_Weights",
    "ResNet",
    "ResNet18_Weights",
    "ResNet34_Weights",
    "ResNet50_Weights",
    "ResNet101_Weights",
    "ResNet152_Weights",
    "Wide_ResNet50_2_Weights",
    "Wide_ResNet101_2_Weights",
    "accelerate",
    "explain",
    "export_onnx",
    "graphed",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "resnext101_64x4d",
    "restore",
    "tune",
    "wide_resnet50_2",
    "wide_resnet101_2",
]
__version__ = "0.1.0"

if TYPE_CHECKING:
    from resnet_fast.export import export_onnx
    from resnet_fast.export.onnx_model import OnnxModel


def __getattr__(name: str) -> Any:
    if name == "export_onnx":  # imported when asked for: the ONNX libraries take longer to load than all of this
        from resnet_fast.export import export_onnx

        return export_onnx
    if name == "OnnxModel":
        from resnet_fast.export.onnx_model import OnnxModel

        return OnnxModel
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
