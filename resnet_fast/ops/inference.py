"""The fused ops of inference, ``torch.ops.resnet_fast.*``: what each is given, its fake kernel and its gradients.

``kernels/reference/inference.py`` defines what each op computes. Which implementation computes it is decided inside the
op, per call, so that ``forward`` stays free of branches on tensors and ``torch.compile`` and ``torch.export`` see one
node. The ops are opaque (no ``triton_op``): they work without a driver and under fake tensors.
"""

from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_fast.kernels.contract import Case, Geometry
from resnet_fast.ops.checks import (
    check_conv,
    check_device,
    check_images,
    check_parameter,
    empty_channels_last,
    geometry_of,
    pooled,
    stands_for_many,
)
from resnet_fast.ops.dispatch import BACK_TO_BACK, PREPARED, conv_case, implementation
from resnet_fast.ops.registry import register

# --- conv_bn_act ----------------------------------------------------------------------------------------------------


def _conv_bn_act(*operands: Any) -> Tensor:
    x, weight, scale, shift, residual, stride, padding, dilation, groups, relu = operands
    prepared = PREPARED.get(x.device.type)
    if prepared is not None:
        y = prepared(*operands)
        if y is not None:
            return y
    geometry = geometry_of(stride, padding, dilation, groups)
    check_conv(x, weight, scale, shift, residual, geometry)
    serving = implementation(conv_case("conv_bn_act", x, weight, geometry), x)
    return serving.conv_bn_act(x, weight, scale, shift, residual, *geometry, relu)


def _conv_bn_act_fake(*operands: Any) -> Tensor:
    x, weight, scale, shift, residual, *numbers, _ = operands
    return empty_channels_last(x, check_conv(x, weight, scale, shift, residual, geometry_of(*numbers)))


def _conv_bn_act_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, weight, scale, _, residual, ctx.stride, ctx.padding, ctx.dilation, ctx.groups, ctx.relu = inputs
    ctx.has_residual = residual is not None
    ctx.save_for_backward(x, weight, scale, output if ctx.relu else None)


def _conv_bn_act_backward(ctx: Any, grad: Tensor) -> tuple:
    x, weight, scale, y = ctx.saved_tensors
    if ctx.relu:
        grad = torch.ops.aten.threshold_backward(grad, y, 0)
    geometry = (ctx.stride, ctx.padding, ctx.dilation, ctx.groups)
    grads = _conv_gradients(grad, x, weight, scale, geometry, ctx.needs_input_grad[:4])
    return (*grads, grad if ctx.has_residual else None, None, None, None, None, None)


def _conv_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor, geometry: tuple, needed: tuple[bool, ...]
) -> tuple[Optional[Tensor], Optional[Tensor], Optional[Tensor], Optional[Tensor]]:
    """Gradients of ``conv(x, weight) * scale + shift`` for the four tensors, in ATen ops, which have gradients too."""
    stride, padding, dilation, groups = geometry
    narrow_weight = weight.to(x.dtype)
    d_x = d_weight = d_scale = d_shift = None
    if needed[0] or needed[1]:
        d_conv = (grad * scale.view(1, -1, 1, 1)).to(x.dtype)
        d_x, d_weight, _ = torch.ops.aten.convolution_backward(
            d_conv, x, narrow_weight, None, stride, padding, dilation, False, [0, 0], groups, [*needed[:2], False]
        )
        d_weight = d_weight.to(weight.dtype) if needed[1] else None
    if needed[2]:
        conv = F.conv2d(x, narrow_weight, None, stride, padding, dilation, groups)
        d_scale = (grad.to(scale.dtype) * conv).sum((0, 2, 3))
    if needed[3]:
        d_shift = grad.sum((0, 2, 3), dtype=scale.dtype)
    return d_x if needed[0] else None, d_weight, d_scale, d_shift


# --- conv_chain -----------------------------------------------------------------------------------------------------

_POINTWISE = Geometry()


def _conv_chain(*operands: Tensor) -> tuple[Tensor, Tensor]:
    x, weight, scale, shift, residual, next_weight, next_scale, next_shift = operands
    n, _, p, q = _conv_chain_output(*operands)
    case = Case("conv_chain", x.device.type, x.dtype, weight.shape[1], next_weight.shape[0], gpu=x.device.index)
    serving = implementation(case, x, BACK_TO_BACK)
    if serving is not BACK_TO_BACK["reference"] and serving.chain_pays(case, n * p * q):
        return serving.conv_chain(*operands)
    out = _conv_bn_act(x, weight, scale, shift, residual, *_POINTWISE, True)
    return out, _conv_bn_act(out, next_weight, next_scale, next_shift, None, *_POINTWISE, True)


