"""What all implementations share: the tensors and numbers that an op is given, and the case of a call."""

from typing import NamedTuple, Optional, TypeVar

import torch
from torch import Tensor

Pair = tuple[int, int]
"""Along height, and along width."""


class Case(NamedTuple):
    """One call of an op, without its data. ``in_channels`` and ``out_channels`` count all groups together."""

    op: str  # as "conv_bn_act"; out_channels of "conv_chain" are those of its second convolution
    device: str  # torch.device.type
    dtype: torch.dtype  # of x, and so of the result; of 8-bit ops, the 8-bit one
    in_channels: int
    out_channels: int
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    gpu: Optional[int] = None  # torch.device.index: a machine may have different GPUs


class Geometry(NamedTuple):
    """What a convolution is given beside its tensors."""

    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1


class Affine(NamedTuple):
    """``x * scale + shift``, both ``[C]``."""

    scale: Tensor
    shift: Tensor


class BatchNorm(NamedTuple):
    """What a batch norm has beside its statistics: ``scale`` (gamma) and ``shift`` (beta), both ``[K]``, and eps."""

    scale: Tensor
    shift: Tensor
    eps: float


class Gate(NamedTuple):
    """The ReLU that a convolution's input came through, for the gradient to go back through.

    ``affine`` and ``mean`` are those of the batch norm before it, whose input the convolution's input then is (raw);
    both are None where the convolution's input is the ReLU's result.
    """

    affine: Optional[Affine] = None
    mean: Optional[Tensor] = None


class Gradient(NamedTuple):
    """A gradient ``g [N, C, H, W]``, and what batch norm's backward pass needs of it: see ``reference/training.py``."""

    g: Tensor
    total: Optional[Tensor] = None
    product: Optional[Tensor] = None


def wide(x: Tensor) -> torch.dtype:
    """The dtype of vectors and statistics beside ``x``."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def output_size(size: Pair, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair) -> Pair:
    """Height and width of a convolution's result, from those of its image and of its kernel."""
    p, q = ((size[i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i in range(2))
    return p, q


_Image = TypeVar("_Image", Tensor, Optional[Tensor])


def nhwc(x: _Image) -> _Image:
    """The image ``[N, C, H, W]`` in ``torch.channels_last``, itself where it is; None stays None."""
    return None if x is None else x.contiguous(memory_format=torch.channels_last)
