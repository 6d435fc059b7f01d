"""What every op checks of its operands, and the shapes that follow from them."""

from typing import Any, Optional

import torch
from torch import Tensor

from resnet_fast.kernels.contract import Geometry, output_size


def geometry_of(stride: Any, padding: Any, dilation: Any, groups: int) -> Geometry:
    """The geometry that an op was given: lists of two numbers, or of one for both directions."""
    stride, padding, dilation = ((pair[0], pair[-1]) for pair in (stride, padding, dilation))
    return Geometry(stride, padding, dilation, groups)


def check_images(x: Any) -> None:
    if len(x) != 4:
        raise RuntimeError(f"x has shape {list(x)}, expected 4 dimensions: [N, C, H, W]")


def conv_output(x: Any, weight: Any, geometry: Geometry) -> list[Any]:
    """Shape of the convolution's result ``[N, K, P, Q]`` for an image and a weight of these shapes; may be symbolic.

    Raises:
        RuntimeError: ``x`` or ``weight`` has not 4 dimensions, the image is smaller than the kernel, or the geometry
            makes no sense.
    """
    check_images(x)
    stride, padding, dilation, _ = geometry
    if min(*stride, *dilation) < 1 or min(padding) < 0:
        raise RuntimeError(
            f"stride is {stride}, dilation is {dilation}, padding is {padding}, "
            "expected positive numbers, positive numbers, and numbers not below 0"
        )
    if len(weight) != 4:
        raise RuntimeError(f"weight has shape {list(weight)}, expected 4 dimensions: [K, C/groups, R, S]")
    size, kernel = x[2:], weight[2:]
    for axis, name in enumerate(("height", "width")):
        extent = dilation[axis] * (kernel[axis] - 1) + 1
        if size[axis] + 2 * padding[axis] < extent:
            raise RuntimeError(
                f"x has shape {list(x)}, expected {name} + 2 * {padding[axis]} (padding) of at least {extent} "
                "(dilated kernel)"
            )
    return [x[0], weight[0], *output_size(size, kernel, stride, padding, dilation)]


def pooled(shape: Any) -> list[Any]:
    """Shape of an image ``[N, K, P, Q]`` after a stem's max-pool: 3x3, stride 2, padding 1."""
    return [*shape[:2], *output_size(shape[2:], (3, 3), (2, 2), (1, 1), (1, 1))]


def check_conv(
    x: Any, weight: Tensor, scale: Tensor, shift: Tensor, residual: Optional[Tensor], geometry: Geometry
) -> list[Any]:
    """Shape of ``conv(x, weight) * scale + shift + residual``.

    Raises:
        RuntimeError: shapes, devices or dtypes do not fit.
    """
    out = check_shapes(x, weight, scale, shift, residual, geometry)
    check_parameter("weight", weight, x)
    for name, vector in (("scale", scale), ("shift", shift)):
        if vector.dtype not in (torch.float32, torch.float64):
            raise RuntimeError(f"{name} is {vector.dtype}, expected float32 or float64")
    if residual is not None and residual.dtype is not x.dtype:
        raise RuntimeError(f"residual is {residual.dtype}, expected {x.dtype}")
    return out


def check_shapes(
    x: Any, weight: Tensor, scale: Tensor, shift: Tensor, residual: Optional[Tensor], geometry: Geometry
) -> list[Any]:
    """The same for operands of any dtype."""
    out = conv_output(x.shape, weight.shape, geometry)
    k, group_channels = weight.shape[:2]
    groups = geometry.groups
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
        if tensor is not None:
            check_device(name, tensor, x)
    return out


def check_parameter(name: str, parameter: Tensor, x: Any) -> None:
    """A parameter has the dtype of ``x``, or one that holds all its numbers."""
    dtype = x.dtype
    wider = parameter.dtype is not dtype and torch.promote_types(dtype, parameter.dtype) != parameter.dtype
    if wider or not dtype.is_floating_point:
        raise RuntimeError(f"x is {dtype} and {name} is {parameter.dtype}, expected the same floating-point dtype")


def check_device(name: str, tensor: Tensor, x: Any) -> None:
    if tensor.device != x.device:
        raise RuntimeError(f"{name} is on {tensor.device}, expected the device of x, {x.device}")


def stands_for_many(tensor: Tensor) -> bool:
    """Whether it is a batch of tensors, as gradients are under ``is_grads_batched=True``.

    Then ops need rules, which most of ATen's have and ours have not.
    """
    return "Batched" in repr(torch._C._dispatch_keys(tensor))


def empty_channels_last(x: Tensor, shape: Any, dtype: Optional[torch.dtype] = None) -> Tensor:
    return torch.empty(shape, dtype=dtype or x.dtype, device=x.device, memory_format=torch.channels_last)