def _conv_chain_output(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor,
    next_weight: Tensor,
    next_scale: Tensor,
    next_shift: Tensor,
) -> list[Any]:
    """Shape of the first convolution's result."""
    for name, tensor in (("weight", weight), ("next_weight", next_weight)):
        if tensor.dim() != 4 or tuple(tensor.shape[2:]) != (1, 1):
            raise RuntimeError(f"{name} has shape {list(tensor.shape)}, expected [K, C, 1, 1]")
    out = check_conv(x, weight, scale, shift, residual, _POINTWISE)
    try:  # the residual has the shape and dtype of the first one's result
        check_conv(residual, next_weight, next_scale, next_shift, None, _POINTWISE)
    except RuntimeError as error:
        raise RuntimeError(f"the second convolution (x: the first one's result): {error}") from None
    return out


def _conv_chain_fake(*operands: Tensor) -> tuple[Tensor, Tensor]:
    x, next_weight = operands[0], operands[5]
    n, k, p, q = _conv_chain_output(*operands)
    return empty_channels_last(x, [n, k, p, q]), empty_channels_last(x, [n, next_weight.shape[0], p, q])


def _conv_chain_setup(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    x, weight, scale, _, _, next_weight, next_scale, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, scale, next_weight, next_scale, *output)


def _conv_chain_backward(ctx: Any, grad: Optional[Tensor], grad_z: Optional[Tensor]) -> tuple:
    x, weight, scale, next_weight, next_scale, out, z = ctx.saved_tensors
    needed = ctx.needs_input_grad
    next_grads: tuple = (None, None, None, None)
    if grad_z is not None:
        grad_z = torch.ops.aten.threshold_backward(grad_z, z, 0)
        wanted = (any(needed[:5]), *needed[5:])
        next_grads = _conv_gradients(grad_z, out, next_weight, next_scale, _POINTWISE, wanted)
        if next_grads[0] is not None:
            grad = next_grads[0] if grad is None else grad + next_grads[0]
    if grad is None or not any(needed[:5]):
        return (None, None, None, None, None, *next_grads[1:])
    grad = torch.ops.aten.threshold_backward(grad, out, 0)
    return (*_conv_gradients(grad, x, weight, scale, _POINTWISE, needed[:4]), grad, *next_grads[1:])


# --- stem -----------------------------------------------------------------------------------------------------------

_STEM_GEOMETRY = Geometry((2, 2), (3, 3))


