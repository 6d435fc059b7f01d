"""What a file is verified with: noise, and pictures of the user."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Union

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS

from resnet_fast.export.metadata import Metadata

_IO = {"fp32": torch.float32, "fp16": torch.float16}


@dataclass(frozen=True)
class Sample:
    """One batch, as the file takes it and as the network reads it.

    ``fed`` is uint8 ``[N, height, width, C]``, or float ``[N, C, height, width]``; ``precise`` and ``single`` are
    ``[N, C, height, width]`` in float64 and float32.
    """

    fed: np.ndarray
    precise: Tensor
    single: Tensor


def noise(metadata: Metadata, batches: Sequence[int]) -> list[Sample]:
    """A sample of each batch size, from a fixed seed; no two images are the same.

    Pictures of any size are given wide, tall and small, so that they are both enlarged and reduced.
    """
    generator = torch.Generator().manual_seed(0)
    channels, height, width = metadata.input_size
    samples = []
    for index, batch in enumerate(batches):
        if metadata.preprocess is None:
            samples.append(_plain(metadata, torch.randn(batch, channels, height, width, generator=generator)))
            continue
        if (resize := metadata.preprocess.resize) is not None:
            height, width = [(resize + 31, 2 * resize), (resize + 64, resize + 1), (resize // 2 + 1, resize)][index % 3]
        shape = (batch, height, width, channels)
        samples.append(_pictured(metadata, torch.randint(256, shape, dtype=torch.uint8, generator=generator)))
    return samples


def pictures(metadata: Metadata, files: Sequence[Path]) -> Iterator[Sample]:
    """One sample for each of ``files``, resized and cropped as the metadata says where the graph does not do it."""
    mode = {1: "L", 3: "RGB"}.get(metadata.input_size[0])
    if mode is None:
        raise ValueError(f"input_size is {metadata.input_size}, expected 1 or 3 channels, as pictures have")
    preprocess = metadata.preprocess or metadata.preprocessing()
    for file in files:
        try:
            with Image.open(file) as opened:
                pixels = np.array(opened.convert(mode))
        except OSError as error:
            raise ValueError(f"images has {str(file)!r}, expected a picture: {error}") from error
        image = torch.from_numpy(pixels).view(1, *pixels.shape[:2], -1)
        if metadata.preprocess is None:
            yield _plain(metadata, preprocess(image))
        elif preprocess.resize is None:  # the client resizes, and gives bytes
            whole = metadata.preprocessing()
            plain = type(whole)(whole.crop, (0.0,) * image.shape[3], (1 / 255,) * image.shape[3], whole.resize)
            yield _pictured(metadata, plain(image).round().byte().permute(0, 2, 3, 1))
        else:
            yield _pictured(metadata, image)


def find_pictures(folder: Union[str, os.PathLike]) -> list[Path]:
    """Files in ``folder`` and below with the name of a picture, in order.

    Raises:
        FileNotFoundError: there is no such folder, or no picture in it.
    """
    found = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in IMG_EXTENSIONS)
    if not found:
        raise FileNotFoundError(f"images is {str(folder)!r}, expected a folder with pictures in it or below")
    return found


def _plain(metadata: Metadata, images: Tensor) -> Sample:
    given = images.to(_IO[metadata.io_dtype])
    return Sample(given.numpy(), given.double(), given.float())


def _pictured(metadata: Metadata, images: Tensor) -> Sample:
    assert metadata.preprocess is not None
    return Sample(images.numpy(), metadata.preprocess(images, torch.float64), metadata.preprocess(images))
