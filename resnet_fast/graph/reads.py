"""What a traced forward read besides its inputs. While that is the same, the trace stands for the forward."""

import argparse
import enum
import functools
import numbers
import sys
import types
from collections import deque
from collections.abc import Callable, Sized
from dataclasses import dataclass, field
from typing import Any, Generic, Optional, Protocol

import torch
from torch import Tensor, nn

from resnet_fast.graph.conditions import Accelerated, Path, child_at

CONSTANTS = (
    *(numbers.Number, str, bytes, range, slice, enum.Enum, type(None), types.EllipsisType),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format),
)
_CODE = (
    *(types.FunctionType, types.BuiltinFunctionType, types.MethodDescriptorType, types.WrapperDescriptorType),
    *(types.ModuleType, nn.Module, torch._ops.OpOverload, torch._ops.OpOverloadPacket),
)
_PLAIN_BASES = {
    *(object, Generic, Protocol, types.SimpleNamespace, *argparse.Namespace.__mro__),
    *(dict, list, set, frozenset, tuple, deque),
}
_DATA = (dict, list, set, frozenset, tuple, deque, types.SimpleNamespace, argparse.Namespace)
_NEVER_STATE = ("torch", "torchvision", "timm", "numpy", "resnet_fast")
ABSENT = object()


class Unseen(TypeError):
    """Of a value whose changes would not be noticed."""


def package_of(code: Any) -> str:
    """The package that a class or a function is from."""
    return (getattr(code, "__module__", None) or "").partition(".")[0]


def belongs_to_user(cls: type) -> bool:
    package = package_of(cls)
    return package not in _NEVER_STATE and package not in sys.stdlib_module_names


class _Same:
    """Equal to what holds the same tensor, of the same shape."""

    def __init__(self, value: Tensor) -> None:
        self.value, self.meta = value, (value.shape, value.dtype, value.device)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value and self.meta == other.meta

    __hash__ = None  # type: ignore[assignment]


def freeze(value: Any, visit: Callable[[Any], None] = lambda value: None, above: tuple[int, ...] = ()) -> Any:
    """Something that is equal as long as ``value`` is, all the way down; constants and code are what they are.

    Args:
        visit: called with everything that code could be called by, or written to.

    Raises:
        Unseen: something in it is neither data nor code, so that it may change unseen.
    """
    if isinstance(value, CONSTANTS):
        return value
    if isinstance(value, Tensor):
        return _Same(value)
    if isinstance(value, (type, *_CODE)):
        visit(value)
    if isinstance(value, _CODE) and not _own_attributes(value):
        return value
    if isinstance(value, type) and not belongs_to_user(value):
        return value
    if id(value) in above:
        return above.index(id(value))
    if len(above) > 20 or (isinstance(value, Sized) and len(value) > 100):
        raise Unseen(f"a {type(value).__name__} that would take long to compare at every call")
    inner: Callable[[Any], Any] = functools.partial(freeze, visit=visit, above=(*above, id(value)))
    if isinstance(value, type):
        return value, *map(inner, _class_data(value).items())
    if isinstance(value, _CODE):
        return value, inner(_own_attributes(value))
    if isinstance(value, types.MethodType):
        return inner(value.__func__), inner(value.__self__)
    if isinstance(value, functools.partial):
        return inner(value.func), inner(value.args), inner(value.keywords)
    kind = type(value)
    plain = (
        base in _PLAIN_BASES or belongs_to_user(base) or package_of(base) == "collections" for base in kind.__mro__
    )
    if not all(plain):
        raise Unseen(f"a {kind.__name__}")
    frozen: list[Any] = [kind]
    if isinstance(value, (dict, list, set, deque)):
        visit(value)
    if isinstance(value, dict):
        frozen += [(inner(k), inner(v)) for k, v in value.items()]
    elif isinstance(value, (set, frozenset)):
        frozen.append(frozenset(map(inner, value)))
    elif isinstance(value, (list, tuple, deque)):
        frozen += map(inner, value)
    elif not hasattr(value, "__dict__") and not any("__slots__" in vars(base) for base in kind.__mro__):
        raise Unseen(f"a {kind.__name__}")
    if hasattr(value, "__dict__") and value.__dict__:
        frozen.append(inner(value.__dict__))
    for base in kind.__mro__:
        slots = vars(base).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            frozen.append((name, inner(getattr(value, name, None))))
    if belongs_to_user(kind):
        frozen += map(inner, _class_data(kind).items())
    return tuple(frozen)


