"""``torch.fx`` graphs of a module's own forward, its children as black boxes."""

import inspect
import operator
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Optional, TypeVar

import torch
from torch import fx, nn
from torch.fx.immutable_collections import immutable_dict

from resnet_fast.graph.conditions import Accelerated, Path, is_sequential


class _Proxy(fx.Proxy):
    """Keeps ``a += b`` apart from ``a = a + b``, which plain proxies do not: the first writes to ``a``."""


def _in_place(operation: Callable) -> Callable:
    def method(self: fx.Proxy, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", operation, (self, other), {})

    return method


IN_PLACE = (operator.iadd, operator.isub, operator.imul, operator.itruediv)
ADDITIONS = {
    operator.add: operator.add,
    operator.iadd: operator.iadd,
    torch.add: operator.add,
    "add": operator.add,
    "add_": operator.iadd,
}
for _operation in IN_PLACE:
    setattr(_Proxy, f"__{_operation.__name__}__", _in_place(_operation))


_AUTOCAST_DEVICES = ("cpu", "cuda")


def _surroundings() -> tuple:
    """What a forward may change by ``with no_grad()``, ``with autocast()`` or ``checkpoint``, and no graph records."""
    autocast = [(torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in _AUTOCAST_DEVICES]
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)  # by which ``checkpoint`` works
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), hooks, autocast


@contextmanager
def _everything_on() -> Iterator[None]:
    """Gradients are on and autocast is, to a dtype that nobody asks for: so it shows when a forward switches either."""
    *_, autocast = _surroundings()
    _set_autocast([(True, torch.float64)] * len(autocast))
    try:
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        _set_autocast(autocast)


def _set_autocast(settings: list[tuple[bool, torch.dtype]]) -> None:
    for device, (enabled, dtype) in zip(_AUTOCAST_DEVICES, settings):
        torch.set_autocast_enabled(device, enabled)
        torch.set_autocast_dtype(device, dtype)


class Tracer(fx.Tracer):
    """Children are leaves, but a Sequential is only a way to write its children in a row."""

    def __init__(self, traced_func_name: str) -> None:
        super().__init__()
        self.traced_func_name = traced_func_name
        self.surroundings = _surroundings()
        self.inlined: list[Path] = []
        self.inputs: tuple[str, ...] = ()

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _surroundings() != self.surroundings:
            raise TypeError("it switches gradients or autocast, or makes checkpoints")
        return super().create_node(*args, **kwargs)

    def create_args_for_root(
        self, root_fn: Callable, is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable, list[Any]]:
        """Only the required parameters are symbolic: code that asks whether an optional one is None must get a true
        answer, so the graph holds for calls that leave the optional ones out."""
        parameters = list(inspect.signature(root_fn).parameters.values())[1:]
        required = [p for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        if not required:
            raise TypeError("it has no required parameter")
        if any(p.kind is p.KEYWORD_ONLY for p in required):
            raise TypeError("it has a required keyword-only parameter")
        self.inputs = tuple(p.name for p in required)
        return root_fn, [self.root, *(self.create_proxy("placeholder", name, (), {}) for name in self.inputs)]

    def create_arg(self, a: Any) -> Any:
        """Plain fx would turn every kind of dictionary into a dict."""
        if isinstance(a, OrderedDict) and type(a) is OrderedDict:
            return self.create_node("call_function", OrderedDict, ([self.create_arg(item) for item in a.items()],), {})
        if isinstance(a, dict) and type(a) not in (dict, immutable_dict):
            raise TypeError(f"it makes a {type(a).__name__}")
        return super().create_arg(a)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if not is_sequential(m):
            return True
        self.inlined.append(tuple(module_qualified_name.split(".")))
        return False


class Untraceable(Exception):
    pass


T = TypeVar("T", bound=Tracer)


def trace(module: nn.Module, training: bool, kind: type[T] = Tracer) -> tuple[T, fx.Graph]:  # type: ignore[assignment]
    """The graph of a module's own forward, all flags ``training``. The module is left as it was, flags and
    attributes included.

    Raises:
        Untraceable: with the reason.
    """
    flags = [(m, m.training) for m in module.modules()]
    attributes = {k: (v, _shallow(v)) for k, v in module.__dict__.items()}
    for m, _ in flags:
        m.__dict__["training"] = training
    try:
        with _everything_on():
            tracer = kind("stock_forward" if isinstance(module, Accelerated) else "forward")
            graph = tracer.trace(module)
    except Exception as error:
        first_line = (str(error) or repr(error)).splitlines()[0]
        raise Untraceable(f"its forward could not be traced: {first_line}") from error
    finally:
        for m, training in flags:
            m.__dict__["training"] = training
        changed = [k for k, v in module.__dict__.items() if k not in attributes or v is not attributes[k][0]]
        changed += [k for k, (v, was) in attributes.items() if _shallow(v) != was]
        for k in list(module.__dict__):
            if k not in attributes:
                del module.__dict__[k]
        for k, (v, was) in attributes.items():
            module.__dict__[k] = v
            if isinstance(v, list) and was is not None:
                v[:] = was
    if changed:
        raise Untraceable(f"its forward writes to the attribute {changed[0]!r}")
    for node in graph.nodes:
        first = node.args[0] if node.args else None
        if isinstance(first, fx.Node) and first.op == "placeholder" and writes(node, called(module, node)):
            raise Untraceable("its forward writes to its input")
    return tracer, graph


def _shallow(value: Any) -> Optional[list]:
    return list(value) if isinstance(value, list) else None


def path_of(node: fx.Node) -> Path:
    return tuple(str(node.target).split("."))


def called(module: nn.Module, node: fx.Node) -> Optional[nn.Module]:
    return module.get_submodule(str(node.target)) if node.op == "call_module" else None


def writes(node: fx.Node, child: Optional[nn.Module]) -> bool:
    """Whether a node is known to write to its first input."""
    if child is not None:
        return bool(getattr(child, "inplace", False))
    if node.op == "call_method":
        return str(node.target).endswith("_")
    name = getattr(node.target, "__name__", "")
    in_place = node.kwargs.get("inplace", False) or name.endswith("_") or node.target in (*IN_PLACE, operator.setitem)
    return node.op == "call_function" and bool(in_place)


def is_addition(node: fx.Node) -> bool:
    plain = len(node.args) == 2 and not node.kwargs
    return plain and node.op in ("call_function", "call_method") and node.target in ADDITIONS
