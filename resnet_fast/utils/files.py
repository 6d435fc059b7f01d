"""Files that appear whole or not at all, and what is written to them as JSON."""

import contextlib
import json
import math
import os
import re
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Union

_DAY = 86_400.0  # seconds


@contextlib.contextmanager
def replacing(path: Union[str, os.PathLike]) -> Iterator[Path]:
    """Give a temporary path in the folder of ``path``; move what was written there over ``path`` at the end.

    If the block raises, the temporary file goes and ``path`` stays as it was. A link is followed, not replaced.

    Raises:
        IsADirectoryError: ``path`` is a folder.
        FileNotFoundError: the folder of ``path`` does not exist.
        PermissionError: that folder cannot be written to.
    """
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise IsADirectoryError(f"path is {str(path)!r}, a folder; expected a file name")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"path is {str(path)!r}, but its folder {str(Path(path).parent)!r} does not exist")
    # The suffix stays last, because some readers go by it. Opened plainly, not by mkstemp, which allows only its owner.
    temporary = target.with_name(f".{target.stem}.{secrets.token_hex(4)}{target.suffix}")
    try:
        temporary.open("xb").close()
    except OSError as error:
        raise type(error)(error.errno, f"cannot write to the folder of path {str(path)!r}: {error.strerror}") from error
    remove_stale(target)
    try:
        yield temporary
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def remove_stale(target: Path) -> None:
    """Remove what processes that were killed, a day ago at least, left of their temporary files for ``target``."""
    name = re.compile(rf"\.{re.escape(target.stem)}\.[0-9a-f]{{8}}{re.escape(target.suffix)}")
    for left in target.parent.glob(".*"):
        with contextlib.suppress(OSError):  # another process may do the same
            if name.fullmatch(left.name) and left.is_file() and time.time() - left.stat().st_mtime > _DAY:
                left.unlink()


def json_text(data: Any, ascii: bool = False) -> str:
    """Return ``data`` as JSON that every reader takes: what JSON has no number for (NaN, infinities) is text.

    Bytes of file names that are no UTF-8 are escaped as JSON does it, all but ASCII only if ``ascii``.
    """
    text = json.dumps(_plain(data), indent=2, allow_nan=False, ensure_ascii=ascii) + "\n"
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
