"""A folder of images for each class, as people have them; and what else a folder can be, which is said."""

import logging
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Optional

import torch

from resnet_fast.finetune.arguments import Settings
from resnet_fast.utils.pictures import find_files, is_litter, readable_suffixes

logger = logging.getLogger(__name__)

_TRAINING = ("train", "training")
_VALIDATION = ("val", "valid", "validation", "test", "testing")
_OTHER_TASKS = (
    ({"jpegimages"}, "detection or segmentation, in the format of Pascal VOC"),
    ({"images", "labels"}, "detection, in the format of YOLO"),
    ({"images", "masks"}, "segmentation"),
    ({"images", "annotations"}, "detection or segmentation"),
)
"""Names of folders, and what a data set is for that has them."""

_WORDS = {"set", "data", "dataset", "images", "imgs", "img", "pictures", "photos", "split", "dev", "eval", "holdout"}
"""What is beside train and val in names of parts, as ``training_set`` and ``val2017``."""

Sample = tuple[str, int]
"""A file, and the number of its class."""


class Folders(NamedTuple):
    """Images to learn from and to validate on."""

    classes: tuple[str, ...]
    train: list[Sample]
    validation: list[Sample]


def read_folders(folder: Path, settings: Settings) -> Folders:
    """The images of ``folder``, which has a folder for each class, or ``train`` and ``val`` with such folders.

    Also ``training``, and ``valid``, ``validation``, ``test`` or ``testing``, in any case of letters. Without them,
    ``settings.val_fraction`` of each class is set apart. Files that are no pictures are left out, and counted in the
    log; hidden ones and those in hidden folders are not even counted.

    Raises:
        FileNotFoundError: no folder of a class, or one without pictures, or ``train`` without ``val``.
        ValueError: the folder is laid out for something else, or has one class, or other ones in ``val``.
    """
    _refuse_other_tasks(folder)
    train, validation = _part(folder, _TRAINING), _part(folder, _VALIDATION)
    if train is None or not _inside(train):  # a class may well be called train
        if train is None and validation is not None and _inside(validation):
            raise FileNotFoundError(f"DATA is {str(folder)!r}, which has {validation.name}/, but no train/ beside it")
        if train is not None and validation is not None:
            raise ValueError(
                f"DATA is {str(folder)!r}, whose {train.name}/ and {validation.name}/ have pictures, but no folder for "
                f"each class; expected e.g. {train.name}/cat/1.jpg"
            )
        classes, samples = _classes(folder)
        return Folders(classes, *_split(classes, samples, settings))
    if validation is None:
        expected = "/, ".join(_VALIDATION)
        raise FileNotFoundError(f"DATA is {str(folder)!r}, which has {train.name}/, but no {expected}/ beside it")
    classes, samples = _classes(train)
    others, told = _classes(validation)
    check_classes(others, classes, str(validation), f"{train.name}/ has")
    return Folders(classes, samples, told)


def _refuse_other_tasks(folder: Path) -> None:
    for place in (folder, *(part for part in (_part(folder, _TRAINING),) if part is not None)):
        names = {path.name.lower(): path.name for path in place.iterdir() if not is_litter(path.name)}
        coco = [name for key, name in names.items() if key.endswith(".json") and ("coco" in key or "instances" in key)]
        if "annotations" in names and not find_files(place / names["annotations"])[0]:  # or it may be a class
            coco.append(f"{names['annotations']}/")
        found = [
            (" and ".join(f"{names[key]}/" for key in sorted(keys)), task)
            for keys, task in _OTHER_TASKS
            if keys <= names.keys()
        ]
        found += [(name, "detection, in the format of COCO") for name in coco]
        if found:
            has, task = found[0]
            raise ValueError(
                f"DATA is {str(folder)!r}, where {place.name}/ has {has}: a data set for {task}; expected a folder of "
                "images for each class, e.g. DATA/cat/1.jpg and DATA/dog/2.jpg"
            )


