"""From a module's own forward to a fused program.

``build`` traces ``module.forward`` with ``torch.fx``, its children as black boxes, and looks in the graph for what the
fused ops compute: ``conv -> batch norm [-> add] [-> ReLU]``, the stem with its max-pool, the global average pool, in
eval mode with the linear layer after it. What it finds is replaced, what it does not know stays as it was, and the
graph is written out as a Python function. So a block is recognised by what it does, whatever its class and its children
are called.

A program is valid for the structure it was traced from, in eval or in training mode. ``Program.refusal`` says, cheaply
enough for every call, whether that still holds: children of the exact expected types, no hooks, and in eval mode
running statistics in use. If it does not, the module's own forward runs.

In training mode, what is found is put together to whole residual blocks: see ``training_blocks.py``.
"""

from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, Optional, TypeVar

import torch
from torch import fx, nn
from torch.nn.modules import module as nn_module

from resnet_fast.graph.conditions import BATCH_STATISTICS, REFUSALS, Path, child_at
from resnet_fast.graph.obstacles import obstacles, told
from resnet_fast.graph.opening import Opener, stock_type
from resnet_fast.graph.patterns import FusedOp, Match, matches
from resnet_fast.graph.rewriting import rewrite
from resnet_fast.graph.source import compile_graph
from resnet_fast.graph.tracing import Untraceable, trace
from resnet_fast.graph.training_blocks import blocks

_PLAIN = (bool, int, float, str, type(None), tuple)
_MODULE_ATTRIBUTES = frozenset(nn.Module().__dict__)


@dataclass(frozen=True)
class _Same:
    """Equal to what is the very same object."""

    value: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value


def _settings(module: nn.Module) -> dict[str, Any]:
    """The plain attributes a forward may branch on."""
    return {k: v for k, v in module.__dict__.items() if k != "training" and isinstance(v, _PLAIN)}


def _opened_settings(child: Optional[nn.Module]) -> dict[str, Any]:
    """These, and the others: an activation may be a function."""
    own = {} if child is None else child.__dict__
    others = {k: _Same(v) for k, v in own.items() if k not in _MODULE_ATTRIBUTES and not isinstance(v, _PLAIN)}
    return {} if child is None else _settings(child) | {k: v for k, v in others.items() if k != STATE}


def hidden_state(module: nn.Module) -> str:
    """An attribute that a forward may depend on, and whose changes ``Program.stale`` does not see, or ''."""
    return next(
        (k for k, v in module.__dict__.items() if k not in _MODULE_ATTRIBUTES and not isinstance(v, _PLAIN)), ""
    )


def _child_names(module: nn.Module) -> tuple[str, ...]:
    return tuple(name for name, child in module._modules.items() if child is not None)


@dataclass(eq=False)
class Program:
    """A module's forward with its fused ops, or the reason why there is none."""

    function: Any = None  # called with the module and its inputs
    inputs: tuple[str, ...] = ()  # the parameters it takes: the forward's required ones
    source: str = ""
    ops: list[FusedOp] = field(default_factory=list)
    rest: list[str] = field(default_factory=list)  # children that run their own forward
    reason: str = ""  # why nothing was fused
    obstacles: dict[str, str] = field(default_factory=dict)  # by name: why a convolution was not
    parts: dict[Path, str] = field(default_factory=dict)  # child -> what it must still be (a key of REFUSALS)
    opened: dict[Path, type] = field(default_factory=dict)  # children that the graph follows into
    children: dict[Path, tuple[str, ...]] = field(default_factory=dict)  # of the module, and of what it follows into
    settings: dict[str, Any] = field(default_factory=dict)
    opened_settings: dict[Path, dict[str, Any]] = field(default_factory=dict)
    graph: Optional[fx.Graph] = None  # what ``function`` computes; without one, what the module's own forward does
    training: bool = False  # the mode it is for
    embedded: dict[Path, "Program"] = field(default_factory=dict)  # of children, where they became part of this one

    def takes(self, args: tuple, kwargs: dict[str, Any]) -> bool:
        """Whether a call gives the inputs and nothing else; optional arguments are left to the module's own forward."""
        return len(args) + len(kwargs) == len(self.inputs) and all(name in self.inputs for name in kwargs)

    def stale(self, module: nn.Module) -> bool:
        """Whether the module's structure or settings have changed, so that its forward must be traced again."""
        for path, names in self.children.items():
            owner = child_at(module, path)
            if owner is None or _child_names(owner) != names:
                return True
        if torch.compiler.is_compiling():
            return False
        changed = (_opened_settings(child_at(module, path)) != was for path, was in self.opened_settings.items())
        embedded = (kept(child_at(module, path)) is not program for path, program in self.embedded.items())
        return _settings(module) != self.settings or any(changed) or any(embedded)

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
        for path, cls in self.opened.items():
            child = child_at(module, path)
            if child is None or stock_type(child) is not cls:
                return f"{'.'.join(path)} is no {cls.__name__} any more"
        for path, kind in self.parts.items():
            child = child_at(module, path)
            reason = "is gone" if child is None else REFUSALS[kind](child)
            if reason and not (ignore_training and module.training and reason == BATCH_STATISTICS):
                return f"{'.'.join(path)} {reason}"
        return ""


