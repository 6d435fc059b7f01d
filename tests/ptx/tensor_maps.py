"""Tensor maps, by which the copy engine of sm_90 finds a box in a tensor and its place in shared memory.

The host encodes them: Triton calls the driver's ``cuTensorMapEncodeTiled``, of whose arguments there is one here for
each of its own. Boxes and coordinates are those of "Tensors: Tiled Mode", where what lies outside a tensor is zero;
swizzles those of "Swizzling modes". Interleaved and im2col maps, and NaN outside, are refused.
"""

from typing import Any, NamedTuple

import numpy as np

from tests.ptx.parse import PtxError
from tests.ptx.tensors import Misplaced, Tensors

_PIECE = 16  # bytes
_TF32 = 11
_BYTES = {0: 1, 6: 2, 7: 4, 9: 2, _TF32: 4}  # CUtensorMapDataType: UINT8, FLOAT16, FLOAT32, BFLOAT16, TFLOAT32


class TensorMap(NamedTuple):
    """Innermost dimension first. strides: bytes, from the second dimension on. swizzle: over 16 << swizzle bytes."""

    address: int
    kind: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    swizzle: int

    @property
    def item(self) -> int:
        return _BYTES[self.kind]

    @property
    def bytes(self) -> int:
        """Of a box, also of one that is partly outside."""
        return int(np.prod(self.box)) * self.item

    def offsets(self, starts: np.ndarray) -> np.ndarray:
        """Of boxes that go to ``starts [n]`` in shared memory: [n, pieces of 16 bytes], row after row."""
        linear = starts[:, None] + _PIECE * np.arange(self.bytes // _PIECE)
        return linear ^ ((linear >> 7) & ((1 << self.swizzle) - 1)) << 4

    def load(self, tensors: Tensors, corners: np.ndarray) -> np.ndarray:
        """Of ``corners [n, dimensions]``: [n, pieces, 4] of 32 bits."""
        unit = _PIECE // self.item
        if self.sizes[0] % unit or (corners[:, 0] % unit).any():
            unit = 1  # pieces that are partly outside are read number by number
        rank = len(self.box)
        address = np.full((len(corners),) + (1,) * rank, self.address, np.int64)
        inside = np.ones_like(address, np.bool_)
        for i, (size, stride, side) in enumerate(zip(self.sizes, (self.item, *self.strides), self.box)):
            step = unit if i == 0 else 1
            at = corners[:, i].astype(np.int64)[:, None] + np.arange(0, side, step)
            at = at.reshape(len(corners), *((-1 if j == i else 1) for j in reversed(range(rank))))
            inside = inside & (at >= 0) & (at < size)
            address = address + at * stride
        values = np.zeros((inside.size, unit * self.item // min(unit * self.item, 4)), f"u{min(unit * self.item, 4)}")
        try:
            found = tensors.load(address[inside].view(np.uint64), values.dtype.itemsize, values.shape[1])
        except Misplaced as error:
            raise PtxError(f"the box of a tensor map {error.args[0]}") from None
        values[inside.reshape(-1)] = found
        words = values.reshape(-1).view(np.uint32).reshape(len(corners), -1, 4)
        if self.kind == _TF32 and (words & np.uint32(0x1FFF)).any():
            raise PtxError("unknown: how the copy engine rounds to TF32")
        return words


def encode(
    address: int,
    swizzle: int,
    item: int,
    kind: int,
    block: Any,
    shape: Any,
    strides: Any,
    padding: int,
) -> TensorMap:
    """In place of ``fill_tma_descriptor_tiled`` of Triton's driver, which has the outermost dimension first.

    The conditions are those that the driver's documentation has for ``cuTensorMapEncodeTiled``.
    """
    if kind not in _BYTES or _BYTES[kind] != item or padding:
        raise PtxError(f"unknown: a tensor map of type {kind}, with numbers of {item} bytes, padding {padding}")
    made = TensorMap(
        address, kind, tuple(shape[::-1]), tuple(item * one for one in strides[-2::-1]), tuple(block[::-1]), swizzle
    )
    row, least = made.box[0] * item, made.sizes[0] * item
    if not 1 <= len(made.box) <= 5 or address % 16 or not 0 <= swizzle <= 3:
        raise PtxError(f"not a tensor map: {made}")
    if any(not 0 < size <= 2**32 for size in made.sizes) or any(not 0 < side <= 256 for side in made.box):
        raise PtxError(f"not a tensor map: {made}")
    for size, stride in zip((*made.sizes[1:], 1), made.strides):
        if stride % 16 or not least <= stride < 2**40:
            raise PtxError(f"not a tensor map: {made}")
        least = stride * size
    if row % 16 or (swizzle and row > 16 << swizzle):
        raise PtxError(f"not a tensor map: {made}")
    if swizzle and row < 16 << swizzle:
        raise PtxError(f"unknown: rows of {row} bytes, swizzled over {16 << swizzle}")
    return made
