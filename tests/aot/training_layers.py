"""Every launch of the forward pass of training ResNet-18, ResNet-50 and ResNeXt-50, planned on the meta device.

As in layers.py, whose layers these are. Training's shapes: 8 and 128 images of 224x224.
"""

from collections.abc import Iterator
from typing import Optional

import torch

from resnet_fast.kernels.contract import Affine, BatchNorm, Geometry
from resnet_fast.kernels.triton.expand import plan_expand_statistics
from resnet_fast.kernels.triton.forward import plan_conv_affine, plan_conv_statistics
from resnet_fast.kernels.triton.gram import plan_gram
from resnet_fast.kernels.triton.plan import Plan
from resnet_fast.kernels.triton.pool import plan_tail_pool
from resnet_fast.kernels.triton.tail import plan_tail
from resnet_fast.utils import compat
from tests.aot.layers import DTYPES, Item, Layer, image, items, model_layers

BATCHES = (8, 128)


def forward_launches(architecture: str, precision: str, batches: tuple[int, ...] = BATCHES) -> Iterator[Item]:
    if precision == "tf32" and architecture.startswith("gfx"):
        return
    with compat.float32_in_tf32(precision == "tf32"):
        for layer in model_layers():
            for batch in batches:
                for name, plan in _convolution(layer, batch, DTYPES[precision], architecture):
                    yield from items(f"{name} of {layer.name()} batch {batch}", architecture, precision, plan)
        for channels, size in [(64, 56), (512, 28), (2048, 7)]:
            y = image(BATCHES[-1], channels, size, size, DTYPES[precision])
            for residual, affine in [(None, None), (y, None), (y, _affine(channels))]:
                plan = plan_tail(y, _affine(channels), residual, affine, True, architecture)
                yield from items(f"tail {channels} {size}x{size}", architecture, precision, plan)
        y = image(BATCHES[-1], 64, 112, 112, DTYPES[precision])
        plan = plan_tail_pool(y, _affine(64), architecture)
        yield from items("tail_pool 64 112x112", architecture, precision, plan)


def _convolution(layer: Layer, batch: int, dtype: torch.dtype, architecture: str) -> Iterator[tuple[str, Plan]]:
    """The ways in which training runs a convolution.

    An expanding 1x1 gets its statistics from the Gram matrix of its input, or like all others from its result. The
    first convolution of a block reads the finished output of the block before, which has no prologue.
    """
    x = image(batch, layer.c, layer.h, layer.w, dtype)
    weight = torch.empty(layer.k, layer.c // layer.groups, *layer.kernel, dtype=dtype, device="meta")
    geometry = Geometry(layer.stride, layer.padding, (1, 1), layer.groups)
    downsample = not layer.relu
    prologues: list[Optional[Affine]] = []
    if not layer.residual or layer.kernel != (1, 1):
        prologues.append(None)
    if layer.residual or layer.kernel == (3, 3):
        prologues.append(_affine(layer.c))
    for prologue in prologues:
        what = "" if prologue is None else " with prologue"
        yield (
            "conv_statistics" + what,
            plan_conv_statistics(
                x, prologue, weight, geometry, BatchNorm(*_affine(layer.k), 1e-5), target=architecture
            ),
        )
        if layer.kernel == (1, 1) and (layer.residual or downsample):
            yield "gram" + what, plan_gram(x, prologue, layer.stride, architecture)
            matrix, vector = (torch.empty(*shape, device="meta") for shape in ((layer.k, layer.c), (layer.c,)))
            covariance, norm = torch.empty(layer.c, layer.c, device="meta"), BatchNorm(*_affine(layer.k), 1e-5)
            plan = plan_expand_statistics(matrix, matrix, vector, covariance, norm, batch)
            yield "expand_statistics" + what, plan
            residual = image(batch, layer.k, layer.h, layer.w, dtype) if layer.residual else None
            yield (
                "conv_affine" + what,
                plan_conv_affine(x, prologue, weight, _affine(layer.k), residual, geometry, layer.relu, architecture),
            )


def _affine(channels: int) -> Affine:
    return Affine(torch.empty(channels, device="meta"), torch.empty(channels, device="meta"))
