"""Photographs that installed packages bring along: nothing is downloaded."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import v2

from resnet_fast.finetune.transforms import Preprocessing


@dataclass(frozen=True)
class Photographs:
    """``pictures [N, 3, size, size]``, uint8, and the same as ``images``, float32, normalised as for ImageNet."""

    names: tuple[str, ...]
    images: Tensor
    pictures: Tensor


def photographs(size: int) -> Photographs:
    """Eight photographs from scikit-image and scikit-learn, the short side scaled to 8/7 of ``size``, then cropped."""
    from skimage import data
    from sklearn.datasets import load_sample_image

    raw = {
        "astronaut": data.astronaut(),
        "coffee": data.coffee(),
        "cat": data.chelsea(),
        "rocket": data.rocket(),
        "motorcycle": data.stereo_motorcycle()[0],
        "galaxies": data.hubble_deep_field(),
        "temple": load_sample_image("china.jpg"),
        "flower": load_sample_image("flower.jpg"),
    }
    resize = v2.Resize(round(size * 8 / 7), v2.InterpolationMode.BICUBIC, antialias=True)
    crop = v2.Compose([v2.ToImage(), resize, v2.CenterCrop(size), v2.ToPureTensor()])
    pictures = torch.stack([crop(np.array(picture)) for picture in raw.values()])
    return Photographs(tuple(raw), v2.Compose(Preprocessing(size).finish())(pictures), pictures)
