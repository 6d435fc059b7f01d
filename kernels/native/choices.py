"""The measured choices of algorithms for this CPU, in ``cpu-choices.json``; see ``kernels/choices.py``."""

import functools
import platform
from pathlib import Path
from typing import Optional

import torch

from resnet_fast.kernels.choices import Choices, own_version
from resnet_fast.kernels.native import library
from resnet_fast.utils.cpuinfo import first_processor

_choices = Choices("cpu-choices.json")


def path() -> Path:
    """Where the file lies."""
    return _choices.path()


def measured(shape: str) -> Optional[str]:
    """The algorithm chosen for ``shape`` (``planner.describe``) on this machine, or None."""
    return _choices.measured(machine(), shape)


def add(chosen: dict[str, str]) -> None:
    """Keep choices by shape, beside those that are there; raises as ``Choices.add`` does."""
    _choices.add(machine(), chosen)


def forget() -> None:
    """Read the file again when it is asked next."""
    _choices.forget()


@functools.cache
def machine() -> str:
    """All that a measurement depends on beside the shape: CPU, instruction set, versions."""
    own, abi = own_version(), library.ABI
    return f"{_cpu()}, {library.variant()}, resnet-fast {own} (interface {abi}), torch {torch.__version__}"


def _cpu() -> str:
    found = first_processor()
    # The name alone is a family on some virtual machines.
    numbers = [found[key] for key in ("cpu family", "model", "stepping") if key in found]
    return " ".join([found.get("model name") or platform.processor() or platform.machine(), *numbers])
