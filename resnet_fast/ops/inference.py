"""The fused ops as ``torch.ops.resnet_fast.*``: schema, fake kernels, autograd and autocast rules, dispatch.

``kernels/reference/inference.py`` defines what each op computes. Which implementation computes it is decided inside the
op, per call, so that ``forward`` stays free of branches on tensors and ``torch.compile`` and ``torch.export`` see one
node. The ops are opaque (no ``triton_op``): they work without a driver and under fake tensors.

Environment variables, for tests and for finding faults:

- ``RESNET_FAST_IMPLEMENTATION``: ``triton``, ``native``, ``onednn`` or ``reference``. That one is tried first; the
  reference still runs what it does not cover. Triton serves CPU tensors only so, and only in its interpreter.
- ``RESNET_FAST_ISA``: ``portable``, ``avx2``, ``avx512`` or ``avx512_bf16``. The instruction set of the native kernels,
  read when they are first used; without it, the best that the CPU runs.
"""

import os
from collections.abc import Callable
from types import ModuleType
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_fast.kernels import native, onednn
from resnet_fast.kernels.contract import Case
from resnet_fast.kernels.native import training as native_training
from resnet_fast.kernels.reference import inference as reference
from resnet_fast.kernels.reference import quantised as reference_quantised
from resnet_fast.kernels.reference import training as reference_training
from resnet_fast.kernels.triton import prepared
from resnet_fast.kernels.triton import table as triton

Pair = tuple[int, int]

IMPLEMENTATIONS: dict[str, ModuleType] = {
    "triton": triton,
    "native": native,
    "onednn": onednn,
    "reference": reference,
}
"""By name, best first. Each has the functions of ``reference``; ``supports(case)`` gives None, or the reason."""

TRAINING: dict[str, ModuleType] = {
    "triton": triton,
    "native": native_training,
    "reference": reference_training,
}
"""The same for training's primitives: each module has functions of ``reference_training``."""

QUANTISED: dict[str, ModuleType] = {"triton": triton, "reference": reference_quantised}
"""The same for the ops on 8-bit numbers: ``reference_quantised``."""

# Triton's interpreter is a test instrument: it serves the CPU only on request.
_NOT_ON = {"cpu": "triton"}

library = torch.library.Library("resnet_fast", "DEF")


# --- dispatch -------------------------------------------------------------------------------------------------------


def implementation_for(case: Case, among: dict[str, ModuleType] = IMPLEMENTATIONS) -> str:
    """Name of the implementation that serves ``case`` in this process."""
    preferred = os.environ.get("RESNET_FAST_IMPLEMENTATION") or None
    if preferred is not None and preferred not in IMPLEMENTATIONS:
        raise ValueError(
            f"RESNET_FAST_IMPLEMENTATION is {preferred!r}, expected one of {', '.join(IMPLEMENTATIONS)} or nothing"
        )
    excluded = _NOT_ON.get(case.device)
    names = (preferred, "reference") if preferred else [name for name in among if name != excluded]
    return next(name for name in names if name in among and among[name].supports(case) is None)


def _implementation(case: Case, x: Tensor) -> ModuleType:
    return reference if x.numel() == 0 else IMPLEMENTATIONS[implementation_for(case)]


# --- what every op checks -------------------------------------------------------------------------------------------


def check_images(x: Any) -> None:
    if len(x) != 4:
        raise RuntimeError(f"x has shape {list(x)}, expected 4 dimensions: [N, C, H, W]")


