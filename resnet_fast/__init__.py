"""ResNets with convolution, batch norm, residual add and ReLU fused into custom kernels, behind torchvision's API.

What is listed in ``__all__`` is imported when it is asked for, so that the command line answers at once.
"""

import importlib
from typing import TYPE_CHECKING

from resnet_fast.utils.when_imported import when_imported

if TYPE_CHECKING:
    from resnet_fast.accelerated import accelerate, restore
    from resnet_fast.cuda_graph import graphed
    from resnet_fast.exactness import exact
    from resnet_fast.explanation import explain
    from resnet_fast.export import export_onnx
    from resnet_fast.export.onnx_model import OnnxModel
    from resnet_fast.int8.files import load_quantized, save_quantized
    from resnet_fast.int8.quantising import quantisation_of, quantize
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
    "exact",
    "explain",
    "export_onnx",
    "graphed",
    "load_quantized",
    "quantisation_of",
    "quantize",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "resnext101_64x4d",
    "restore",
    "save_quantized",
    "tune",
    "wide_resnet50_2",
    "wide_resnet101_2",
]
__version__ = "0.1.0"

# A module may not have the name of what it holds here: its import would put it in that one's place.
_ELSEWHERE = {
    "BasicBlock": "models.blocks",
    "Bottleneck": "models.blocks",
    "OnnxModel": "export.onnx_model",
    "accelerate": "accelerated",
    "exact": "exactness",
    "explain": "explanation",
    "export_onnx": "export",
    "graphed": "cuda_graph",
    "load_quantized": "int8.files",
    "quantisation_of": "int8.quantising",
    "quantize": "int8.quantising",
    "restore": "accelerated",
    "save_quantized": "int8.files",
    "tune": "tuning",
}
"""The modules of what is not in ``models.resnet``."""

if not TYPE_CHECKING:  # a type checker would believe that every name exists

    def __getattr__(name):
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        module = importlib.import_module(f"{__name__}.{_ELSEWHERE.get(name, 'models.resnet')}")
        globals()[name] = getattr(module, name)
        return globals()[name]

    def __dir__():
        return sorted({*globals(), *__all__})


# Archives of torch.export and AOTInductor need the fused ops, torchvision's get_model("fast_resnet50") the builders,
# whether torch and torchvision are imported before this or after.
when_imported("torch", "resnet_fast.ops")
when_imported("torchvision", "resnet_fast.models.resnet")
