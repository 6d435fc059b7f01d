"""Whether a forward is a function of its inputs and of what can be watched, seen while it is traced.

A trace runs a forward once, and what Python decides in it is decided for ever: so the trace must know what was read,
and nothing may be drawn, counted, printed or kept. ``Observer`` looks at every instruction of the Python code that runs
(but for PyTorch's own), before it is carried out, and at every attribute of a module that is read. It notes what was
read (``reads.py``), and raises ``Impure`` at what it does not know to be harmless, so that nothing has happened yet.
"""

import dis
import functools
import gc
import inspect
import operator
import sys
import threading
import types
import warnings
from collections import deque
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

from resnet_fast.graph import reads
from resnet_fast.graph.conditions import Path
from resnet_fast.graph.known_code import BUILTINS, PURE_FRAMES, known
from resnet_fast.graph.reads import (
    ABSENT,
    Reads,
    Unseen,
    child_names,
    found_in_class,
    freeze,
    package_of,
    stock_type,
    type_at,
)

_METHODS = {"forward", "_conv_forward", "children", "named_children", "modules", "named_modules", "get_submodule"}
_METHODS |= {"items", "keys", "values"}
"""Of PyTorch's modules, those that a forward may call."""
_FORBIDDEN = {
    **dict.fromkeys(("STORE_ATTR", "DELETE_ATTR"), "writes to the attribute {!r}"),
    **dict.fromkeys(("STORE_GLOBAL", "DELETE_GLOBAL"), "writes to the global variable {!r}"),
    **dict.fromkeys(("SETUP_WITH", "BEFORE_WITH", "LOAD_SPECIAL"), "has a with statement"),
    **dict.fromkeys(("MATCH_CLASS", "MATCH_MAPPING", "MATCH_SEQUENCE"), "asks what kind of value it has"),
    "IMPORT_NAME": "imports {!r}",
    "LOAD_BUILD_CLASS": "defines a class",
    "SETUP_FINALLY": "catches exceptions",
}
_CLOSURE_READS, _CLOSURE_WRITES = ("LOAD_DEREF", "LOAD_CLASSDEREF"), ("STORE_DEREF", "DELETE_DEREF")


class Impure(Exception):
    """What a forward does, as a predicate: "calls print"."""


@functools.lru_cache(1000)
def _instructions(code: types.CodeType) -> dict[int, tuple[str, Any, tuple[str, ...]]]:
    """What has to be looked at, by place: an operation, its argument, and which attributes of it are asked for next."""
    found: dict[int, Any] = {}
    following = [
        one for one in dis.get_instructions(code) if one.opname not in ("CACHE", "EXTENDED_ARG", "PUSH_NULL", "PRECALL")
    ]
    loaded: tuple[str, ...] = ()  # the last global variable, with attributes
    for i, one in enumerate(following):
        if one.opname in ("SETUP_WITH", "BEFORE_WITH", "LOAD_SPECIAL") and loaded == ("warnings", "catch_warnings"):
            continue  # as in detectron2
        if one.opname == "LOAD_GLOBAL" or one.opname in (*_FORBIDDEN, *_CLOSURE_READS, *_CLOSURE_WRITES):
            end = i + 1
            while following[end : end + 1] and following[end].opname in ("LOAD_ATTR", "LOAD_METHOD"):
                end += 1
            attributes = tuple(str(next.argval) for next in following[i + 1 : end])
            found[one.offset] = one.opname, one.argval, attributes
            loaded = (one.argval, *attributes) if one.opname == "LOAD_GLOBAL" else loaded
    return found


@functools.lru_cache(1000)
def _catches(code: types.CodeType) -> bool:
    """Whether there is an exception handler other than that of a ``with`` statement."""
    names = [one.opname for one in dis.get_instructions(code)]
    return names.count("PUSH_EXC_INFO") > names.count("WITH_EXCEPT_START")