def conv_output(x: Any, weight: Any, stride: Pair, padding: Pair, dilation: Pair) -> list[Any]:
    """Shape of the convolution's result ``[N, K, P, Q]`` for an image and a weight of these shapes; may be symbolic.

    Raises:
        RuntimeError: ``x`` or ``weight`` has not 4 dimensions, the image is smaller than the kernel, or the geometry
            makes no sense.
    """
    check_images(x)
    if min(*stride, *dilation) < 1 or min(padding) < 0:
        raise RuntimeError(
            f"stride is {stride}, dilation is {dilation}, padding is {padding}, "
            "expected positive numbers, positive numbers, and numbers not below 0"
        )
    if len(weight) != 4:
        raise RuntimeError(f"weight has shape {list(weight)}, expected 4 dimensions: [K, C/groups, R, S]")
    n, _, *image = x
    k, _, *kernel = weight
    size = []
    for axis, name in enumerate(("height", "width")):
        extent = dilation[axis] * (kernel[axis] - 1) + 1
        padded = image[axis] + 2 * padding[axis]
        if padded < extent:
            raise RuntimeError(
                f"x has shape {list(x)}, expected {name} + 2 * {padding[axis]} (padding) of at least {extent} "
                "(dilated kernel)"
            )
        size.append((padded - extent) // stride[axis] + 1)
    return [n, k, *size]


def check_conv(
    x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, residual: Optional[Tensor], groups: int, out: list[Any]
) -> None:
    """Raise RuntimeError unless the tensors fit; ``out`` is the shape of the result."""
    check_operands(x, weight, scale, shift, residual, groups, out)
    dtype = x.dtype
    wider = weight.dtype is not dtype and torch.promote_types(dtype, weight.dtype) != weight.dtype
    if wider or not dtype.is_floating_point:
        raise RuntimeError(f"x is {dtype} and weight is {weight.dtype}, expected the same floating-point dtype")
    for name, vector in (("scale", scale), ("shift", shift)):
        if vector.dtype not in (torch.float32, torch.float64):
            raise RuntimeError(f"{name} is {vector.dtype}, expected float32 or float64")
    if residual is not None and residual.dtype is not dtype:
        raise RuntimeError(f"residual is {residual.dtype}, expected {dtype}")


def check_operands(
    x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, residual: Optional[Tensor], groups: int, out: list[Any]
) -> None:
    """Raise RuntimeError unless shapes and devices fit."""
    k, group_channels = weight.shape[:2]
    if groups < 1 or k % groups:
        raise RuntimeError(f"groups is {groups}, expected a divisor of weight.shape[0] = {k}")
    if x.shape[1] != group_channels * groups:
        raise RuntimeError(
            f"x has {x.shape[1]} channels (shape {list(x.shape)}), expected {group_channels * groups}: "
            f"weight is {list(weight.shape)} with groups={groups}"
        )
    for name, vector in (("scale", scale), ("shift", shift)):
        if vector.dim() != 1 or vector.shape[0] != k:
            raise RuntimeError(f"{name} has shape {list(vector.shape)}, expected [{k}]")
    if residual is not None and list(residual.shape) != out:
        raise RuntimeError(f"residual has shape {list(residual.shape)}, expected {out}")
    for name, tensor in (("weight", weight), ("scale", scale), ("shift", shift), ("residual", residual)):
        if tensor is not None and tensor.device != x.device:
            raise RuntimeError(f"{name} is on {tensor.device}, expected the device of x, {x.device}")


def pooled(size: int) -> int:
    return (size + 2 - 3) // 2 + 1


def empty_channels_last(x: Tensor, shape: list[Any]) -> Tensor:
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


# --- conv_bn_act ----------------------------------------------------------------------------------------------------

library.define(
    "conv_bn_act(Tensor x, Tensor weight, Tensor scale, Tensor shift, Tensor? residual, int[2] stride, "
    "int[2] padding, int[2] dilation, int groups, bool relu) -> Tensor"
)


def _pair(values: Any) -> Pair:
    return values[0], values[-1]


def _conv_bn_act(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Optional[Tensor],
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
    relu: bool,
) -> Tensor:
    if x.is_cuda:  # where Python would take longer than a small convolution
        y = prepared.run(x, weight, scale, shift, residual, stride, padding, dilation, groups, relu)
        if y is not None:
            return y
    stride, padding, dilation = _pair(stride), _pair(padding), _pair(dilation)
    out = conv_output(x.shape, weight.shape, stride, padding, dilation)
    check_conv(x, weight, scale, shift, residual, groups, out)
    kernel = (weight.shape[2], weight.shape[3])
    case = Case("conv_bn_act", x.device.type, x.dtype, x.shape[1], out[1], kernel, stride, padding, dilation, groups)
    return _implementation(case, x).conv_bn_act(
        x, weight, scale, shift, residual, stride, padding, dilation, groups, relu
    )


def _conv_bn_act_fake(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Optional[Tensor],
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
    relu: bool,
) -> Tensor:
    out = conv_output(x.shape, weight.shape, _pair(stride), _pair(padding), _pair(dilation))
    check_conv(x, weight, scale, shift, residual, groups, out)
    return empty_channels_last(x, out)


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

library.define(
    "conv_chain(Tensor x, Tensor weight, Tensor scale, Tensor shift, Tensor residual, "
    "Tensor next_weight, Tensor next_scale, Tensor next_shift) -> (Tensor, Tensor)"
)

_POINTWISE: tuple[Pair, Pair, Pair, int] = ((1, 1), (0, 0), (1, 1), 1)


def chained(case: Case) -> bool:
    """Whether the op has a kernel for ``case``; if not, it is two convolutions, and gains nothing."""
    return implementation_for(case, {"triton": triton, "reference": reference}) == "triton"


def _conv_chain(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor,
    next_weight: Tensor,
    next_scale: Tensor,
    next_shift: Tensor,
) -> tuple[Tensor, Tensor]:
    args = (x, weight, scale, shift, residual, next_weight, next_scale, next_shift)
    n, _, p, q = _conv_chain_checked(*args)
    case = Case("conv_chain", x.device.type, x.dtype, weight.shape[1], next_weight.shape[0])
    if x.numel() > 0 and chained(case) and triton.chain_pays(case, n * p * q):
        return triton.conv_chain(*args)
    out = _conv_bn_act(x, weight, scale, shift, residual, *_POINTWISE, True)
    return out, _conv_bn_act(out, next_weight, next_scale, next_shift, None, *_POINTWISE, True)


def _conv_chain_checked(
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
    out = conv_output(x.shape, weight.shape, *_POINTWISE[:3])
    check_conv(x, weight, scale, shift, residual, 1, out)
    try:
        check_conv(residual, next_weight, next_scale, next_shift, None, 1, out)  # which is like the first one's result
    except RuntimeError as error:
        raise RuntimeError(f"the second convolution (x: the first one's result): {error}") from None
    return out


def _conv_chain_fake(x: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
    n, k, p, q = _conv_chain_checked(x, *rest)
    return empty_channels_last(x, [n, k, p, q]), empty_channels_last(x, [n, rest[4].shape[0], p, q])


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

library.define("stem(Tensor x, Tensor weight, Tensor scale, Tensor shift) -> Tensor")

_STEM_GEOMETRY = ((2, 2), (3, 3), (1, 1), 1)


def _stem(x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    out = _stem_checked(x, weight, scale, shift)
    stride, padding, dilation, groups = _STEM_GEOMETRY
    case = Case("stem", x.device.type, x.dtype, x.shape[1], out[1], (7, 7), stride, padding, dilation, groups)
    return _implementation(case, x).stem(x, weight, scale, shift)


def _stem_checked(x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor) -> list[Any]:
    """Shape of the convolution's result, before the pool."""
    if weight.dim() != 4 or tuple(weight.shape[2:]) != (7, 7):
        raise RuntimeError(f"weight has shape {list(weight.shape)}, expected [K, C, 7, 7]")
    out = conv_output(x.shape, weight.shape, *_STEM_GEOMETRY[:3])
    check_conv(x, weight, scale, shift, None, 1, out)
    return out


def _stem_fake(x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    n, k, p, q = _stem_checked(x, weight, scale, shift)
    return empty_channels_last(x, [n, k, pooled(p), pooled(q)])


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

library.define("global_avg_pool(Tensor x) -> Tensor")


def _global_avg_pool(x: Tensor) -> Tensor:
    check_images(x.shape)
    case = Case("global_avg_pool", x.device.type, x.dtype, x.shape[1], x.shape[1])
    return _implementation(case, x).global_avg_pool(x)


def _global_avg_pool_fake(x: Tensor) -> Tensor:
    check_images(x.shape)
    return empty_channels_last(x, [x.shape[0], x.shape[1], 1, 1])


def _global_avg_pool_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.shape = inputs[0].shape


def _global_avg_pool_backward(ctx: Any, grad: Tensor) -> Tensor:
    return (grad / (ctx.shape[2] * ctx.shape[3])).expand(ctx.shape)


# --- head -----------------------------------------------------------------------------------------------------------

library.define("head(Tensor x, Tensor weight, Tensor? bias) -> Tensor")


def _head(x: Tensor, weight: Tensor, bias: Optional[Tensor]) -> Tensor:
    _, k = _head_checked(x, weight, bias)
    return _implementation(Case("head", x.device.type, x.dtype, x.shape[1], k), x).head(x, weight, bias)


def _head_checked(x: Tensor, weight: Tensor, bias: Optional[Tensor]) -> list[Any]:
    """Shape of the result."""
    check_images(x.shape)
    if weight.dim() != 2 or weight.shape[1] != x.shape[1]:
        raise RuntimeError(f"weight has shape {list(weight.shape)}, expected [K, {x.shape[1]}]: x is {list(x.shape)}")
    k = weight.shape[0]
    if bias is not None and (bias.dim() != 1 or bias.shape[0] != k):
        raise RuntimeError(f"bias has shape {list(bias.shape)}, expected [{k}]")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        wider = tensor.dtype is not x.dtype and torch.promote_types(x.dtype, tensor.dtype) != tensor.dtype
        if wider or not x.dtype.is_floating_point:
            raise RuntimeError(f"x is {x.dtype} and {name} is {tensor.dtype}, expected the same floating-point dtype")
        if tensor.device != x.device:
            raise RuntimeError(f"{name} is on {tensor.device}, expected the device of x, {x.device}")
    return [x.shape[0], k]


def _head_fake(x: Tensor, weight: Tensor, bias: Optional[Tensor]) -> Tensor:
    return x.new_empty(_head_checked(x, weight, bias))


def _head_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, weight, bias = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(x, weight)


def _head_backward(ctx: Any, grad: Tensor) -> tuple:
    x, weight = ctx.saved_tensors
    h, w = x.shape[2:]
    d_x = d_weight = d_bias = None
    if ctx.needs_input_grad[0]:
        d_x = ((grad @ weight.to(x.dtype)) / (h * w))[:, :, None, None].expand(x.shape)
    if ctx.needs_input_grad[1]:
        d_weight = (grad.T @ x.mean((2, 3))).to(weight.dtype)
    if ctx.needs_input_grad[2]:
        d_bias = grad.sum(0, dtype=ctx.bias_dtype)
    return d_x, d_weight, d_bias


# --- registration ---------------------------------------------------------------------------------------------------


def cast(tensor: Any, device: str) -> Any:
    """What autocast makes of an image: float64 and None stay."""
    if tensor is None or not tensor.is_floating_point() or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(torch.get_autocast_dtype(device))


def _autocast(op: Any, key: torch._C.DispatchKey, device: str) -> Callable:
    """Cast images (``x`` and ``residual``) as autocast casts a convolution's input; float32 parameters stay.

    The implementations take a float32 weight beside a half-precision ``x``: they cast once, when they pack it.
    """
    kinds = [argument.name.removeprefix("next_") for argument in op._schema.arguments]

    def kernel(*args: Any) -> Any:
        given = list(args)
        for i, (kind, arg) in enumerate(zip(kinds, args)):
            parameter = kind in ("weight", "bias") and arg is not None and arg.dtype != torch.float32
            if kind in ("x", "residual") or parameter:
                given[i] = cast(arg, device)
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
            return op(*given)

    return kernel


for _name, _kernel, _fake, _backward, _setup in (
    ("conv_bn_act", _conv_bn_act, _conv_bn_act_fake, _conv_bn_act_backward, _conv_bn_act_setup),
    ("conv_chain", _conv_chain, _conv_chain_fake, _conv_chain_backward, _conv_chain_setup),
    ("stem", _stem, _stem_fake, _stem_backward, _stem_setup),
    ("global_avg_pool", _global_avg_pool, _global_avg_pool_fake, _global_avg_pool_backward, _global_avg_pool_setup),
    ("head", _head, _head_fake, _head_backward, _head_setup),
):
    # One kernel for every device: the choice among implementations needs more than the device.
    library.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"resnet_fast::{_name}", _fake, lib=library)
    torch.library.register_autograd(f"resnet_fast::{_name}", _backward, setup_context=_setup, lib=library)

# A pool alone runs in the dtype that it is given, as adaptive_avg_pool2d does.
for _name in ("conv_bn_act", "conv_chain", "stem", "head"):
    _op = getattr(torch.ops.resnet_fast, _name).default
    library.impl(_name, _autocast(_op, torch._C.DispatchKey.AutocastCPU, "cpu"), "AutocastCPU")
    library.impl(_name, _autocast(_op, torch._C.DispatchKey.AutocastCUDA, "cuda"), "AutocastCUDA")
