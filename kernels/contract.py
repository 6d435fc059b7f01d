"""What an implementation is asked when it must say whether it covers a call."""

from typing import NamedTuple

import torch


class Case(NamedTuple):
    """One call of an op, without its data. ``in_channels`` and ``out_channels`` count all groups together."""

    op: str  # of ops.py, as "conv_bn_act"; out_channels of "conv_chain" are those of its second convolution
    device: str  # torch.device.type
    dtype: torch.dtype  # of x, and so of the result; of 8-bit ops, the 8-bit one
    in_channels: int
    out_channels: int
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
