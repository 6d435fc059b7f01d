"""The fused ops applied to modules: ``conv_bn_act(x, conv, bn)`` instead of ``relu(bn(conv(x)))``.

The modules' tensors are read at every call, so an optimiser step or ``load_state_dict`` is seen at once; what is
derived from them is cached until they change. Results lie in ``torch.channels_last``. Every parameter gets gradients.
"""

from collections.abc import Sequence
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from resnet_fast import ops
from resnet_fast.graph.batch_norm import (
    Affine,
    BatchNorm,
    move_running_statistics,
    process_group,
    scale_and_shift,
    tensors_of,
    uses_batch_statistics,
)
from resnet_fast.graph.conditions import head_refusals, is_stem_conv, padding_of
from resnet_fast.kernels.contract import Case, Geometry
from resnet_fast.ops.checks import conv_output
from resnet_fast.ops.residual_block import flat_geometry
from resnet_fast.utils import compat


def conv_bn_act(
    x: Tensor,
    conv: nn.Conv2d,
    bn: Optional[BatchNorm],
    residual: Optional[Tensor] = None,
    relu: bool = True,
    inplace_add: bool = False,
) -> Tensor:
    """``relu(bn(conv(x)) + residual)`` in one op, ``bn`` normalising by its running statistics.

    Args:
        x: ``[N, C, H, W]``, float32, float16, bfloat16 or float64, the dtype of ``conv.weight`` unless autocast is on.
        conv: with ``padding_mode="zeros"``, as much on either side.
        bn: its ``training`` flag is not read. None: there is no norm.
        residual: ``[N, K, P, Q]``, or any shape that broadcasts against it (then added in a step of its own).
        relu: whether the ReLU is applied.
        inplace_add: whether a residual of another shape or dtype is added by ``+=``, which keeps the convolution's.

    Returns:
        ``[N, K, P, Q]`` in channels_last.

    Raises:
        TypeError: ``x`` is no tensor.
        ValueError: ``x`` is 3-dimensional, as batch norm does.
        RuntimeError: another number of dimensions, wrong channels, dtype or device, as convolution does.
    """
    _check_input(x, conv)
    scale, shift = scale_and_shift(conv, bn)
    op = torch.ops.resnet_fast.conv_bn_act
    geometry = geometry_of(conv)
    if residual is None or _fits(residual, x, [conv]):
        return _widened(op(x, conv.weight, scale, shift, residual, *geometry, relu), bn)
    y = _widened(op(x, conv.weight, scale, shift, None, *geometry, False), bn)
    y = y.add_(residual) if inplace_add else y + residual
    return F.relu(y) if relu else y


def conv_chain(
    x: Tensor,
    conv: nn.Conv2d,
    bn: Optional[BatchNorm],
    residual: Tensor,
    next_conv: nn.Conv2d,
    next_bn: Optional[BatchNorm],
    inplace_add: bool = False,
) -> tuple[Tensor, Tensor]:
    """Where one bottleneck ends and the next begins: ``out = relu(bn(conv(x)) + residual)`` and
    ``z = relu(next_bn(next_conv(out)))`` in one op, both norms normalising by their running statistics.

    Args:
        x: as for ``conv_bn_act``.
        conv, next_conv: ``pointwise`` ones, or it is two ops.
        residual, inplace_add: as for ``conv_bn_act``.

    Returns:
        ``out`` ``[N, K, H, W]`` and ``z`` ``[N, L, H, W]``, in channels_last.

    Raises as ``conv_bn_act`` does.
    """
    _check_input(x, conv)
    plain = pointwise(conv) and pointwise(next_conv) and next_conv.weight.dtype == conv.weight.dtype
    if not plain or not _fits(residual, x, [conv]):
        out = conv_bn_act(x, conv, bn, residual, inplace_add=inplace_add)
        return out, conv_bn_act(out, next_conv, next_bn)
    first = (conv.weight, *scale_and_shift(conv, bn))
    second = (next_conv.weight, *scale_and_shift(next_conv, next_bn))
    out, z = torch.ops.resnet_fast.conv_chain(x, *first, residual, *second)
    return _widened(out, bn), _widened(z, next_bn)


