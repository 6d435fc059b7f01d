"""From what an op is given to what a kernel takes: layouts, outputs, workspaces, and the constants of a window.

Kernels' files call these through the module, so that tests can see every tensor that a kernel gets (guard.py).
"""

from typing import Optional

import torch
from torch import Tensor

from resnet_fast.kernels.contract import Affine, Pair, nhwc
from resnet_fast.kernels.triton import device

__all__ = ["allocate", "allocate_bytes", "allocate_floats", "flip", "index64", "nhwc", "vector", "vectors", "window"]

_INT32_ELEMENTS = 2**31  # from here on, offsets are computed in 64 bits


def vector(v: Optional[Tensor]) -> Optional[Tensor]:
    """A vector of channels, contiguous; None stays None."""
    return None if v is None else v.contiguous()


def vectors(affine: Optional[Affine]) -> tuple[Optional[Tensor], Optional[Tensor]]:
    """Scale and shift; two times None for None."""
    return (None, None) if affine is None else (vector(affine[0]), vector(affine[1]))


def allocate(x: Tensor, shape: tuple[int, ...], dtype: Optional[torch.dtype] = None) -> Tensor:
    """An output in NHWC, like ``x`` or of another dtype."""
    return torch.empty(shape, dtype=dtype or x.dtype, device=x.device, memory_format=torch.channels_last)


def allocate_floats(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Statistics or a workspace of a launch over ``x``, float32."""
    return torch.empty(shape, dtype=torch.float32, device=x.device)


def allocate_bytes(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A workspace of a launch over ``x``, uint8."""
    return torch.empty(shape, dtype=torch.uint8, device=x.device)


def index64(x: Tensor, y: Tensor) -> bool:
    """Whether offsets into ``x`` or ``y`` take 64 bits."""
    return max(x.numel(), y.numel()) >= _INT32_ELEMENTS


def flip(prologue: Optional[Affine], dtype: torch.dtype, target: str) -> bool:
    """Whether a product of the activated image is made the other way round, see prologue.py."""
    return prologue is not None and target == "sm_90" and device.precision_of(dtype, target) != "ieee"


def window(stride: Pair, padding: Pair, dilation: Pair) -> dict[str, int]:
    """The constants of a kernel that say where a convolution's window lies."""
    return {
        "STRIDE_H": stride[0],
        "STRIDE_W": stride[1],
        "PAD_H": padding[0],
        "PAD_W": padding[1],
        "DILATION_H": dilation[0],
        "DILATION_W": dilation[1],
    }
