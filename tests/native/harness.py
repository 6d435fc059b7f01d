"""Runs one operation of the compiled kernels, its operands placed where a wrong access shows."""

import ctypes
import functools
import mmap
from collections.abc import Callable
from typing import Any, Optional

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from resnet_fast.kernels.native import abi, library
from resnet_fast.kernels.native import inference as native
from resnet_fast.kernels.native.abi import ALGORITHMS, NOWHERE, Op, Ref, Shape
from tests.cpu.ops.cases import WINOGRAD_TILES, Conv, Data, assert_close, exact_conv, tolerance, unfused

_BORDER = 1 << 12  # bytes
_POISON = 0xFF  # in every byte: NaN as float32 and as float64

Place = Callable[[int], np.ndarray]
"""Gives so many bytes, in which nothing has been written yet."""


class Poisoned:
    """Operands between borders of NaN: a read beyond one shows in the result, a write is found by ``check``."""

    def __init__(self, misaligned: bool = False) -> None:
        self.offset = 4 if misaligned else 0
        self._buffers: list[tuple[np.ndarray, int, int]] = []

    def __call__(self, size: int) -> np.ndarray:
        buffer = np.full(size + 2 * _BORDER + 64, _POISON, np.uint8)
        first = _BORDER + -(buffer.ctypes.data + _BORDER) % 64 + self.offset
        self._buffers.append((buffer, first, size))
        return buffer[first : first + size]

    def check(self) -> None:
        for buffer, first, size in self._buffers:
            assert (buffer[:first] == _POISON).all(), "something was written before an operand"
            assert (buffer[first + size :] == _POISON).all(), "something was written behind an operand"


