"""The layer in a module that is a layer and more: a subclass's convolution, a norm before its activation.

A *core* is a graph's node that calls a module, and has ``CORE`` in its ``meta``: of what the module computes, it is the
convolution or the norm alone. ``close`` turns the cores that nothing was made of into calls of functions.
"""

import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from resnet_fast.graph.aliasing import written
from resnet_fast.graph.batch_norm import Affine
from resnet_fast.graph.conditions import SYNCHRONISED
from resnet_fast.graph.source import compile_graph
from resnet_fast.graph.tracing import CORE, is_addition

BATCH_NORMS = (nn.BatchNorm2d, *SYNCHRONISED)


def convolution(x: Any, conv: nn.Conv2d) -> Tensor:
    return nn.Conv2d.forward(conv, x)


def normalisation(x: Any, norm: nn.Module) -> Tensor:
    """By PyTorch's own forward, whatever the norm's class does beside it."""
    stock: Any = next(cls for cls in (*SYNCHRONISED, nn.BatchNorm2d) if isinstance(norm, cls))
    return stock.forward(norm, x)


class AffineCore:
    """Called with a norm of somebody's own, gives what it computes."""

    __name__ = "affine_core"

    def __init__(self, function: Callable[[nn.Module], tuple[Tensor, Tensor]], channels: int, widens: bool) -> None:
        self.function, self.channels, self.widens = function, channels, widens

    def __call__(self, owner: nn.Module) -> Affine:
        return Affine(owner, self.function, self.widens)


@dataclass(frozen=True)
class Owned:
    """In a match: what a core gives of the child of this name."""

    core: AffineCore
    name: str


def affine(x: Any, norm: Affine) -> Tensor:
    scale, shift = norm.function(norm.owner)
    return x * scale + shift if norm.widens else x * scale.to(x.dtype) + shift.to(x.dtype)


def close(graph: fx.Graph) -> None:
    """Replace the cores that are left."""
    for node in list(graph.nodes):
        core = node.meta.get(CORE)
        if core is None:
            continue
        with graph.inserting_before(node):
            layer = graph.get_attr(str(node.target))
            if isinstance(core, AffineCore):
                closed = graph.call_function(affine, (node.args[0], graph.call_function(core, (layer,))))
            else:
                closed = graph.call_function(core, (node.args[0], layer))
        node.replace_all_uses_with(closed)
        graph.erase_node(node)


# --- calls of functions with a layer's own tensors and settings -------------------------------------------------------


def _conv2d(
    x: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: Any = 1
) -> dict[str, Any]:
    return locals()


def _batch_norm(
    input: Any,
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    training: Any = False,
    momentum: Any = 0.1,
    eps: Any = 1e-5,
) -> dict[str, Any]:
    return locals()


def owner_of(node: fx.Node) -> str:
    """The name of the module whose weights a node convolves or normalises by, or ''."""
    if node.op != "call_function" or node.target not in (torch.conv2d, F.batch_norm):
        return ""
    owners = {str(given.target).rpartition(".")[0] for given in node.all_input_nodes if given.op == "get_attr"}
    return owners.pop() if len(owners) == 1 else ""


def core_of(node: fx.Node, layer: nn.Module, name: str) -> Optional[tuple[Callable, list[fx.Node]]]:
    """The core that a call of a function is, if it does just what ``layer``, called ``name``, would; and the nodes that
    go with it: a counter, and assertions of what the core asserts itself."""
    try:
        given = (_conv2d if node.target is torch.conv2d else _batch_norm)(*node.args, **node.kwargs)
    except TypeError:
        return None

    def own(key: str, used: bool = True) -> bool:
        tensor = layer._parameters.get(key, layer._buffers.get(key))
        value = given[key]
        if tensor is None or not used:
            return value is None
        return isinstance(value, fx.Node) and value.op == "get_attr" and value.target == f"{name}.{key}"

    if isinstance(layer, nn.Conv2d) and node.target is torch.conv2d:
        same = all(_pair(given[key]) == getattr(layer, key) for key in ("stride", "padding", "dilation"))
        own_tensors = own("weight") and own("bias")
        plain = same and given["groups"] == layer.groups and layer.padding_mode == "zeros"
        return (convolution, []) if own_tensors and plain else None
    if isinstance(layer, nn.BatchNorm2d) and node.target is F.batch_norm:
        tracked = not layer.training or layer.track_running_stats
        own_tensors = own("weight") and own("bias") and own("running_mean", tracked) and own("running_var", tracked)
        batch = layer.training or layer.running_mean is None
        settings = (batch, layer.momentum or 0.0, layer.eps)
        if not own_tensors or (given["training"], given["momentum"], given["eps"]) != settings:
            return None
        counters = _counters(node.graph, f"{name}.num_batches_tracked")
        counted = layer.training and layer.track_running_stats and layer.num_batches_tracked is not None
        return (normalisation, [*counters, *_assertions(given["input"])]) if len(counters) == counted else None
    return None


def _pair(value: Any) -> Any:
    return (value, value) if isinstance(value, int) else value


def _counters(graph: fx.Graph, name: str) -> list[fx.Node]:
    """Nodes that add 1 to a tensor of the module."""
    adding = (node for node in graph.nodes if node.op == "call_method" and node.target == "add_" and not node.users)
    return [n for n in adding if getattr(n.args[0], "target", None) == name and n.args[1:] == (1,) and not n.kwargs]


