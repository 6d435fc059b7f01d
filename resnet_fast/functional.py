"""The fused ops applied to modules: ``conv_bn_act(x, conv, bn)`` instead of ``relu(bn(conv(x)))``.

The modules' tensors are read at every call, so an optimiser step or ``load_state_dict`` is seen at once; what is
derived from them is cached until they change. Results lie in ``torch.channels_last``. Every parameter gets gradients.
"""

from typing import Any, Optional, Union

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from resnet_fast import ops
from resnet_fast.kernels.packing import PackCache

BatchNorm = Union[nn.BatchNorm2d, FrozenBatchNorm2d]

_folds = PackCache()


def conv_bn_act(
    x: Tensor,
    conv: nn.Conv2d,
    bn: BatchNorm,
    residual: Optional[Tensor] = None,
    relu: bool = True,
    inplace_add: bool = False,
) -> Tensor:
    """``relu(bn(conv(x)) + residual)`` in one op, ``bn`` normalising by its running statistics.

    Args:
        x: ``[N, C, H, W]``, float32, float16, bfloat16 or float64, the dtype of ``conv.weight`` unless autocast is on.
        conv: with numeric padding and ``padding_mode="zeros"``.
        bn: its ``training`` flag is not read.
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
    scale, shift = fold_batch_norm(bn, conv.bias)
    op = torch.ops.resnet_fast.conv_bn_act
    geometry = (conv.stride, conv.padding, conv.dilation, conv.groups)
    if residual is None or _fits(residual, x, conv):
        return op(x, conv.weight, scale, shift, residual, *geometry, relu)
    y = op(x, conv.weight, scale, shift, None, *geometry, False)
    y = y.add_(residual) if inplace_add else y + residual
    return F.relu(y) if relu else y


def stem(x: Tensor, conv: nn.Conv2d, bn: BatchNorm) -> Tensor:
    """``max_pool2d(relu(bn(conv(x))), 3, 2, 1)`` for a 7x7 stride-2 ``conv``: ``[N, C, H, W] -> [N, K, H/4, W/4]``.

    Raises as ``conv_bn_act`` does.
    """
    _check_input(x, conv)
    return torch.ops.resnet_fast.stem(x, conv.weight, *fold_batch_norm(bn, conv.bias))


def global_avg_pool(x: Tensor) -> Tensor:
    """Mean over H and W: ``[N, C, H, W] -> [N, C, 1, 1]``."""
    return torch.ops.resnet_fast.global_avg_pool(x)


def fold_batch_norm(bn: BatchNorm, conv_bias: Optional[Tensor] = None) -> tuple[Tensor, Tensor]:
    """``scale`` and ``shift``, each ``[K]`` in float32 or wider, with ``bn(y + conv_bias) == y * scale + shift``.

    ``scale = weight / sqrt(running_var + eps)`` and ``shift = bias + (conv_bias - running_mean) * scale`` (Ioffe and
    Szegedy 2015, section 3.1).
    """
    counter = getattr(bn, "num_batches_tracked", None)  # its version rises when the running statistics are updated
    tensors = (bn.running_var, bn.running_mean, bn.weight, bn.bias, conv_bias, counter)
    sources = tuple(t for t in tensors if t is not None)
    differentiated = torch.is_grad_enabled() and any(t.requires_grad for t in sources)
    if differentiated or torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return _fold(bn, conv_bias)
    return _folds.get(sources, (bn.eps, conv_bias is None), lambda: _fold(bn, conv_bias))


def _fold(bn: BatchNorm, conv_bias: Optional[Tensor]) -> tuple[Tensor, Tensor]:
    assert bn.running_var is not None and bn.running_mean is not None
    wide = torch.float64 if bn.running_var.dtype == torch.float64 else torch.float32
    scale = torch.rsqrt(bn.running_var.to(wide) + bn.eps)
    if bn.weight is not None:
        scale = scale * bn.weight
    centre = bn.running_mean.to(wide)
    if conv_bias is not None:
        centre = centre - conv_bias
    shift = -centre * scale
    if bn.bias is not None:
        shift = shift + bn.bias
    return scale, shift


def _check_input(x: Tensor, conv: nn.Conv2d) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"x is a {type(x).__name__}, expected a tensor [N, {conv.in_channels}, H, W]")
    if x.dim() != 4:
        error = ValueError if x.dim() == 3 else RuntimeError  # what batch norm and convolution raise
        raise error(f"x has shape {list(x.shape)}, expected 4 dimensions: [N, {conv.in_channels}, H, W]")
    if x.dtype != conv.weight.dtype and not _autocast_enabled(x.device.type):
        raise RuntimeError(f"x is {x.dtype}, expected {conv.weight.dtype}, the dtype of conv.weight (or autocast)")


def _autocast_enabled(device: str) -> bool:
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def _fits(residual: Tensor, x: Tensor, conv: nn.Conv2d) -> bool:
    """Whether the op can add the residual itself: the output's shape, and the dtype that the output will have."""
    dtype = x.dtype
    if _autocast_enabled(x.device.type) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
    geometry: Any = (conv.stride, conv.padding, conv.dilation)
    shape = ops.conv_output(x, conv.weight, *geometry)
    return residual.dtype == dtype and list(residual.shape) == shape
