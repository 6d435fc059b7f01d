"""Where in a graph fused ops fit: ``conv -> batch norm [-> add] [-> ReLU]``, the stem, the global average pool, the
head."""

import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import fx, nn

from resnet_fast.graph import functional
from resnet_fast.graph.aliasing import written
from resnet_fast.graph.conditions import (
    NORMS,
    Path,
    conv_refusal,
    exact,
    flatten_refusal,
    global_pool_refusal,
    head_refusals,
    is_stem_conv,
    stem_pool_refusal,
)
from resnet_fast.graph.residual_blocks import depths, main_path
from resnet_fast.graph.tracing import ADDITIONS, called, is_addition

_RELU_FUNCTIONS = {F.relu, F.relu_, torch.relu, torch.relu_}
_FLATTENING: list[tuple[tuple, dict]] = [
    *((given, {}) for given in ((1,), (1, -1), (1, 3))),
    *(((), {"start_dim": 1, **end}) for end in ({}, {"end_dim": -1}, {"end_dim": 3})),
]  # arguments of ``flatten`` that make [N, C * H * W] of [N, C, H, W]


@dataclass(frozen=True)
class FusedOp:
    """One fused op of a program, for people: ``conv1+bn1+relu``."""

    op: str
    parts: tuple[str, ...]
    conv: Optional[Path] = None

    def __str__(self) -> str:
        return "+".join(self.parts)


@dataclass
class Match:
    op: FusedOp
    nodes: list[fx.Node]  # in order; the last one is replaced
    parts: dict[Path, str]
    target: Callable
    args: tuple  # graph nodes, and names of children
    kwargs: dict[str, Any]


