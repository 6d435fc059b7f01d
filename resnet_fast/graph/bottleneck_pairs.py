"""Bottlenecks in a row: between two of them, two 1x1 convolutions are one op (``functional.conv_chain``).

A bottleneck ends in a 1x1 convolution, the shortcut's addition and a ReLU, and the next one begins with a 1x1
convolution of just that. Each block is a module with a program of its own, so the pair belongs to neither. ``join``
looks in the program of the module that calls them for blocks that feed one another alone, and puts one ``Bottlenecks``
in place of their calls. It is a function of the image and of the blocks, made of the blocks' own programs. Where it
gains nothing or may not stand in for the blocks, each is called as before: on devices without a kernel for the pair,
and when a block has hooks, has changed, or is in training mode.
"""

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple, Optional

import torch
from torch import fx, nn

from resnet_fast.graph import functional
from resnet_fast.graph.conditions import Accelerated, Path, child_at, customised, exact, stock_wanted
from resnet_fast.graph.layout import channels_last, laid_out_like
from resnet_fast.graph.program import Program, kept
from resnet_fast.graph.source import compile_graph
from resnet_fast.graph.tracing import path_of


@dataclass(eq=False)
class Bottlenecks:
    """Called with an image and the blocks: what the blocks make of it, one after another."""

    blocks: tuple[Path, ...]  # from the module that calls them
    programs: tuple[Program, ...]  # of the blocks, which ``function`` was made of
    function: Callable  # called with None, the image and the blocks
    pairs: tuple[tuple[Path, Path], ...]  # the convolutions that are one op: the last of a block, the first of the next
    widths: tuple[tuple[int, int], ...]  # of each pair: channels in and out

    __name__ = "bottlenecks"  # what the generated source calls it

    def __call__(self, x: Any, *blocks: nn.Module) -> Any:
        if self._stands_in(x, blocks):
            return self.function(None, x, *blocks)
        for block in blocks:
            x = block(x)
        return x

    def _stands_in(self, x: Any, blocks: tuple[nn.Module, ...]) -> bool:
        if stock_wanted((x,), {}):
            return False
        # A compiled or exported graph gets the op anyhow: which device will run it is not known yet.
        if not torch.compiler.is_compiling() and not any(functional.chained(x, *widths) for widths in self.widths):
            return False
        return not any(map(_refusal, blocks, self.programs))

    def refusal(self, module: nn.Module, ignore_training: bool = False) -> str:
        """Why the blocks of ``module``, which calls them, are to be called one by one right now, or ''.

        ``ignore_training`` asks the same for the module after ``eval()``.
        """
        for path, program in zip(self.blocks, self.programs):
            block = child_at(module, path)
            reason = "is gone" if block is None else _refusal(block, program, ignore_training)
            if reason:
                return f"{'.'.join(path)}: {reason}"
        return ""


def _refusal(block: nn.Module, program: Program, ignore_training: bool = False) -> str:
    if kept(block) is not program or program.stale(block):
        return "has changed"
    return customised(block) or program.refusal(block, ignore_training)


# --- finding blocks ---------------------------------------------------------------------------------------------------


class _Block(NamedTuple):
    """A call of an accelerated block that ends as a bottleneck does."""

    node: fx.Node  # the call
    module: nn.Module
    program: Program
    entry: fx.Node  # in the program: its input, in channels_last
    first: Optional[fx.Node]  # the 1x1 convolution that alone reads the input, which is also the shortcut
    last: fx.Node  # the 1x1 convolution that the shortcut is added to

    def conv(self, node: fx.Node) -> Any:
        return self.module.get_submodule(node.args[1].target)  # type: ignore[union-attr,arg-type]


def join(module: nn.Module, program: Program) -> None:
    """Change ``program``, which is for eval mode, so that it calls ``Bottlenecks`` where it can."""
    if program.function is None or program.graph is None:
        return
    graph = program.graph
    for blocks in list(_runs(module, graph)):
        bottlenecks = _bottlenecks(blocks)
        last = blocks[-1].node
        with graph.inserting_before(last):
            members = [graph.get_attr(str(block.node.target)) for block in blocks]
            joined = graph.call_function(bottlenecks, (blocks[0].node.args[0], *members))
        last.replace_all_uses_with(joined)
        for block in reversed(blocks):
            graph.erase_node(block.node)
        program.embedded |= zip(bottlenecks.blocks, bottlenecks.programs)
    if program.embedded:
        program.function, program.source = compile_graph(graph, type(module).__name__)


def bottlenecks_of(program: Program) -> list[Bottlenecks]:
    """Those that a program calls."""
    graph = program.graph or fx.Graph()
    return [node.target for node in graph.nodes if isinstance(node.target, Bottlenecks)]


def _runs(module: nn.Module, graph: fx.Graph) -> Iterator[list[_Block]]:
    """Blocks called one right after another, each reading only the one before and read only by the next."""
    run: list[_Block] = []
    for node in graph.nodes:
        block = _block(module, node)
        follows = bool(run) and node.args == (run[-1].node,) and len(run[-1].node.users) == 1
        if block is not None and block.first is not None and follows:
            run.append(block)
            continue
        if len(run) > 1:
            yield run
        run = [block] if block is not None else []


