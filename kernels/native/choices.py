"""The measured choices of algorithms, in a JSON file of the user's: ``cpu-choices.json`` in the cache folder.

They are kept by machine, a text that names CPU, instruction set and versions, and within it by shape. A file that
cannot be read is ignored, with a warning; it is replaced when something is measured next.
"""

import functools
import json
import os
import platform
import tempfile
import warnings
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Optional

import torch

from resnet_fast.kernels.cpuinfo import first_processor
from resnet_fast.kernels.native import library

FORMAT = 1

_loaded: Optional[dict[str, str]] = None  # this machine's


def path() -> Path:
    """Where the file lies: ``RESNET_FAST_CACHE`` or ``XDG_CACHE_HOME``/resnet_fast, by default ~/.cache/resnet_fast."""
    folder = os.environ.get("RESNET_FAST_CACHE")
    if folder is None:
        folder = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "resnet_fast")
    return Path(folder) / "cpu-choices.json"


def measured(shape: str) -> Optional[str]:
    """The algorithm chosen for ``shape`` (``planner.describe``) on this machine, or None."""
    global _loaded
    if _loaded is None:
        _loaded = _read().get(machine(), {})
    return _loaded.get(shape)


def add(chosen: dict[str, str]) -> None:
    """Keep choices by shape, beside those that are there.

    Raises:
        OSError: the file cannot be written; the choices hold for this process all the same.
    """
    global _loaded
    machines = _read()
    mine = machines.setdefault(machine(), {})
    mine |= (_loaded or {}) | chosen
    _loaded = mine
    _write(machines)


def forget() -> None:
    """Read the file again when it is asked next."""
    global _loaded
    _loaded = None


@functools.cache
def machine() -> str:
    """All that a measurement depends on beside the shape: CPU, instruction set, versions."""
    try:
        own = version_of("resnet-fast")
    except PackageNotFoundError:
        own = "unknown"
    return f"{_cpu()}, {library.variant()}, resnet-fast {own} (interface {library.ABI}), torch {torch.__version__}"


def _cpu() -> str:
    found = first_processor()
    # The name alone is a family on some virtual machines.
    numbers = [found[key] for key in ("cpu family", "model", "stepping") if key in found]
    return " ".join([found.get("model name") or platform.processor() or platform.machine(), *numbers])


def _read() -> dict[str, dict[str, str]]:
    try:
        content = json.loads(path().read_text())
        machines: dict[str, dict[str, str]] = content["machines"]
        sound = content["format"] == FORMAT and all(
            isinstance(choice, str) for mine in machines.values() for choice in mine.values()
        )
        if not sound:
            raise ValueError(f"expected format {FORMAT}, with a choice for each shape of each machine")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        warnings.warn(f"{path()} is ignored: {error!r}", stacklevel=2)
        return {}
    return machines


def _write(machines: dict[str, dict[str, str]]) -> None:
    """All of it or nothing: another process may read or write at the same time."""
    target = path()
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=target.parent, suffix=".part", delete=False) as part:
        try:
            json.dump({"format": FORMAT, "machines": machines}, part, indent=1, sort_keys=True)
            part.close()
            os.replace(part.name, target)
        except BaseException:
            os.unlink(part.name)
            raise
