"""Checkpoints that appear whole or not at all, and are read as data: code in them is never run."""

import io
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from resnet_fast.utils.files import replacing

LAST, BEST = "last.pt", "best.pt"
_KEYS = {"model", "optimizer", "schedule", "scaler", "epoch", "history", "best", "classes", "settings"}


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """A temporary path, moved over ``path`` once it is on the disk.

    Raises:
        OSError: it could not be written, as on a full disk. ``path`` is as it was, and the temporary file is gone.
    """
    try:
        with replacing(path) as temporary:
            yield temporary
            _flush(temporary)
        _flush(path.parent)
    except OSError as error:
        raise OSError(
            error.errno, f"cannot write {str(path)!r}: {error.strerror or error}; what was there before is unchanged"
        ) from error


def _flush(path: Path) -> None:
    if os.name == "nt":
        return  # Windows flushes nothing that is open to be read, and opens no folders
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save(path: Path, content: Mapping[str, Any]) -> None:
    """``content``, tensors and plain values, to ``path``; raises as ``writing``."""
    buffer = io.BytesIO()  # torch.save to a file says of a full disk only that a position in it is unexpected
    torch.save(dict(content), buffer)
    with writing(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def load(path: Path) -> dict[str, Any]:
    """The content of a ``last.pt``, on the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        RuntimeError: it is not a checkpoint, or not one to go on from.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # a file of another kind can raise anything
        raise RuntimeError(f"--resume {str(path)!r} is not loaded: it is not a checkpoint, or damaged") from error
    if not isinstance(content, dict) or not set(content) >= _KEYS:
        raise RuntimeError(f"--resume {str(path)!r} holds weights only, expected a {LAST}; --weights starts from them")
    return content
