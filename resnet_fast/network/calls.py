"""Which calls of a graph, and which leaf modules, are operations of the native library."""

import math
import operator
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_map

from resnet_fast.graph import conditions, cores, functional
from resnet_fast.graph.layout import channels_last, laid_out_like
from resnet_fast.kernels.native import abi
from resnet_fast.network.operations import Steps, pair
from resnet_fast.network.steps import Child, Image, NotPlanned

# --- functions --------------------------------------------------------------------------------------------------------


def _conv_bn_act(
    low: Steps,
    x: Any,
    conv: Child,
    bn: Optional[Child],
    residual: Any = None,
    relu: bool = True,
    inplace_add: bool = False,
) -> Image:
    return low.conv(x, conv.module, conv.path, bn and bn.module, residual, relu)


def _stem(low: Steps, x: Any, conv: Child, bn: Optional[Child]) -> Image:
    return low.conv(x, conv.module, conv.path, bn and bn.module, relu=True, pool=True)


def _convolution(low: Steps, x: Any, conv: Child) -> Image:
    reason = conditions.own_conv_refusal(conv.module)
    if reason:
        raise NotPlanned(f"{'.'.join(conv.path)} {reason}")
    return low.conv(x, conv.module, conv.path)


def _channels_last(low: Steps, x: Any) -> Any:
    return low.in_order(x, True) if isinstance(x, Image) and len(x.shape) == 4 else x


def _laid_out_like(low: Steps, value: Any, given: Any) -> Any:
    if not isinstance(given, Image) or len(given.shape) != 4 or (given.nhwc and not given.in_both_orders):
        return value

    def restored(leaf: Any) -> Any:
        return low.in_order(leaf, False) if isinstance(leaf, Image) and len(leaf.shape) == 4 else leaf

    return tree_map(restored, value)


def _relu(low: Steps, x: Any, inplace: bool = False) -> Image:
    y = low.add(x, None, relu=True)
    if inplace:
        low.overwrite(x)
    return y


def _add(low: Steps, x: Any, other: Any) -> Image:
    return low.add(x, other)


def _add_(low: Steps, x: Any, other: Any) -> Image:
    y = low.add(x, other)
    low.overwrite(x)
    return y