def _block(module: nn.Module, node: fx.Node) -> Optional[_Block]:
    if node.op != "call_module" or len(node.args) != 1 or node.kwargs:
        return None
    child = module.get_submodule(str(node.target))
    program = kept(child)
    if not isinstance(child, Accelerated) or program is None or program.reason or len(program.inputs) != 1:
        return None
    assert program.graph is not None
    _, *nodes, output = program.graph.nodes
    functions = (functional.conv_bn_act, channels_last, laid_out_like)
    if not all(one.op in ("get_attr", "call_module") or one.target in functions for one in nodes):
        return None
    entry, result = nodes[0], output.args[0]
    if entry.target is not channels_last or not isinstance(result, fx.Node) or result.target is not laid_out_like:
        return None
    last = result.args[0]
    if not isinstance(last, fx.Node) or set(last.users) != {result}:
        return None
    block = _Block(node, child, program, entry, None, last)
    shortcut = last.kwargs.get("residual")
    if not isinstance(shortcut, fx.Node) or not _pointwise(block, last):
        return None
    direct = shortcut is entry
    others = [user for user in entry.users if user is not (last if direct else shortcut)]
    if not (direct or (_is_identity(block, shortcut) and shortcut.args == (entry,))) or len(others) != 1:
        return block
    first = others[0]
    alone = first.args[0] is entry and first.kwargs.get("residual") is None and _pointwise(block, first)
    return block._replace(first=first) if alone else block


def _pointwise(block: _Block, node: fx.Node) -> bool:
    """Whether it is a 1x1 convolution, batch norm, and in the end a ReLU."""
    fused = node.target is functional.conv_bn_act
    return fused and bool(node.kwargs["relu"]) and functional.pointwise(block.conv(node))


def _is_identity(block: _Block, node: fx.Node) -> bool:
    identity = node.op == "call_module" and not exact(nn.Identity)(block.module.get_submodule(str(node.target)))
    return identity and len(node.users) == 1


# --- the function of bottlenecks --------------------------------------------------------------------------------------


def _bottlenecks(blocks: list[_Block]) -> Bottlenecks:
    pairs = list(pairwise(blocks))
    function, _ = compile_graph(_graph(blocks), "bottlenecks")
    return Bottlenecks(
        tuple(path_of(block.node) for block in blocks),
        tuple(block.program for block in blocks),
        function,
        tuple((_conv_path(block, block.last), _conv_path(after, after.first)) for block, after in pairs),
        tuple(
            (block.conv(block.last).in_channels, after.conv(after.first).out_channels)  # type: ignore[arg-type]
            for block, after in pairs
        ),
    )


def _conv_path(block: _Block, node: Any) -> Path:
    return *path_of(block.node), *path_of(node.args[1])


def _graph(blocks: list[_Block]) -> fx.Graph:
    """The blocks' graphs one after another, with a ``conv_chain`` from each to the next."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    modules = [graph.placeholder(f"block{i}") for i in range(len(blocks))]
    image = graph.call_function(channels_last, (x,))
    reduced: Optional[fx.Node] = None  # what the block's first convolution made of the image
    for i, (block, module) in enumerate(zip(blocks, modules)):
        given, *nodes, _ = block.program.graph.nodes  # type: ignore[union-attr]
        made = {given: x, block.entry: image}  # what a block is given lies in memory as the first one's input does
        if block.first is not None and reduced is not None:
            made[block.first] = reduced

        def value(node: fx.Node, made: dict = made, module: fx.Node = module) -> fx.Node:
            return made[node] if node in made else _attribute(graph, module, node)

        for node in nodes:
            if node is block.last:
                break  # after it there is only the result's layout
            if node.op == "call_module":
                args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), value)
                made[node] = graph.call_method("__call__", (_attribute(graph, module, node), *args), kwargs)
            elif node.op == "call_function" and node not in made:
                made[node] = graph.node_copy(node, value)
        args, kwargs = fx.map_arg((block.last.args, dict(block.last.kwargs)), value)
        if i + 1 == len(blocks):
            image = graph.call_function(functional.conv_bn_act, args, kwargs)
            break
        following = blocks[i + 1].first
        assert following is not None
        _, conv, norm = following.args
        after = [child and _attribute(graph, modules[i + 1], child) for child in (conv, norm)]
        pair = graph.call_function(
            functional.conv_chain,
            (*args, kwargs["residual"], *after),
            {"inplace_add": kwargs.get("inplace_add", False)},
        )
        image, reduced = (graph.call_function(operator.getitem, (pair, side)) for side in (0, 1))
    graph.output(graph.call_function(laid_out_like, (image, x)))
    return graph


def _attribute(graph: fx.Graph, module: fx.Node, node: Any) -> fx.Node:
    """The child of ``module`` that a ``get_attr`` or ``call_module`` node names."""
    for name in path_of(node):
        module = graph.call_function(getattr, (module, name))
    return module
