"""``torch.ops.resnet_fast.residual_block``: a residual block in training, and its backward pass, as ops.

What they are given, fake kernels and gradients; ``block.py`` says what they compute. Double backward goes through the
same block in ATen's differentiable ops.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_fast.kernels.contract import Geometry, nhwc, wide
from resnet_fast.ops import block_backward, block_forward
from resnet_fast.ops.block import Block, Layer, Pick, saved_shapes
from resnet_fast.ops.block_backward import Wanted
from resnet_fast.ops.checks import check_conv, empty_channels_last, pooled, stands_for_many
from resnet_fast.ops.dispatch import TRAINING, implementation
from resnet_fast.ops.registry import register

Tensors = Sequence[Tensor]

_PLAIN = (
    "float[] eps, int[] geometry, bool[] batch_statistics, bool identity, bool projection, bool relu, bool pool, "
    "str process_group"
)
_NUMBERS = 7  # of a geometry: stride, padding and dilation in both directions, groups


def flat_geometry(geometry: Geometry) -> list[int]:
    """As the ops take it."""
    return [*geometry.stride, *geometry.padding, *geometry.dilation, geometry.groups]


def block_of(
    weights: Tensors, scales: Tensors, shifts: Tensors, eps: Any, geometry: Any, batch: Any, *rest: Any
) -> Block:
    layers = []
    for i, (weight, scale, shift) in enumerate(zip(weights, scales, shifts)):
        sh, sw, ph, pw, dh, dw, groups = geometry[_NUMBERS * i : _NUMBERS * (i + 1)]
        layers.append(Layer(weight, scale, shift, eps[i], Geometry((sh, sw), (ph, pw), (dh, dw), groups), batch[i]))
    return Block(tuple(layers), *rest)


# --- what is checked --------------------------------------------------------------------------------------------------


def _checked(block: Block, x: Tensor, residual: Optional[Tensor]) -> list[Any]:
    """Shape of the result ``[N, K, P, Q]``.

    Raises:
        RuntimeError: shapes, dtypes or devices do not fit, as a convolution does.
        ValueError: batch statistics of a single value a channel, as batch norm does.
    """
    shape = _checked_layers(block, block.main, x)
    source = x if residual is None else residual
    shortcut = shape
    if block.projection:
        shortcut = _checked_layers(block, block.layers[-1:], source)
    elif block.identity or residual is not None:
        shortcut = list(source.shape)
    if shortcut != shape or source.dtype != x.dtype or source.device != x.device:
        raise RuntimeError(
            f"the shortcut is {source.dtype} of shape {shortcut} on {source.device}, expected {x.dtype} of {shape} "
            f"on {x.device}"
        )
    if block.pool:
        shape = pooled(shape)
    return shape


def _checked_layers(block: Block, layers: Sequence[Layer], x: Tensor) -> list[Any]:
    image: Any = x
    out: list[Any] = []
    for layer in layers:
        out = check_conv(image, layer.weight, layer.scale, layer.shift, None, layer.geometry)
        if layer.batch_statistics and not block.process_group and out[0] * out[2] * out[3] == 1:
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {torch.Size(out)}")
        image = _Pending(out, x.dtype, x.device)
    return out


class _Pending(NamedTuple):
    """An image that is yet to be made, for the checks."""

    shape: list[Any]
    dtype: torch.dtype
    device: torch.device


# --- forward ----------------------------------------------------------------------------------------------------------


def _residual_block(
    x: Tensor, residual: Optional[Tensor], weights: Tensors, scales: Tensors, shifts: Tensors, *plain: Any
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    block = block_of(weights, scales, shifts, *plain)
    _checked(block, x, residual)
    result = block_forward.forward(block, nhwc(x), nhwc(residual), _pick_for(x))
    return result.out, result.statistics, result.saved


def _pick_for(x: Tensor) -> Pick:
    return lambda case: implementation(case, x, TRAINING)


def _residual_block_fake(
    x: Tensor, residual: Optional[Tensor], weights: Tensors, scales: Tensors, shifts: Tensors, *plain: Any
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    block = block_of(weights, scales, shifts, *plain)
    out = empty_channels_last(x, _checked(block, x, residual))
    statistics = [_vector(x, 2, layer.weight.shape[0]) for layer in block.layers if layer.batch_statistics]
    shapes = saved_shapes(block, x.shape, None if residual is None else residual.shape)
    return out, statistics, [_saved_like(x, shape) for shape in shapes]


def _vector(x: Tensor, *shape: Any) -> Tensor:
    return x.new_empty(shape, dtype=wide(x))


def _saved_like(x: Tensor, shape: Optional[Sequence[Any]]) -> Tensor:
    if shape is None:
        return torch.empty((), dtype=torch.bool)  # on the CPU, which decides by it
    return empty_channels_last(x, list(shape)) if len(shape) == 4 else _vector(x, *shape)


# --- backward ---------------------------------------------------------------------------------------------------------


def _wanted(flags: Sequence[bool]) -> Wanted:
    layers = (len(flags) - 2) // 2
    return Wanted(flags[0], flags[1], tuple(flags[2 : 2 + layers]), tuple(flags[2 + layers :]))


def _residual_block_backward(
    grad: Tensor,
    x: Tensor,
    residual: Optional[Tensor],
    out: Optional[Tensor],
    weights: Tensors,
    scales: Tensors,
    shifts: Tensors,
    *plain: Any,
) -> list[Tensor]:
    """Gradients for x, the residual, every weight, scale and shift; those not wanted are empty."""
    *plain_block, saved, flags = plain
    block = block_of(weights, scales, shifts, *plain_block)
    wanted = _wanted(flags)
    found = block_backward.backward(block, nhwc(grad), nhwc(x), nhwc(residual), out, saved, wanted, _pick_for(x))
    empty = grad.new_empty(0)
    # Without a ReLU the residual's gradient is the result's, which an op may not return as its own.
    d_residual = grad.clone() if found.residual is not None and found.residual is grad else found.residual
    images = [found.x if wanted.x else None, d_residual if wanted.residual else None]
    tensors = [
        _laid_out_as(tensor, gradient.to(tensor.dtype)) if want and gradient is not None else None
        for gradients, wants, given in (
            (found.weights, wanted.weights, weights),
            (found.scales, wanted.vectors, scales),
            (found.shifts, wanted.vectors, shifts),
        )
        for gradient, want, tensor in zip(gradients, wants, given)
    ]
    return [empty if gradient is None else gradient for gradient in (*images, *tensors)]


def _laid_out_as(tensor: Tensor, gradient: Tensor) -> Tensor:
    """The gradient with its tensor's strides: DDP warns of others, also where sizes of 1 make them immaterial."""
    if gradient.stride() == tensor.stride():
        return gradient
    same = all(a == b for size, a, b in zip(tensor.shape, gradient.stride(), tensor.stride()) if size > 1)
    return gradient.as_strided(tensor.shape, tensor.stride()) if same else torch.empty_like(tensor).copy_(gradient)


