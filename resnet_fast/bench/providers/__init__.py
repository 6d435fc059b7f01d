"""The libraries that are compared. To add one, write a module here and name it in ``NAMES``. (``plan`` is not there: it
is for ``benchmarks/layers.py``.)

A provider's module has

    TITLE      its name in tables, with the settings that matter
    load(folder: Path, threads: int) -> Callable[[], numpy.ndarray]
               the model of the workload in ``folder``, ready: a call runs it on the images once
    train(folder: Path, threads: int) -> Step
               the training workload in ``folder``, ready: a call is a step; only in those of ``TRAINING``

and, where it is not as ``Provider`` has it by default, NEEDS, ONNX, APART, DEVICES, ACCURATE and unavailable(). It
imports libraries, PyTorch included, only in ``load``: the process that starts the others reads the module too. One that
runs apart has numpy and its own libraries, not PyTorch, and no programs.
"""

import difflib
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Optional, Union

NAMES = ("ours", "eager", "channels_last", "compile", "onnxruntime", "openvino", "ncnn", "MNN")
GPU_NAMES = ("ours", "graphed", "channels_last", "compile", "tensorrt")
TRAINING = ("ours", "channels_last", "compile")
INT8 = ("ours_int8", "onnxruntime_int8", "ours")

FLOAT32_ERROR = 1e-4
"""A hundred times what 50 layers in another order of summation give, and a tenth of what bfloat16 or TF32 arithmetic
gives."""


@dataclass(frozen=True)
class Provider:
    """What the process that starts a provider has to know of it.

    Attributes:
        title: its name in tables.
        needs: the optional module that it imports.
        onnx: whether it reads the model as an ONNX file; "int8": as one in 8 bits.
        apart: whether it runs in the environment of its own that ``peer_environment.py`` describes; then ``needs`` is
            looked for there.
        devices: what it runs on: "cpu", "cuda".
        accurate: largest error, relative to the largest result, that is taken at face value. For 8 bits it tells a
            wrong result from a rounded one: ResNet-50 with random weights is 0.17 off (docs/int8.md).
        unavailable: gives the reason why it cannot run on this machine, beside a missing module, or None.
    """

    title: str
    needs: Optional[str] = None
    onnx: Union[bool, str] = False
    apart: bool = False
    devices: tuple[str, ...] = ("cpu",)
    accurate: float = FLOAT32_ERROR
    unavailable: Callable[[], Optional[str]] = lambda: None


def provider(name: str) -> Provider:
    """The provider ``name``, one of ``NAMES`` or ``GPU_NAMES``, as its module describes it."""
    module = importlib.import_module(f"{__name__}.{name}")
    given = {key.lower(): value for key, value in vars(module).items()}
    return Provider(**{field.name: given[field.name] for field in fields(Provider) if field.name in given})


def provider_names(text: Optional[str], known: Sequence[str] = NAMES) -> list[str]:
    """The names in ``text``, which has commas between them; all of ``known`` if it is None.

    Raises:
        ValueError: a name is not in ``known``; the message has the closest one that is.
    """
    names = list(known) if text is None else list(dict.fromkeys(part.strip() for part in text.split(",")))
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"did you mean {close[0]}?" if close else f"expected some of {', '.join(known)}"
            raise ValueError(f"no provider is called {name!r}: {hint}")
    return names
