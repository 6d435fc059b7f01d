"""Images to calibrate and to judge by: a folder, a file of tensors, or anything that gives tensors."""

import logging
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional, Union

import numpy as np
import torch
from torch import Tensor

from resnet_fast.export.metadata import Metadata
from resnet_fast.export.runner import find_pictures, pictures
from resnet_fast.utils.errors import first_line
from resnet_fast.utils.pictures import Remarks

logger = logging.getLogger(__name__)


Item = tuple[Tensor, Optional[int]]


@dataclass(frozen=True)
class Source:
    """Images that can be gone through, each ``[C, H, W]`` float32 as the model reads it, with its label if known.

    Attributes:
        items: begins to go through them.
        total: how many there are; None if only the end tells.
        again: whether ``items`` can be called a second time.
        skipped: picture files that could not be read, each once, as far as somebody has gone through them.
    """

    items: Callable[[], Iterator[Item]]
    total: Optional[int]
    again: bool = True
    skipped: list[str] = field(default_factory=list)

    def batches(self, size: int) -> Iterator[tuple[Tensor, Optional[Tensor]]]:
        """``[size or less, C, H, W]``, and their labels ``[size or less]`` int64 if all of them have one."""
        images: list[Tensor] = []
        labels: list[Optional[int]] = []
        for image, label in self.items():
            images.append(image)
            labels.append(label)
            if len(images) == size:
                yield _batch(images, labels)
                images, labels = [], []
        if images:
            yield _batch(images, labels)


Images = Union[str, os.PathLike, Tensor, np.ndarray, Iterable[Any], Source]
"""What ``open_images`` takes."""


def _batch(images: list[Tensor], labels: list[Optional[int]]) -> tuple[Tensor, Optional[Tensor]]:
    known = [label for label in labels if label is not None]
    return torch.stack(images), torch.tensor(known) if len(known) == len(labels) else None


def open_images(images: Images, name: str, metadata: Metadata, outputs: int) -> Source:
    """Check what was given as the argument ``name``, and make it a ``Source``.

    Args:
        images: One of

            - a folder: all images in it and below, resized, cropped and normalised as ``metadata`` says. Files that
              cannot be read are left out, and named in the log. Where every image lies in a folder of its class, these
              folders, by name if ``metadata`` has classes, else in the order of the alphabet, are labels.
            - a file of tensors: .npy, .npz or .pt, with ``images [N, C, H, W]`` and, in the latter two, optionally
              ``labels [N]``. Floating point as the model reads it, or uint8, which is scaled to [0, 1] and normalised.
            - a ``Source``, opened before.
            - such a tensor or array, or an iterable or data set of ``[N, C, H, W]`` or ``[C, H, W]``, or of pairs of
              images and labels, as a DataLoader gives.
        name: for messages.
        metadata: of the model.
        outputs: how many classes the model knows.

    Raises:
        FileNotFoundError: no such file or folder, or no image in the folder.
        ValueError: a file that cannot be read, or another shape than the model's, or labels that it does not know.
        TypeError: none of the above.
    """
    if isinstance(images, Source):
        return images
    reader = _Reader(name, metadata, outputs)
    if isinstance(images, (str, os.PathLike)):
        path = Path(images)
        if path.is_dir():
            return _folder(path, reader)
        return _arrays(*_load(path, name), reader)
    if isinstance(images, (Tensor, np.ndarray)):
        return _arrays(images, None, reader)
    if hasattr(images, "__getitem__") and hasattr(images, "__len__"):  # a list, or a data set of PyTorch
        elements: Any = images
        return Source(lambda: _items((elements[index] for index in range(len(elements))), reader), None)
    if isinstance(images, Iterable):
        total = getattr(getattr(images, "dataset", None), "__len__", lambda: None)()
        return Source(lambda: _items(images, reader), total, again=not isinstance(images, Iterator))
    raise TypeError(f"{name} is {type(images).__name__}, expected a path, a tensor or an iterable of tensors")