def _class_data(cls: type) -> dict[str, Any]:
    """What instances have of their class, that is no code."""
    bases = [base for base in reversed(cls.__mro__) if belongs_to_user(base)]
    items = ((k, v) for base in bases for k, v in vars(base).items())
    return {k: v for k, v in items if not k.startswith("__") and isinstance(v, (*CONSTANTS, *_DATA))}


def _own_attributes(code: Any) -> dict[str, Any]:
    """Those that somebody gave to a function."""
    attributes = vars(code) if isinstance(code, types.FunctionType) else {}
    return {k: v for k, v in attributes.items() if not k.startswith("__") and isinstance(v, (*CONSTANTS, *_DATA))}


@dataclass(eq=False)
class Reads:
    """Of a module's forward, in its own attributes and those of the modules below it, and elsewhere."""

    children: dict[Path, tuple[str, ...]] = field(default_factory=dict)  # the names of those that a module has
    attributes: dict[Path, dict[str, Any]] = field(default_factory=dict)  # constants and code in ``__dict__``
    tensors: dict[Path, dict[tuple[str, str], bool]] = field(default_factory=dict)  # its own; whether they are None
    others: dict[Any, tuple[Callable[[nn.Module], Any], Any]] = field(default_factory=dict)  # by what they are

    def add(self, key: Any, get: Callable[[nn.Module], Any], frozen: Any) -> None:
        """Note that ``get``, called with the module, gives what was ``frozen``."""
        self.others.setdefault(key, (get, frozen))

    def include(self, path: Path, child: nn.Module, reads: "Reads") -> None:
        """Watch what the forward of a child read, and its class."""
        self.add((path, type), functools.partial(type_at, path), stock_type(child))
        self.children |= {(*path, *below): names for below, names in reads.children.items()}
        for below, values in reads.attributes.items():
            self.attributes.setdefault((*path, *below), {}).update(values)
        self.tensors |= {(*path, *below): values for below, values in reads.tensors.items()}
        for key, (get, frozen) in reads.others.items():
            self.add((path, key), functools.partial(_below, path, get), frozen)

    def hold(self, module: nn.Module) -> bool:
        """Whether the forward of ``module`` would read the same now."""
        try:
            return self.attributes_hold(module) and self.others_hold(module)
        except Exception:  # of something that was replaced, and does not like to be compared
            return False

    def attributes_hold(self, module: nn.Module) -> bool:
        for path, values in self.attributes.items():
            owner = child_at(module, path)
            if owner is None:
                return False
            attributes = owner.__dict__
            for name, value in values.items():
                now = attributes.get(name, ABSENT)
                if now is not value and now != value:
                    return False
        for path, missing in self.tensors.items():
            owner = child_at(module, path)
            if owner is None:
                return False
            for (holder, name), was in missing.items():
                if (owner.__dict__[holder].get(name) is None) is not was:
                    return False
        return True

    def others_hold(self, module: nn.Module) -> bool:
        """The same for what is neither constant nor code in a module's ``__dict__``."""
        try:
            return all(freeze(get(module)) == frozen for get, frozen in self.others.values())
        except Exception:
            return False


def child_names(module: nn.Module) -> tuple[str, ...]:
    return tuple(name for name, child in module._modules.items() if child is not None)


def _below(path: Path, get: Callable[[Any], Any], root: nn.Module) -> Any:
    return get(child_at(root, path))


def type_at(path: Path, root: nn.Module) -> Optional[type]:
    """Its stock class."""
    owner = child_at(root, path)
    return None if owner is None else stock_type(owner)


def stock_type(module: nn.Module) -> type:
    return type(module).stock_class if isinstance(module, Accelerated) else type(module)


def found_in_class(cls: type, name: str) -> Any:
    """What instances find in their class, as it is there: functions as functions, properties as properties."""
    return next((vars(base)[name] for base in cls.__mro__ if name in vars(base)), ABSENT)


# --- where things are read again ---


def attribute(owner: Any, name: str, root: nn.Module) -> Any:
    return getattr(owner, name, ABSENT)


def always(value: Any, root: nn.Module) -> Any:
    return value


def content(cell: types.CellType, root: nn.Module) -> Any:
    return cell.cell_contents


def own_attribute(path: Path, name: str, root: nn.Module) -> Any:
    owner = child_at(root, path)
    return ABSENT if owner is None else owner.__dict__.get(name, ABSENT)


def class_attribute(path: Path, name: str, root: nn.Module) -> Any:
    return getattr(type(child_at(root, path)), name, ABSENT)
