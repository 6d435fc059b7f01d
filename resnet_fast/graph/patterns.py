"""Where in a graph fused ops fit: ``conv -> batch norm [-> add] [-> ReLU]``, the stem, the global average pool, the
head."""

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import fx, nn

from resnet_fast.graph import functional
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
from resnet_fast.graph.tracing import called, writes

_RELU_FUNCTIONS = {F.relu, F.relu_, torch.relu, torch.relu_}
_ADDITIONS = {
    operator.add: operator.add,
    operator.iadd: operator.iadd,
    torch.add: operator.add,
    "add": operator.add,
    "add_": operator.iadd,
}
_FLATTENING: list[tuple[tuple, dict]] = [
    *((given, {}) for given in ((1,), (1, -1), (1, 3))),
    *(((), {"start_dim": 1, **end}) for end in ({}, {"end_dim": -1}, {"end_dim": 3})),
]  # arguments of ``flatten`` that make [N, C * H * W] of [N, C, H, W]


@dataclass(frozen=True)
class Step:
    """One fused op of a program, for people: ``conv1+bn1+relu``."""

    op: str
    parts: tuple[str, ...]
    conv: Optional[Path] = None

    def __str__(self) -> str:
        return "+".join(self.parts)


@dataclass
class Match:
    step: Step
    nodes: list[fx.Node]  # in order; the last one is replaced
    parts: dict[Path, str]
    target: Callable
    args: tuple  # graph nodes, and names of children
    kwargs: dict[str, Any]


class Matcher:
    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.taken: set[fx.Node] = set()  # nodes of matches found so far

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
        step = Step("global_avg_pool", (str(node.target),))
        return Match(step, [node], {path_of(node): "global pool"}, functional.global_avg_pool, node.args, {})

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
        step = Step("head", (*match.step.parts, flattened, *names))
        return Match(step, nodes, parts, functional.head, (*pool_node.args, names), {})

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
            add = _ADDITIONS[follower.target]
            residual = second if first is chain else first
            # x += conv(...) writes to x, which others may see: only the convolution's own result may be overwritten.
            own = first is chain or add is operator.add
            if own and isinstance(residual, fx.Node) and residual is not chain:
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
                    step = Step("stem", (*names, str(pool_node.target)), path_of(conv_node))
                    return Match(step, nodes, parts, functional.stem, inputs, {})
        step = Step("conv_bn_act", tuple(names), path_of(conv_node))
        kwargs: dict[str, Any] = {"relu": relu}
        if residual is not None:
            kwargs |= {"residual": residual, "inplace_add": add is operator.iadd}
        return Match(step, nodes, parts, functional.conv_bn_act, inputs, kwargs)


def is_addition(node: fx.Node) -> bool:
    plain = len(node.args) == 2 and not node.kwargs
    return plain and node.op in ("call_function", "call_method") and node.target in _ADDITIONS


def path_of(node: fx.Node) -> Path:
    return tuple(str(node.target).split("."))


def _harmless(node: fx.Node, child: Optional[nn.Module]) -> bool:
    """Whether a node surely writes to none of its inputs, so that a convolution may move past it."""
    known = child is None or type(child).__module__.startswith("torch.nn.") or isinstance(child, NORMS)
    return known and not writes(node, child)


def matches(module: nn.Module, graph: fx.Graph, training: bool = False) -> list[Match]:
    matcher = Matcher(module)
    order = {node: i for i, node in enumerate(graph.nodes)}
    nodes = list(graph.nodes)
    found: list[Match] = []
    for node in nodes:
        match = matcher.conv(node) or (not training and matcher.head(node)) or matcher.global_pool(node)
        if match is None:
            continue
        between = nodes[order[match.nodes[0]] : order[match.nodes[-1]]]
        if all(n in match.nodes or _harmless(n, matcher.child(n)) for n in between):
            found.append(match)
            matcher.taken.update(match.nodes)
    return found


# --- residual blocks --------------------------------------------------------------------------------------------------


