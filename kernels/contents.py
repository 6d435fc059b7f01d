"""What tensors hold, looked at in enough places for everyday writes to show.

PyTorch counts most writes in a tensor's ``_version``, but not those through ``.data``, through NumPy or by other
libraries. Looking at all weights in every call would take as long as using them. So of a large tensor only a cache line
here and there is compared, so many that each stretch as long as one output channel's weights has one, and no two
channels the same part: a write to a whole channel shows, whichever it is, and so does one to the same input channel
of all. Small tensors, norms and biases among them, are compared whole. A write to a few elements of a large tensor may
not show.

On a GPU this would need the CPU to wait for it in every call, so there it is only done where the environment variable
``RESNET_FAST_COMPARE_GPU`` is 1.
"""

import os
from collections.abc import Sequence

import torch
from torch import Tensor

from resnet_fast.kernels import streams
from resnet_fast.kernels.native import abi, library

_LINE = 64
_WHOLE = 4096  # bytes
_MOST = 65536  # lines of one tensor
_FACTOR = 0x1E3779B97F4A7C15  # odd
_FEW = 8  # tensors: for so few, more threads would not be quicker


class Contents:
    """What tensors hold now, for as long as these have the memory that they have now."""

    __slots__ = ("_digest", "_others", "_pieces")

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        native = library.unavailable() is None
        pieces = [_pieces(tensor) for tensor in tensors if native and tensor.device.type == "cpu" and tensor.numel()]
        self._pieces = (abi.Pieces * len(pieces))(*pieces)
        others = [i for i, tensor in enumerate(tensors) if tensor.numel() and _compared(tensor, native)]
        self._others = {i: _digest(tensors[i]) for i in others}
        self._digest = self._read()

    def unchanged(self, tensors: Sequence[Tensor]) -> bool:
        """``tensors`` are those that it was made of, or others with the same memory."""
        return self._read() == self._digest and all(
            _digest(tensors[i]) == held for i, held in self._others.items() if _compared(tensors[i], native=False)
        )

    def _read(self) -> int:
        count = len(self._pieces)
        threads = torch.get_num_threads() if count > _FEW else 1
        return library.digest(self._pieces, threads) if count else 0


def on_gpu() -> bool:
    """Whether tensors on a GPU are compared as well."""
    return os.environ.get("RESNET_FAST_COMPARE_GPU", "") == "1"


def _compared(tensor: Tensor, native: bool) -> bool:
    """Whether PyTorch is to compare the tensor. Nobody may wait for a stream that is being captured."""
    if tensor.device.type == "cpu":
        return not native
    return tensor.is_cuda and on_gpu() and not streams.capturing(tensor.device.index)


def _pieces(tensor: Tensor) -> abi.Pieces:
    """The places that are compared. Any ``stride + _LINE`` bytes on end have all of one."""
    extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    size = extent * tensor.element_size()
    if size <= _WHOLE:
        return abi.Pieces(tensor.data_ptr(), size, 1, size)
    stride = max(size // tensor.shape[0] - _LINE, _LINE, size // _MOST)
    return abi.Pieces(tensor.data_ptr(), stride, (size - _LINE) // stride + 1, _LINE)


def _digest(tensor: Tensor) -> int:
    """The same by PyTorch: each byte with its place is one number, and the sum is of these, well mixed."""
    pieces = _pieces(tensor)
    shape, strides = (pieces.count, pieces.bytes), (pieces.stride, 1)
    offset = tensor.storage_offset() * tensor.element_size()
    seen = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(
        tensor.untyped_storage(), offset, shape, strides
    )
    numbers = torch.arange(0, 256 * seen.numel(), 256, device=tensor.device).view(shape).add_(seen)
    for _ in range(2):
        numbers.mul_(_FACTOR).bitwise_xor_(numbers >> 29)
    return int(numbers.sum())
