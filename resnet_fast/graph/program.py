"""From a module's own forward to a fused program.

``build`` traces ``module.forward`` with ``torch.fx``, its children as black boxes, and looks in the graph for what the
fused ops compute: ``conv -> batch norm [-> add] [-> ReLU]``, the stem with its max-pool, the global average pool, in
eval mode with the linear layer after it. What it finds is replaced, what it does not know stays as it was, and the
graph is written out as a Python function. So a block is recognised by what it does, whatever its class and its children
are called.

A program is valid for the structure it was traced from, in eval or in training mode. ``Program.refusal`` says, cheaply
enough for every call, whether that still holds: children of the exact expected types, no hooks, and in eval mode
running statistics in use. If it does not, the module's own forward runs.

In training mode, what is found is put together to whole residual blocks (``patterns.chains``): see
``ops/block_passes.py``.
"""

import linecache
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Optional

import torch
from torch import Tensor, fx, nn
from torch.nn.modules import module as nn_module
from torch.utils._pytree import tree_map

from resnet_fast.graph.conditions import BATCH_STATISTICS, REFUSALS, Path, child_at
from resnet_fast.graph.patterns import Match, Step, chains, matches
from resnet_fast.graph.tracing import Untraceable, trace

# What reads the strides of its input, or makes a view that keeps them: given a channels_last tensor, it (or a ``view``
# further on) would fail or see another layout.
_LAYOUT_FUNCTIONS = {
    *("view", "view_as", "as_strided", "stride", "is_contiguous", "data_ptr", "storage", "untyped_storage", "numpy"),
    *("getitem", "chunk", "split", "tensor_split", "narrow", "select", "unbind", "expand", "unfold", "diagonal"),
    *("permute", "transpose", "swapaxes", "movedim", "squeeze", "unsqueeze"),
}
_LAYOUT_SAFE_PACKAGES = {"resnet_fast", "torch", "torchvision", "timm", "_operator", "builtins", "math"}

PROGRAM = "_resnet_fast_program"
"""The attribute in which an accelerated module keeps its program: see ``programs.py``."""

_PLAIN = (bool, int, float, str, type(None), tuple)
_MODULE_ATTRIBUTES = frozenset(nn.Module().__dict__)


def _settings(module: nn.Module) -> dict[str, Any]:
    """The plain attributes a forward may branch on."""
    return {k: v for k, v in module.__dict__.items() if k != "training" and isinstance(v, _PLAIN)}


def hidden_state(module: nn.Module) -> str:
    """An attribute that a forward may depend on, and whose changes ``Program.stale`` does not see, or ''."""
    return next(
        (k for k, v in module.__dict__.items() if k not in _MODULE_ATTRIBUTES and not isinstance(v, _PLAIN)), ""
    )


def _child_names(module: nn.Module) -> tuple[str, ...]:
    return tuple(name for name, child in module._modules.items() if child is not None)


class Fused:
    """Mark of the classes whose forward runs a program; see ``accelerated.py``."""

    stock_class: type  # the class that the forward was derived from
    stock_forward: Callable  # and that class's own forward