def _residual_block_backward_fake(
    grad: Tensor,
    x: Tensor,
    residual: Optional[Tensor],
    out: Optional[Tensor],
    weights: Tensors,
    scales: Tensors,
    shifts: Tensors,
    *plain: Any,
) -> list[Tensor]:
    wanted = _wanted(plain[-1])
    given = [x, residual, *weights, *scales, *shifts]
    flags = [wanted.x, wanted.residual, *wanted.weights, *wanted.vectors, *wanted.vectors]
    return [
        grad.new_empty(0)
        if tensor is None or not flag
        else empty_channels_last(tensor, list(tensor.shape))
        if i < 2
        else torch.empty_like(tensor)
        for i, (tensor, flag) in enumerate(zip(given, flags))
    ]


# --- autograd ---------------------------------------------------------------------------------------------------------


def _setup(ctx: Any, inputs: tuple, output: tuple[Tensor, list[Tensor], list[Tensor]]) -> None:
    x, residual, weights, scales, shifts, *ctx.plain = inputs
    out, statistics, saved = output
    block = block_of(weights, scales, shifts, *ctx.plain)
    ctx.layers = len(weights)
    ctx.mark_non_differentiable(*statistics, *saved)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(
        x, residual, out if block.relu and not block.pool else None, *weights, *scales, *shifts, *saved
    )