class _NoTensors(TorchDispatchMode):
    """Nothing is computed while a forward is traced, so that nothing is drawn, written, or asked for its value."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise Impure(f"computes with tensors that do not come from its inputs ({func})")


_lock = threading.RLock()


class Observer:
    """What is looked at while a forward is traced, in this thread.

    Attributes:
        reads: what it read.
        questions: of which inputs it asked whether they are of some class, and what it was told: that of a tensor.
    """

    def __init__(self, root: nn.Module) -> None:
        self.reads = Reads({(): child_names(root)})
        self.questions: list[tuple[str, Any, bool]] = []
        self.both_modes = 0  # whether the forward is followed in either mode, so that it may ask for it
        self.begun = False  # before that, torch.fx reads, and not the forward
        self._paths: dict[nn.Module, Path] = {m: tuple(n.split(".")) if n else () for n, m in root.named_modules()}
        self._children = {".".join(path): module for module, path in self._paths.items()}
        self._mutable: dict[int, tuple[Any, Any]] = {}  # by id: what may be written to, and what it was
        self._importing = 0  # imports under way: PyTorch does some when it first needs them
        self._unseen = 0  # functions that were entered since the last instruction was seen
        self._shadowed: list[dict[str, Any]] = []
        self._within: dict[types.CodeType, set[str]] = {}  # code -> variables of the functions around it that run too
        self._thread = threading.get_ident()
        # One object each: Python 3.11 does not hold the one that a frame had while it is called.
        self._asks, self._look, self._end = self._isinstance, self._instruction, self._imported

    def __enter__(self) -> "Observer":
        _lock.acquire()
        self._tensors, self._tracing = _NoTensors(), sys.gettrace()
        self._collecting = gc.isenabled()
        gc.disable()  # it calls back, and what it finds has finalisers: code that is not the forward's
        self._tensors.__enter__()

        def getattribute(module: nn.Module, name: str) -> Any:
            try:
                value = object.__getattribute__(module, name)
            except AttributeError:
                self._read(module, name, ABSENT, sys._getframe(1))
                raise
            self._read(module, name, value, sys._getframe(1))
            return value

        nn.Module.__getattribute__ = getattribute  # type: ignore[method-assign,assignment]
        self._transparent = getattribute.__code__
        self.look_on()
        return self

    def __exit__(self, *error: Any) -> None:
        lost = sys.gettrace() is None  # something raised under our eyes, be it a finaliser that nobody hears of
        sys.settrace(self._tracing)
        if self._collecting:
            gc.enable()
        del nn.Module.__getattribute__
        for names in self._shadowed:
            del names["isinstance"]
        self._tensors.__exit__(*error)
        _lock.release()
        written = [(value, was) for value, was in self._mutable.values() if not _unchanged(value, was)]
        for value, was in written:
            _put_back(value, was)
        if written and not isinstance(error[1], Impure):
            raise Impure(f"writes to a {type(written[0][0]).__name__} that it did not make")
        if self._unseen or (lost and error[1] is None):
            raise Impure("runs where this Python does not show what it does")

    def look_on(self) -> None:
        """Also after something was raised here and caught: Python then takes away who looks."""
        sys._getframe().f_trace_opcodes = True  # in Python 3.12 what comes after follows this frame
        sys.settrace(self._enter)

    def begin(self, defaults: list[Any]) -> None:
        """From now on the forward runs, with these optional arguments."""
        self.begun = True
        self._defaults(defaults)

    def _defaults(self, values: Iterable[Any]) -> None:
        for value in values:
            frozen = self._freeze(value, "the default of an argument")
            if frozen is not value:
                self.reads.add((id(value), "default"), functools.partial(reads.always, value), frozen)

    # --- instructions ---

    def _enter(self, frame: types.FrameType, event: str, arg: Any) -> Any:
        name = frame.f_globals.get("__name__", "")
        package = _owner(name)
        made = name.startswith("namedtuple_")
        if not self.begun or self._importing or made or package in ("torch", "resnet_fast") or package in PURE_FRAMES:
            return None
        code = frame.f_code
        if isinstance(frame.f_locals.get("self"), warnings.catch_warnings):
            return None
        if package in sys.stdlib_module_names:
            caller: Any = frame.f_back
            if (caller.f_back if caller.f_code is self._transparent else caller).f_trace is not None:
                raise Impure(f"calls {name}.{code.co_name}")
            if package != "importlib":
                return None  # called by PyTorch
            self._importing += 1
            frame.f_trace_lines = False
            return self._end
        if _catches(code):
            raise Impure("catches exceptions")
        around = self._within.get(code, set()) | set(code.co_cellvars)
        self._within.update((part, around) for part in code.co_consts if isinstance(part, types.CodeType))
        if _may_have_defaults(frame):
            for function in _functions_of(code):
                self._defaults((*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()))
        if "isinstance" not in frame.f_globals:
            frame.f_globals["isinstance"] = self._asks
            self._shadowed.append(frame.f_globals)
        frame.f_trace = self._look  # before the next line: Python 3.13 looks for it
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        self._unseen += 1
        return self._look

    def _imported(self, frame: types.FrameType, event: str, arg: Any) -> Any:
        self._importing -= event == "return"
        return self._end

    def _instruction(self, frame: types.FrameType, event: str, arg: Any) -> Any:
        if event != "opcode":
            return self._look
        self._unseen = 0
        found = _instructions(frame.f_code).get(frame.f_lasti)
        if found is None:
            return self._look
        operation, name, attributes = found
        if operation in _FORBIDDEN:
            raise Impure(_FORBIDDEN[operation].format(name))
        if operation == "LOAD_GLOBAL":
            self._global(frame, name, attributes)
        elif name in frame.f_code.co_freevars and name not in self._within.get(frame.f_code, ()):
            if operation in _CLOSURE_WRITES:
                raise Impure(f"writes to the variable {name!r} of a function around it")
            self._closure(frame, name)
        return self._look

    def _global(self, frame: types.FrameType, name: str, attributes: tuple[str, ...]) -> None:
        if name not in frame.f_globals:
            value = frame.f_builtins.get(name)
            exception = isinstance(value, type) and issubclass(value, BaseException)
            if value is not None and name not in BUILTINS and not exception:
                raise Impure(f"calls {name}")
            return
        value, label = frame.f_globals[name], name
        if value is self._asks:
            return
        names = frame.f_globals
        get: Any = lambda root: names.get(name, ABSENT)  # noqa: E731
        for attribute in attributes:
            if not isinstance(value, (types.ModuleType, type)):
                break
            owner, value = value, getattr(value, attribute, ABSENT)
            get, label, name = functools.partial(reads.attribute, owner, attribute), f"{label}.{attribute}", attribute
        if value is ABSENT:
            return
        if isinstance(value, types.ModuleType):
            raise Impure(f"uses {label}")
        frozen = self._freeze(value, label)
        defined = isinstance(value, (type, *_FUNCTIONS)) and getattr(value, "__name__", "") == name
        if not defined or frozen is not value:
            self.reads.add((id(names), label), get, frozen)

    def _closure(self, frame: types.FrameType, name: str) -> None:
        value = frame.f_locals.get(name)
        frozen = self._freeze(value, name)
        if name == "__class__" or isinstance(value, (type, *_FUNCTIONS, nn.Module)):
            return
        code = frame.f_code
        for function in _functions_of(code):
            cell = function.__closure__[code.co_freevars.index(name)]  # type: ignore[index]
            if cell.cell_contents is value:
                self.reads.add((id(cell), name), functools.partial(reads.content, cell), frozen)

    # --- attributes of modules ---

    def _read(self, module: nn.Module, name: str, value: Any, frame: types.FrameType) -> None:
        if not self.begun or threading.get_ident() != self._thread:
            return
        reader = frame.f_globals.get("__name__", "")
        package = _owner(reader)
        own = reader.startswith("torch.nn.modules")
        calling = own and (name == "__dict__" or frame.f_code.co_name in ("_wrapped_call_impl", "_call_impl"))
        if package == "resnet_fast" or (package == "torch" and not own) or calling:
            return
        path = self._paths.get(module)
        if path is None:
            raise Impure(f"reads {name!r} of a module that is none of its children")
        if path not in self.reads.children:
            self.reads.children[path] = child_names(module)
        if name in ("__dict__", "_parameters", "_buffers"):
            raise Impure(f"looks through its {name}")
        if name == "training" and path and not self.both_modes:
            raise Impure(f"asks for the mode of {'.'.join(path)}")
        static = found_in_class(type(module), name)
        if name == "__class__" or isinstance(static, classmethod):
            self.reads.add(
                (path, "__class__"), functools.partial(type_at, path), self._freeze(stock_type(module), name)
            )
        if name in ("training", "_modules") or (name.startswith("__") and name.endswith("__")):
            return
        label = ".".join((*path, name))
        attributes = module.__dict__
        if name in attributes:
            frozen = self._freeze(value, label)
            if frozen is value:
                self.reads.attributes.setdefault(path, {})[name] = value
            else:
                self.reads.add((path, name), functools.partial(reads.own_attribute, path, name), frozen)
            return
        for holder in ("_parameters", "_buffers"):
            if name in attributes[holder]:
                self.reads.tensors.setdefault(path, {})[holder, name] = attributes[holder][name] is None
                return
        if name in attributes["_modules"]:
            return
        self.reads.attributes.setdefault(path, {})[name] = ABSENT
        if isinstance(static, (types.FunctionType, classmethod, staticmethod)):
            function = getattr(static, "__func__", static)
            if not own and package_of(function) == "torch" and name not in _METHODS:
                raise Impure(f"calls {label}")
        elif value is not ABSENT and not isinstance(static, property):
            self.reads.add(
                (path, name), functools.partial(reads.class_attribute, path, name), self._freeze(value, label)
            )

    def _isinstance(self, value: Any, classes: Any) -> bool:
        """In place of the built-in function, in the code that runs."""
        if threading.get_ident() != self._thread:
            return isinstance(value, classes)
        asked = self._children.get(str(value.node.target)) if isinstance(value, fx.Proxy) else value
        if isinstance(asked, nn.Module) and asked in self._paths:
            path = self._paths[asked]
            self.reads.add((path, type), functools.partial(type_at, path), stock_type(asked))
        if not isinstance(value, fx.Proxy):
            return isinstance(value, classes)
        answer = isinstance(_TENSOR, classes)
        if value.node.op == "placeholder":
            self.questions.append((str(value.node.target), classes, answer))
        elif value.node.op != "call_module" or type(asked) not in _GIVES_A_TENSOR:
            raise Impure("asks for the type of a result")
        return answer

    # --- values ---

    def _freeze(self, value: Any, label: str) -> Any:
        try:
            return freeze(value, functools.partial(self._visit, label))
        except Unseen as unseen:
            raise Impure(f"reads {label}, {unseen}") from None

    def _visit(self, label: str, value: Any) -> None:
        if isinstance(value, _CONTAINERS):
            copy: Any = dict if isinstance(value, dict) else set if isinstance(value, set) else list
            self._mutable.setdefault(id(value), (value, copy(value)))
        elif not known(value):
            raise Impure(f"calls {label}")


@functools.cache
def _owner(module: str) -> str:
    """The package that code is of; our modules that count and keep are looked at as everybody's are."""
    return "resnet_fast.finetune" if module.startswith("resnet_fast.finetune.") else module.partition(".")[0]