def _stem(x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    _stem_output(x, weight, scale, shift)
    return implementation(conv_case("stem", x, weight, _STEM_GEOMETRY), x).stem(x, weight, scale, shift)


def _stem_output(x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor) -> list[Any]:
    """Shape of the result."""
    if weight.dim() != 4 or tuple(weight.shape[2:]) != (7, 7):
        raise RuntimeError(f"weight has shape {list(weight.shape)}, expected [K, C, 7, 7]")
    return pooled(check_conv(x, weight, scale, shift, None, _STEM_GEOMETRY))


def _stem_fake(*operands: Tensor) -> Tensor:
    return empty_channels_last(operands[0], _stem_output(*operands))


def _stem_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _stem_backward(ctx: Any, grad: Tensor) -> tuple:
    x, weight, scale, shift = ctx.saved_tensors
    # The pre-pool activation is four times the result: made again rather than kept.
    y = torch.ops.resnet_fast.conv_bn_act(x, weight, scale, shift, None, *_STEM_GEOMETRY, True)
    _, indices = torch.ops.aten.max_pool2d_with_indices(y, [3, 3], [2, 2], [1, 1])
    grad = torch.ops.aten.max_pool2d_with_indices_backward(grad, y, [3, 3], [2, 2], [1, 1], [1, 1], False, indices)
    grad = torch.ops.aten.threshold_backward(grad, y, 0)
    return _conv_gradients(grad, x, weight, scale, _STEM_GEOMETRY, ctx.needs_input_grad)


# --- global_avg_pool ------------------------------------------------------------------------------------------------


def _global_avg_pool(x: Tensor) -> Tensor:
    check_images(x.shape)
    case = Case("global_avg_pool", x.device.type, x.dtype, x.shape[1], x.shape[1], gpu=x.device.index)
    return implementation(case, x).global_avg_pool(x)


def _global_avg_pool_fake(x: Tensor) -> Tensor:
    check_images(x.shape)
    return empty_channels_last(x, [x.shape[0], x.shape[1], 1, 1])


def _global_avg_pool_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.shape = inputs[0].shape


def _global_avg_pool_backward(ctx: Any, grad: Tensor) -> Tensor:
    return _spread(grad / (ctx.shape[2] * ctx.shape[3]), ctx.shape)


def _spread(grad: Tensor, shape: Any) -> Tensor:
    """A gradient ``[N, C, 1, 1]`` for every pixel.

    In memory, where its reader wants it anyway: Inductor of 2.8 computes a tensor of strides 0 in place, once a pixel.
    """
    grad = grad.expand(shape)
    return grad if stands_for_many(grad) else grad.contiguous(memory_format=torch.channels_last)


# --- head -----------------------------------------------------------------------------------------------------------


def _head(x: Tensor, weight: Tensor, bias: Optional[Tensor]) -> Tensor:
    _, k = _head_output(x, weight, bias)
    case = Case("head", x.device.type, x.dtype, x.shape[1], k, gpu=x.device.index)
    return implementation(case, x).head(x, weight, bias)


def _head_output(x: Tensor, weight: Tensor, bias: Optional[Tensor]) -> list[Any]:
    """Shape of the result."""
    check_images(x.shape)
    if weight.dim() != 2 or weight.shape[1] != x.shape[1]:
        raise RuntimeError(f"weight has shape {list(weight.shape)}, expected [K, {x.shape[1]}]: x is {list(x.shape)}")
    k = weight.shape[0]
    if bias is not None and (bias.dim() != 1 or bias.shape[0] != k):
        raise RuntimeError(f"bias has shape {list(bias.shape)}, expected [{k}]")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None:
            check_parameter(name, tensor, x)
            check_device(name, tensor, x)
    return [x.shape[0], k]


def _head_fake(x: Tensor, weight: Tensor, bias: Optional[Tensor]) -> Tensor:
    return x.new_empty(_head_output(x, weight, bias))


def _head_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, weight, bias = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(x, weight)


def _head_backward(ctx: Any, grad: Tensor) -> tuple:
    x, weight = ctx.saved_tensors
    h, w = x.shape[2:]
    d_x = d_weight = d_bias = None
    if ctx.needs_input_grad[0]:
        d_x = _spread(((grad @ weight.to(x.dtype)) / (h * w))[:, :, None, None], x.shape)
    if ctx.needs_input_grad[1]:
        d_weight = (grad.T @ x.mean((2, 3))).to(weight.dtype)
    if ctx.needs_input_grad[2]:
        d_bias = grad.sum(0, dtype=ctx.bias_dtype)
    return d_x, d_weight, d_bias


# --- registration ---------------------------------------------------------------------------------------------------

register(
    "conv_bn_act(Tensor x, Tensor weight, Tensor scale, Tensor shift, Tensor? residual, int[2] stride, "
    "int[2] padding, int[2] dilation, int groups, bool relu) -> Tensor",
    *(_conv_bn_act, _conv_bn_act_fake, _conv_bn_act_setup, _conv_bn_act_backward),
    autocast=True,
)
register(
    "conv_chain(Tensor x, Tensor weight, Tensor scale, Tensor shift, Tensor residual, "
    "Tensor next_weight, Tensor next_scale, Tensor next_shift) -> (Tensor, Tensor)",
    *(_conv_chain, _conv_chain_fake, _conv_chain_setup, _conv_chain_backward),
    autocast=True,
)
register(
    "stem(Tensor x, Tensor weight, Tensor scale, Tensor shift) -> Tensor",
    *(_stem, _stem_fake, _stem_setup, _stem_backward),
    autocast=True,
)
# Without autocast: a pool runs in the dtype that it is given, as adaptive_avg_pool2d does.
register(
    "global_avg_pool(Tensor x) -> Tensor",
    *(_global_avg_pool, _global_avg_pool_fake, _global_avg_pool_setup, _global_avg_pool_backward),
)
register(
    "head(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    *(_head, _head_fake, _head_setup, _head_backward),
    autocast=True,
)
