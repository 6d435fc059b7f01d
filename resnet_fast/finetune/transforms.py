"""Augmentation and normalisation for each kind of data, and mixup and cutmix: torchvision's transforms."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Optional

import torch
from torch import Tensor
from torchvision.transforms import v2

from resnet_fast.finetune.arguments import Settings

Kind = Literal["folder", "cifar", "digits"]
Triple = tuple[float, float, float]

_POLICIES = {"ra": v2.RandAugment, "ta_wide": v2.TrivialAugmentWide, "augmix": v2.AugMix}


@dataclass(frozen=True)
class Preprocessing:
    """What the model needs to be given: images of ``size``, in [0, 1], less ``mean``, over ``std``.

    Of others the shorter side is ``resize`` first, and the centre is cut out.
    """

    size: int
    mean: Triple = (0.485, 0.456, 0.406)  # of ImageNet, which published weights expect
    std: Triple = (0.229, 0.224, 0.225)
    resize: Optional[int] = None

    def finish(self) -> list[v2.Transform]:
        return [v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(self.mean), list(self.std)), v2.ToPureTensor()]


def preprocessing(kind: Kind, settings: Settings) -> Preprocessing:
    size = settings.image_size or (224 if kind == "folder" else 32)
    if kind == "digits":
        return Preprocessing(size, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), size)
    return Preprocessing(size, resize=round(size * 256 / 224) if kind == "folder" else size)


def for_training(kind: Kind, settings: Settings) -> v2.Transform:
    """Return what makes an augmented ``[3, size, size]`` float32 of a PIL image or ``[3, H, W]`` uint8."""
    last = preprocessing(kind, settings)
    size = (last.size, last.size)
    steps: dict[Kind, list[v2.Transform]] = {
        "folder": [v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip()],
        "cifar": [v2.Resize(size), v2.RandomCrop(size, padding=last.size // 8), v2.RandomHorizontalFlip()],
        "digits": [v2.Resize(size), v2.RandomAffine(degrees=10, translate=(0.1, 0.1), scale=(0.9, 1.1))],
    }
    policy = [_POLICIES[settings.auto_augment]()] if settings.auto_augment else []
    erasing = [v2.RandomErasing(settings.random_erase)] if settings.random_erase else []
    return v2.Compose([v2.ToImage(), *steps[kind], *policy, *last.finish(), *erasing])


def for_evaluation(kind: Kind, settings: Settings) -> v2.Transform:
    """Return what makes ``[3, size, size]`` float32 of a PIL image or uint8 tensor: all of it, or a folder's centre."""
    last = preprocessing(kind, settings)
    size = (last.size, last.size)
    whole: list[v2.Transform] = [v2.Resize(size)]
    centre = [v2.Resize(last.resize, antialias=True), v2.CenterCrop(size)]
    return v2.Compose([v2.ToImage(), *(centre if kind == "folder" else whole), *last.finish()])


def mixing(settings: Settings, classes: int) -> Optional[Callable[[Tensor, Tensor], Any]]:
    """Return what mixes images ``[N, 3, H, W]`` and labels ``[N]``, which become shares of classes ``[N, classes]``."""
    choices: list[v2.Transform] = []
    if settings.mixup_alpha:
        choices.append(v2.MixUp(alpha=settings.mixup_alpha, num_classes=classes))
    if settings.cutmix_alpha:
        choices.append(v2.CutMix(alpha=settings.cutmix_alpha, num_classes=classes))
    return v2.RandomChoice(choices) if choices else None
