"""Picture files as people have them, read upright, in 8 bits a channel and without transparency."""

import contextlib
import logging
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Union

import numpy as np
from PIL import Image, ImageOps

_FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF", "AVIF", "HEIF")
TRANSPARENT = "over white"
"""Is in the ``info`` of a picture that has been laid on white."""


def readable_suffixes() -> set[str]:
    """Suffixes of picture files that Pillow, with the plug-ins that are registered, can open; ``.heic`` needs one."""
    known = Image.registered_extensions()  # loads the plug-ins
    return {suffix for suffix, kind in known.items() if kind in _FORMATS and kind in Image.OPEN}


def is_litter(name: str) -> bool:
    """Whether a file or folder of that name is none of the user's: hidden, or left by an archive of macOS."""
    return name.startswith(".") or name == "__MACOSX"


def find_files(folder: Union[str, "os.PathLike[str]"]) -> tuple[list[Path], "Counter[str]"]:
    """The pictures in ``folder`` and below, folder by folder; and how many other files there are, by their suffix."""
    readable = readable_suffixes()
    pictures: list[Path] = []
    others: Counter[str] = Counter()
    for place, names in sorted(_walk(folder)):
        for name in sorted(names):
            suffix = os.path.splitext(name)[1].lower()
            if is_litter(name):
                continue
            if suffix in readable:
                pictures.append(Path(place, name))
            else:
                others[suffix or "without a suffix"] += 1
    return pictures, others


def _walk(folder: Union[str, "os.PathLike[str]"]) -> Iterator[tuple[str, list[str]]]:
    for place, folders, names in os.walk(os.fspath(folder), followlinks=True):
        folders[:] = [name for name in folders if not is_litter(name)]  # os.walk then stays out of the others
        yield place, names


def read_picture(file: Union[str, os.PathLike], mode: str = "RGB") -> Image.Image:
    """Read a picture as ``mode``, "RGB" or "L", turned as its EXIF data say.

    16 bits a channel are scaled to 8, from the whole range of 16. What shines through is white: ``info[TRANSPARENT]``
    is then set.

    Raises:
        ValueError: its numbers have no known range: floating point, or integers of 32 bits.
        Exception: what Pillow raises of a file that it cannot read, whatever that is.
    """
    with Image.open(file) as opened:
        kind = opened.format
        opened.load()  # raises here, not within what follows, if the file ends too early
        picture: Image.Image = opened
        with contextlib.suppress(Exception):  # EXIF data can be broken in every way; the picture is good all the same
            picture = ImageOps.exif_transpose(opened)
        if picture.mode == "F" or (picture.mode == "I" and kind not in ("PNG", "PPM")):
            numbers = "floating point numbers" if picture.mode == "F" else "integers of 32 bits"
            raise ValueError(f"it holds {numbers}, whose range is not known; expected 8 or 16 bits a channel")
        if picture.mode == "I" or picture.mode.startswith("I;16"):
            wide = np.asarray(picture).astype(np.uint32)
            picture = Image.fromarray(((wide + 128) // 257).astype(np.uint8))
        if picture.has_transparency_data:
            picture = picture.convert("RGBA")
            if np.asarray(picture)[..., 3].min() < 255:
                white = Image.new("RGBA", picture.size, "white")
                picture = Image.alpha_composite(white, picture)
                picture.info[TRANSPARENT] = True
        return picture.convert(mode)


class Remarks:
    """What is to be said of pictures, in a log, each thing once.

    Attributes:
        skipped: names of those that could not be read.
    """

    def __init__(self, logger: logging.Logger) -> None:
        self.skipped: list[str] = []
        self._names: set[str] = set()
        self._logger = logger
        self._transparent = False

    def unreadable(self, name: str, reason: str) -> None:
        if name not in self._names:
            self._names.add(name)
            self.skipped.append(name)
            self._logger.warning("skipped %s: %s", name, reason)

    def transparent(self, name: str) -> None:
        if not self._transparent:
            self._transparent = True
            self._logger.warning("transparent pictures, e.g. %s, are shown on white", name)