# --- the program ------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Program:
    """A module's forward with its fused ops, or the reason why there is none."""

    function: Any = None  # called with the module and its inputs
    inputs: tuple[str, ...] = ()  # the parameters it takes: the forward's required ones
    source: str = ""
    steps: list[Step] = field(default_factory=list)
    rest: list[str] = field(default_factory=list)  # children that run their own forward
    reason: str = ""  # why nothing was fused
    parts: dict[Path, str] = field(default_factory=dict)  # child -> what it must still be (a key of REFUSALS)
    children: dict[Path, tuple[str, ...]] = field(default_factory=dict)  # of the module and its inlined Sequentials
    settings: dict[str, Any] = field(default_factory=dict)
    graph: Optional[fx.Graph] = None  # what ``function`` computes; without one, what the module's own forward does
    training: bool = False  # the mode it is for
    in_training: Optional["Program"] = None  # the one for training mode, beside that for eval mode
    rows: list[Any] = field(default_factory=list)  # blocks that ``rows`` has joined
    plans: Any = None  # what ``network`` made of it

    def takes(self, args: tuple, kwargs: dict[str, Any]) -> bool:
        """Whether a call gives the inputs and nothing else; optional arguments are left to the module's own forward."""
        return len(args) + len(kwargs) == len(self.inputs) and all(name in self.inputs for name in kwargs)

    def inlined(self, module: nn.Module) -> list[nn.Module]:
        """The Sequentials of ``module`` whose children this program calls itself."""
        paths = [path for path, kind in self.parts.items() if kind == "sequential"]
        return [child for path in paths if (child := child_at(module, path)) is not None]

    def stale(self, module: nn.Module) -> bool:
        """Whether the module's structure or settings have changed, so that its forward must be traced again."""
        for path, names in self.children.items():
            owner = child_at(module, path)
            if owner is None or _child_names(owner) != names:
                return True
        if torch.compiler.is_compiling():
            return False
        return _settings(module) != self.settings or any(row.stale(module) for row in self.rows)

    def refusal(self, module: nn.Module, ignore_training: bool = False) -> str:
        """Why the program cannot stand in for the module's own forward right now, or ''.

        ``ignore_training`` asks the same for the module after ``eval()``.
        """
        if self.function is None:
            return self.reason
        if module.training is not self.training and not ignore_training:
            return "training mode" if module.training else "eval mode"
        return self.parts_refusal(module, ignore_training) or (
            "global module hooks are registered" if nn_module._has_any_global_hook() else ""
        )

    def parts_refusal(self, module: nn.Module, ignore_training: bool = False) -> str:
        """The same for the children that the program calls itself."""
        for path, kind in self.parts.items():
            child = child_at(module, path)
            reason = "is gone" if child is None else REFUSALS[kind](child)
            if reason and not (ignore_training and module.training and reason == BATCH_STATISTICS):
                return f"{'.'.join(path)} {reason}"
        return ""


def stock_wanted(args: tuple, kwargs: dict) -> str:
    """Why the caller needs the stock forward, whatever the program could do, or ''.

    Symbolic tracing and ``torch.jit.trace`` must see the stock children; ``torch.onnx`` plain ops; ``torch.func`` and
    forward-mode differentiation know no rule for a custom op, and jvp would silently be zero. Statistics of an empty
    batch are NaN, which batch norm does not let into its running ones.
    """
    images = [value for value in (*args, *kwargs.values()) if isinstance(value, (Tensor, fx.Proxy))]
    if not images or isinstance(images[0], fx.Proxy):
        return "symbolic tracing"
    if torch.compiler.is_compiling():
        return "torch.onnx export" if torch.onnx.is_in_onnx_export() else ""
    if torch.jit.is_tracing():
        return "torch.jit tracing"
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "torch.func transform"
    if images[0].numel() == 0:
        return "empty batch"
    if torch.autograd.forward_ad._current_level >= 0:
        return "forward-mode differentiation"
    return ""


# --- layout: channels_last inside, results as the input came ----------------------------------------------------------


def channels_last(x: Any) -> Any:
    """A 4-dimensional tensor in channels_last, anything else as it is."""
    return x.contiguous(memory_format=torch.channels_last) if isinstance(x, Tensor) and x.dim() == 4 else x


def laid_out_like(value: Any, given: Any) -> Any:
    """``value`` (a tensor or a structure of them) in the layout that ``given``, the program's input, came in."""
    if not isinstance(given, Tensor) or given.dim() != 4:
        return value
    if given.is_contiguous(memory_format=torch.channels_last) and not given.is_contiguous():
        return value

    def restored(leaf: Any) -> Any:
        moved = isinstance(leaf, Tensor) and leaf.dim() == 4 and leaf.is_contiguous(memory_format=torch.channels_last)
        return leaf.contiguous() if moved else leaf

    return tree_map(restored, value)


