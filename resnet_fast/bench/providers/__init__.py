"""The libraries that are compared. To add one, write a module here and name it in ``NAMES``.

A provider's module has

    TITLE      its name in tables, with the settings that matter
    NEEDS      the optional module that it imports, or None
    ONNX       whether it reads the model as an ONNX file
    unavailable() -> Optional[str]
               why it cannot run on this machine beside a missing module, or None
    load(folder: Path, threads: int) -> Callable[[], numpy.ndarray]
               the model of the workload in ``folder``, ready: a call runs it on the images once

and imports libraries, PyTorch included, only in ``load``: the process that starts the others reads the module too.
"""

import importlib
from types import ModuleType

NAMES = ("ours", "eager", "channels_last", "compile", "onnxruntime", "openvino")


def provider(name: str) -> ModuleType:
    """The module of the provider ``name``, one of ``NAMES``."""
    return importlib.import_module(f"{__name__}.{name}")
