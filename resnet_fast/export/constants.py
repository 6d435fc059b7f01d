"""What depends on parameters and buffers alone, computed once, in float64: it is then rounded once, as a weight is.

Frozen batch norms of other people's, the exponent ``1 / p`` of a generalised mean, standardised weights: a graph in
float16 or bfloat16 would compute all these in that type, with a rounding at each step.
"""

import contextlib
from typing import Any, Optional

import torch
from torch import Tensor, fx, nn

_CONVOLUTIONS = (torch.ops.aten.conv2d.default, torch.ops.aten.conv2d.padding)
_SCALES = (torch.ops.aten.mul.Tensor, torch.ops.aten.mul_.Tensor)
_SHIFTS = (torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor, torch.ops.aten.sub.Tensor, torch.ops.aten.sub_.Tensor)


def fold_constants(graph_module: fx.GraphModule) -> None:
    """In place; the results are parameters in float64."""
    for node in list(graph_module.graph.nodes):
        value = _constant_result(graph_module, node)
        if value is not None:
            with graph_module.graph.inserting_before(node):
                node.replace_all_uses_with(
                    new_constant(graph_module, f"{_free_owner(graph_module, node)}.value", value)
                )
            graph_module.graph.erase_node(node)
    tidy(graph_module)


def fold_affine(graph_module: fx.GraphModule) -> None:
    """Fold in place what multiplies a convolution's result by constants, one a channel, or adds such to it."""
    for node in list(graph_module.graph.nodes):
        if node.op != "call_function" or node.target not in (*_SCALES, *_SHIFTS) or node.kwargs:
            continue
        conv, other = _operands(node)
        if conv is None or other is None:
            continue
        weight, bias, factor = (value_of(graph_module, one) for one in (conv.args[1], argument(conv, 2), other))
        assert weight is not None
        assert factor is not None
        channels = len(weight)
        if (
            factor.dim() > 4
            or factor.numel() not in (1, channels)
            or (factor.numel() > 1 and factor.shape[-3:-2] != (channels,))
        ):
            continue
        factor = factor.double().flatten().expand(channels)
        shift = torch.zeros(channels, dtype=torch.float64) if bias is None else bias.double()
        if node.target in _SCALES:
            set_weights(graph_module, conv, weight.double() * factor.view(-1, 1, 1, 1), shift * factor)
        else:
            minus = node.target in _SHIFTS[2:]
            set_weights(graph_module, conv, weight.double(), shift - factor if minus else shift + factor)
        node.replace_all_uses_with(conv)
        graph_module.graph.erase_node(node)
    tidy(graph_module)


def _operands(node: fx.Node) -> tuple[Optional[fx.Node], Optional[fx.Node]]:
    """The convolution that ``node`` alone reads, and the constant; the constant may come first, but in a difference."""
    first, second = node.args[:2]
    pairs = [(first, second)] if node.target in _SHIFTS[2:] else [(first, second), (second, first)]
    for conv, other in pairs:
        if isinstance(other, fx.Node) and other.op == "get_attr" and is_own_convolution(conv):
            assert isinstance(conv, fx.Node)
            return conv, other
    return None, None


def is_own_convolution(node: Any) -> bool:
    """Whether it is a convolution with constant weights whose result is read once."""
    if not isinstance(node, fx.Node) or node.target not in _CONVOLUTIONS or len(node.users) > 1:
        return False
    constants = [tensor for tensor in (node.args[1], argument(node, 2)) if tensor is not None]
    return all(isinstance(tensor, fx.Node) and tensor.op == "get_attr" for tensor in constants)


def _constant_result(graph_module: fx.GraphModule, node: fx.Node) -> Optional[Tensor]:
    """What ``node`` gives, if it reads constants alone and is no larger than they; in float64, as they are."""
    inputs = node.all_input_nodes
    if node.op != "call_function" or not inputs or any(one.op != "get_attr" for one in inputs):
        return None
    schema = getattr(node.target, "_schema", None)
    expected = node.meta.get("val")
    if schema is None or schema.is_mutable or not isinstance(expected, Tensor) or expected.dtype != torch.float32:
        return None

    def read(one: fx.Node) -> Any:
        value = value_of(graph_module, one)
        return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

    with contextlib.suppress(Exception), torch.inference_mode(False), torch.no_grad():  # then it stays in the graph
        result = node.target(*fx.map_arg(node.args, read), **fx.map_arg(node.kwargs, read))  # type: ignore[operator]
        largest = max(value_of(graph_module, one).numel() for one in inputs)  # type: ignore[union-attr]
        if isinstance(result, Tensor) and result.dtype == torch.float64 and result.numel() <= largest:
            return result.clone()
    return None


# --- constants of a graph ---------------------------------------------------------------------------------------------


def value_of(graph_module: fx.GraphModule, node: Any) -> Optional[Tensor]:
    """The tensor that a ``get_attr`` node reads; None of None."""
    if node is None:
        return None
    owner, _, name = str(node.target).rpartition(".")
    return getattr(graph_module.get_submodule(owner), name).detach()


def argument(node: fx.Node, index: int) -> Any:
    """The argument at ``index``, or None if there are fewer."""
    return node.args[index] if len(node.args) > index else None


def new_constant(graph_module: fx.GraphModule, target: str, value: Tensor) -> fx.Node:
    """A node that reads ``value``, which becomes the parameter ``target`` of an existing submodule."""
    owner, _, name = target.rpartition(".")
    module = graph_module.get_submodule(owner)
    setattr(module, name, nn.Parameter(value, requires_grad=False))
    return graph_module.graph.get_attr(target)


def set_weights(graph_module: fx.GraphModule, conv: fx.Node, weight: Tensor, bias: Tensor) -> None:
    """Give a convolution another weight and bias, under the names that its module has."""
    owner = _owner(graph_module, conv)
    with graph_module.graph.inserting_before(conv):
        conv.update_arg(1, new_constant(graph_module, f"{owner}.weight", weight))
        bias_node = new_constant(graph_module, f"{owner}.bias", bias)
    conv.args = (*conv.args[:2], bias_node, *conv.args[3:])


def tidy(graph_module: fx.GraphModule) -> None:
    """Leave out what nothing reads any more."""
    graph_module.graph.eliminate_dead_code()
    graph_module.delete_all_unused_submodules()
    graph_module.recompile()


def _owner(graph_module: fx.GraphModule, conv: fx.Node) -> str:
    """Name the module for the folded tensors: the convolution's own, or a new one if other nodes share its weight."""
    weight = conv.args[1]
    assert isinstance(weight, fx.Node)
    readers = [
        user
        for node in graph_module.graph.nodes
        if node.op == "get_attr" and node.target == weight.target
        for user in node.users
    ]
    owner = str(weight.target).rpartition(".")[0]
    return owner if readers == [conv] and owner else _free_owner(graph_module, conv)


def _free_owner(graph_module: fx.GraphModule, node: fx.Node) -> str:
    owner = f"folded.{node.name}"
    graph_module.add_submodule(owner, nn.Module())
    return owner
