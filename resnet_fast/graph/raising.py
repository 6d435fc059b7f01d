"""Calls of functions in dynamo's graphs as calls of layers, and back.

Dynamo's graphs call functions on tensors, and have the parameters among their inputs; the matcher knows layers. So for
a while the functions that layers call become layers again, which have no tensors of their own.
"""

import copy
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor


def known_value(node: fx.Node) -> Any:
    """What dynamo knows of a node: a tensor without data, or a number that may be symbolic."""
    return node.meta.get("example_value")


def known_tensor(node: Any) -> Optional[Tensor]:
    """The same for a tensor that is an ordinary one of floating-point numbers and not empty; of all else None."""
    value = known_value(node) if isinstance(node, fx.Node) else None
    if type(value) is not FakeTensor or value.layout is not torch.strided or not value.is_floating_point():
        return None
    return None if any(type(size) is int and size == 0 for size in value.shape) else value


class Layer(NamedTuple):
    """A layer without tensors, the inputs of the graph that are its tensors, and the call that it was."""

    layer: nn.Module
    tensors: dict[str, fx.Node]
    function: Callable[..., Any]
    arguments: tuple[Any, ...]  # but for the first
    keywords: dict[str, Any]


def _conv2d(
    x: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: Any = 1
) -> nn.Module:
    k, c, *kernel = weight.shape
    return nn.Conv2d(c * groups, k, tuple(kernel), stride, padding, dilation, groups, bias is not None, device="meta")


def _batch_norm(
    x: Any,
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: Any = 0.1,
    eps: Any = 1e-5,
) -> nn.Module:
    # ``float`` has dynamo guard a number that it would take anew in each call.
    momentum = float(momentum) if training else 0.0
    norm = nn.BatchNorm2d(1, float(eps), momentum, weight is not None, running_mean is not None, device="meta")
    return norm.train(training)


def _linear(x: Any, weight: Any, bias: Any = None) -> nn.Module:
    return nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")


def _dropout(x: Any, p: Any = 0.5, training: bool = True, inplace: bool = False) -> nn.Module:
    return nn.Dropout(inplace=inplace).train(training)


def _max_pool2d(x: Any, *args: Any, **kwargs: Any) -> nn.Module:
    return nn.MaxPool2d(*args, **kwargs)


_LAYERS: dict[Any, Callable[..., nn.Module]] = {
    torch.conv2d: _conv2d,
    F.batch_norm: _batch_norm,
    F.linear: _linear,
    F.dropout: _dropout,
    F.max_pool2d: _max_pool2d,
    F.adaptive_avg_pool2d: lambda x, output_size: nn.AdaptiveAvgPool2d(output_size),
}
"""The layers that call these functions; the arguments are those of the call, tensors as dynamo knows them."""

_TENSORS = ("weight", "bias", "running_mean", "running_var")


def raise_layers(module: fx.GraphModule) -> dict[str, Layer]:
    """Change calls of functions to calls of layers, and give these by name: one for the same tensors and settings."""
    layers: dict[str, Layer] = {}
    names: dict[Any, str] = {}
    for node in list(module.graph.nodes):
        raised = _raised(node)
        if raised is None:
            continue
        layer, tensors, *_ = raised
        name = names.setdefault((str(layer), layer.training, *tensors.items()), f"{node.name}_layer")
        if name not in layers:
            layers[name] = raised
            module.add_submodule(name, layer)
        with module.graph.inserting_before(node):
            called = module.graph.call_module(name, (node.args[0],))
        called.meta = dict(node.meta)
        node.replace_all_uses_with(called)
        module.graph.erase_node(node)
    for node in list(module.graph.nodes):
        if node.target == "item" and not node.users:  # a layer's number, which the layer has now
            module.graph.erase_node(node)
    first = next(node for node in module.graph.nodes if node.op != "placeholder")
    for node in list(module.graph.nodes):
        if node.target == "add_" and node is not first and _counts(node):
            first.prepend(node)  # from between a convolution and its batch norm, where nothing may be
    return layers


def _counts(node: fx.Node) -> bool:
    """Whether all that a node does is to add a number to an input, as other such nodes may, and nothing reads that."""
    given: Any = node.args[0]
    alone = isinstance(given, fx.Node) and given.op == "placeholder" and node.all_input_nodes == [given]
    return alone and all(user.target == "add_" and not user.users for user in given.users)


def _raised(node: fx.Node) -> Optional[Layer]:
    make = _LAYERS.get(node.target) if node.op == "call_function" and node.args else None
    x = known_tensor(node.args[0]) if make is not None else None
    if x is None or known_tensor(node) is None or (x.dim() != 4 and make not in (_linear, _dropout)):
        return None
    assert make is not None
    try:
        arguments = inspect.signature(make).bind(*node.args, **node.kwargs).arguments
        tensors = {name: arguments[name] for name in _TENSORS if arguments.get(name) is not None}
        if not all(_is_parameter(one) for one in tensors.values()):
            return None
        layer = make(*fx.map_arg(node.args, known_value), **fx.map_arg(node.kwargs, known_value))
    except (TypeError, ValueError, RuntimeError):  # sizes and numbers that are not known before the call
        return None
    parameters = {**dict.fromkeys((*layer._parameters, *layer._buffers)), **tensors}
    layer._parameters, layer._buffers = dict.fromkeys(parameters), {}
    return Layer(layer, tensors, node.target, node.args[1:], node.kwargs)  # type: ignore[arg-type]


def _is_parameter(node: Any) -> bool:
    """Whether a layer may have it: an input of the graph, of a size that is known."""
    value = known_tensor(node)
    return value is not None and node.op == "placeholder" and all(type(size) is int for size in value.shape)


class Bound:
    """Called with tensors: a copy of a layer that has them."""

    __name__ = "bound"

    def __init__(self, one: Layer) -> None:
        self.layer, self.names = one.layer, tuple(one.tensors)

    def __call__(self, *tensors: Tensor) -> nn.Module:
        layer = copy.copy(self.layer)
        layer._parameters = {**self.layer._parameters, **dict(zip(self.names, tensors))}  # type: ignore[arg-type]
        return layer


def lower_layers(module: fx.GraphModule, layers: dict[str, Layer]) -> None:
    """Give our ops the layers' tensors, and change layers that are still called to the calls that they were."""
    graph = module.graph
    for node in list(graph.nodes):
        one = layers.get(node.target) if node.op in ("call_module", "get_attr") else None
        if one is None:
            continue
        with graph.inserting_before(node):
            if node.op == "get_attr":
                changed = graph.call_function(Bound(one), tuple(one.tensors.values()))
            else:
                changed = graph.call_function(one.function, (*node.args, *one.arguments), one.keywords)
                changed.meta = dict(node.meta)
        node.replace_all_uses_with(changed)
        graph.erase_node(node)
    for name in layers:
        module.delete_submodule(name)
    module.recompile()