def chained(x: Tensor, in_channels: int, out_channels: int) -> bool:
    """Whether ``conv_chain``, from so many channels to so many, has a kernel for images like ``x``.

    Those that are too small to gain from it do without all the same.
    """
    channels = in_channels, out_channels
    return ops.chained(Case("conv_chain", x.device.type, _dtype_of_result(x), *channels, gpu=x.device.index))


def pointwise(conv: nn.Conv2d) -> bool:
    """Whether it is 1x1, of stride 1, without padding and groups."""
    geometry = (conv.kernel_size, conv.stride, padding_of(conv), conv.groups)
    return geometry == ((1, 1), (1, 1), (0, 0), 1)


def residual_block(
    x: Tensor,
    convs: Sequence[nn.Conv2d],
    norms: Sequence[Optional[BatchNorm]],
    residual: Optional[Tensor] = None,
    identity: bool = False,
    projection: bool = False,
    relu: bool = True,
    pool: bool = False,
    inplace_add: bool = False,
) -> Tensor:
    """Convolutions in a row, each with its batch norm and a ReLU; the last one's ReLU comes after a shortcut is added.

    One op with a backward pass of its own, which keeps less than the modules would: see ``ops/block.py``. Each
    batch norm normalises by what it is set to, batch statistics or running ones, and updates the latter as its own
    forward does.

    Args:
        x: ``[N, C, H, W]``.
        convs, norms: of the same number, in order; with ``projection`` the last are the shortcut's. None: no norm.
        residual: what is added, or with ``projection`` the shortcut's input; None: ``x``, if ``identity`` or
            ``projection`` is set, else nothing.
        identity: ``x`` is added.
        relu: whether there is a ReLU after the last convolution.
        pool: a 3x3 max-pool of stride 2 comes last.
        inplace_add: see ``conv_bn_act``.

    Returns:
        ``[N, K, P, Q]`` in channels_last.

    Raises:
        ValueError: batch statistics of a single value a channel, as batch norm does.
        And as ``conv_bn_act`` does.
    """
    _check_input(x, convs[0])
    batch = [uses_batch_statistics(norm) for norm in norms]
    groups = {process_group(norm) for norm, uses in zip(norms, batch) if uses}
    last = len(convs) - 1 - projection
    if len(groups) > 1:
        raise NotImplementedError("batch norms of one block synchronise over different process groups")
    shortcut = identity or projection or residual is not None
    if pool and (shortcut or not relu or not batch[last]):
        if last == 0 and not shortcut and relu and is_stem_conv(convs[0]):
            return stem(x, convs[0], norms[0])
        return F.max_pool2d(
            residual_block(x, convs, norms, residual, identity, projection, relu, inplace_add=inplace_add), 3, 2, 1
        )
    if identity:
        residual = x
    added = (x if residual is None else residual) if shortcut else None
    if added is not None and not _fits(added, x, convs[: last + 1], convs[last + 1 :]):
        y = residual_block(x, convs[: last + 1], norms[: last + 1], relu=False)
        if projection:
            added = residual_block(added, convs[-1:], norms[-1:], relu=False)
        y = y.add_(added) if inplace_add else y + added
        return F.relu(y) if relu else y

    vectors = [scale_and_shift(conv, norm, uses) for conv, norm, uses in zip(convs, norms, batch)]
    out, statistics, _ = torch.ops.resnet_fast.residual_block(
        x,
        None if identity else residual,
        [conv.weight for conv in convs],
        [scale for scale, _ in vectors],
        [shift for _, shift in vectors],
        [norm.eps if uses else 0.0 for norm, uses in zip(norms, batch)],  # type: ignore[union-attr]
        [number for conv in convs for number in flat_geometry(geometry_of(conv))],
        batch,
        identity,
        projection,
        relu,
        pool,
        groups.pop() if groups else "",
    )
    normalised = [(conv, norm) for conv, norm, uses in zip(convs, norms, batch) if uses]
    with torch.no_grad():
        for (conv, norm), moments in zip(normalised, statistics):
            move_running_statistics(conv, norm, moments)
    return _widened(out, norms[last], norms[-1])


