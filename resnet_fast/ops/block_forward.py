"""The forward pass of a residual block in training: see ``block.py``."""

from typing import NamedTuple, Optional

import torch
from torch import Tensor

from resnet_fast.kernels.contract import Affine
from resnet_fast.ops.block import (
    Block,
    Image,
    Layer,
    Norm,
    Pick,
    Primitives,
    expands,
    matrix,
    norm_of,
    norm_tensors,
    output_shape,
)
from resnet_fast.ops.block_norm import from_gram, normalise
from resnet_fast.ops.cancellation import cancelled


class Result(NamedTuple):
    out: Tensor
    statistics: list[Tensor]  # [2, K] for each layer with batch statistics: mean and unbiased variance
    saved: list[Tensor]  # what backward needs beside inputs and result, in the order of ``saved_shapes``


def forward(block: Block, x: Tensor, residual: Optional[Tensor], pick: Pick) -> Result:
    """``x`` and ``residual`` in channels_last."""
    run = Primitives(pick)
    statistics: list[Tensor] = []
    saved: list[Tensor] = []
    image = Image(x)
    for layer in block.main[:-1]:
        image = _inner(block, layer, image, run, statistics, saved)

    last = block.main[-1]
    shortcut: Optional[Image] = None
    projection_statistics: list[Tensor] = []
    projection_saved: list[Tensor] = []
    if block.projection:
        source = Image(x if residual is None else residual)
        shortcut = _outer(block, block.layers[-1], source, run, projection_statistics, projection_saved)
    elif block.identity:
        shortcut = Image(x)
    elif residual is not None:
        shortcut = Image(residual)

    if last.batch_statistics and not expands(block, last, image.x.shape):
        y, norm = _raw(block, last, image, run, statistics, saved)
        if block.pool:
            out = run.pass_("tail_pool", y)(y, norm.affine)
        else:
            out = run.pass_("tail", y)(y, norm.affine, *(shortcut or (None, None)), block.relu)
    else:
        affine = _affine(block, last, image, run, statistics, saved)
        added = None if shortcut is None else _settled(shortcut, run)
        convolve = run.conv("conv_affine", image.x, last.weight, last.geometry)
        out = convolve(*image, last.weight, affine, added, last.geometry, block.relu)
    return Result(out, statistics + projection_statistics, saved + projection_saved)


def _inner(
    block: Block, layer: Layer, image: Image, run: Primitives, statistics: list[Tensor], saved: list[Tensor]
) -> Image:
    """A layer that a ReLU follows."""
    if layer.batch_statistics:
        y, norm = _raw(block, layer, image, run, statistics, saved)
        return Image(y, norm.affine)
    convolve = run.conv("conv_affine", image.x, layer.weight, layer.geometry)
    y = convolve(*image, layer.weight, Affine(layer.scale, layer.shift), None, layer.geometry, True)
    saved.append(y)
    return Image(y)


def _outer(
    block: Block, layer: Layer, image: Image, run: Primitives, statistics: list[Tensor], saved: list[Tensor]
) -> Image:
    """The shortcut's layer: ready, or its raw result with the batch norm still to be applied (without a ReLU)."""
    if layer.batch_statistics and not expands(block, layer, image.x.shape):
        y, norm = _raw(block, layer, image, run, statistics, saved)
        return Image(y, norm.affine)
    affine = _affine(block, layer, image, run, statistics, saved)
    convolve = run.conv("conv_affine", image.x, layer.weight, layer.geometry)
    return Image(convolve(*image, layer.weight, affine, None, layer.geometry, False))


def _settled(shortcut: Image, run: Primitives) -> Tensor:
    if shortcut.prologue is None:
        return shortcut.x
    return run.pass_("tail", shortcut.x)(shortcut.x, shortcut.prologue, None, None, False)


def _raw(
    block: Block, layer: Layer, image: Image, run: Primitives, statistics: list[Tensor], saved: list[Tensor]
) -> tuple[Tensor, Norm]:
    convolve = run.conv("conv_statistics", image.x, layer.weight, layer.geometry)
    n, _, p, q = output_shape(image.x.shape, layer)
    if block.process_group:
        y, mean, variance = convolve(*image, layer.weight, layer.geometry)
        norm, moved = normalise(block, layer, mean, variance, n * p * q)
    else:
        y, vectors, moved = convolve(*image, layer.weight, layer.geometry, layer.norm)
        norm = norm_of(vectors, n * p * q)
    statistics.append(moved)
    saved += [*norm_tensors(block, norm), y]
    return y, norm


def _affine(
    block: Block, layer: Layer, image: Image, run: Primitives, statistics: list[Tensor], saved: list[Tensor]
) -> Affine:
    """What an expand layer's or a frozen layer's result is multiplied by, and what is added."""
    if not layer.batch_statistics:
        return Affine(layer.scale, layer.shift)
    n, _, p, q = output_shape(image.x.shape, layer)
    input_mean, covariance = run.pass_("gram", image.x)(*image, layer.geometry.stride)
    if block.process_group:
        mean, variance, cancels = from_gram(layer, image.x, input_mean, covariance)
    else:
        expand = run.pass_("expand_statistics", image.x)
        given = matrix(layer, image.x), input_mean, covariance, layer.norm, n * p * q
        vectors, moved, cancels = expand(*given)
    by_result = cancelled(cancels, layer.weight)
    convolve = run.conv("conv_statistics", image.x, layer.weight, layer.geometry)
    if block.process_group:
        if by_result:
            _, mean, variance = convolve(*image, layer.weight, layer.geometry)
        norm, moved = normalise(block, layer, mean, variance, n * p * q)
    else:
        if by_result:
            _, vectors, moved = convolve(*image, layer.weight, layer.geometry, layer.norm)
        norm = norm_of(vectors, n * p * q)
    statistics.append(moved)
    # Mean and covariance may lie in one storage, and an op may return only one view of that.
    saved += [*norm_tensors(block, norm), input_mean.clone(), covariance, torch.tensor(by_result)]
    return norm.affine