def _max_pool(
    low: Steps,
    x: Any,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Image:
    if pair(dilation) != (1, 1) or return_indices:
        raise NotPlanned(f"{low.name()} pools with dilation or indices")
    return low.pool(x, abi.MAX_POOL, kernel_size, stride, padding, ceil_mode)


def _avg_pool(
    low: Steps,
    x: Any,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: Optional[int] = None,
) -> Image:
    if (count_include_pad and pair(padding) != (0, 0)) or divisor_override is not None:
        raise NotPlanned(f"{low.name()} averages with padding or a divisor of its own")
    return low.pool(x, abi.AVG_POOL, kernel_size, stride, padding, ceil_mode)


def _adaptive_avg_pool(low: Steps, x: Any, output_size: Any) -> Image:
    if output_size not in (1, (1, 1)):
        raise NotPlanned(f"{low.name()} pools to {output_size}")
    return low.global_avg_pool(x)


def _mean(low: Steps, x: Any, dim: Any, keepdim: bool = False) -> Image:
    if tuple(dim) not in ((2, 3), (-2, -1)):
        raise NotPlanned(f"{low.name()} averages over other dimensions than (2, 3)")
    return low.global_avg_pool(x, keepdim)


def _dropout(low: Steps, x: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Image:
    if training:
        raise NotPlanned(f"{low.name()} drops out")
    return low.read(x)


def _view(low: Steps, x: Any, *shape: Any) -> Image:
    """Only the flattening kind, and only where memory is in that order: elsewhere the stock ``view`` raises."""
    x = low.read(x)
    if x.nhwc and not x.in_both_orders:
        raise NotPlanned(f"{low.name()} views an image in channels_last")
    return _reshape(low, x, *shape)


def _reshape(low: Steps, x: Any, *shape: Any) -> Image:
    x = low.read(x)
    sizes = tuple(shape[0]) if len(shape) == 1 and isinstance(shape[0], (tuple, list)) else shape
    if len(sizes) != 2 or sizes[0] != x.shape[0] or sizes[1] not in (-1, math.prod(x.shape[1:])):
        raise NotPlanned(f"{low.name()} reshapes to {list(sizes)}")
    return low.flatten(x, 1)


def _size(low: Steps, x: Any, dim: Optional[int] = None) -> Any:
    return x.shape if dim is None else x.shape[dim]


def _getattr(low: Steps, x: Any, name: str) -> Any:
    if not isinstance(x, Image) or name != "shape":
        raise NotPlanned(f"{low.name()} asks for {name}")
    return x.shape


CALLS: dict[Any, Callable[..., Any]] = {
    cores.convolution: _convolution,
    functional.conv_bn_act: _conv_bn_act,
    functional.stem: _stem,
    functional.global_avg_pool: Steps.global_avg_pool,
    channels_last: _channels_last,
    laid_out_like: _laid_out_like,
    **dict.fromkeys((F.relu, torch.relu, "relu"), _relu),
    **dict.fromkeys((F.relu_, torch.relu_, "relu_"), lambda low, x: _relu(low, x, inplace=True)),
    **dict.fromkeys((operator.add, torch.add, "add"), _add),
    **dict.fromkeys((operator.iadd, "add_"), _add_),
    **dict.fromkeys((F.max_pool2d, torch.max_pool2d), _max_pool),
    F.avg_pool2d: _avg_pool,
    F.adaptive_avg_pool2d: _adaptive_avg_pool,
    **dict.fromkeys((torch.mean, "mean"), _mean),
    F.dropout: _dropout,
    **dict.fromkeys((torch.flatten, "flatten"), Steps.flatten),
    "view": _view,
    "reshape": _reshape,
    "size": _size,
    getattr: _getattr,
    OrderedDict: lambda low, items: OrderedDict(items),
}


# --- layers -----------------------------------------------------------------------------------------------------------


def _plain_conv(low: Steps, conv: nn.Module, x: Image) -> Image:
    reason = conditions.conv_refusal(conv)
    if reason:
        raise NotPlanned(f"{low.name()} {reason}")
    return low.conv(x, conv, low.at)  # type: ignore[arg-type]


def _dropout_layer(low: Steps, layer: nn.Module, x: Image) -> Image:
    return _dropout(low, x, training=layer.training)


def _max_pool_layer(low: Steps, pool: Any, x: Image) -> Image:
    return _max_pool(
        low, x, pool.kernel_size, pool.stride, pool.padding, pool.dilation, pool.ceil_mode, pool.return_indices
    )


def _avg_pool_layer(low: Steps, pool: Any, x: Image) -> Image:
    window = (pool.kernel_size, pool.stride, pool.padding)
    return _avg_pool(low, x, *window, pool.ceil_mode, pool.count_include_pad, pool.divisor_override)


MODULES: dict[type, Callable[[Steps, Any, Image], Image]] = {
    nn.Conv2d: _plain_conv,
    nn.Linear: lambda low, layer, x: low.linear(x, layer),
    nn.ReLU: lambda low, layer, x: _relu(low, x, layer.inplace),
    nn.Identity: lambda low, layer, x: low.read(x),
    nn.Dropout: _dropout_layer,
    nn.MaxPool2d: _max_pool_layer,
    nn.AvgPool2d: _avg_pool_layer,
    nn.AdaptiveAvgPool2d: lambda low, layer, x: _adaptive_avg_pool(low, x, layer.output_size),
    nn.Flatten: lambda low, layer, x: low.flatten(x, layer.start_dim, layer.end_dim),
}
