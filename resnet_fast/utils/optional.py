"""Packages that only some features need."""

import importlib
from types import ModuleType

EXTRAS = {
    "onnxruntime": "onnxruntime",
    "openvino": "openvino",
    "timm": "timm",
    "sklearn": "finetune",
    "skimage": "demo",
    "matplotlib": "finetune",
    "jinja2": "demo",
    "safetensors": "safetensors",
    "tritonclient": "serving",
    "tensorrt_rtx_bindings": "tensorrt",
    "tensorrt_rtx_libs": "tensorrt",
}
"""The extra of ``resnet-fast`` that brings each optional module."""


class MissingPackageError(ImportError):
    """An optional package is not installed; the message says which extra brings it."""


def require(module: str, purpose: str) -> ModuleType:
    """Import ``module`` (a key of ``EXTRAS``, or a submodule of one), or say which extra ``purpose`` needs."""
    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != package:
            raise
        raise MissingPackageError(
            f"{purpose} needs {package}, which is not installed: pip install 'resnet-fast[{EXTRAS[package]}]'",
            name=package,
        ) from error
