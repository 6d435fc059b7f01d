"""Images and labels: folders of images, CIFAR and the digits."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import default_loader

from resnet_fast.finetune.arguments import Settings
from resnet_fast.finetune.cifar import read_cifar
from resnet_fast.finetune.digits import CLASSES, digits
from resnet_fast.finetune.transforms import Kind

_VALIDATION = ("val", "valid", "validation", "test")


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
        return default_loader(self.samples[index][0])


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

    A folder is that of CIFAR-10 or CIFAR-100, or it has a folder of images for each class, either below ``train`` and
    ``val`` (also ``valid``, ``validation``, ``test``), or directly; then ``settings.val_fraction`` of each class is
    set apart.

    Raises:
        FileNotFoundError: no such folder, no classes in it, or a class without images.
        ValueError: ``val`` has other classes than ``train``, or a file is not what its name says.
        MissingPackageError: the digits need scikit-learn.
    """
    if data == "digits":
        return _digits(settings.seed)
    folder = Path(data)
    if not folder.is_dir():
        raise FileNotFoundError(f"DATA is {data!r}, expected digits or a folder")
    cifar = read_cifar(folder)
    if cifar is not None:
        train = Arrays("train", cifar.train_images, cifar.train_labels)
        return Data("cifar", cifar.classes, train, Arrays("test", cifar.test_images, cifar.test_labels))
    return _folders(folder, settings)


def _digits(seed: int) -> Data:
    data = digits(seed)
    train = Arrays("train", _pixels(data.train_images), data.train_labels)
    return Data("digits", CLASSES, train, Arrays("test", _pixels(data.test_images), data.test_labels))


def _pixels(images: Tensor) -> Tensor:
    """uint8, from [-1, 1]."""
    return ((images + 1) * 127.5).round().byte()


def _folders(folder: Path, settings: Settings) -> Data:
    if not (folder / "train").is_dir():
        whole = ImageFolder(folder)
        train, validation = _split(whole, settings)
        return Data("folder", tuple(whole.classes), Files(train), Files(validation))
    other = next((folder / name for name in _VALIDATION if (folder / name).is_dir()), None)
    if other is None:
        raise FileNotFoundError(f"{str(folder)!r} has train/, but no {'/, '.join(_VALIDATION)}/ beside it")
    learnt, told = ImageFolder(folder / "train"), ImageFolder(other)
    check_classes(told.classes, learnt.classes, str(other), "train/ has")
    return Data("folder", tuple(learnt.classes), Files(learnt.samples), Files(told.samples))


def _split(whole: ImageFolder, settings: Settings) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    generator = torch.Generator().manual_seed(settings.seed)
    train, validation = [], []
    for label, name in enumerate(whole.classes):
        samples = [sample for sample in whole.samples if sample[1] == label]
        if len(samples) < 2:
            raise ValueError(
                f"class {name!r} has one image, expected at least 2: one to learn from, one to tell how well"
            )
        apart = min(max(round(len(samples) * settings.val_fraction), 1), len(samples) - 1)
        order = torch.randperm(len(samples), generator=generator).tolist()
        validation += [samples[index] for index in sorted(order[:apart])]
        train += [samples[index] for index in sorted(order[apart:])]
    return train, validation


def check_classes(found: Sequence[str], expected: Sequence[str], where: str, whose: str) -> None:
    """Raises ValueError, with the first difference, unless both are the same names in the same order."""
    if list(found) == list(expected):
        return
    if len(found) != len(expected):
        extra = sorted(set(found) ^ set(expected))
        detail = f", among them not {', '.join(map(repr, extra[:3]))}" if extra else ""
        raise ValueError(f"{where} has {len(found)} classes, but {whose} {len(expected)}{detail}; expected the same")
    first = next(index for index, (one, other) in enumerate(zip(found, expected)) if one != other)
    raise ValueError(
        f"{where} has {found[first]!r} as class {first}, but {whose} {expected[first]!r}; expected the same classes"
    )