def _part(folder: Path, names: Sequence[str]) -> Optional[Path]:
    """The folder within ``folder`` that has one of ``names``, the first of them if there are several."""
    inside = {path.name.lower(): path for path in _inside(folder)}
    return next((inside[name] for name in names if name in inside), None)


def _inside(folder: Path) -> list[Path]:
    """The folders in ``folder``, by name."""
    return sorted(path for path in folder.iterdir() if path.is_dir() and not is_litter(path.name))


def _classes(folder: Path) -> tuple[tuple[str, ...], list[Sample]]:
    places = _inside(folder)
    if not places:
        loose = len(find_files(folder)[0])
        has = f"{loose} pictures, but no folder for each class" if loose else "no class folder"
        raise FileNotFoundError(f"DATA has {has} in {str(folder)!r}, expected e.g. cat/1.jpg and dog/2.jpg there")
    if len(places) == 1:
        within = _inside(places[0])
        hint = f"; is {str(places[0])!r} meant?" if len(within) > 1 else ""
        raise ValueError(f"DATA has one class in {str(folder)!r}, {places[0].name!r}, expected 2 at least{hint}")
    classes = tuple(place.name for place in places)
    check_names(classes)
    words = [set(re.findall("[a-z]+", name.lower())) for name in classes]
    if all(one <= {*_TRAINING, *_VALIDATION, *_WORDS} for one in words) and set.union(*words) & set(_TRAINING):
        raise ValueError(
            f"DATA has {', '.join(map(repr, classes))} in {str(folder)!r}, which seem to be parts and no classes; "
            "expected train/ and val/, with a folder of images for each class in them"
        )
    samples: list[Sample] = []
    others: Counter[str] = Counter()
    empty = []
    for label, place in enumerate(places):
        pictures, rest = find_files(place)
        samples += [(str(picture), label) for picture in pictures]
        others += rest
        if not pictures:
            empty.append(place.name)
    loose = sum(path.suffix.lower() in readable_suffixes() and not is_litter(path.name) for path in folder.iterdir())
    if others:
        kinds = ", ".join(f"{count} {suffix}" for suffix, count in others.most_common())
        logger.warning("left out of %s, as no pictures that can be read: %s", folder, kinds)
    if loose:
        logger.warning("left out of %s: %d pictures beside the folders of the classes", folder, loose)
    if empty:
        raise FileNotFoundError(
            f"DATA has no picture that can be read for {', '.join(map(repr, empty))} in {str(folder)!r}, expected "
            f"some, or no such folder; what can be read ends in {', '.join(sorted(readable_suffixes()))}"
        )
    return classes, samples


def _split(classes: Sequence[str], whole: list[Sample], settings: Settings) -> tuple[list[Sample], list[Sample]]:
    generator = torch.Generator().manual_seed(settings.seed)
    train, validation = [], []
    for label, name in enumerate(classes):
        samples = [sample for sample in whole if sample[1] == label]
        if len(samples) < 2:
            raise ValueError(
                f"class {name!r} has one image, expected at least 2: one to learn from, one to tell how well"
            )
        apart = min(max(round(len(samples) * settings.val_fraction), 1), len(samples) - 1)
        order = torch.randperm(len(samples), generator=generator).tolist()
        validation += [samples[index] for index in sorted(order[:apart])]
        train += [samples[index] for index in sorted(order[apart:])]
    return train, validation


def check_names(classes: Sequence[str]) -> None:
    """Raises ValueError for a name that no line of ``classes.txt`` can hold: before the work, which ends with it."""
    for name in classes:
        try:
            name.encode("utf-8")
        except UnicodeEncodeError:
            raise ValueError(f"DATA has the class {name!r}, expected a name in UTF-8; rename its folder") from None
        if len(name.splitlines()) != 1:
            raise ValueError(f"DATA has the class {name!r}, expected a name of one line; rename its folder")


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
