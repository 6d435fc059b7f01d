"""Images and labels: folders of images, CIFAR and the digits."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from resnet_fast.finetune.arguments import Settings
from resnet_fast.finetune.cifar import read_cifar
from resnet_fast.finetune.digits import CLASSES, digits
from resnet_fast.finetune.folders import check_names, read_folders
from resnet_fast.finetune.transforms import Kind
from resnet_fast.utils.pictures import read_picture


class Images(Protocol):
    """Images that are loaded one by one."""

    def __len__(self) -> int: ...

    def label(self, index: int) -> int: ...

    def name(self, index: int) -> str:
        """For the log."""

    def load(self, index: int) -> Any:
        """A PIL image in RGB or ``[3, H, W]`` uint8; raises what its decoder raises."""


@dataclass(frozen=True)
class Files:
    """Image files, each with its label."""

    samples: Sequence[tuple[str, int]]

    def __len__(self) -> int:
        return len(self.samples)

    def label(self, index: int) -> int:
        return self.samples[index][1]

    def name(self, index: int) -> str:
        return self.samples[index][0]

    def load(self, index: int) -> Any:
        return read_picture(self.samples[index][0])


@dataclass(frozen=True)
class Arrays:
    """Images in memory, ``[N, 3, H, W]`` uint8, and labels ``[N]``."""

    title: str
    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.images)

    def label(self, index: int) -> int:
        return int(self.labels[index])

    def name(self, index: int) -> str:
        return f"{self.title}[{index}]"

    def load(self, index: int) -> Tensor:
        return self.images[index]


@dataclass(frozen=True)
class Data:
    """What is learnt from, and what tells how well."""

    kind: Kind
    classes: tuple[str, ...]
    train: Images
    validation: Images


def open_data(data: str, settings: Settings) -> Data:
    """The digits, or what is in a folder.

    A folder is that of CIFAR-10 or CIFAR-100, or of images, see ``read_folders``.

    Raises:
        FileNotFoundError: no such folder, no classes in it, or a class without images.
        ValueError: the folder is laid out for something else, ``val`` has other classes than ``train``, a class has a
            name that is no line of text, or a file is not what its name says.
        MissingPackageError: the digits need scikit-learn.
    """
    if data == "digits":
        return _digits(settings.seed)
    folder = Path(data)
    if not folder.is_dir():
        raise FileNotFoundError(f"DATA is {data!r}, expected digits or a folder")
    cifar = read_cifar(folder)
    if cifar is not None:
        check_names(cifar.classes)
        train = Arrays("train", cifar.train_images, cifar.train_labels)
        return Data("cifar", cifar.classes, train, Arrays("test", cifar.test_images, cifar.test_labels))
    classes, learnt, told = read_folders(folder, settings)
    return Data("folder", classes, Files(learnt), Files(told))


def _digits(seed: int) -> Data:
    data = digits(seed)
    train = Arrays("train", _pixels(data.train_images), data.train_labels)
    return Data("digits", CLASSES, train, Arrays("test", _pixels(data.test_images), data.test_labels))


def _pixels(images: Tensor) -> Tensor:
    """uint8, from [-1, 1]."""
    return ((images + 1) * 127.5).round().byte()
