"""Residual blocks in training: convolutions in a row, found one by one, put together with their shortcuts."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Optional

from torch import fx, nn

from resnet_fast.graph import functional
from resnet_fast.graph.conditions import IN_TRAINING, Path, exact, stem_pool_refusal
from resnet_fast.graph.patterns import FusedOp, Match, Matcher
from resnet_fast.graph.tracing import path_of


def blocks(module: nn.Module, graph: fx.Graph, found: list[Match]) -> list[Match]:
    """The matches in training mode: convolutions put together to blocks (``ops/block.py``), with their shortcuts."""
    matcher = Matcher(module, graph)
    order = {node: i for i, node in enumerate(graph.nodes)}
    convs = [match for match in found if match.op.conv]
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
    alone: set[int] = set()
    for row, _ in rows:
        end, identities = _before_identities(matcher, row[-1].kwargs.get("residual"))
        shortcut = by_last.get(end)
        if shortcut is not None and id(shortcut) not in followers and _linear(shortcut) and _read_once(shortcut):
            parts = {path_of(node): "identity" for node in identities}
            nodes = [*shortcut.nodes, *identities]
            shortcuts[id(row[-1])] = replace(shortcut, nodes=nodes, parts=shortcut.parts | parts)
            alone.add(id(shortcut))

    joined: list[Match] = []
    for row, links in rows:
        if id(row[0]) in alone:
            continue
        shortcut = shortcuts.get(id(row[-1]))
        for way in _ways(row, links, shortcut):
            made = [_block(matcher, *one) for one in way if _norms_in_order(order, *one)]
            movable = [block for block in made if _movable(matcher, order, block.nodes)]
            if len(movable) == len(way):
                break
        joined += movable
    return [*(match for match in found if not match.op.conv), *joined]


@dataclass
class _Link:
    """From a convolution's ReLU to the next convolution."""

    match: Match
    parts: dict[Path, str]  # identities on the way
    nodes: list[fx.Node]


def _before_identities(matcher: Matcher, node: Any) -> tuple[Any, list[fx.Node]]:
    """What went into a row of identities that ends in a node and that nothing else reads, and the row."""
    passed: list[fx.Node] = []
    while isinstance(node, fx.Node) and len(node.users) == 1 and (child := matcher.child(node)) is not None:
        if exact(nn.Identity)(child):
            break
        passed.insert(0, node)
        node = node.args[0]
    return node, passed


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


def _block(matcher: Matcher, row: list[Match], links: list[_Link], shortcut: Optional[Match]) -> Match:
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
        parts |= {path: IN_TRAINING.get(kind, kind) for path, kind in match.parts.items()}
    names = [name for match in members for name in match.op.parts]

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

    convs = tuple(match.args[1] for match in members)
    norms = tuple(match.args[2] for match in members)
    kwargs = {
        "residual": residual,
        "identity": identity,
        "projection": shortcut is not None,
        "relu": relu,
        "pool": pool,
        "inplace_add": last.kwargs.get("inplace_add", False),
    }
    op = FusedOp("residual_block", tuple(names), first.op.conv)
    return Match(op, nodes, parts, functional.residual_block, (x, convs, norms), kwargs)


def _ways(row: list[Match], links: list[_Link], shortcut: Optional[Match]) -> Iterator[list[tuple]]:
    """How a row and its shortcut may be put together: as one block, as two, and each convolution alone."""
    yield [(row, links, shortcut)]
    beside: list[tuple] = [] if shortcut is None else [([shortcut], [], None)]
    if beside:
        yield [(row, links, None), *beside]
    yield [*(([match], [], None) for match in row), *beside]


def _norms_in_order(order: dict[fx.Node, int], row: list[Match], links: list[_Link], shortcut: Optional[Match]) -> bool:
    """Whether a batch norm that several of a block's convolutions share is called in the block's order.

    Its running statistics depend on that.
    """
    calls: dict[Any, list[int]] = {}
    for match in (*row, *filter(None, [shortcut])):
        if isinstance(match.args[2], str):
            calls.setdefault(match.args[2], []).append(order[match.nodes[0]])
    return all(places == sorted(places) for places in calls.values())


def _movable(matcher: Matcher, order: dict[fx.Node, int], nodes: list[fx.Node]) -> bool:
    """Whether all nodes may run where the last of them does. Sorts them.

    Not past another call of one of their norms: running statistics depend on the order.
    """
    nodes.sort(key=order.__getitem__)
    norms = {node.target for node in nodes if matcher.norm(node) is not None}
    every = list(order)
    between = [node for node in every[order[nodes[0]] : order[nodes[-1]]] if node not in nodes]
    return all(node.target not in norms and matcher.may_pass(nodes, node) for node in between)
