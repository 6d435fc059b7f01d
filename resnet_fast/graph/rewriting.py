"""A traced graph with fused ops in place of what they compute."""

from typing import Any, Optional

from torch import fx, nn

from resnet_fast.graph.cores import Owned, close
from resnet_fast.graph.layout import channels_last, draws, laid_out_like, reads_layout
from resnet_fast.graph.patterns import Match


def rewrite(
    module: nn.Module, graph: fx.Graph, matches: list[Match], training: bool, given: Optional[fx.Node] = None
) -> None:
    """Change the graph of ``module``: an op for each match; the input is laid out once, the results as it came.

    Args:
        training: the mode that the graph is for.
        given: the input that counts; without it, the first one.
    """
    replaced: dict[fx.Node, fx.Node] = {}  # the inputs of a match may have been replaced since it was found
    for match in matches:
        last = match.nodes[-1]
        with graph.inserting_before(last):
            args = _with_children(graph, match.args)
            args, kwargs = fx.map_arg((args, match.kwargs), lambda node: replaced.get(node, node))
            fused = graph.call_function(match.target, args, kwargs)
        last.replace_all_uses_with(fused)
        replaced[last] = fused
        for node in reversed(match.nodes):
            graph.erase_node(node)
    close(graph)

    given = given or next(node for node in graph.nodes if node.op == "placeholder")
    with graph.inserting_before(next(node for node in graph.nodes if node.op != "placeholder")):
        entry = graph.call_function(channels_last, (given,))
    given.replace_all_uses_with(entry, delete_user_cb=lambda user: user is not entry)

    def restored(value: fx.Node) -> fx.Node:
        return given if value is entry else graph.call_function(laid_out_like, (value, given))

    moved: dict[fx.Node, fx.Node] = {}  # others have views of what these were changed to, or may have written to it
    for node in list(graph.nodes):
        _change_arguments(node, moved)
        if node.op == "output" or reads_layout(module, node, training) or draws(module, node, training):
            with graph.inserting_before(node):
                laid_out = {value: restored(value) for value in node.all_input_nodes}
            _change_arguments(node, laid_out)
            moved |= laid_out


def _change_arguments(node: fx.Node, others: dict[fx.Node, fx.Node]) -> None:
    node.args, node.kwargs = fx.map_arg((node.args, node.kwargs), lambda value: others.get(value, value))


def _with_children(graph: fx.Graph, args: tuple) -> tuple:
    """The arguments of a match, children instead of their names."""

    def child(arg: Any) -> Any:
        if isinstance(arg, tuple):
            return _with_children(graph, arg)
        if isinstance(arg, Owned):
            return graph.call_function(arg.core, (graph.get_attr(arg.name),))
        return graph.get_attr(arg) if isinstance(arg, str) else arg

    return tuple(map(child, args))
