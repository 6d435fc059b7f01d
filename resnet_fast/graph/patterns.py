"""Where in a graph fused ops fit: ``conv [-> batch norm] [-> add] [-> ReLU]``, the stem, the global average pool, the
head."""

import operator
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import fx, nn

from resnet_fast.graph import functional
from resnet_fast.graph.aliasing import written
from resnet_fast.graph.conditions import (
    NORMS,
    REFUSALS,
    Path,
    exact,
    flatten_refusal,
    global_pool_refusal,
    head_refusals,
    is_stem_conv,
    stem_pool_refusal,
)
from resnet_fast.graph.cores import CORE, AffineCore, Owned, convolution, normalisation
from resnet_fast.graph.opening import Opener
from resnet_fast.graph.residual_blocks import depths, main_path
from resnet_fast.graph.tracing import ADDITIONS, Untraceable, called, is_addition, path_of, trace

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
        self._known: dict[nn.Module, bool] = {}  # whether children only read
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

    def may_pass(self, nodes: list[fx.Node], node: fx.Node) -> bool:
        """Whether ``nodes``, layers of a match, may run after a node that is between them.

        A child of unknown code may write to what it is given, so that must not be what the layers read.
        """
        child = self.child(node)
        if harmless(node, child) or (child is not None and self._only_reads(child)):
            return True
        if child is None or set(child.modules()) & {self.child(one) for one in nodes}:
            return False
        read = {given for one in nodes for given in one.all_input_nodes if given not in nodes and given < node}
        return not self._memory(read) & self._memory(node.all_input_nodes)

    def _only_reads(self, child: nn.Module) -> bool:
        if child not in self._known:
            try:
                graph = trace(child, child.training, Opener)[1]
                self._known[child] = all(harmless(node, called(child, node)) for node in graph.nodes)
            except Untraceable:
                self._known[child] = False
        return self._known[child]

    def _memory(self, nodes: Iterable[fx.Node]) -> set[fx.Node]:
        """The nodes whose results' memory some nodes' results may be in."""
        found, left = set(), list(nodes)
        while left:
            node = left.pop()
            fresh = self.norm(node) is not None or self.conv_kind(node)
            left += () if fresh or node in found else node.all_input_nodes
            found.add(node)
        return found

    def is_main_path(self, end: fx.Node, other: Any) -> bool:
        """Whether a convolution's result, and not the other operand of its addition, is the block's main path."""
        operands = (end, other)
        ends = main_path(operands, lambda node: node is end or self.ends_in_convolution(node), self.depths.__getitem__)
        return ends == operands

    def ends_in_convolution(self, node: Any) -> bool:
        """Whether ``conv`` would find a convolution, and its batch norm, before ``node``, and nothing else reads it."""
        if not isinstance(node, fx.Node):
            return False
        child = self.child(node)
        while child is not None and not exact(nn.Identity)(child) and len(node.users) == 1:
            node = node.all_input_nodes[0]
            child = self.child(node)
        conv_node = node.args[0] if self.norm(node) and len(node.users) == 1 else node
        return isinstance(conv_node, fx.Node) and len(conv_node.users) == 1 and bool(self.conv_kind(conv_node))

    def conv_kind(self, node: fx.Node) -> str:
        """What a convolution must still be when its op runs (a key of ``REFUSALS``); '': there is no op for it."""
        child, core = self.child(node), node.meta.get(CORE)
        if child is None or core not in (None, convolution):
            return ""
        kind = "conv" if core is None or type(child) is nn.Conv2d else "own conv"
        return "" if REFUSALS[kind](child) else kind

    def norm(self, node: fx.Node) -> Optional[tuple[str, Any]]:
        """The same of a norm that an op may compute, and what stands for it in a match; None: it is none."""
        child, core = self.child(node), node.meta.get(CORE)
        if isinstance(core, AffineCore):
            return "opened", Owned(core, str(node.target))
        if type(child) in NORMS:
            return "norm", str(node.target)
        return ("own norm", str(node.target)) if core is normalisation else None

    def is_relu(self, node: Optional[fx.Node]) -> bool:
        if node is None:
            return False
        child = self.child(node)
        if child is not None:
            return not exact(nn.ReLU)(child)
        return node.target in _RELU_FUNCTIONS or (node.op == "call_method" and node.target in ("relu", "relu_"))

    def ways(self, node: fx.Node, training: bool) -> Iterator[Match]:
        """The ops that may begin with a node, the best first."""
        makers = (self.conv, partial(self.conv, whole=False), *(() if training else (self.head,)), self.global_pool)
        return (match for make in makers if (match := make(node)) is not None)

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

    def conv(self, conv_node: fx.Node, whole: bool = True) -> Optional[Match]:
        """The op that begins with a convolution, if there is one; not ``whole``: without what follows the norm."""
        conv: Any = self.child(conv_node)
        kind = self.conv_kind(conv_node)
        if not kind or len(conv_node.args) != 1 or conv_node.kwargs:
            return None
        parts: dict[Path, str] = {path_of(conv_node): kind}
        nodes = [conv_node]
        names = [str(conv_node.target)]
        end, norm = conv_node, None
        passed: list[fx.Node] = []
        tail_parts: dict[Path, str] = {}
        follower = self.next(conv_node, tail_parts, passed)
        found = self.norm(follower) if follower is not None else None
        if follower is not None and found is not None and _fits(conv, found[1]):
            parts |= tail_parts
            parts[path_of(follower)], norm = found
            nodes += [*passed, follower]
            names.append(str(follower.target))
            end = follower
            passed, tail_parts = [], {}
            follower = self.next(end, tail_parts, passed)
        inputs = (conv_node.args[0], conv_node.target, norm)
        residual, add = None, None
        if not whole:
            follower = None
        if follower is not None and is_addition(follower):
            chain = passed[-1] if passed else end
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
        if norm is None and residual is None and not relu:
            return None
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


def _fits(conv: nn.Conv2d, norm: Any) -> bool:
    """Whether a norm of somebody's own has as many channels as the convolution before it."""
    return not isinstance(norm, Owned) or norm.core.channels == conv.out_channels


def harmless(node: fx.Node, child: Optional[nn.Module]) -> bool:
    """Whether a node surely writes to none of its inputs, and switches nothing."""
    if CORE in node.meta:
        return True
    known = child is None or type(child).__module__.startswith("torch.nn.") or isinstance(child, NORMS)
    return known and not written(node, child) and not (node.op == "call_function" and node.is_impure())


def matches(module: nn.Module, graph: fx.Graph, training: bool = False) -> list[Match]:
    matcher = Matcher(module, graph)
    order = {node: i for i, node in enumerate(graph.nodes)}
    nodes = list(graph.nodes)
    found: list[Match] = []
    for node in nodes:
        for match in matcher.ways(node, training):
            between = nodes[order[match.nodes[0]] : order[match.nodes[-1]]]
            if all(n in match.nodes or matcher.may_pass(match.nodes, n) for n in between):
                found.append(match)
                matcher.taken.update(match.nodes)
                break
    return found
