"""The shapes in which the convolution kernels want to read weights and images.

Weights are packed once and kept until they change (``kernels/packing.py``); an image with few channels is padded at
every call, which takes the place of its conversion to NHWC.
"""

import functools

import torch
import torch.nn.functional as F

from resnet_fast.kernels.packing import PackCache

STEM_CHANNELS = 8  # so few that ``pixels`` takes them
_GROUP_WIDTH = 32  # channels: a tensor core instruction is 16 wide, a memory sector 16 halves
ROW_UNIT = 16  # elements to which a row of a padded image is rounded up, so that every row starts aligned

_packs = PackCache()


@functools.cache
def merged(groups: int, channels: int) -> int:
    """How many neighbouring groups of ``channels`` input channels to merge into one.

    ResNeXt's groups are 4 to 32 channels wide. Narrow ones would leave most of a tensor core's tile empty, and write
    a few bytes per pixel. A merged group computes zeros between its parts, in a tile that was there anyway. One
    consequence: an Inf or a NaN in one group also reaches the outputs of the groups it is merged with, as 0 * Inf.
    """
    return max(n for n in range(1, groups + 1) if groups % n == 0 and (n == 1 or n * channels <= _GROUP_WIDTH))


def weight(source: torch.Tensor, dtype: torch.dtype, groups: int, merge: int, block: int) -> torch.Tensor:
    """``[K, C/groups, R, S]`` -> ``[K, R, S, merge * C/groups]``, channels padded with zeros to a multiple of block."""

    def make() -> torch.Tensor:
        w = source.detach().to(dtype).permute(0, 2, 3, 1)
        if merge > 1:
            k, r, s, c = w.shape
            parts = w.reshape(groups // merge, merge, k // groups, r, s, c)
            diagonal = w.new_zeros(groups // merge, merge, k // groups, r, s, merge, c)
            for i in range(merge):
                diagonal[:, i, :, :, :, i] = parts[:, i]
            w = diagonal.reshape(k, r, s, merge * c)
        return _pad_last(w, block)

    return _packs.get((source,), ("weight", dtype, groups, block), make)


def row_weight(source: torch.Tensor, dtype: torch.dtype, pixel: int, block: int) -> torch.Tensor:
    """``[K, C, R, S]`` -> ``[K, R, 1, S * pixel]`` for the images of ``pixels``, padded to a multiple of block."""

    def make() -> torch.Tensor:
        w = _pad_last(source.detach().to(dtype).permute(0, 2, 3, 1), pixel)
        return _pad_last(w.flatten(2).unsqueeze(2), block)

    return _packs.get((source,), ("row_weight", dtype, pixel, block), make)


def matrix(source: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A fully connected layer's ``[K, C]`` as it is, row after row."""
    return _packs.get((source,), ("matrix", dtype), lambda: source.detach().to(dtype).contiguous())


def vector(source: torch.Tensor) -> torch.Tensor:
    """A bias ``[K]`` in float32."""
    return _packs.get((source,), "vector", lambda: source.detach().float().contiguous())


def as_conv(source: torch.Tensor) -> torch.Tensor:
    """``[K, C]`` -> ``[K, C, 1, 1]``, the same memory each time, so that what is packed from it is found again."""
    return source.detach()[:, :, None, None]


def constants(source: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """K ones and K zeros, float32: scale and shift of a weight ``[K, ...]`` that has none."""

    def make() -> tuple[torch.Tensor, torch.Tensor]:
        k = source.shape[0]
        return torch.ones(k, device=source.device), torch.zeros(k, device=source.device)

    return _packs.get((source,), "constants", make)


def pixel_width(channels: int) -> int:
    """Elements per pixel in ``pixels``, for up to 8 channels: what makes every pixel start aligned."""
    return 4 if channels <= 4 else 8


def pixels(x: torch.Tensor, padding: tuple[int, int]) -> torch.Tensor:
    """``[N, C, H, W]`` -> ``[N, H + 2 * padding, W + 2 * padding rounded up, pixel_width(C)]``, zeros around.

    With 3 channels and taps one by one, 13 of 16 products would be with padding, and every load 2 bytes. Padded to 4,
    the taps of one kernel row are one contiguous run, and the border needs no checks.
    """
    n, c, h, w = x.shape
    width = pixel_width(c)
    row = -(-(w + 2 * padding[1]) * width // ROW_UNIT) * ROW_UNIT // width
    padded = x.new_zeros(n, h + 2 * padding[0], row, width)
    padded[:, padding[0] : padding[0] + h, padding[1] : padding[1] + w, :c] = x.permute(0, 2, 3, 1)
    return padded


def _pad_last(w: torch.Tensor, multiple: int) -> torch.Tensor:
    return F.pad(w, (0, -w.shape[-1] % multiple)).contiguous()
