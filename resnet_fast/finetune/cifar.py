"""CIFAR-10 and CIFAR-100 in the python format of https://www.cs.toronto.edu/~kriz/cifar.html.

torchvision's reader accepts no other files than the published ones, and unpickles whatever it finds; this one also
reads data of one's own in that format, and only arrays and plain values.
"""

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class _Format:
    folder: str
    train: tuple[str, ...]
    test: str
    meta: str
    labels: str
    names: str


_FORMATS = (
    _Format(
        "cifar-10-batches-py",
        tuple(f"data_batch_{number}" for number in range(1, 6)),
        "test_batch",
        "batches.meta",
        "labels",
        "label_names",
    ),
    _Format("cifar-100-python", ("train",), "test", "meta", "fine_labels", "fine_label_names"),
)
_PIXELS = 3 * 32 * 32


@dataclass(frozen=True)
class Cifar:
    """Images ``[N, 3, 32, 32]``, uint8; labels ``[N]``, int64."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    classes: tuple[str, ...]


def read_cifar(folder: Path) -> Optional[Cifar]:
    """CIFAR-10 or CIFAR-100, if ``folder`` is their published folder or the one that it lies in; else None.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is not in the published format.
    """
    for form in _FORMATS:
        for place in (folder, folder / form.folder):
            if (place / form.meta).is_file():
                return _read(place, form)
    return None


def _read(folder: Path, form: _Format) -> Cifar:
    classes = tuple(_load(folder / form.meta, form.names)[form.names])
    parts = [_batch(folder / name, form.labels, len(classes)) for name in form.train]
    images, labels = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return Cifar(images, labels, *_batch(folder / form.test, form.labels, len(classes)), classes)


def _batch(path: Path, key: str, classes: int) -> tuple[Tensor, Tensor]:
    content = _load(path, "data", key)
    data, labels = np.asarray(content["data"]), np.asarray(content[key])
    if data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != _PIXELS or labels.shape != data.shape[:1]:
        raise ValueError(
            f"{str(path)!r} has data {data.dtype}{list(data.shape)} and {labels.size} {key}, "
            f"expected uint8[N, {_PIXELS}] and N of them"
        )
    if labels.size and not 0 <= labels.min() <= labels.max() < classes:
        raise ValueError(f"{str(path)!r} has {key} from {labels.min()} to {labels.max()}, expected 0 to {classes - 1}")
    return torch.from_numpy(data.copy()).view(-1, 3, 32, 32), torch.from_numpy(labels.astype(np.int64))


def _load(path: Path, *keys: str) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            content = _PlainUnpickler(file, encoding="latin1").load()
    except OSError:
        raise
    except Exception as error:  # a file of another kind can raise anything
        raise ValueError(f"{str(path)!r} is no CIFAR file in the python format: {error}") from error
    missing = [key for key in keys if not isinstance(content, dict) or key not in content]
    if missing:
        raise ValueError(f"{str(path)!r} has no {missing[0]!r}, expected CIFAR's python format")
    return content


class _PlainUnpickler(pickle.Unpickler):
    """Arrays and plain values; anything else in a pickle could run code."""

    def find_class(self, module: str, name: str) -> Any:
        plain = {("_codecs", "encode"), ("numpy", "ndarray"), ("numpy", "dtype")}
        arrays = {(f"numpy.{core}.multiarray", "_reconstruct") for core in ("core", "_core")}
        if (module, name) in plain | arrays:
            return super().find_class(module.replace("numpy.core", "numpy._core"), name)
        raise pickle.UnpicklingError(f"it holds {module}.{name}, expected arrays and plain values")