_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, types.MethodDescriptorType, types.WrapperDescriptorType)
_CONTAINERS = (dict, list, set, deque)
_TENSOR = torch.empty(0, device="cpu")
_GIVES_A_TENSOR = {nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.Linear, nn.Identity}


def _may_have_defaults(frame: types.FrameType) -> bool:
    """Whether what is entered may have been given containers by its defaults: a module's code has none, and they are
    older than any result, and than the dict of the other keyword arguments."""
    code, given = frame.f_code, dict(frame.f_locals)
    if not code.co_flags & inspect.CO_OPTIMIZED:
        return False
    if code.co_flags & inspect.CO_VARKEYWORDS:
        named = code.co_argcount + code.co_kwonlyargcount + bool(code.co_flags & inspect.CO_VARARGS)
        given.pop(code.co_varnames[named], None)
    containers = (value for value in given.values() if isinstance(value, _CONTAINERS))
    return any(not any(isinstance(item, fx.Proxy) for item in _items(value)) for value in containers)


def _items(container: Any) -> Iterable[Any]:
    return container.values() if isinstance(container, dict) else container


def _functions_of(code: types.CodeType) -> list[types.FunctionType]:
    """Those made of this code, for which all objects are looked through: tens of milliseconds."""
    found = (one for one in gc.get_referrers(code) if isinstance(one, types.FunctionType))
    return [function for function in found if function.__code__ is code]


def _unchanged(value: Any, was: Any) -> bool:
    if isinstance(value, dict):
        return list(value) == list(was) and all(map(operator.is_, value.values(), was.values()))
    return value == was if isinstance(value, set) else len(value) == len(was) and all(map(operator.is_, value, was))


def _put_back(value: Any, was: Any) -> None:
    value.clear()
    (value.update if isinstance(value, (dict, set)) else value.extend)(was)
