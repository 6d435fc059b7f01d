"""``torch.fx`` graphs of a module's own forward, its children as black boxes.

What Python decides in a forward is decided once, so only forwards are traced that decide by what can be watched: see
``purity.py``.
"""

import dis
import inspect
import operator
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Optional, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.fx.immutable_collections import immutable_dict
from torch.nn.modules import module as nn_module

from resnet_fast.graph.conditions import Accelerated, Path, customised, is_sequential
from resnet_fast.graph.purity import Impure, Observer
from resnet_fast.graph.reads import Reads


class _Proxy(fx.Proxy):
    """Keeps ``a += b`` apart from ``a = a + b``, which plain proxies do not: the first writes to ``a``.

    And answers no question that the trace would not record: what attributes it has, its name, its text.
    """

    def __getattr__(self, name: str) -> Any:
        if not any(hasattr(kind, name) for kind in (Tensor, dict, list)) and not _asked_by_torch():
            raise Impure(f"asks an input or a result for {name!r}")
        return _Attribute(self, name)

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        frame = sys._getframe(1)  # functions in C ask too
        asked = dis.opname[frame.f_code.co_code[frame.f_lasti]] == "LOAD_ATTR" and not _asked_by_torch()
        return _refuse("asks for the class of an input or a result") if asked else type(self)

    def __hash__(self) -> int:
        return super().__hash__() if _asked_by_torch() else _refuse("looks for an input or a result in a dict or set")

    def __format__(self, spec: str) -> str:
        tracer: Any = self.tracer
        told = _asked_by_torch() or tracer.tells()
        return super().__format__(spec) if told else _refuse("makes text of an input or a result")

    def __repr__(self) -> str:
        return super().__repr__() if _asked_by_torch() else _refuse("makes text of an input or a result")


class _Attribute(fx.proxy.Attribute, _Proxy):
    """What an input or a result has, as ``x.shape``."""


def _asked_by_torch() -> bool:
    return sys._getframe(2).f_globals.get("__name__", "").partition(".")[0] in ("torch", "resnet_fast")


def _refuse(what: str) -> Any:
    raise Impure(what)


def _in_place(operation: Callable) -> Callable:
    def method(self: fx.Proxy, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", operation, (self, other), {})

    return method


IN_PLACE = (
    *(operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv, operator.imod),
    *(operator.ipow, operator.iand, operator.ior, operator.ixor, operator.ilshift, operator.irshift),
)
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

    def __init__(self, module: nn.Module, observer: Observer) -> None:
        super().__init__()
        self.traced_func_name = "stock_forward" if isinstance(module, Accelerated) else "forward"
        self.observer = observer
        self.surroundings = _surroundings()
        self.inlined: list[Path] = []
        self.inputs: tuple[str, ...] = ()
        self.tensors = list(_tensors(module))

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
        given = [self.root, *(self.create_proxy("placeholder", name, (), {}) for name in self.inputs)]
        self.observer.begin([p.default for p in parameters if p not in required and p.default is not p.empty])
        return root_fn, given

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """Tensors of the modules, buffers among them, are read at every call."""
        if not isinstance(attr_val, Tensor):
            return attr_val
        name = self.name_of(attr_val)
        if name not in parameter_proxy_cache:
            parameter_proxy_cache[name] = self.create_proxy("get_attr", name, (), {})
        return parameter_proxy_cache[name]

    def tells(self) -> bool:
        """Whether text may be made of an input or a result."""
        return False

    def questions(self) -> list[tuple[int, Any, bool]]:
        """What was asked of the class of an input, by its number."""
        places = [node.target for node in self.graph.nodes if node.op == "placeholder"]
        return [(places.index(name), classes, answer) for name, classes, answer in self.observer.questions]

    def name_of(self, tensor: Tensor) -> str:
        names = [name for name, one in self.tensors if one is tensor]
        if len(names) != 1:
            raise Impure(f"uses a tensor that has {', '.join(names) or 'none of its modules'} for a name")
        return names[0]

    def create_arg(self, a: Any) -> Any:
        """Plain fx would turn every kind of dictionary into a dict, and make attributes of tensors that are none."""
        if isinstance(a, Tensor):
            return self.create_node("get_attr", self.name_of(a), (), {})
        if isinstance(a, OrderedDict) and type(a) is OrderedDict:
            return self.create_node("call_function", OrderedDict, ([self.create_arg(item) for item in a.items()],), {})
        if isinstance(a, dict) and type(a) not in (dict, immutable_dict):
            raise TypeError(f"it makes a {type(a).__name__}")
        return super().create_arg(a)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if not is_sequential(m) or customised(m) or nn_module._has_any_global_hook():
            return True
        self.inlined.append(tuple(module_qualified_name.split(".")))
        return False


CORE = "core"
"""In the ``meta`` of a node that calls a part of a module: see ``cores.py``."""


class Untraceable(Exception):
    """Attributes:
    reads: what the forward had read when it was found out.
    """

    reads: Reads


T = TypeVar("T", bound=Tracer)


def trace(module: nn.Module, training: bool, kind: type[T] = Tracer) -> tuple[T, fx.Graph]:  # type: ignore[assignment]
    """The graph of a module's own forward, all flags ``training``. The module is left as it was.

    Raises:
        Untraceable: with the reason.
    """
    flags = [(m, m.training) for m in module.modules()]
    for m, _ in flags:
        m.__dict__["training"] = training
    observer = Observer(module)
    try:
        with _everything_on(), observer:
            tracer = kind(module, observer)
            return tracer, tracer.trace(module)
    except Exception as error:
        first_line = (str(error) or repr(error)).splitlines()[0]
        how = f"its forward {error}" if isinstance(error, Impure) else f"its forward could not be traced: {first_line}"
        untraceable = Untraceable(how)
        untraceable.reads = observer.reads
        raise untraceable from error
    finally:
        for m, training in flags:
            m.__dict__["training"] = training


def _tensors(root: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for path, module in root.named_modules():
        holders = (module.__dict__, module._parameters, module._buffers)
        for name, value in (item for holder in holders for item in holder.items()):
            if isinstance(value, Tensor):
                yield f"{path}.{name}" if path else name, value


def path_of(node: fx.Node) -> Path:
    return tuple(str(node.target).split("."))


def called(module: nn.Module, node: fx.Node) -> Optional[nn.Module]:
    return module.get_submodule(str(node.target)) if node.op == "call_module" else None


def is_addition(node: fx.Node) -> bool:
    plain = len(node.args) == 2 and not node.kwargs
    return plain and node.op in ("call_function", "call_method") and node.target in ADDITIONS
