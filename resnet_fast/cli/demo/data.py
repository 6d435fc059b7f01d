"""Real data that installed packages bring along: nothing is downloaded."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_fast.finetune.digits import CLASSES, Digits, digits

__all__ = ["CLASSES", "Digits", "Photographs", "digits", "photographs"]

# Of ImageNet, as torchvision normalises.
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Photographs:
    """``images [N, 3, size, size]``, normalised as for ImageNet, and ``pictures``, uint8 ``[size, size, 3]`` each."""

    names: tuple[str, ...]
    images: Tensor
    pictures: tuple[np.ndarray, ...]


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
    cropped = torch.stack([_cropped(picture, size) for picture in raw.values()])
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (_MEAN, _STD))
    pictures = tuple((picture.permute(1, 2, 0) * 255).round().byte().numpy() for picture in cropped)
    return Photographs(tuple(raw), (cropped - mean) / std, pictures)


def _cropped(picture: np.ndarray, size: int) -> Tensor:
    """``[3, size, size]`` in [0, 1]."""
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1).unsqueeze(0).float() / 255
    short = round(size * 8 / 7)
    height, width = (round(extent * short / min(pixels.shape[2:])) for extent in pixels.shape[2:])
    scaled = F.interpolate(pixels, size=(height, width), mode="bicubic", align_corners=False, antialias=True)
    top, left = (height - size) // 2, (width - size) // 2
    return scaled[0, :, top : top + size, left : left + size].clamp(0, 1)
