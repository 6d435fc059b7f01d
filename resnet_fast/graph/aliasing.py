"""Which nodes of a graph write to memory that others see. A program may copy what a view is made of, or moves past it.

What functions write to, and of what their results may be views, PyTorch's own schemas say.
"""

import functools
import operator
from collections.abc import Collection, Iterator
from typing import Any, Optional

import torch
from torch import fx, nn
from torch.utils._pytree import tree_leaves

from resnet_fast.graph.layout import reads_layout, unknown_code
from resnet_fast.graph.tracing import IN_PLACE, called

_METHODS = {f"__{operation.__name__}__" for operation in (*IN_PLACE, operator.setitem)}
_VIEWS = {"data", "T", "H", "mT", "mH", "real", "imag", "grad"}
_SAME_MEMORY = (nn.Identity, nn.modules.dropout._DropoutNd, nn.Flatten, nn.Unflatten)


@functools.cache
def _schema(name: str) -> tuple[frozenset, bool]:
    """The arguments, by number or name, that an operator writes to; whether its result may be a view of one."""
    packet = getattr(torch.ops.aten, name, None) if not name.startswith("__") else None
    if packet is None:
        return frozenset(), True
    schemas = [getattr(packet, overload)._schema for overload in packet.overloads()]
    arguments = [(i, arg) for schema in schemas for i, arg in enumerate(schema.arguments) if arg.is_write]
    written = {arg.name for _, arg in arguments} | {i for i, arg in arguments if not arg.kwarg_only}
    plain = [schema for schema in schemas if not any(arg.is_out for arg in schema.arguments)]
    views = any(result.alias_info is not None for schema in plain for result in schema.returns)
    return frozenset(written), views or "dropout" in name


def _nodes(value: Any) -> Iterator[fx.Node]:
    return (leaf for leaf in tree_leaves(value) if isinstance(leaf, fx.Node))


def _name(node: fx.Node) -> str:
    return str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")


def written(node: fx.Node, child: Optional[nn.Module]) -> list[fx.Node]:
    """What a node is known to write to, of its arguments."""
    first = list(_nodes(node.args[:1]))
    if node.op == "call_module":
        return first if getattr(child, "inplace", False) else []
    if node.op not in ("call_function", "call_method"):
        return []
    if node.target in (*IN_PLACE, operator.setitem, *_METHODS) or _in_place(node):
        return first
    places, _ = _schema(_name(node))
    by_number = [node.args[place] for place in places if isinstance(place, int) and place < len(node.args)]
    return list(_nodes([*by_number, *(node.kwargs[name] for name in places if name in node.kwargs)]))


def _in_place(node: fx.Node) -> bool:
    name = _name(node)
    if name.endswith("_") and not name.endswith("__"):
        return True
    position = _position_of_inplace(node.target) if node.op == "call_function" else None
    given = position is not None and position < len(node.args) and node.args[position]
    return bool(given or node.kwargs.get("inplace", False))


@functools.cache
def _position_of_inplace(function: Any) -> Optional[int]:
    code = getattr(function, "__code__", None)
    names = code.co_varnames[: code.co_argcount] if code is not None else ()
    return names.index("inplace") if "inplace" in names else None


def _shared(node: fx.Node, child: Optional[nn.Module]) -> list[fx.Node]:
    """The arguments whose memory the result may have."""
    if node.op == "call_module":
        own = type(child).__module__.startswith("torch.nn.") and not isinstance(child, _SAME_MEMORY)
        return [] if own and not getattr(child, "inplace", False) else list(_nodes((node.args, node.kwargs)))
    if node.op not in ("call_function", "call_method"):
        return []
    targets = written(node, child)
    if node.target is getattr and node.args[1] not in _VIEWS:
        return []
    if targets or node.target in (operator.getitem, getattr):
        return targets or list(_nodes(node.args[:1]))
    arithmetic = getattr(node.target, "__module__", "") == "_operator"
    return [] if arithmetic or not _schema(_name(node))[1] else list(_nodes((node.args, node.kwargs)))


class _Memory:
    """Which nodes may share memory, filled in the order of a graph."""

    def __init__(self, module: nn.Module, fresh: Collection[nn.Module]) -> None:
        self.module, self.fresh = module, fresh
        self.near: dict[fx.Node, set[fx.Node]] = {}  # nodes -> those that may have the same memory
        self.tensor: dict[fx.Node, fx.Node] = {}  # nodes -> the first one that is the same tensor

    def add(self, node: fx.Node) -> list[fx.Node]:
        """Gives what the node is known to write to."""
        child = called(self.module, node)
        targets = written(node, child)
        shared = [] if child in self.fresh else _shared(node, child)
        group = {node}.union(*(self.near[one] for one in shared))
        self.near |= dict.fromkeys(group, group)
        returned = len(targets) == 1 and node.target not in (operator.setitem, "__setitem__")
        self.tensor[node] = self.tensor[targets[0]] if returned else node
        return targets


def hidden_write(
    module: nn.Module, graph: fx.Graph, image: Optional[fx.Node] = None, fresh: Collection[nn.Module] = ()
) -> str:
    """What a graph writes to that others see otherwise than through the node that is written to, or ''.

    Code that is not known may write to what it is given.

    Args:
        image: the input that counts, where others are tensors that the graph may write to; without it, all do.
        fresh: children whose results are known to share no memory with their inputs.
    """
    order = {node: i for i, node in enumerate(graph.nodes)}
    last_use = {node: max(map(order.__getitem__, node.users), default=-1) for node in graph.nodes}
    memory = _Memory(module, fresh)
    for node in graph.nodes:
        targets = memory.add(node)
        unknown = list(_nodes((node.args, node.kwargs))) if not targets and unknown_code(module, node) else []
        for target in (*targets, *unknown):
            near = memory.near[target] - {node}
            others = (one for one in near if one.op in ("placeholder", "get_attr"))
            given = next(others, None) if image is None else image if image in near else None
            if target in targets and given is not None:
                return "its input" if given.op == "placeholder" else f"its attribute {given.target!r}"
            tensor = memory.tensor[target]
            # A program gives code that is not known the same tensor as it does what makes views: see ``rewriting.py``.
            views = {one for one in near if reads_layout(module, one)} | {target}
            same = views if target in unknown else {one for one in near if memory.tensor[one] is tensor}
            if any(last_use[one] > order[node] for one in near - same):
                return "memory that other tensors share"
    return ""


def gives_its_input(module: nn.Module, graph: fx.Graph) -> bool:
    """Whether a result may have an input's memory."""
    memory = _Memory(module, ())
    for node in graph.nodes:
        if node.op == "output":
            near = set[fx.Node]().union(*(memory.near[one] for one in node.all_input_nodes))
            return any(one.op in ("placeholder", "get_attr") for one in near)
        memory.add(node)
    raise AssertionError("a graph ends in its output")
