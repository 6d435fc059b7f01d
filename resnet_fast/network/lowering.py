"""From a module's fused graph to steps of the native kernels, for one shape of input.

The graphs of ``graph.program`` are interpreted with ``Image``s, which have a shape but no data; every operation that
the native library knows becomes a ``Step``. Children are followed into their own graphs, so a whole network becomes one
list. Whatever is not known here ends it with ``NotPlanned``.
"""

from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn

from resnet_fast.graph import conditions, functional
from resnet_fast.graph.bottleneck_pairs import Bottlenecks
from resnet_fast.graph.conditions import Accelerated, Path
from resnet_fast.graph.cores import AffineCore
from resnet_fast.graph.program import Program, build
from resnet_fast.graph.reads import Reads
from resnet_fast.graph.state import state_of
from resnet_fast.network.calls import CALLS, MODULES
from resnet_fast.network.operations import Steps
from resnet_fast.network.steps import Child, Image, NotPlanned

# Leaf modules of these packages may be traced like containers: their forward does nothing that a trace would miss.
_KNOWN_PACKAGES = ("torch", "torchvision", "timm", "resnet_fast")


@dataclass
class Lowering(Steps):
    """Makes the steps of a graph. ``plain`` keeps those of modules that are not accelerated, for the next shape."""

    plain: dict[Path, tuple[type, Program]] = field(default_factory=dict)
    reads: list[tuple[Path, Reads]] = field(default_factory=list)  # of the forwards, where a ``Guard`` does not see it

    def graph(self, module: nn.Module, program: Program, inputs: tuple) -> Any:
        """The results of ``program``'s graph: ``Image``s, in the structure that the module's forward returns."""
        if program.graph is None or len(inputs) != len(program.inputs):
            raise NotPlanned(program.reason or f"{self.name()} is called with other than its required inputs")
        if program.questions:
            raise NotPlanned(f"{self.name()} asks for the type of its input")
        if program.reads.others:
            self.reads.append((self.at, program.reads))
        env: dict[fx.Node, Any] = {}
        given = iter(inputs)
        for node in program.graph.nodes:
            if node.op == "placeholder":
                env[node] = next(given)
                continue
            args, kwargs = _mapped(node.args, env), _mapped(node.kwargs, env)
            if node.op == "output":
                return args[0]
            env[node] = self._node(module, node, args, kwargs)
        raise AssertionError("a graph ends in its output")

    def _node(self, module: nn.Module, node: fx.Node, args: tuple, kwargs: dict[str, Any]) -> Any:
        if node.op in ("get_attr", "call_module"):
            path = tuple(str(node.target).split("."))
            child = conditions.child_at(module, path)
            if child is None:
                raise NotPlanned(f"{self.name()} uses {node.target}, which is no module")
            if node.op == "get_attr":
                return Child(child, (*self.at, *path))
            return self._module(child, (*self.at, *path), args, kwargs)
        if getattr(node.target, "__module__", "") == "_operator" and not any(isinstance(arg, Image) for arg in args):
            return node.target(*args, **kwargs)  # type: ignore[operator]  # sizes
        if isinstance(node.target, Bottlenecks):
            x, *blocks = args
            for block in blocks:
                x = self._module(block.module, block.path, (x,), {})
            return x
        if node.target is functional.head:
            return self._head(*args)
        if isinstance(node.target, AffineCore):
            return Child(node.target(args[0].module), args[0].path)
        lower = CALLS.get(node.target)
        if lower is None:
            raise NotPlanned(f"{self.name()} calls {getattr(node.target, '__name__', node.target)}")
        try:
            return lower(self, *args, **kwargs)
        except (TypeError, ValueError) as error:  # arguments that are not foreseen here
            raise NotPlanned(f"{self.name()} calls {getattr(node.target, '__name__', node.target)}: {error}") from error

    def _module(self, module: nn.Module, path: Path, args: tuple, kwargs: dict[str, Any]) -> Any:
        outside, self.at = self.at, path
        try:
            reason = conditions.customised(module)
            if reason:
                raise NotPlanned(f"{self.name()} {reason}")
            lower = MODULES.get(type(module))
            if lower is not None:
                if kwargs or len(args) != 1 or not isinstance(args[0], Image):
                    raise NotPlanned(f"{self.name()} is called with more than an image")
                return lower(self, module, args[0])
            if kwargs:
                raise NotPlanned(f"{self.name()} is called with keywords")
            return self.graph(module, self._program(module), args)
        finally:
            self.at = outside

    def _program(self, module: nn.Module) -> Program:
        """The graph to follow into, its conditions checked."""
        if isinstance(module, Accelerated):
            state = state_of(module)
            assert state is not None
            program = state.eval
            reason = program.refusal(module)
        else:
            known = type(module).__module__.split(".")[0] in _KNOWN_PACKAGES
            if not known and not any(True for _ in module.children()):
                raise NotPlanned(f"{self.name()} is a {type(module).__name__}")
            known_class, program = self.plain.get(self.at) or (None, Program())
            if known_class is not type(module) or program.stale(module):
                program = build(module)
                self.plain[self.at] = type(module), program
            reason = "training mode" if module.training else program.parts_refusal(module)
        if reason:
            raise NotPlanned(f"{self.name()}: {reason}")
        return program

    def _head(self, x: Any, layers: tuple[Child, ...]) -> Image:
        y = self.flatten(self.global_avg_pool(x), 1)
        for layer in layers:
            y = self._module(layer.module, layer.path, (y,), {})
        return y


def _mapped(value: Any, env: dict[fx.Node, Any]) -> Any:
    if isinstance(value, fx.Node):
        return env[value]
    if isinstance(value, tuple) and not hasattr(value, "_fields"):
        return tuple(_mapped(v, env) for v in value)
    if isinstance(value, list):
        return [_mapped(v, env) for v in value]
    return {k: _mapped(v, env) for k, v in value.items()} if isinstance(value, dict) else value