def _backward(ctx: Any, grad: Optional[Tensor], *_: Any) -> tuple:
    x, residual, out, *tensors = ctx.saved_tensors
    n = ctx.layers
    weights, scales, shifts, saved = tensors[:n], tensors[n : 2 * n], tensors[2 * n : 3 * n], tensors[3 * n :]
    need_x, need_residual, *need_lists = ctx.needs_input_grad[:5]
    needs = [need_x, need_residual, *(bool(one) for needed in need_lists for one in needed)]
    rest = (None,) * len(ctx.plain)
    if grad is None:
        return None, None, [None] * n, [None] * n, [None] * n, *rest
    if torch.is_grad_enabled() or stands_for_many(grad):
        grads = _differentiable_gradients([x, residual, *weights, *scales, *shifts], ctx.plain, grad, needs)
    else:
        need_weights, need_scales, need_shifts = needs[2 : 2 + n], needs[2 + n : 2 + 2 * n], needs[2 + 2 * n :]
        wanted = [need_x, need_residual, *need_weights, *(a or b for a, b in zip(need_scales, need_shifts))]
        op = torch.ops.resnet_fast.residual_block_backward
        found = op(grad, x, residual, out, weights, scales, shifts, *ctx.plain, saved, wanted)
        grads = [gradient if needed else None for gradient, needed in zip(found, needs)]
    return grads[0], grads[1], grads[2 : 2 + n], grads[2 + n : 2 + 2 * n], grads[2 + 2 * n :], *rest


def _differentiable_gradients(
    given: Sequence[Optional[Tensor]], plain: Sequence[Any], grad: Tensor, needs: Sequence[bool]
) -> list[Optional[Tensor]]:
    """The same gradients, with gradients of their own if gradients are on: through the block in ATen's ops, once more.

    One input may have been computed from another, or be given twice. So the block is put together of aliases, and
    differentiated with respect to these: no path is followed beyond them.
    """
    twice = torch.is_grad_enabled()
    with torch.enable_grad():
        aliases: list[Any] = [None if tensor is None else tensor.view_as(tensor) for tensor in given]
        x, residual, *tensors = aliases
        n = len(tensors) // 3
        block = block_of(tensors[:n], tensors[n : 2 * n], tensors[2 * n :], *plain)
        if block.process_group:
            raise NotImplementedError("double backward through batch statistics of several processes (SyncBatchNorm)")
        inputs = [alias for alias, needed in zip(aliases, needs) if needed and alias is not None]
        found = iter(torch.autograd.grad(_composed(block, x, residual), inputs, grad, create_graph=twice))
    return [next(found) if needed and alias is not None else None for alias, needed in zip(aliases, needs)]


def _composed(block: Block, x: Tensor, residual: Optional[Tensor]) -> Tensor:
    """What ``residual_block`` computes, in ATen's ops."""
    z = x
    for layer in block.main[:-1]:
        z = F.relu(_convolved(z, layer))
    z = _convolved(z, block.main[-1])
    if block.projection:
        z = z + _convolved(x if residual is None else residual, block.layers[-1])
    elif block.identity:
        z = z + x
    elif residual is not None:
        z = z + residual
    if block.relu:
        z = F.relu(z)
    return F.max_pool2d(z, 3, 2, 1) if block.pool else z


def _convolved(x: Tensor, layer: Layer) -> Tensor:
    y = F.conv2d(x, layer.weight.to(x.dtype), None, *layer.geometry)
    if layer.batch_statistics:
        return F.batch_norm(y, None, None, layer.scale, layer.shift, True, 0.0, layer.eps)
    return (y * layer.scale.view(1, -1, 1, 1) + layer.shift.view(1, -1, 1, 1)).to(x.dtype)


# --- registration -----------------------------------------------------------------------------------------------------


register(
    "residual_block(Tensor x, Tensor? residual, Tensor[] weights, Tensor[] scales, Tensor[] shifts, "
    f"{_PLAIN}) -> (Tensor, Tensor[], Tensor[])",
    *(_residual_block, _residual_block_fake, _setup, _backward),
    autocast=True,
)
register(
    "residual_block_backward(Tensor grad, Tensor x, Tensor? residual, Tensor? out, Tensor[] weights, Tensor[] scales, "
    f"Tensor[] shifts, {_PLAIN}, Tensor[] saved, bool[] wanted) -> Tensor[]",
    *(_residual_block_backward, _residual_block_backward_fake),
)
