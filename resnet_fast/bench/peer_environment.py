"""The virtual environment of the peers that cannot share this package's.

MNN's converter, imported, installs a package with an old protobuf through the first ``pip`` on PATH. So these peers
live in an environment that ``make bench-peers`` makes, and their processes find no programs at all.
"""

import functools
import os
import subprocess
from pathlib import Path
from typing import Optional

VARIABLE = "RESNET_FAST_PEERS"
"""Names the environment's folder; without it there is none."""

PACKAGES = ("ncnn", "pnnx", "MNN")

_SECONDS = 60  # for a Python to start, on a slow disk


def python() -> str:
    """The environment's Python, whether it is there or not."""
    # Not resolved: it is a link, and the folder that it lies in is what makes it this environment's.
    return str(Path(os.environ.get(VARIABLE, "")).absolute() / "bin" / "python")


def version(package: str) -> Optional[str]:
    """The version of ``package`` in the environment; None where one of them is not there."""
    return _version(python(), package) if os.environ.get(VARIABLE) else None


def missing(package: str) -> Optional[str]:
    """Return why ``package`` cannot be had from the environment, or None."""
    if version(package) is not None:
        return None
    return f"{package} is not installed: make bench-peers, and name the environment it makes in {VARIABLE}"


def environment(folder: Path) -> dict[str, str]:
    """The variables for a process there: PATH leads to an empty part of ``folder``, and nothing to this Python."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    nothing = folder / "no-programs"
    nothing.mkdir(exist_ok=True)
    return {**kept, "PATH": str(nothing)}


@functools.cache
def _version(python: str, package: str) -> Optional[str]:
    code = f"import importlib.metadata; print(importlib.metadata.version({package!r}))"
    try:
        given = subprocess.run([python, "-I", "-c", code], timeout=_SECONDS, capture_output=True, check=True, text=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return given.stdout.strip()
