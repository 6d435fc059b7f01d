"""Convolutions whose kernels read through tensor descriptors: which they are, and what they are launched with.

A tile asks for them by the name of its ``kernel``: "descriptors", or "specialised", the same kernels with their warps
specialised (gemm_descriptor.py). They are for inference at stride 1. Where they cannot serve, ``refusal`` says why, and
the pointer kernel takes the same tile; so a tile must also fit that one.
"""

import functools
import math
from typing import Any, Optional

import torch

from resnet_fast.kernels.triton import tiles
from resnet_fast.kernels.triton.conv_descriptor import conv_descriptor_kernel
from resnet_fast.kernels.triton.gemm_descriptor import gemm_descriptor_kernel
from triton.tools.tensor_descriptor import TensorDescriptor

# NVIDIA's compute capabilities. The copy engine came with 9.0. What Triton specialises well are programs whose sums lie
# in the tensor memory of 10.0 and 11.0, which 12.0 has not; on 9.0 its compiler fails, or ignores the wish.
_CAPABILITIES = {"descriptors": range(90, 1000), "specialised": range(100, 120)}

_ALIGNMENT = 16  # bytes, of a descriptor's address and strides
_COORDINATES = 2**31  # they are int32

_Launch = tuple[Any, tuple[int, ...], tuple[Any, ...], dict[str, Any]]  # kernel, grid, arguments, constants


def refusal(
    tile: tiles.Tile,
    target: str,
    precision: str,
    x: torch.Tensor,
    packed: torch.Tensor,
    stride: tuple[int, int],
    groups: int,
    training: bool,
) -> Optional[str]:
    """None if a kernel with descriptors takes the convolution of ``x [N, C, H, W]`` in NHWC, else the reason why not.

    precision: "half", "tf32" or "ieee". packed: the weight, as pack.weight makes it. training: with a prologue or
    statistics.
    """
    if tile.kernel not in _CAPABILITIES:
        return f"the tile is for {tile.kernel}"
    if target != "interpreter" and not (
        target.startswith("sm_") and int(target.removeprefix("sm_")) in _CAPABILITIES[tile.kernel]
    ):
        return f"no {tile.kernel} on {target}"
    if precision == "ieee" and target != "interpreter":
        return "float32 without TF32, for which there are no matrix instructions that read what the copy engine wrote"
    if training:
        return "a prologue or statistics"
    if stride != (1, 1):
        return f"stride {stride}"
    if groups != 1:
        return f"{groups} groups"
    n, c, h, w = x.shape
    if not 0 < n * h * w < _COORDINATES:
        return f"{n * h * w} pixels"
    if c * x.element_size() % _ALIGNMENT:
        return f"{c} channels of {x.element_size()} bytes, {_ALIGNMENT} bytes do not divide a pixel"
    if (x.data_ptr() | packed.data_ptr()) % _ALIGNMENT:
        return f"an address that is no multiple of {_ALIGNMENT}"
    return None


def gemm(
    tile: tiles.Tile,
    target: str,
    x: torch.Tensor,
    packed: torch.Tensor,
    operands: tuple[torch.Tensor, ...],
    constants: dict[str, Any],
) -> _Launch:
    """The launch of a 1x1 convolution without padding. operands: scale, shift, residual, y."""
    n, c, h, w = x.shape
    k, rows = packed.shape[0], n * h * w
    work = -(-rows // tile.rows) * -(-k // tile.columns)
    tf32 = constants["PRECISION"] == "tf32"
    return (
        gemm_descriptor_kernel,
        (programs(work, tile, target, x),),
        (_descriptor(x, (rows, c), (tile.rows, tile.reduction), tf32), _weight(packed, tile, tf32), *operands, rows),
        {"C": c, "K": k, **constants, "SPECIALISE": tile.kernel == "specialised", **tile.constants()},
    )


def conv(
    tile: tiles.Tile,
    target: str,
    x: torch.Tensor,
    packed: torch.Tensor,
    operands: tuple[torch.Tensor, ...],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    constants: dict[str, Any],
) -> _Launch:
    """The launch of any other. operands: scale, shift, residual, y."""
    n, c, h, w = x.shape
    k, r, s, _ = packed.shape
    p, q = operands[-1].shape[2:]
    sides = box(n, p, q, tile.rows)
    boxes = math.prod(-(-size // side) for size, side in zip((n, p, q), sides))
    tf32 = constants["PRECISION"] == "tf32"
    return (
        conv_descriptor_kernel,
        (programs(boxes * -(-k // tile.columns), tile, target, x),),
        (
            _descriptor(x, (n, h, w, c), (*sides, tile.reduction), tf32),
            _weight(packed, tile, tf32),
            *operands, n, p, q,
        ),
        {
            "C": c,
            "K": k,
            "R": r,
            "S": s,
            "PAD_H": padding[0],
            "PAD_W": padding[1],
            "DILATION_H": dilation[0],
            "DILATION_W": dilation[1],
            **constants,
            "SPECIALISE": tile.kernel == "specialised",
            "TN": sides[0],
            "TH": sides[1],
            "TW": sides[2],
            **tile.constants(),
        },
    )  # fmt: skip


@functools.lru_cache(maxsize=4096)
def box(n: int, p: int, q: int, size: int) -> tuple[int, int, int]:
    """Images, rows and pixels of a box of ``size`` output pixels, which is a power of two, for ``[n, p, q]`` of them.

    The sides are powers of two as well. Of all such boxes, the one that covers the images with the fewest copies; of
    several, over the fewest images, then the squarest, as its neighbours then read most of the same pixels.
    56x56 at 128 pixels: 2 images of 8x8, nothing wasted; of a single image 8x16, an eighth wasted.
    """
    powers = [1 << i for i in range(size.bit_length())]
    boxes = [(size // (th * tw), th, tw) for th in powers for tw in powers if th * tw <= size]
    return min(boxes, key=lambda b: (-(-n // b[0]) * -(-p // b[1]) * -(-q // b[2]), b[0], max(b[1:])))


def programs(work: int, tile: tiles.Tile, target: str, x: torch.Tensor) -> int:
    """How many programs go through ``work`` tiles: as many as run side by side on the GPU.

    A specialised program takes all registers of a multiprocessor. Others are limited by shared memory, for the stages
    of the pipeline and for what is rearranged before it is stored. Tests compare that with what the compiler takes.
    """
    data = tiles.load(target)
    side_by_side = 1
    if tile.kernel != "specialised":
        stages = tile.stages * (tile.rows + tile.columns) * tile.reduction
        stored = tile.rows * tile.columns // (2 if tile.split else 1)
        side_by_side = max(1, data["shared_memory"] // ((stages + stored) * x.element_size()))
    multiprocessors = _multiprocessors(x.device) if x.is_cuda else data["multiprocessors"]
    return min(work, multiprocessors * side_by_side)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _weight(packed: torch.Tensor, tile: tiles.Tile, tf32: bool) -> TensorDescriptor:
    k = packed.shape[0]
    return _descriptor(packed, (k, packed.numel() // k), (tile.columns, tile.reduction), tf32)


def _descriptor(x: torch.Tensor, shape: tuple[int, ...], block: tuple[int, ...], tf32: bool) -> TensorDescriptor:
    """Of a contiguous ``x``, taken as of ``shape``. tf32: the copy rounds to it; matrix instructions would truncate."""
    strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    return TensorDescriptor(x, list(shape), strides, list(block), round_f32_to_tf32=tf32)
