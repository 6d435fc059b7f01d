"""Which code is known to be pure, or is looked at when it runs: that of functions and classes that a forward calls."""

import builtins
import functools
import sys
import types
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import get_ignored_functions

from resnet_fast.graph.reads import CONSTANTS, package_of

BUILTINS = {
    *("abs", "all", "any", "bool", "bytes", "callable", "complex", "dict", "divmod", "enumerate", "filter", "float"),
    *("frozenset", "getattr", "hasattr", "int", "isinstance", "issubclass", "iter", "len", "list", "map", "max"),
    *("min", "next", "pow", "property", "range", "reversed", "round", "set", "slice", "sorted", "staticmethod", "str"),
    *("sum", "super", "tuple", "zip"),
}
_PURE_MODULES = {"math", "cmath", "operator", "_operator", "itertools", "_functools", "_collections", "collections"}
PURE_FRAMES = {"typing", "typing_extensions", "enum", "abc", "_collections_abc", "collections", "types", "operator"}
PURE_FRAMES |= {"numbers"}


@functools.cache
def _recorded() -> dict[int, Any]:
    """Functions of PyTorch that a trace records when they are called with what it follows, by ``id``: kept here, since
    some are made anew at each look, and their ``id`` would be another's when they are gone."""
    spaces = (torch, torch._C._VariableFunctions, torch._C._nn, torch.functional, F, torch.linalg, torch.fft)
    functions = [getattr(space, name) for space in (*spaces, torch.special, Tensor) for name in dir(space)]
    harmless = (torch.jit.is_scripting, torch.jit.is_tracing, torch.jit.annotate)  # of which ``stock_wanted`` asks
    ignored = set(map(id, get_ignored_functions()))
    return {id(f): f for f in (*functions, *harmless) if callable(f) and (id(f) not in ignored or f in harmless)}


def known(value: Any) -> bool:
    """Whether code is not PyTorch's or Python's own, so that it is looked at when it runs, or is known to be pure."""
    if isinstance(value, types.ModuleType):
        return False
    if isinstance(value, (type, types.MethodDescriptorType, types.WrapperDescriptorType)):
        cls = value if isinstance(value, type) else value.__objclass__
        if value is type or isinstance(value, types.WrapperDescriptorType):
            return False
        if cls is warnings.catch_warnings:
            return True
        if package_of(cls) == "builtins":
            return cls.__name__ in BUILTINS or issubclass(cls, BaseException)
        package = package_of(cls)
        return package not in ("numpy", *sys.stdlib_module_names) or package in PURE_FRAMES | _PURE_MODULES
    if isinstance(value, types.BuiltinFunctionType):
        owner = value.__self__
        if isinstance(owner, types.ModuleType) and owner is not builtins:
            return owner.__name__ in _PURE_MODULES or id(value) in _recorded()
        return value.__name__ in BUILTINS if owner is builtins else id(value) in _recorded() or _plain(owner)
    return not isinstance(value, types.FunctionType) or package_of(value) != "torch" or id(value) in _recorded()


def _plain(owner: Any) -> bool:
    return isinstance(owner, CONSTANTS) and not isinstance(owner, type(None))
