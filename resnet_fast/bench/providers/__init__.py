"""The libraries that are compared. To add one, write a module here and name it in ``NAMES``. (``plan`` is not there: it
is for ``benchmarks/layers.py``.)

A provider's module has

    TITLE      its name in tables, with the settings that matter
    NEEDS      the optional module that it imports, or None
    ONNX       whether it reads the model as an ONNX file
    APART      whether it runs in the environment of its own that apart.py describes; then NEEDS is looked for there
    unavailable() -> Optional[str]
               why it cannot run on this machine beside a missing module, or None
    load(folder: Path, threads: int) -> Callable[[], numpy.ndarray]
               the model of the workload in ``folder``, ready: a call runs it on the images once

and imports libraries, PyTorch included, only in ``load``: the process that starts the others reads the module too. One
that runs apart has numpy and its own libraries, not PyTorch, and no programs.
"""

import difflib
import importlib
from types import ModuleType
from typing import Optional

NAMES = ("ours", "eager", "channels_last", "compile", "onnxruntime", "openvino", "ncnn", "MNN")


def provider(name: str) -> ModuleType:
    """The module of the provider ``name``, one of ``NAMES``."""
    return importlib.import_module(f"{__name__}.{name}")


def provider_names(text: Optional[str]) -> list[str]:
    """The names in ``text``, which has commas between them; all if it is None.

    Raises:
        ValueError: a name is not in ``NAMES``; the message has the closest one that is.
    """
    names = list(NAMES) if text is None else list(dict.fromkeys(part.strip() for part in text.split(",")))
    for name in names:
        if name not in NAMES:
            close = difflib.get_close_matches(name, NAMES, n=1, cutoff=0.5)
            hint = f"did you mean {close[0]}?" if close else f"expected some of {', '.join(NAMES)}"
            raise ValueError(f"no provider is called {name!r}: {hint}")
    return names
