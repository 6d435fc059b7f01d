"""Convolutions whose kernels read through tensor descriptors: which they are, the descriptors, the programs.

A tile asks for them by the name of its ``kernel``: "descriptors", or "specialised", the same kernels with their warps
specialised (gemm_descriptor.py). They are for inference at stride 1. Where they cannot serve, ``refusal`` says why, and
the pointer kernel takes the same tile; so a tile must also fit that one.
"""

import functools
import math
from typing import Optional

import torch

from resnet_fast.kernels.triton import tiles
from resnet_fast.utils import compat
from triton.tools.tensor_descriptor import TensorDescriptor

# NVIDIA's compute capabilities. The copy engine came with 9.0. What Triton specialises well are programs whose sums lie
# in the tensor memory of 10.0 and 11.0, which 12.0 has not; on 9.0 its compiler fails, or ignores the wish.
_CAPABILITIES = {"descriptors": range(90, 1000), "specialised": range(100, 120)}

_ALIGNMENT = 16  # bytes, of a descriptor's address and strides
_BYTES = 2**31  # of a tensor: from there on Triton's launcher, which counts them in an int, has it for a small one


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
    if not compat.has_descriptors():
        return "this Triton has no tensor descriptors that serve"
    if precision == "tf32" and not compat.descriptors_round():
        return "this Triton's descriptors do not round to TF32"
    if tile.kernel == "specialised" and target != "interpreter" and not compat.descriptors_round():
        return "this Triton's compiler specialises no warps of ours"
    if precision == "ieee" and target != "interpreter":
        return "float32 without TF32, for which there are no matrix instructions that read what the copy engine wrote"
    if training:
        return "a prologue or statistics"
    if stride != (1, 1):
        return f"stride {stride}"
    if groups != 1:
        return f"{groups} groups"
    n, c, h, w = x.shape
    if n * h * w == 0:
        return "no pixels"
    size = max(x.numel(), packed.numel()) * x.element_size()
    if size >= _BYTES:
        return f"a tensor of {size} bytes"
    if c * x.element_size() % _ALIGNMENT:
        return f"{c} channels of {x.element_size()} bytes, {_ALIGNMENT} bytes do not divide a pixel"
    if (x.data_ptr() | packed.data_ptr()) % _ALIGNMENT:
        return f"an address that is no multiple of {_ALIGNMENT}"
    return None


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


def weight(packed: torch.Tensor, tile: tiles.Tile, tf32: bool) -> TensorDescriptor:
    k = packed.shape[0]
    return describe(packed, (k, packed.numel() // k), (tile.columns, tile.reduction), tf32)


def describe(x: torch.Tensor, shape: tuple[int, ...], block: tuple[int, ...], tf32: bool) -> TensorDescriptor:
    """Of a contiguous ``x``, taken as of ``shape``. tf32: the copy rounds to it; matrix instructions would truncate."""
    strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    rounding = {"round_f32_to_tf32": True} if tf32 else {}  # which not every Triton knows
    return TensorDescriptor(x, list(shape), strides, list(block), **rounding)