def _assertions(x: fx.Node) -> list[fx.Node]:
    """Nodes that assert that ``x`` has four dimensions."""
    asked = [user for user in x.users if (user.target, user.args[1:]) in ((getattr, ("ndim",)), ("dim", ()))]
    compared = [user for node in asked for user in node.users if (user.target, user.args[1:]) == (operator.eq, (4,))]
    return [user for node in compared for user in node.users if user.target is torch._assert]


# --- norms of somebody's own ------------------------------------------------------------------------------------------


def affine_core(nodes: list[fx.Node], layer: nn.Module, name: str) -> Optional[tuple[fx.Node, Any, AffineCore]]:
    """The node, of these, that is ``x * scale + shift``, both made of ``layer``'s tensors alone; x; and its core."""
    constant: set[Any] = set()
    for node in nodes:
        given = node.args[:1] if _is_cast(node) else node.all_input_nodes
        plain = node.op in ("call_function", "call_method") and bool(given) and not written(node, None)
        if node.op == "get_attr" or (plain and constant.issuperset(given)):
            constant.add(node)
    for node in nodes:
        if node.target is F.batch_norm:
            return _frozen(node, layer, name)
        if not is_addition(node):
            continue
        operands: Any = node.args
        for product, shift in (operands, operands[::-1]):
            multiplied = isinstance(product, fx.Node) and product.target in (operator.mul, torch.mul, "mul")
            if not multiplied or shift not in constant or len(product.users) != 1 or len(product.args) != 2:
                continue
            for x, scale in (product.args, product.args[::-1]):
                if scale in constant and isinstance(x, fx.Node) and x not in constant:
                    function = _function([one for one in nodes if one in constant], scale, shift, name)
                    casts = [one for one in nodes if one in constant and _is_cast(one)]
                    channels = _channels(function, layer) if set(casts) in ({scale, shift}, set()) else 0
                    return (node, x, AffineCore(function, channels, not casts)) if channels else None
    return None


def _frozen(node: fx.Node, layer: nn.Module, name: str) -> Optional[tuple[fx.Node, Any, AffineCore]]:
    """The same of a batch norm by running statistics that is no ``nn.BatchNorm2d``'s."""
    given = _batch_norm(*node.args, **node.kwargs)
    tensors = [given[key] for key in ("running_mean", "running_var", "weight", "bias")]
    if given["training"] or not all(isinstance(one, fx.Node) and one.op == "get_attr" for one in tensors):
        return None
    mean, variance, weight, bias = (str(one.target).removeprefix(f"{name}.") for one in tensors)

    def function(owner: Any, eps: float = given["eps"]) -> tuple[Tensor, Tensor]:
        scale = getattr(owner, weight) * (getattr(owner, variance) + eps).rsqrt()
        shift = getattr(owner, bias) - getattr(owner, mean) * scale
        return scale.view(1, -1, 1, 1), shift.view(1, -1, 1, 1)

    return node, given["input"], AffineCore(function, getattr(layer, weight).numel(), widens=False)


def agree(one: AffineCore, other: AffineCore, layer: nn.Module) -> bool:
    """Whether two cores compute the same of any tensors like those of ``layer``."""
    generator = torch.Generator().manual_seed(0)
    tensors = (*layer._parameters.items(), *layer._buffers.items())
    drawn = {k: torch.rand(t.shape, dtype=torch.float64, generator=generator) for k, t in tensors if t is not None}
    owner: Any = SimpleNamespace(**drawn)
    pairs = zip(one.function(owner), other.function(owner))
    return one.widens == other.widens and all(
        torch.allclose(a.flatten(), b.flatten(), rtol=1e-12, atol=0.0) for a, b in pairs
    )


def _is_cast(node: fx.Node) -> bool:
    """Whether a node casts to the dtype of another."""
    dtype = node.args[1] if node.op == "call_method" and node.target == "to" and len(node.args) == 2 else None
    asked = isinstance(dtype, fx.Node) and dtype.target is getattr and dtype.args[1:] == ("dtype",)
    return asked and not node.kwargs


def _function(nodes: Iterable[fx.Node], scale: Any, shift: Any, name: str) -> Callable[[nn.Module], Any]:
    """Of the module called ``name``: scale and shift."""
    graph = fx.Graph()
    owner = graph.placeholder("owner")
    made: dict[fx.Node, fx.Node] = {}
    for node in nodes:
        if node.op == "get_attr":
            made[node] = graph.call_function(getattr, (owner, str(node.target).removeprefix(f"{name}.")))
        elif _is_cast(node):
            made[node] = made[node.args[0]]  # type: ignore[index]
        else:
            made[node] = graph.node_copy(node, made.__getitem__)
    graph.output((made[scale], made[shift]))
    graph.eliminate_dead_code()
    return partial(compile_graph(graph, "affine")[0], None)


def _channels(function: Callable, layer: nn.Module) -> int:
    """How many numbers scale and shift have, if there is one for each channel; else 0."""
    with torch.no_grad():
        scale, shift = function(layer)
    k = scale.numel()
    return k if {tuple(scale.shape), tuple(shift.shape)} <= {(1, k, 1, 1), (k, 1, 1)} else 0