@dataclass(frozen=True)
class _Reader:
    """Checks and normalises single images."""

    name: str
    metadata: Metadata
    outputs: int

    def image(self, image: Tensor, where: str) -> Tensor:
        expected = self.metadata.input_size
        if tuple(image.shape) != expected:
            raise ValueError(f"{where} is an image of shape {list(image.shape)}, expected {list(expected)}")
        if image.dtype == torch.uint8:
            return self.normalised(image.float() / 255)
        if not image.is_floating_point():
            raise ValueError(f"{where} is an image of {image.dtype}, expected floating point or uint8")
        image = image.detach().float().cpu()
        if not image.isfinite().all():
            raise ValueError(f"{where} is an image with NaN or infinity")
        return image

    def normalised(self, image: Tensor) -> Tensor:
        mean, std = self.metadata.mean, self.metadata.std
        if mean is None or std is None:
            raise ValueError(
                f"mean is {mean} and std is {std}, expected {image.shape[0]} numbers each, "
                f"because {self.name} has images that are not normalised"
            )
        return (image - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)

    def label(self, label: Any, where: str) -> int:
        number = int(label)
        if not 0 <= number < self.outputs:
            raise ValueError(f"{where} has label {number}, expected 0 to {self.outputs - 1}")
        return number


def _folder(folder: Path, reader: _Reader) -> Source:
    files = find_pictures(folder, reader.name)
    labels = _labels(folder, files, reader)
    reader.metadata.preprocessing()  # raises at once if nobody said how to normalise
    remarks = Remarks(logger)

    def items() -> Iterator[Item]:
        count = 0
        for file in files:
            # Also where the file's graph resizes by itself: what is calibrated is the network behind that.
            for sample in pictures(reader.metadata, [file], remarks):
                count += 1
                yield sample.single[0], labels.get(file.relative_to(folder).parts[0])
        if not count:
            raise ValueError(f"{reader.name} is {str(folder)!r}, where none of {len(files)} pictures can be read")

    return Source(items, len(files), skipped=remarks.skipped)


def _labels(folder: Path, files: list[Path], reader: _Reader) -> dict[str, int]:
    """Return the label of each folder of a class by its name; none if the folders are not the model's classes."""
    names = sorted({file.relative_to(folder).parts[0] for file in files})
    if any((folder / name).is_file() for name in names):
        return {}
    classes = reader.metadata.classes
    if classes is not None and set(names) <= set(classes):
        return {name: classes.index(name) for name in names}
    if len(names) == reader.outputs and classes is None:
        return {name: index for index, name in enumerate(names)}
    return {}


def _load(path: Path, name: str) -> tuple[Any, Any]:
    """Images and labels of a file; the images of a large one stay on the disk until they are read."""
    if not path.is_file():
        raise FileNotFoundError(f"{name} is {str(path)!r}, expected a folder of images or a file of tensors")
    try:
        if path.suffix == ".npy":
            return np.load(path, mmap_mode="r", allow_pickle=False), None
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                found: Any = dict(arrays)
        elif path.suffix in (".pt", ".pth"):
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        else:
            raise ValueError("expected a folder, or a file that ends in .npy, .npz, .pt or .pth")
    except Exception as error:  # zip, pickle and header errors have no common base but this
        raise ValueError(f"{name} is {str(path)!r}: {first_line(error)}") from error
    if isinstance(found, Tensor):
        return found, None
    if not isinstance(found, dict) or "images" not in found:
        has = f"the keys {sorted(map(str, found))}" if isinstance(found, dict) else f"a {type(found).__name__}"
        raise ValueError(f"{name} is {str(path)!r}, which holds {has}, expected images, and labels if known")
    return found["images"], found.get("labels")


def _arrays(images: Any, labels: Any, reader: _Reader) -> Source:
    if len(images.shape) != 4 or not len(images):
        raise ValueError(f"{reader.name} has shape {list(images.shape)}, expected [N, C, H, W] with N of at least 1")
    if labels is not None and len(labels) != len(images):
        raise ValueError(f"{reader.name} has {len(labels)} labels for {len(images)} images")

    def items() -> Iterator[Item]:
        for index in range(len(images)):
            where = f"{reader.name}[{index}]"
            image = images[index]
            tensor = image if isinstance(image, Tensor) else torch.from_numpy(np.array(image))
            yield reader.image(tensor, where), None if labels is None else reader.label(labels[index], where)

    return Source(items, len(images))


def _items(iterable: Iterable[Any], reader: _Reader) -> Iterator[Item]:
    count = 0
    for item in iterable:
        images, labels = item if isinstance(item, (tuple, list)) and len(item) == 2 else (item, None)
        tensor = torch.as_tensor(images)
        if tensor.dim() == 3:
            tensor, labels = tensor[None], None if labels is None else [labels]
        if labels is not None and len(labels) != len(tensor):
            raise ValueError(f"{reader.name} has {len(labels)} labels for a batch of {len(tensor)} images")
        for index, image in enumerate(tensor):
            where = f"{reader.name}[{count}]"
            yield reader.image(image, where), None if labels is None else reader.label(labels[index], where)
            count += 1
    if not count:
        raise ValueError(f"{reader.name} is empty, expected images")
