"""The folder that a run writes to: its own for as long as the run lasts, and free of what a killed one left."""

import itertools
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from resnet_fast.finetune.arguments import SettingError, Settings
from resnet_fast.finetune.checkpoint import LAST

_LOCK = ".lock"
_PATIENCE = 8.0  # seconds: the workers of a run that was killed hold its lock until they notice, which takes them 5
_TEMPORARY = re.compile(  # see utils.files.replacing
    r"\.(last|best|metrics|curves|results|classes|confusion)\.[0-9a-f]{8}\.(pt|csv|json|png|txt)"
)


@contextmanager
def claimed(settings: Settings) -> Iterator[Path]:
    """The folder that ``settings`` ask for, made if it does not exist; no other run gets it meanwhile.

    The lock is the system's, which takes it back however the process ends: no stale one can be left.

    Raises:
        SettingError: another run writes there, or an earlier one did and is to be kept; or it cannot be written to.
    """
    folder = _wanted(settings)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / _LOCK)
        lock.acquire(timeout=_PATIENCE)
    except Timeout:
        raise SettingError("output", f"is {str(folder)!r}, where another run writes; expected another folder") from None
    except OSError as error:
        problem = f"is {str(folder)!r}, expected a folder that can be written to: {error.strerror}"
        raise SettingError("output", problem) from error
    try:
        resumed = settings.resume is not None and folder.samefile(Path(settings.resume).parent)
        if (folder / LAST).exists() and not settings.overwrite and not resumed:
            raise SettingError(
                "output", f"has a checkpoint, {folder / LAST}: --resume goes on, --overwrite starts anew"
            )
        for left in folder.iterdir():
            if _TEMPORARY.fullmatch(left.name):
                left.unlink()
        yield folder
    finally:
        lock.release()


def _wanted(settings: Settings) -> Path:
    if settings.output is not None:
        return Path(settings.output)
    if settings.resume is not None:
        return Path(settings.resume).parent
    for number in itertools.count(1):
        folder = Path("runs", "finetune" if number == 1 else f"finetune-{number}")
        try:
            folder.mkdir(parents=True)  # so that of two runs that begin together only one has it
        except FileExistsError:
            continue
        return folder
    raise AssertionError