class Matcher:
    def __init__(self, module: nn.Module, graph: fx.Graph) -> None:
        self.module = module
        self.graph = graph
        self.taken: set[fx.Node] = set()  # nodes of matches found so far

    @cached_property
    def depths(self) -> dict[fx.Node, int]:
        return depths(self.module, self.graph)

    def child(self, node: fx.Node) -> Optional[nn.Module]:
        return called(self.module, node)

    def next(self, node: fx.Node, parts: dict[Path, str], passed: list[fx.Node]) -> Optional[fx.Node]:
        """The only user of a node, identities skipped (and noted); None if there are several."""
        while True:
            if len(node.users) != 1:
                return None
            user = next(iter(node.users))
            if user.op == "output" or user in self.taken:
                return None
            child = self.child(user)
            if child is None or exact(nn.Identity)(child):
                return user
            parts[path_of(user)] = "identity"
            passed.append(user)
            node = user

    def is_main_path(self, end: fx.Node, other: Any) -> bool:
        """Whether a convolution's result, and not the other operand of its addition, is the block's main path."""
        operands = (end, other)
        ends = main_path(operands, lambda node: node is end or self.ends_in_convolution(node), self.depths.__getitem__)
        return ends == operands

    def ends_in_convolution(self, node: Any) -> bool:
        """Whether ``conv`` would find a convolution and its batch norm before ``node``, and nothing else reads it."""
        if not isinstance(node, fx.Node):
            return False
        norm = self.child(node)
        while norm is not None and not exact(nn.Identity)(norm) and len(node.users) == 1:
            node = node.all_input_nodes[0]
            norm = self.child(node)
        conv_node = node.args[0] if type(norm) in NORMS and len(node.users) == 1 else None
        if not isinstance(conv_node, fx.Node) or len(conv_node.users) != 1:
            return False
        conv = self.child(conv_node)
        return conv is not None and not conv_refusal(conv)

    def is_relu(self, node: Optional[fx.Node]) -> bool:
        if node is None:
            return False
        child = self.child(node)
        if child is not None:
            return not exact(nn.ReLU)(child)
        return node.target in _RELU_FUNCTIONS or (node.op == "call_method" and node.target in ("relu", "relu_"))

    def global_pool(self, node: fx.Node) -> Optional[Match]:
        pool = self.child(node)
        if pool is None or global_pool_refusal(pool):
            return None
        op = FusedOp("global_avg_pool", (str(node.target),))
        return Match(op, [node], {path_of(node): "global pool"}, functional.global_avg_pool, node.args, {})

    def head(self, pool_node: fx.Node) -> Optional[Match]:
        """Global pool, flatten, dropouts, linear layer: what these last are is asked at every call."""
        match = self.global_pool(pool_node)
        if match is None:
            return None
        nodes, parts = [pool_node], match.parts
        flatten = self.next(pool_node, parts, nodes)
        if flatten is None or not self.is_flatten(flatten):
            return None
        nodes.append(flatten)
        if flatten.op == "call_module":
            parts[path_of(flatten)] = "flatten"
        layers: list[fx.Node] = []
        node, linear = flatten, False
        while not linear:
            follower = self.next(node, parts, nodes)
            layer = self.child(follower) if follower is not None else None
            if follower is None or type(layer) not in (nn.Dropout, nn.Linear):
                return None
            layers.append(follower)
            nodes.append(follower)
            node, linear = follower, type(layer) is nn.Linear
        names = tuple(str(layer.target) for layer in layers)
        if any(len(layer.args) != 1 or layer.kwargs for layer in layers) or any(
            head_refusals([self.module.get_submodule(name) for name in names])
        ):
            return None
        flattened = str(flatten.target) if flatten.op == "call_module" else "flatten"
        op = FusedOp("head", (*match.op.parts, flattened, *names))
        return Match(op, nodes, parts, functional.head, (*pool_node.args, names), {})

    def is_flatten(self, node: fx.Node) -> bool:
        """To ``[N, C * H * W]``."""
        child = self.child(node)
        if child is not None:
            return not flatten_refusal(child)
        known = node.target is torch.flatten or (node.op == "call_method" and node.target == "flatten")
        return known and (node.args[1:], dict(node.kwargs)) in _FLATTENING

    def conv(self, conv_node: fx.Node) -> Optional[Match]:
        conv = self.child(conv_node)
        if conv is None or conv_refusal(conv) or len(conv_node.args) != 1 or conv_node.kwargs:
            return None
        parts: dict[Path, str] = {path_of(conv_node): "conv"}
        nodes = [conv_node]
        bn_node = self.next(conv_node, parts, nodes)
        bn = self.child(bn_node) if bn_node is not None else None
        if bn_node is None or type(bn) not in NORMS:
            return None
        parts[path_of(bn_node)] = "norm"
        nodes.append(bn_node)
        names = [str(conv_node.target), str(bn_node.target)]
        inputs = (conv_node.args[0], conv_node.target, bn_node.target)
        residual, add = None, None

        passed: list[fx.Node] = []
        tail_parts: dict[Path, str] = {}
        follower = self.next(bn_node, tail_parts, passed)
        if follower is not None and is_addition(follower):
            chain = passed[-1] if passed else bn_node
            first, second = follower.args
            add = ADDITIONS[follower.target]
            residual = second if first is chain else first
            # x += conv(...) writes to x, which others may see: only the convolution's own result may be overwritten. So
            # what is added to in place ends in the addition; else the block's main path does.
            ends_here = first is chain if add is operator.iadd else self.is_main_path(chain, residual)
            if ends_here and isinstance(residual, fx.Node) and residual is not chain:
                nodes += [*passed, follower]
                parts |= tail_parts
                names.append("add")
                passed, tail_parts = [], {}
                follower = self.next(follower, tail_parts, passed)
            else:
                residual, follower = None, None
        relu = self.is_relu(follower)
        if relu:
            assert follower is not None
            nodes += [*passed, follower]
            parts |= tail_parts
            if follower.op == "call_module":
                parts[path_of(follower)] = "relu"
            names.append("relu")
            if residual is None and is_stem_conv(conv):
                pool_node = self.next(follower, {}, [])
                pool = self.child(pool_node) if pool_node is not None else None
                if pool_node is not None and pool is not None and not stem_pool_refusal(pool):
                    nodes.append(pool_node)
                    parts[path_of(conv_node)] = "stem conv"
                    parts[path_of(pool_node)] = "stem pool"
                    op = FusedOp("stem", (*names, str(pool_node.target)), path_of(conv_node))
                    return Match(op, nodes, parts, functional.stem, inputs, {})
        op = FusedOp("conv_bn_act", tuple(names), path_of(conv_node))
        kwargs: dict[str, Any] = {"relu": relu}
        if residual is not None:
            kwargs |= {"residual": residual, "inplace_add": add is operator.iadd}
        return Match(op, nodes, parts, functional.conv_bn_act, inputs, kwargs)


def path_of(node: fx.Node) -> Path:
    return tuple(str(node.target).split("."))


def harmless(node: fx.Node, child: Optional[nn.Module]) -> bool:
    """Whether a convolution may move past a node: it surely writes to none of its inputs, and switches nothing."""
    known = child is None or type(child).__module__.startswith("torch.nn.") or isinstance(child, NORMS)
    return known and not written(node, child) and not (node.op == "call_function" and node.is_impure())


def matches(module: nn.Module, graph: fx.Graph, training: bool = False) -> list[Match]:
    matcher = Matcher(module, graph)
    order = {node: i for i, node in enumerate(graph.nodes)}
    nodes = list(graph.nodes)
    found: list[Match] = []
    for node in nodes:
        match = matcher.conv(node) or (not training and matcher.head(node)) or matcher.global_pool(node)
        if match is None:
            continue
        between = nodes[order[match.nodes[0]] : order[match.nodes[-1]]]
        if all(n in match.nodes or harmless(n, matcher.child(n)) for n in between):
            found.append(match)
            matcher.taken.update(match.nodes)
    return found
