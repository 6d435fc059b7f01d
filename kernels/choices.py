"""Measured choices of algorithms, in JSON files of the user's, in the cache folder.

A file keeps them by machine, a text that names the hardware and the versions that a measurement depends on, and within
it by problem. A file that cannot be read is ignored, with a warning; it is replaced when something is measured next.
"""

import json
import os
import tempfile
import warnings
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Optional

FORMAT = 1
_PATIENCE = 60.0  # seconds to wait for another process, which takes milliseconds


def cache_folder() -> Path:
    """``RESNET_FAST_CACHE``, or ``XDG_CACHE_HOME``/resnet_fast, or ~/.cache/resnet_fast."""
    folder = os.environ.get("RESNET_FAST_CACHE")
    if folder is None:
        folder = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "resnet_fast")
    return Path(folder)


class Choices:
    """The choices in one file: a text for each problem of each machine."""

    def __init__(self, file: str) -> None:
        """``file``: its name, without the folder."""
        self._file = file
        self._loaded: dict[str, dict[str, str]] = {}  # by machine

    def path(self) -> Path:
        """Where the file lies: in ``cache_folder``."""
        return cache_folder() / self._file

    def measured(self, machine: str, problem: str) -> Optional[str]:
        """What was chosen for ``problem`` on ``machine``, or None."""
        mine = self._loaded.get(machine)
        if mine is None:
            mine = self._loaded[machine] = self._read().get(machine, {})
        return mine.get(problem)

    def add(self, machine: str, chosen: dict[str, str]) -> None:
        """Keep choices by problem, beside those that are there.

        Raises:
            OSError: the file cannot be written; the choices hold for this process all the same.
        """
        from filelock import FileLock  # imports asyncio, which takes as long as all else here

        target = self.path()
        lock = FileLock(f"{target}.lock", timeout=_PATIENCE)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except OSError:
            self._with(machine, chosen)
            raise
        try:  # another process may have added to the file since it was read, and may be about to
            self._write(self._with(machine, chosen))
        finally:
            lock.release()

    def _with(self, machine: str, chosen: dict[str, str]) -> dict[str, dict[str, str]]:
        """What the file has by now, with what this process knows beside."""
        machines = self._read()
        mine = machines.setdefault(machine, {})
        mine |= self._loaded.get(machine, {}) | chosen
        self._loaded[machine] = mine
        return machines

    def forget(self) -> None:
        """Read the file again when it is asked next."""
        self._loaded.clear()

    def _read(self) -> dict[str, dict[str, str]]:
        try:
            content = json.loads(self.path().read_text())
            machines: dict[str, dict[str, str]] = content["machines"]
            sound = content["format"] == FORMAT and all(
                isinstance(choice, str) for mine in machines.values() for choice in mine.values()
            )
            if not sound:
                raise ValueError(f"expected format {FORMAT}, with a choice for each problem of each machine")
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            warnings.warn(f"{self.path()} is ignored: {error!r}", stacklevel=2)
            return {}
        return machines

    def _write(self, machines: dict[str, dict[str, str]]) -> None:
        """All of it or nothing: another process may read at the same time."""
        target = self.path()
        with tempfile.NamedTemporaryFile("w", dir=target.parent, suffix=".part", delete=False) as part:
            try:
                json.dump({"format": FORMAT, "machines": machines}, part, indent=1, sort_keys=True)
                part.close()
                os.replace(part.name, target)
            except BaseException:
                os.unlink(part.name)
                raise


def own_version() -> str:
    """Of this package, as installed."""
    try:
        return version_of("resnet-fast")
    except PackageNotFoundError:
        return "unknown"