def chains(module: nn.Module, graph: fx.Graph, found: list[Match]) -> list[Match]:
    """The matches in training mode: convolutions put together to the chains of ``ops/block_passes.py``, with their
    shortcuts."""
    matcher = Matcher(module)
    order = {node: i for i, node in enumerate(graph.nodes)}
    convs = [match for match in found if match.step.conv]
    by_first = {match.nodes[0]: match for match in convs}
    by_last: dict[Any, Match] = {match.nodes[-1]: match for match in convs}
    following = {id(match): after for match in convs if (after := _following(matcher, match, by_first))}
    followers = {id(link.match) for link in following.values()}

    rows: list[tuple[list[Match], list[_Link]]] = []
    for match in convs:
        if id(match) in followers:
            continue
        row, links = [match], []
        while link := following.get(id(row[-1])):
            row.append(link.match)
            links.append(link)
        rows.append((row, links))
    shortcuts: dict[int, Match] = {}  # by the row's last match
    for row, _ in rows:
        shortcut = by_last.get(row[-1].kwargs.get("residual"))
        if shortcut is not None and id(shortcut) not in followers and _linear(shortcut) and _read_once(shortcut):
            shortcuts[id(row[-1])] = shortcut

    chained: list[Match] = []
    alone = {id(match) for match in shortcuts.values()}
    for row, links in rows:
        if id(row[0]) in alone:
            continue
        chain = _chain(matcher, row, links, shortcuts.get(id(row[-1])))
        if _movable(matcher, order, chain.nodes):
            chained.append(chain)
            continue
        singles = [_chain(matcher, [match], [], None) for match in (*row, *filter(None, [shortcuts.get(id(row[-1]))]))]
        chained += [single for single in singles if _movable(matcher, order, single.nodes)]
    return [*(match for match in found if not match.step.conv), *chained]


@dataclass
class _Link:
    """From a convolution's ReLU to the next convolution."""

    match: Match
    parts: dict[Path, str]  # identities on the way
    nodes: list[fx.Node]


def _following(matcher: Matcher, match: Match, by_first: dict[fx.Node, Match]) -> Optional[_Link]:
    """The convolution that alone reads a match's ReLU."""
    if match.target is not functional.conv_bn_act or not match.kwargs["relu"] or _added(match):
        return None
    parts: dict[Path, str] = {}
    passed: list[fx.Node] = []
    reader = matcher.next(match.nodes[-1], parts, passed)
    return _Link(by_first[reader], parts, passed) if reader in by_first else None


def _linear(match: Match) -> bool:
    return not match.kwargs.get("relu", True) and not _added(match)


def _read_once(match: Match) -> bool:
    return len(match.nodes[-1].users) == 1


def _added(match: Match) -> bool:
    return match.kwargs.get("residual") is not None


def _chain(matcher: Matcher, row: list[Match], links: list[_Link], shortcut: Optional[Match]) -> Match:
    first, last = row[0], row[-1]
    x = first.args[0]
    residual, identity = last.kwargs.get("residual"), False
    if shortcut is not None:
        residual = None if shortcut.args[0] is x else shortcut.args[0]
    elif residual is x:
        residual, identity = None, True
    members = [*row, *([shortcut] if shortcut else [])]
    nodes = [node for match in members for node in match.nodes] + [node for link in links for node in link.nodes]
    parts = {path: kind for link in links for path, kind in link.parts.items()}
    for match in members:
        kinds = {"norm": "training norm", "stem conv": "conv"}
        parts |= {path: kinds.get(kind, kind) for path, kind in match.parts.items()}
    names = [name for match in members for name in match.step.parts]

    pool = last.target is functional.stem
    relu = pool or last.kwargs["relu"]
    if relu and not pool and not _added(last):
        pool_node = matcher.next(last.nodes[-1], {}, [])
        child = matcher.child(pool_node) if pool_node is not None else None
        if pool_node is not None and child is not None and not stem_pool_refusal(child):
            pool = True
            nodes.append(pool_node)
            parts[path_of(pool_node)] = "stem pool"
            names.append(str(pool_node.target))

    convs = tuple(str(match.args[1]) for match in members)
    norms = tuple(str(match.args[2]) for match in members)
    kwargs = {
        "residual": residual,
        "identity": identity,
        "projection": shortcut is not None,
        "relu": relu,
        "pool": pool,
        "inplace_add": last.kwargs.get("inplace_add", False),
    }
    step = Step("residual_block", tuple(names), first.step.conv)
    return Match(step, nodes, parts, functional.residual_block, (x, convs, norms), kwargs)


def _movable(matcher: Matcher, order: dict[fx.Node, int], nodes: list[fx.Node]) -> bool:
    """Whether all nodes may run where the last of them does. Sorts them.

    Not past another call of one of their norms: running statistics depend on the order.
    """
    nodes.sort(key=order.__getitem__)
    norms = {node.target for node in nodes if isinstance(matcher.child(node), NORMS)}
    every = list(order)
    between = [node for node in every[order[nodes[0]] : order[nodes[-1]]] if node not in nodes]
    return all(node.target not in norms and _harmless(node, matcher.child(node)) for node in between)
