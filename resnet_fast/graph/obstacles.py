"""Why convolutions of a graph are not part of a fused op, for people."""

from collections.abc import Collection

from torch import fx, nn
from torch.nn.modules.conv import _ConvNd

from resnet_fast.graph.conditions import REFUSALS, training_norm_refusal
from resnet_fast.graph.cores import CORE
from resnet_fast.graph.patterns import Match, Matcher
from resnet_fast.graph.tracing import is_addition


def obstacles(module: nn.Module, graph: fx.Graph, found: Collection[Match], shut: dict[str, str]) -> dict[str, str]:
    """By the name of each convolution that a graph calls and that no match has: what is in the way.

    shut: why children that might have been opened were not.
    """
    matcher = Matcher(module, graph)
    matched = {node for match in found for node in match.nodes}
    said: dict[str, str] = {}
    for node in graph.nodes:
        if isinstance(matcher.child(node), _ConvNd) and node not in matched:
            said.setdefault(str(node.target), _obstacle(matcher, node, matched, shut))
    return said


def told(said: dict[str, str]) -> str:
    """In a row, once for all of which the same is true: ``conv1, conv2: are ...``."""
    names: dict[str, list[str]] = {}
    for name, obstacle in said.items():
        names.setdefault(obstacle, []).append(name)
    return "; ".join(f"{', '.join(of)} {obstacle}" for obstacle, of in names.items())


def _obstacle(matcher: Matcher, node: fx.Node, matched: Collection[fx.Node], shut: dict[str, str]) -> str:
    kind = matcher.conv_kind(node)
    if not kind:
        refusal = REFUSALS["own conv" if CORE in node.meta else "conv"]
        return shut.get(str(node.target)) or refusal(matcher.child(node))  # type: ignore[arg-type]
    if len(node.args) != 1 or node.kwargs:
        return "is called with more than an image"
    follower = matcher.next(node, {}, [])
    if follower is None:
        readers = [user for user in node.users if user.op != "output"]
        if len(node.users) > 1:
            return f"is read by {len(node.users)} others, not by a batch norm, an addition or a ReLU alone"
        return (
            f"is read by {_named(matcher, readers[0])}"
            if readers
            else "is returned: no batch norm, addition or ReLU follows"
        )
    if follower in matched and is_addition(follower):
        return "is added to what another op computes"
    match = matcher.conv(node)
    if match is not None:
        nodes = list(node.graph.nodes)
        between = nodes[nodes.index(node) : nodes.index(match.nodes[-1])]
        unknown = (one for one in between if one not in match.nodes and not matcher.may_pass(match.nodes, one))
        return f"cannot move past {_named(matcher, next(unknown))}, which may write to its input"
    child = matcher.child(follower)
    if isinstance(child, nn.modules.batchnorm._BatchNorm):
        reason = shut.get(str(follower.target)) or training_norm_refusal(child)
        return f"is followed by {follower.target}, which {reason}"
    if is_addition(follower):
        return "is added to in place" if follower.args[0] is not node else "is added to itself or to a number"
    return f"is followed by {_named(matcher, follower)}: no batch norm, addition or ReLU"


def _named(matcher: Matcher, node: fx.Node) -> str:
    child = matcher.child(node)
    if child is not None:
        return f"{node.target} ({type(child).__name__})"
    return str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", str(node.target))