def geometry_of(conv: nn.Conv2d) -> Geometry:
    """Of a convolution that pads both sides alike."""
    return Geometry(conv.stride, padding_of(conv), conv.dilation, conv.groups)  # type: ignore[arg-type]


def stem(x: Tensor, conv: nn.Conv2d, bn: Optional[BatchNorm]) -> Tensor:
    """``max_pool2d(relu(bn(conv(x))), 3, 2, 1)`` for a 7x7 stride-2 ``conv``: ``[N, C, H, W] -> [N, K, H/4, W/4]``.

    Raises as ``conv_bn_act`` does.
    """
    _check_input(x, conv)
    return _widened(torch.ops.resnet_fast.stem(x, conv.weight, *scale_and_shift(conv, bn)), bn)


def global_avg_pool(x: Tensor) -> Tensor:
    """Mean over H and W: ``[N, C, H, W] -> [N, C, 1, 1]``."""
    return torch.ops.resnet_fast.global_avg_pool(x)


def head(x: Tensor, layers: Sequence[nn.Module]) -> Tensor:
    """What follows the last block of a classifier: global average pool, ``flatten(1)``, then ``layers`` one by one.

    In one op, if the layers are an ``nn.Linear`` and before it no more than dropouts in eval mode, all without hooks;
    that is asked at every call.

    Args:
        x: ``[N, C, H, W]``, of the dtype of the linear layer's weight unless autocast is on.
        layers: the last is, or takes the place of, a linear layer ``C -> K``.

    Returns:
        ``[N, K]``.

    Raises:
        RuntimeError: as pool and layers do.
    """
    if any(head_refusals(layers)):
        y = global_avg_pool(x).flatten(1)
        for layer in layers:
            y = layer(y)
        return y
    weight, bias = layers[-1].weight, layers[-1].bias
    if x.dtype != weight.dtype and not _autocast_enabled(x.device.type):
        raise RuntimeError(f"x is {x.dtype}, expected {weight.dtype}, the dtype of the weight (or autocast)")
    return torch.ops.resnet_fast.head(x, weight, bias)


def _check_input(x: Tensor, conv: nn.Conv2d) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"x is a {type(x).__name__}, expected a tensor [N, {conv.in_channels}, H, W]")
    if x.dim() != 4:
        error = ValueError if x.dim() == 3 else RuntimeError  # what batch norm and convolution raise
        raise error(f"x has shape {list(x.shape)}, expected 4 dimensions: [N, {conv.in_channels}, H, W]")
    if x.dtype != conv.weight.dtype and not _autocast_enabled(x.device.type):
        raise RuntimeError(f"x is {x.dtype}, expected {conv.weight.dtype}, the dtype of conv.weight (or autocast)")


def _widened(y: Tensor, *norms: Optional[BatchNorm]) -> Tensor:
    """Frozen norms multiply by tensors that autocast knows nothing of: their result is as wide as these."""
    for norm in norms:
        if isinstance(norm, FrozenBatchNorm2d) or (isinstance(norm, Affine) and norm.widens):
            dtype = torch.promote_types(y.dtype, tensors_of(norm)[0].dtype)
            y = y if y.dtype == dtype else y.to(dtype)
    return y


def _autocast_enabled(device: str) -> bool:
    return device in compat.AUTOCAST_DEVICES and torch.is_autocast_enabled(device)


def _fits(residual: Tensor, x: Tensor, convs: Sequence[nn.Conv2d], shortcut: Sequence[nn.Conv2d] = ()) -> bool:
    """Whether the op can add the residual itself: the output's shape, and the dtype that the output will have.

    shortcut: through which convolutions the residual goes.
    """
    dtype = _dtype_of_result(residual) if shortcut else residual.dtype
    return dtype == _dtype_of_result(x) and _shape_after(convs, x) == _shape_after(shortcut, residual)


def _shape_after(convs: Sequence[nn.Conv2d], x: Tensor) -> list[Any]:
    shape: Any = x.shape
    for conv in convs:
        shape = conv_output(shape, conv.weight.shape, geometry_of(conv))
    return list(shape)


def _dtype_of_result(x: Tensor) -> torch.dtype:
    if _autocast_enabled(x.device.type) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype
