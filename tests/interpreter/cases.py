"""The convolutions that the tests run, the tiles that they run them in, and the dtypes."""

from typing import NamedTuple, Optional

import pytest
import torch

from resnet_fast.kernels.reference import inference as reference
from resnet_fast.kernels.triton import tiles

DTYPES = [torch.float32, torch.float16, torch.bfloat16]

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))

# The default puts a whole small problem into one tile. The others cut it into several along every dimension, with
# tails; one of them finishes its tiles in two halves.
SMALL = tiles.Tile(rows=32, columns=16, reduction=16, warps=4, stages=1, split=False)
TILES = {
    "default": None,
    "small": SMALL,
    "split": tiles.Tile(rows=16, columns=32, reduction=32, warps=4, stages=1, split=True),
}


class Conv(NamedTuple):
    n: int
    c: int
    h: int
    w: int
    k: int
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    residual: bool = False
    relu: bool = True

    def geometry(self) -> tuple:
        return self.stride, self.padding, self.dilation, self.groups, self.relu

    def inputs(self, dtype: torch.dtype) -> list[Optional[torch.Tensor]]:
        """x, weight, scale, shift, residual, in NHWC, such that the results are of the order of 1."""
        taps = self.c // self.groups * self.kernel[0] * self.kernel[1]
        x = torch.randn(self.n, self.c, self.h, self.w)
        weight = torch.randn(self.k, self.c // self.groups, *self.kernel) / taps**0.5
        scale = torch.rand(self.k) + 0.5
        scale[0] = 0.0  # a zero-initialised last batch norm
        shift = torch.randn(self.k)
        residual = None
        if self.residual:
            shape = reference.conv_bn_act(x, weight, scale, shift, None, *self.geometry()).shape
            residual = nhwc(torch.randn(shape).to(dtype))
        return [nhwc(x.to(dtype)), weight.to(dtype), scale, shift, residual]


CONVS = {
    "round": Conv(2, 32, 8, 8, 32, residual=True),
    "round without relu": Conv(1, 64, 4, 8, 32, residual=True, relu=False),
    "batch 1": Conv(1, 32, 7, 7, 32),
    "neither residual nor relu": Conv(1, 32, 5, 6, 48, relu=False),
    "stride 2": Conv(2, 32, 9, 10, 48, stride=(2, 2)),
    "odd sizes, 1 channel": Conv(2, 1, 9, 11, 10),
    "3 channels": Conv(1, 3, 11, 9, 33, residual=True),
    "3 channels, stride 2": Conv(2, 3, 10, 13, 32, stride=(2, 2)),
    "5 channels": Conv(1, 5, 9, 7, 16),
    "17 channels": Conv(2, 17, 7, 9, 33, residual=True),
    "20 channels": Conv(1, 20, 8, 7, 10),
    "40 channels": Conv(1, 40, 6, 5, 40, residual=True),
    "smaller than the kernel": Conv(2, 16, 2, 1, 16, kernel=(5, 5), padding=(2, 2)),
    "one pixel": Conv(3, 32, 1, 1, 20),
    "5x3, asymmetric": Conv(2, 17, 9, 8, 33, (5, 3), (2, 1), (2, 0), (1, 2), residual=True),
    "3x5, padding of one side": Conv(1, 16, 7, 9, 16, (3, 5), (1, 2), (0, 2)),
    "1x3, few channels": Conv(1, 3, 5, 9, 16, (1, 3), (1, 1), (0, 1)),
    "3x1, few channels": Conv(1, 3, 9, 5, 16, (3, 1), (1, 1), (1, 0)),
    "2x2 without padding": Conv(2, 24, 6, 7, 16, (2, 2), (2, 2), (0, 0)),
    "7x7/2": Conv(1, 20, 11, 9, 24, (7, 7), (2, 2), (3, 3)),
    "7x7/2, 3 channels": Conv(1, 3, 21, 17, 40, (7, 7), (2, 2), (3, 3)),
    "7x7/2, 4 channels": Conv(1, 4, 17, 21, 20, (7, 7), (2, 2), (3, 3), residual=True),
    "dilation 2": Conv(1, 32, 9, 9, 32, padding=(2, 2), dilation=(2, 2), residual=True),
    "dilation 2, 3 channels": Conv(1, 3, 9, 11, 16, padding=(2, 2), dilation=(2, 2)),
    "dilation 2 of rows, 3 channels": Conv(1, 3, 11, 9, 16, padding=(2, 1), dilation=(2, 1)),
    "dilation past the border": Conv(1, 16, 5, 5, 16, padding=(4, 4), dilation=(4, 4)),
    "1x1": Conv(2, 64, 7, 5, 80, (1, 1), padding=(0, 0), residual=True),
    "1x1, odd channels": Conv(1, 33, 5, 7, 17, (1, 1), padding=(0, 0)),
    "1x1, 3 channels": Conv(1, 3, 5, 7, 17, (1, 1), padding=(0, 0)),
    "1x1/2": Conv(2, 32, 9, 8, 48, (1, 1), (2, 2), (0, 0), residual=True),
    "1x1 with padding": Conv(1, 32, 4, 5, 16, (1, 1), padding=(1, 1)),
    "2 groups": Conv(1, 48, 6, 7, 64, groups=2, residual=True),
    "32 groups of 4, ResNeXt": Conv(1, 128, 6, 5, 128, stride=(2, 2), groups=32),
    "32 groups of 8, ResNeXt": Conv(1, 256, 4, 3, 256, groups=32, residual=True),
    "3 groups, more outputs than inputs": Conv(2, 15, 7, 6, 30, groups=3),
    "1x1 in groups": Conv(1, 32, 5, 6, 64, (1, 1), padding=(0, 0), groups=4),
    "depthwise": Conv(1, 40, 7, 6, 40, groups=40),
    "depthwise, prime": Conv(1, 37, 4, 3, 74, stride=(2, 2), groups=37),
}


def nhwc(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous(memory_format=torch.channels_last)