# --- rewriting --------------------------------------------------------------------------------------------------------


def _rewrite(module: nn.Module, graph: fx.Graph, matches: list[Match]) -> None:
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

    given = next(node for node in graph.nodes if node.op == "placeholder")
    with graph.inserting_before(next(node for node in graph.nodes if node.op != "placeholder")):
        entry = graph.call_function(channels_last, (given,))
    given.replace_all_uses_with(entry, delete_user_cb=lambda user: user is not entry)

    def restored(value: fx.Node) -> fx.Node:
        return graph.call_function(laid_out_like, (value, given))

    for node in list(graph.nodes):
        if node.op == "output" or _reads_layout(module, node):
            with graph.inserting_before(node):
                node.args = fx.map_arg(node.args, restored)
                node.kwargs = fx.map_arg(node.kwargs, restored)


def _with_children(graph: fx.Graph, args: tuple) -> tuple:
    """The arguments of a match, children instead of their names."""
    return tuple(
        _with_children(graph, arg) if isinstance(arg, tuple) else graph.get_attr(arg) if isinstance(arg, str) else arg
        for arg in args
    )


def _reads_layout(module: nn.Module, node: fx.Node) -> bool:
    """Whether a node may depend on how its input lies in memory. Code that is not known is taken to."""
    if node.op == "call_method":
        return node.target in _LAYOUT_FUNCTIONS
    if node.op == "call_function":
        package = (getattr(node.target, "__module__", None) or type(node.target).__module__).split(".")[0]
        return package not in _LAYOUT_SAFE_PACKAGES or getattr(node.target, "__name__", "") in _LAYOUT_FUNCTIONS
    if node.op == "call_module":
        child = module.get_submodule(str(node.target))
        return not isinstance(child, Fused) and type(child).__module__.split(".")[0] not in _LAYOUT_SAFE_PACKAGES
    return False


_serial = count()


def compile_graph(graph: fx.Graph, name: str) -> tuple[Callable, str]:
    code = graph.python_code("self")
    filename = f"<resnet_fast {name} {next(_serial)}>"
    namespace = dict(code.globals)
    exec(compile(code.src, filename, "exec"), namespace)
    # Tracebacks and debuggers show the lines, as they do for torch.fx.
    linecache.cache[filename] = (len(code.src), None, code.src.splitlines(keepends=True), filename)
    return namespace["forward"], code.src


def build(module: nn.Module, training: bool = False) -> Program:
    """The fused program of ``module`` for one of its modes, or one without a function that says why there is none."""
    children: dict[Path, tuple[str, ...]] = {(): _child_names(module)}
    settings = _settings(module)
    try:
        tracer, graph = trace(module, "stock_forward" if isinstance(module, Fused) else "forward", training)
    except Untraceable as error:
        return Program(reason=str(error), children=children, settings=settings)
    parts: dict[Path, str] = {}
    for path in tracer.inlined:
        owner = child_at(module, path)
        assert owner is not None
        parts[path] = "sequential"
        children[path] = _child_names(owner)
    found = matches(module, graph, training)
    if not any(match.step.conv for match in found):
        reason = "no convolution followed by batch norm in its own forward"
        return Program(
            inputs=tracer.inputs, reason=reason, parts=parts, children=children, settings=settings, graph=graph
        )
    if training:
        found = chains(module, graph, found)
    for match in found:
        parts |= match.parts
    _rewrite(module, graph, found)
    rest = [str(node.target) for node in graph.nodes if node.op == "call_module"]
    function, source = compile_graph(graph, type(module).__name__)
    steps = [match.step for match in found]
    return Program(function, tracer.inputs, source, steps, rest, "", parts, children, settings, graph, training)
