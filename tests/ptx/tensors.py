"""Global memory: the tensors that a launch is given, and nothing around them.

Addresses are those of this process, so that what the code was told of their alignment holds here as well. Every access
must lie in one tensor and be aligned to its size (Generic Addressing; Alignment of operands).
"""

import ctypes
from collections.abc import Sequence

import numpy as np
import torch

from tests.ptx.parse import PtxError
from tests.ptx.registers import BITS

_WIDEST = 16  # bytes of an access


class Tensors:
    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        spans = sorted({(one.data_ptr(), one.data_ptr() + _bytes(one)) for one in tensors if one.numel()})
        self._kept = list(tensors)
        self._starts = np.array([start for start, _ in spans], np.uint64)
        self._ends = np.array([end for _, end in spans], np.uint64)
        self._memory = [_memory(start, end) for start, end in spans]

    def load(self, addresses: np.ndarray, width: int, count: int) -> np.ndarray:
        """``addresses [n]`` -> ``[n, count]``, numbers of ``width`` bytes."""
        made = np.empty((addresses.size, count), BITS[width])
        for which, at in self._pieces(addresses, width * count):
            base, memory = self._memory[at]
            made[which] = _rows(memory, width, count)[(addresses[which] - base) // np.uint64(width * count)]
        return made

    def store(self, addresses: np.ndarray, values: np.ndarray) -> None:
        """``values [n, count]`` to ``addresses [n]``."""
        count, width = values.shape[1], values.dtype.itemsize
        for which, at in self._pieces(addresses, width * count):
            base, memory = self._memory[at]
            rows, places = _rows(memory, width, count), (addresses[which] - base) // np.uint64(width * count)
            rows[places] = values[which]
            if not np.array_equal(rows[places], values[which]):
                raise PtxError("two threads store different values to one address")

    def _pieces(self, addresses: np.ndarray, size: int):
        """Which of the addresses lie in which tensor."""
        if addresses.size == 0:
            return
        if (addresses % np.uint64(size)).any():
            raise Misplaced("is not a multiple of its size", int((addresses % np.uint64(size)).argmax()))
        found = np.searchsorted(self._starts, addresses, "right").astype(np.int64) - 1
        inside = (found >= 0) & (addresses + np.uint64(size) <= self._ends[found])
        if not inside.all():
            raise Misplaced("is in no tensor", int((~inside).argmax()))
        for at in np.unique(found):
            yield found == at, at


class Misplaced(Exception):
    """What is wrong, and with which one of the addresses."""


def _bytes(tensor: torch.Tensor) -> int:
    """From the first to behind the last of its elements."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    return (last + 1) * tensor.element_size()


def _memory(start: int, end: int) -> tuple[np.uint64, np.ndarray]:
    """The bytes, with those around them up to the next multiples of the widest access, which nobody will get."""
    base = start - start % _WIDEST
    size = -(-(end - base) // _WIDEST) * _WIDEST
    return np.uint64(base), np.frombuffer((ctypes.c_uint8 * size).from_address(base), np.uint8)


def _rows(memory: np.ndarray, width: int, count: int) -> np.ndarray:
    return memory.view(BITS[width]).reshape(-1, count)
