"""Real images in the forms that ``resnet-fast finetune`` reads, made of scikit-learn's digits."""

import io
import pickle
import struct
from pathlib import Path
from typing import Union

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

TINY = ["--model", "timm:test_resnet", "--image-size", "32", "--batch-size", "8", "--threads", "1", "--workers", "0"]
"""A ResNet of 0.5 million parameters, with BasicBlocks and Bottlenecks."""


NAMES = ("zero", "one", "two", "three", "four")


def pixels(count: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """``[count, 32, 32]`` uint8 and labels, the first so many digits below ``classes``."""
    raw = load_digits()
    chosen = np.flatnonzero(raw.target < classes)[:count]
    enlarged = np.kron(raw.images[chosen], np.ones((4, 4))) * 15
    return enlarged.astype(np.uint8), raw.target[chosen]


def write_folder(folder: Path, count: int, classes: int = 3) -> Path:
    """A folder for each class, with PNG files."""
    for index, (image, label) in enumerate(zip(*pixels(count, classes), strict=True)):
        place = folder / NAMES[label]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(place / f"{index:04}.png")
    return folder


def write_cifar(folder: Path, classes: int, names: dict[str, int], meta: str, label_key: str, name_key: str) -> Path:
    """Files of the published format; ``names`` are those of the batches, with the number of images in each."""
    folder.mkdir(parents=True)
    images, labels = pixels(sum(names.values()), classes)
    rows = np.repeat(images.reshape(len(images), 1, -1), 3, axis=1).reshape(len(images), -1)
    start = 0
    for name, count in names.items():
        part = slice(start, start + count)
        (folder / name).write_bytes(python2_pickle({"data": rows[part], label_key: labels[part].tolist()}))
        start += count
    (folder / meta).write_bytes(python2_pickle({name_key: [f"class{label}" for label in range(classes)]}))
    return folder


def write_cifar10(folder: Path, count: int = 8) -> Path:
    names = {**{f"data_batch_{number}": count for number in range(1, 6)}, "test_batch": count}
    return write_cifar(folder / "cifar-10-batches-py", 10, names, "batches.meta", "labels", "label_names")


def write_cifar100(folder: Path, count: int = 24) -> Path:
    names = {"train": count, "test": count // 2}
    return write_cifar(folder / "cifar-100-python", 10, names, "meta", "fine_labels", "fine_label_names")


def python2_pickle(content: object) -> bytes:
    """As Python 2 wrote it: strings are bytes, and numpy's modules have their old names."""
    file = io.BytesIO()
    _Python2Pickler(file, protocol=2).dump(content)
    return file.getvalue().replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")


class _Python2Pickler(pickle._Pickler):  # type: ignore[name-defined]
    dispatch = dict(pickle._Pickler.dispatch)  # type: ignore[attr-defined]  # noqa: RUF012

    def save_string(self, text: Union[str, bytes]) -> None:
        raw = text.encode() if isinstance(text, str) else text
        self.write(b"T" + struct.pack("<i", len(raw)) + raw)
        self.memoize(text)

    dispatch[str] = dispatch[bytes] = save_string