# --- what a module keeps ----------------------------------------------------------------------------------------------

STATE = "_resnet_fast_state"
"""The attribute of an accelerated module, out of state_dicts and pickles, in which its ``State`` is kept."""

P = TypeVar("P")


@dataclass(eq=False)
class State(Generic[P]):
    """What is derived from an accelerated module's structure."""

    eval: Program
    training: Program
    plans: Optional[P] = None  # what ``network`` made of the program for eval mode


def inlined(module: nn.Module, parts: dict[Path, str]) -> list[nn.Module]:
    """The Sequentials of ``module`` whose children its program, with these parts, calls itself."""
    paths = [path for path, kind in parts.items() if kind == "sequential"]
    return [child for path in paths if (child := child_at(module, path)) is not None]


def opened(module: nn.Module, program: Program) -> list[Optional[nn.Module]]:
    """The children that a program follows into, if it can run: they do not run their own forward then."""
    refused = program.refusal(module, ignore_training=True)
    return [] if refused else [child_at(module, path) for path in program.opened]


def kept(module: Optional[nn.Module]) -> Optional[Program]:
    """The program for eval mode that a module keeps, up to date or not."""
    state = None if module is None else module.__dict__.get(STATE)
    return None if state is None else state.eval


# --- making one -------------------------------------------------------------------------------------------------------


class Traced(NamedTuple):
    """A program that is yet to be written, and what it will have in place of the nodes of its graph."""

    program: Program
    found: list[Match]


def trace_forward(module: nn.Module, training: bool = False) -> Traced:
    program = Program(children={(): _child_names(module)}, settings=_settings(module), training=training)
    try:
        tracer, program.graph = trace(module, training, Opener)
    except Untraceable as error:
        program.reason = str(error)
        return Traced(program, [])
    program.inputs = tracer.inputs
    program.opened = tracer.opened
    program.opened_settings = {path: _opened_settings(child_at(module, path)) for path in tracer.opened}
    program.parts |= dict.fromkeys(tracer.inlined, "sequential") | dict.fromkeys(tracer.opened, "opened")
    for path in program.parts:
        owner = child_at(module, path)
        assert owner is not None
        program.children[path] = _child_names(owner)
    found = matches(module, program.graph, training)
    program.obstacles = obstacles(module, program.graph, found, tracer.shut)
    if not any(match.op.conv for match in found):
        program.reason = told(program.obstacles) or "no convolution in its own forward"
    return Traced(program, found)


def write_program(module: nn.Module, traced: Traced) -> Program:
    """The program of what was traced. Children that are to be accelerated must be so already."""
    program, found = traced
    graph = program.graph
    if program.reason or graph is None:
        return program
    if program.training:
        found = blocks(module, graph, found)
    for match in found:
        program.parts |= match.parts
    rewrite(module, graph, found)
    program.ops = [match.op for match in found]
    program.rest = [str(node.target) for node in graph.nodes if node.op == "call_module"]
    program.function, program.source = compile_graph(graph, type(module).__name__)
    return program


def build(module: nn.Module, training: bool = False) -> Program:
    """The fused program of ``module`` for one of its modes, or one without a function that says why there is none."""
    return write_program(module, trace_forward(module, training))
