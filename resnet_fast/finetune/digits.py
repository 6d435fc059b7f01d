"""scikit-learn's handwritten digits, which are installed with it: nothing is downloaded."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_fast.utils.optional import require

CLASSES = tuple(str(digit) for digit in range(10))

_SIDE = 32
_TEST_SHARE = 0.25


@dataclass(frozen=True)
class Digits:
    """Images ``[N, 3, 32, 32]`` in [-1, 1], float32; labels ``[N]``, int64."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def digits(seed: int) -> Digits:
    """scikit-learn's 1797 handwritten digits, 8x8, enlarged; a quarter, the same of each class, for the test.

    Raises:
        MissingPackageError: scikit-learn is not installed.
    """
    raw = require("sklearn.datasets", "the digits").load_digits()
    split = require("sklearn.model_selection", "the digits").train_test_split
    parts = split(raw.images, raw.target, test_size=_TEST_SHARE, random_state=seed, stratify=raw.target)
    train, test = (_enlarged(images) for images in parts[:2])
    labels = [torch.from_numpy(part).long() for part in parts[2:]]
    return Digits(train, labels[0], test, labels[1])


def _enlarged(images: np.ndarray) -> Tensor:
    grey = torch.from_numpy(images).float().unsqueeze(1) / 8 - 1  # pixels are 0 to 16
    large = F.interpolate(grey, size=(_SIDE, _SIDE), mode="bilinear", align_corners=False)
    return large.repeat(1, 3, 1, 1)
