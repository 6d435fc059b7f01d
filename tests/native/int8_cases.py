"""Convolutions of int8 with their operands, the kernels' results, and what these must be to the last bit."""

import ctypes
from typing import NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_fast.kernels.native import abi, library
from resnet_fast.kernels.native import inference as native
from resnet_fast.kernels.native.abi import ALGORITHMS, NOWHERE, Op, Ref
from tests.cpu.ops.cases import Conv
from tests.native.harness import Place, placed


class Int8Data(NamedTuple):
    """A convolution's operands, images in NCHW."""

    conv: Conv
    x: Tensor
    weight: Tensor
    scale: Tensor
    shift: Tensor
    residual: Tensor


FACTOR = 0.37


def make(conv: Conv, seed: int = 0) -> Int8Data:
    """Integers of the whole range, and scales with which some results saturate at either end."""
    generator = torch.Generator().manual_seed(seed)

    def integers(*shape: int) -> Tensor:
        return torch.randint(-128, 128, shape, generator=generator, dtype=torch.int8)

    scale = (torch.rand(conv.k, generator=generator) + 0.2) * 100 / (5500 * conv.taps**0.5)
    scale[::5] *= -1  # a batch norm may turn a channel round
    return Int8Data(
        conv,
        integers(conv.n, conv.c, conv.h, conv.w),
        integers(conv.k, conv.c // conv.groups, *conv.kernel),
        scale,
        torch.randn(conv.k, generator=generator) * 20,
        integers(*conv.output),
    )


def shape_of(conv: Conv, relu: bool = False, pool: bool = False) -> abi.Shape:
    weight = (conv.k, conv.c // conv.groups, *conv.kernel)
    return native.conv_shape((conv.n, conv.c, conv.h, conv.w), weight, *conv.geometry, relu, pool, abi.INT8)


def algorithms_for(conv: Conv, pool: bool = False) -> list[str]:
    return [name for name in ALGORITHMS if library.supports(shape_of(conv, pool=pool), name)]


def convolve(
    data: Int8Data,
    algorithm: str,
    residual: bool,
    relu: bool,
    to_float: bool,
    place: Place,
    pool: bool = False,
    threads: int = 1,
) -> Tensor:
    """The kernels' result, in memory order."""
    shape = shape_of(data.conv, relu, pool)
    high, wide = native.output_size(shape)
    packed = library.pack(shape, algorithm, data.weight, threads=threads)
    dtype = torch.float32 if to_float else torch.int8
    y = placed(torch.full((data.conv.n, data.conv.k, high, wide), 77, dtype=dtype), place)
    x, scale, shift = (placed(t, place) for t in (data.x, data.scale, data.shift))
    other = placed(data.residual, place) if residual else None
    op = Op(abi.CONV, ALGORITHMS.index(algorithm), shape, abi.FLOAT32 if to_float else abi.INT8)
    op.packed, op.shift, op.scale = placed(packed, place).data_ptr(), shift.data_ptr(), scale.data_ptr()
    op.factor = FACTOR
    run(op, x, y, other, threads)
    return y


def run(op: Op, x: Tensor, y: Tensor, residual: Optional[Tensor] = None, threads: int = 1) -> None:
    op.x, op.y, op.residual = Ref(0, 0, 0), Ref(1, 0, 0), NOWHERE if residual is None else Ref(2, 0, 0)
    buffers = (ctypes.c_void_p * 3)(x.data_ptr(), y.data_ptr(), None if residual is None else residual.data_ptr())
    library.run((Op * 1)(op), 1, buffers, threads)


def exact(data: Int8Data, residual: bool, relu: bool, to_float: bool, pool: bool = False) -> Tensor:
    """The same from integers: exact sums, and float32 rounded after each multiplication and addition."""
    sums = F.conv2d(data.x.double(), data.weight.double(), None, *data.conv.geometry)
    assert sums.abs().max() < 2**31
    y = sums.float() * data.scale.view(1, -1, 1, 1)
    y = y + data.shift.view(1, -1, 1, 1)
    if residual:
        y = y + data.residual.float() * torch.tensor(FACTOR)
    if relu:
        y = F.relu(y)
    if not to_float:
        y = torch.round(y).clamp(-128, 127)
    if pool:
        y = F.max_pool2d(y, 3, 2, 1)
    return y.to(torch.float32 if to_float else torch.int8).permute(0, 2, 3, 1)
