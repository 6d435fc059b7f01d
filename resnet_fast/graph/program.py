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

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from itertools import combinations
from typing import Any, Generic, NamedTuple, Optional, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.nn.modules import module as nn_module

from resnet_fast.graph.aliasing import gives_its_input, hidden_write
from resnet_fast.graph.conditions import BATCH_STATISTICS, REFUSALS, STATE, Path, child_at
from resnet_fast.graph.cores import CORE
from resnet_fast.graph.obstacles import obstacles, told
from resnet_fast.graph.opening import Opener
from resnet_fast.graph.patterns import FusedOp, Match, matches
from resnet_fast.graph.reads import Reads, child_names, stock_type
from resnet_fast.graph.rewriting import rewrite
from resnet_fast.graph.source import compile_graph
from resnet_fast.graph.tracing import Untraceable, called, path_of, trace
from resnet_fast.graph.training_blocks import blocks


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
    forwards: dict[Any, Any] = field(default_factory=dict)  # of the classes whose code was followed
    reads: Reads = field(default_factory=Reads)  # what must still be the same, beside the inputs
    questions: list[tuple[int, Any, bool]] = field(default_factory=list)  # the n-th input is of some class, or not
    graph: Optional[fx.Graph] = None  # what ``function`` computes; without one, what the module's own forward does
    training: bool = False  # the mode it is for
    embedded: dict[Path, "Program"] = field(default_factory=dict)  # of children, where they became part of this one

    def takes(self, args: tuple, kwargs: dict[str, Any]) -> bool:
        """Whether a call gives the inputs and nothing else; optional arguments are left to the module's own forward.

        So are calls that Python may tell from those that were traced: by what is None, or twice the same.
        """
        if len(args) + len(kwargs) != len(self.inputs) or not all(name in self.inputs for name in kwargs):
            return False
        given = [*args, *(kwargs[name] for name in self.inputs[len(args) :])] if kwargs else args
        if len(given) > 1 and (
            any(value is None or isinstance(value, (bool, Enum)) for value in given)
            or any(one is other for one, other in combinations(given, 2) if isinstance(one, Tensor))
        ):
            return False
        return all(isinstance(given[i], classes) is answer for i, classes, answer in self.questions)

    def _opened(self, module: nn.Module) -> Iterator[tuple[Optional[nn.Module], type]]:
        return ((child_at(module, path), cls) for path, cls in self.opened.items())

    def stale(self, module: nn.Module) -> bool:
        """Whether the module's structure or settings have changed, so that its forward must be traced again."""
        if any(child is None or stock_type(child) is not cls for child, cls in self._opened(module)):
            return True
        for path, names in self.reads.children.items():
            owner = child_at(module, path)
            if owner is None or child_names(owner) != names:
                return True
        if torch.compiler.is_compiling():
            return bool(self.reads.others) or not self.reads.attributes_hold(module)
        if any(cls.forward is not forward for cls, forward in self.forwards.items()):
            return True
        return not self.reads.hold(module) or any(
            kept(child_at(module, path)) is not program for path, program in self.embedded.items()
        )

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


# --- what a module keeps ----------------------------------------------------------------------------------------------

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
    own: Any = stock_type(module)
    program = Program(training=training, forwards={own: own.forward})
    try:
        tracer, program.graph = trace(module, training, Opener)
    except Untraceable as error:
        program.reason, program.reads = str(error), error.reads
        return Traced(program, [])
    program.inputs, program.reads, program.questions = tracer.inputs, tracer.observer.reads, tracer.questions()
    if hidden_write(module, program.graph):
        shared = hidden_write(module, program.graph, fresh=_fresh(module, program.graph, program.reads))
        if shared:
            program.reason = f"its forward writes to {shared}"
            return Traced(program, [])
    program.opened = tracer.opened
    program.forwards |= {cls: cls.forward for cls in set[Any](tracer.opened.values())}
    program.parts = dict.fromkeys(tracer.inlined, "sequential") | dict.fromkeys(tracer.opened, "opened")
    found = matches(module, program.graph, training)
    program.obstacles = obstacles(module, program.graph, found, tracer.shut)
    if not any(match.op.conv for match in found):
        program.reason = told(program.obstacles) or "no convolution in its own forward"
    return Traced(program, found)


def _fresh(module: nn.Module, graph: fx.Graph, reads: Reads) -> list[nn.Module]:
    """The children that the graph calls and that are known to give new tensors. What decided on that is watched."""
    found = []
    calls = {path_of(node): (called(module, node), CORE in node.meta) for node in graph.nodes}
    for path, (child, core) in calls.items():
        if core and child is not None:
            found.append(child)
            continue
        if child is None or type(child).__module__.startswith("torch.nn."):
            continue
        try:
            traces: list[Any] = [trace(child, training) for training in (False, True)]
        except Untraceable:
            continue
        if not any(gives_its_input(child, graph) for _, graph in traces):
            found.append(child)
            for tracer, _ in traces:
                reads.include(path, child, tracer.observer.reads)
    return found


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
    rewrite(module, graph, found, program.training)
    program.ops = [match.op for match in found]
    program.rest = [str(node.target) for node in graph.nodes if node.op == "call_module"]
    program.function, program.source = compile_graph(graph, type(module).__name__)
    return program


def build(module: nn.Module, training: bool = False) -> Program:
    """The fused program of ``module`` for one of its modes, or one without a function that says why there is none."""
    return write_program(module, trace_forward(module, training))