class Guarded:
    """Operands that touch a page without access, at their end or at their start: a wrong access ends the process."""

    _libc = ctypes.CDLL(None, use_errno=True)

    def __init__(self, at_end: bool) -> None:
        self.at_end = at_end
        self._maps: list[mmap.mmap] = []

    def __call__(self, size: int) -> np.ndarray:
        page = mmap.PAGESIZE
        inside = max(-(-size // page), 1) * page
        pages = mmap.mmap(-1, inside + 2 * page)
        self._maps.append(pages)
        start = ctypes.addressof(ctypes.c_char.from_buffer(pages))
        for guard in (start, start + page + inside):
            if self._libc.mprotect(ctypes.c_void_p(guard), ctypes.c_size_t(page), 0):
                raise OSError(ctypes.get_errno(), "mprotect")
        first = page + (inside - size if self.at_end else 0)
        return np.frombuffer(pages, np.uint8, size, first)


def placed(tensor: Tensor, place: Place) -> Tensor:
    """A copy whose elements lie in memory as the kernels read them: NHWC if it has 4 dimensions."""
    dense = (tensor.permute(0, 2, 3, 1) if tensor.dim() == 4 else tensor).contiguous()
    if not tensor.numel():
        return dense
    memory = torch.from_numpy(place(dense.numel() * dense.element_size())).view(dense.dtype)
    return memory.view(dense.shape).copy_(dense)


def run(
    kind: int, shape: Shape, x: Tensor, output: tuple[int, ...], place: Place, threads: int = 1, **op: Any
) -> Tensor:
    """One operation on an image in memory order; the result, in memory order, in memory that was poisoned."""
    residual: Optional[Tensor] = op.pop("residual", None)
    algorithm, packed, shift = op.get("algorithm", 0), op.get("packed"), op.get("shift")
    y = torch.from_numpy(place(4 * int(np.prod(output)))).fill_(_POISON).view(torch.float32).view(output)
    pointers = [None if tensor is None else tensor.data_ptr() for tensor in (packed, shift)]
    where = NOWHERE if residual is None else Ref(2, 0, 0)
    program = (Op * 1)(Op(kind, algorithm, shape, 0, *pointers, Ref(0, 0, 0), where, Ref(1, 0, 0)))
    buffers = (ctypes.c_void_p * 3)(x.data_ptr(), y.data_ptr(), None if residual is None else residual.data_ptr())
    library.run(program, 1, buffers, threads)
    return y


def shape_of(conv: Conv, relu: bool, pool: bool = False) -> Shape:
    weight = (conv.k, conv.c // conv.groups, *conv.kernel)
    return native.conv_shape((conv.n, conv.c, conv.h, conv.w), weight, *conv.geometry, relu, pool)


def algorithms_for(conv: Conv, pool: bool = False) -> list[str]:
    return [name for name in ALGORITHMS if library.supports(shape_of(conv, True, pool), name)]


def pack(shape: Shape, algorithm: str, data: Data, place: Place) -> Tensor:
    """As ``library.pack``, with the weight read from and the pack written to memory of the test's choice."""
    loaded, number = library._loaded(), ALGORITHMS.index(algorithm)
    # Memory of its own for each, but the weight in the order of KCRS.
    weight, scale = placed(data.weight.flatten(), place).view(data.weight.shape), placed(data.scale.double(), place)
    view = library.weight_view(weight, shape.groups)
    view.scale = scale.data_ptr()
    packed = torch.from_numpy(place(loaded.rf_packed_bytes(shape, number)))
    loaded.rf_pack(shape, number, view, packed.data_ptr(), 1)
    return packed


def convolve(
    data: Data, algorithm: str, residual: bool, relu: bool, place: Place, pool: bool = False, threads: int = 1
) -> Tensor:
    """The convolution of ``data`` by one algorithm, as an NCHW view; checks that no input was written."""
    shape = shape_of(data.conv, relu, pool)
    packed = pack(shape, algorithm, data, place)
    n, k, p, q = data.conv.output
    output = (n, (p - 1) // 2 + 1, (q - 1) // 2 + 1, k) if pool else (n, p, q, k)
    inputs = [placed(t, place) for t in (data.x, data.shift, *([data.residual] if residual else []))]
    inputs.append(packed)
    before = [t.clone() for t in inputs]
    op = {"algorithm": ALGORITHMS.index(algorithm), "packed": packed, "shift": inputs[1]}
    added = inputs[2] if residual else None
    y = run(abi.CONV, shape, inputs[0], output, place, threads, residual=added, **op)
    for tensor, copy in zip(inputs, before):
        assert torch.equal(tensor.view(torch.uint8), copy.view(torch.uint8)), "an input was written"
    return y.permute(0, 3, 1, 2)


class Expected:
    """The right result of a convolution and how far from it one may be, for every algorithm."""

    def __init__(self, data: Data, residual: bool, relu: bool, pool: bool = False) -> None:
        self.args, self.pool = data.args(residual, relu), pool
        self.pytorch = unfused(data, residual, relu)
        self.before_pool = exact_conv(self.args)
        self.exact = F.max_pool2d(self.before_pool, 3, 2, 1) if pool else self.before_pool
        self._allowed: dict[int, Tensor] = {}  # by the side of Winograd's tiles; takes as long as the right result

    def check(self, actual: Tensor, algorithm: str) -> None:
        assert_close(actual, self.exact, self._tolerance(WINOGRAD_TILES.get(algorithm, 0)))

    def _tolerance(self, tile: int) -> Tensor:
        if tile not in self._allowed:
            allowed = tolerance(self.args, self.before_pool, self.pytorch, tile)
            # The largest of right values is right within the largest of their tolerances.
            self._allowed[tile] = F.max_pool2d(allowed, 3, 2, 1) if self.pool else allowed
        return self._allowed[tile]


RESNETS = [
    *("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"),
    *("resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d", "wide_resnet50_2", "wide_resnet101_2"),
]


@functools.cache
def resnet_convs() -> dict[str, Conv]:
    """Every distinct convolution of torchvision's ten ResNets; images of 15 or fewer pixels a side, odd ones too."""
    found: dict[str, Conv] = {}
    for name in RESNETS:
        with torch.device("meta"):
            model = getattr(torchvision.models, name)()
        for conv in (m for m in model.modules() if isinstance(m, nn.Conv2d)):
            (r, s), (stride, _) = conv.kernel_size, conv.stride
            title = f"{conv.in_channels}-{conv.out_channels} {r}x{s}/{stride} groups {conv.groups}"
            height, width = (30, 33) if conv.in_channels == 3 else (15, 13) if conv.in_channels < 256 else (7, 6)
            sizes: tuple = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups)
            found.setdefault(title, Conv(1, conv.in_channels, height, width, conv.out_channels, *sizes))
    return found


TRICKY = {
    "one pixel": Conv(1, 16, 1, 1, 16),
    "one pixel, 3 channels": Conv(2, 3, 1, 1, 5),
    "smaller than a tile": Conv(1, 20, 2, 3, 24),
    "one more than a tile": Conv(1, 17, 5, 5, 33),
    "two left of a tile, eight images": Conv(8, 17, 6, 14, 33),
    "three and one left of a tile, eight images": Conv(8, 16, 7, 5, 24),
    "three and two left of a tile, stride 2, eight images": Conv(8, 17, 13, 11, 33, stride=(2, 2)),
    "less than a tile, nine images": Conv(9, 16, 3, 2, 16),
    "less than a tile, stride 2, nine images": Conv(9, 16, 6, 3, 16, stride=(2, 2)),
    "17 to 1": Conv(3, 17, 6, 9, 1),
    "1 to 17": Conv(1, 1, 9, 4, 17),
    "no padding": Conv(2, 24, 8, 9, 40, padding=(0, 0)),
    "wide padding": Conv(1, 8, 3, 4, 12, padding=(3, 5)),
    "padding on one side": Conv(1, 32, 7, 6, 16, padding=(0, 1)),
    "1x1": Conv(2, 33, 5, 7, 65, (1, 1), padding=(0, 0)),
    "1x1/2": Conv(1, 64, 9, 8, 31, (1, 1), (2, 2), (0, 0)),
    "1x1/2, one column": Conv(1, 16, 9, 1, 32, (1, 1), (2, 2), (0, 0)),
    "5x3, asymmetric": Conv(2, 17, 9, 8, 33, (5, 3), (2, 1), (2, 0), (1, 2)),
    "dilation past the border": Conv(1, 16, 5, 5, 16, padding=(4, 4), dilation=(4, 4)),
    "only padding seen": Conv(1, 10, 13, 1, 5, (3, 2), (1, 2), (0, 3), (1, 2)),
    "stride beyond the kernel": Conv(2, 8, 11, 10, 8, (2, 2), (3, 4), (0, 1)),
    "depthwise": Conv(1, 48, 7, 6, 48, groups=48),
    "depthwise, one row": Conv(2, 16, 1, 9, 16, (1, 3), (1, 1), (0, 1), groups=16),
    "groups of 2": Conv(1, 32, 6, 5, 32, groups=16),
    "groups of 4, dilated, strided": Conv(2, 64, 9, 11, 64, (3, 3), (2, 1), (2, 2), (2, 2), 16),
    "groups of 8": Conv(1, 128, 5, 7, 128, (3, 3), (2, 2), groups=16),
    "groups of 16": Conv(1, 64, 5, 7, 64, groups=4),
    "groups of 3 to 5": Conv(2, 12, 6, 5, 20, groups=4),
    "RGB": Conv(2, 3, 20, 23, 64, (7, 7), (2, 2), (3, 3)),
    "RGB, tiny": Conv(1, 3, 4, 5, 40, (7, 7), (2, 2), (3, 3)),
    "RGB 5x6/2": Conv(1, 3, 17, 14, 24, (5, 6), (2, 2), (1, 2)),
    "RGB 8x8/2, no padding": Conv(2, 3, 21, 10, 33, (8, 8), (2, 2), (0, 0)),
    "RGB 3x3/2": Conv(1, 3, 11, 12, 32, (3, 3), (2, 2), (1, 1)),
}
"""Convolutions at the edges of the kernels: of the image, of a tile, of a vector of channels, of a group."""
