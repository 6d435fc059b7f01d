"""What a plan or a graph took for granted about a module: attributes, flags, hooks, tensors. Asked at every call."""

from collections.abc import Iterable, Iterator
from itertools import chain
from operator import attrgetter, is_, itemgetter
from typing import Any

from torch import Tensor, nn

from resnet_fast.graph.conditions import patched
from resnet_fast.graph.program import STATE
from resnet_fast.graph.reads import stock_type
from resnet_fast.kernels import packing
from resnet_fast.kernels.contents import Contents

_TENSORS = ("_parameters", "_buffers")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

_tensors_of, _hooks_of = itemgetter(*_TENSORS), itemgetter(*_HOOKS)
_containers_of = itemgetter("_modules", *_TENSORS, *_HOOKS)
_version_of = attrgetter("_version")


class Guard:
    """Whether a module is still as it was when the guard was made; with all modules below it, and their tensors.

    Holds no reference to the module, which owns it. Everything is compared in bulk, in few passes: a ResNet-50 has 160
    modules with 4000 attributes and 320 tensors, none of which is in the first caches after the last call.
    """

    def __init__(self, root: nn.Module) -> None:
        """The tensors have a version and memory: see ``network``."""
        self._modules = [module for module in root.modules() if module is not root]
        self._dicts = [module.__dict__ for module in self._modules]
        self._attributes = self._live_attributes(root)
        self._containers = self._live_containers(root)
        self._contents = _contents(self._containers)
        self.tensors = [t for t in _values(chain.from_iterable(map(_tensors_of, self._dicts))) if t is not None]
        self._versions = list(map(_version_of, self.tensors))
        self._pointers = list(map(Tensor.data_ptr, self.tensors))
        self._held = Contents(self.tensors)
        self._forwards: dict[Any, Any] = {cls: cls.forward for cls in self._classes(root)}
        self._clearings = packing.clearings

    def holds(self, root: nn.Module) -> bool:
        try:
            same = self._live_attributes(root) == self._attributes
        except Exception:  # some attribute that was replaced does not like to be compared
            return False
        if not same or packing.clearings != self._clearings:
            return False
        # Not merely equal ones: changes would be made to those that replaced them.
        containers = self._live_containers(root)
        return (
            _identical(containers, self._containers)
            and _identical(_contents(containers), self._contents)
            and list(map(_version_of, self.tensors)) == self._versions
            and list(map(Tensor.data_ptr, self.tensors)) == self._pointers
            and all(cls.forward is forward for cls, forward in self._forwards.items())
            and self._held.unchanged(self.tensors)
        )

    def _classes(self, root: nn.Module) -> set[Any]:
        return {stock_type(module) for module in (root, *self._modules)}

    def patched(self) -> bool:
        """Whether any module below is of a class of PyTorch's that somebody has patched."""
        return any(map(patched, self._forwards))

    def hooked(self) -> bool:
        """Whether any module below has hooks."""
        return any(chain.from_iterable(map(_hooks_of, self._dicts)))

    def _live_attributes(self, root: nn.Module) -> list:
        return [
            *(value for name, value in root.__dict__.items() if name != STATE),  # which leads here
            *map(type, self._modules),
            *_values(self._dicts),
        ]

    def _live_containers(self, root: nn.Module) -> list[dict]:
        return [root.__dict__["_modules"], *chain.from_iterable(map(_containers_of, self._dicts))]


def _contents(containers: list[dict]) -> list:
    """Names, then values."""
    filled = list(filter(None, containers))
    return [*chain.from_iterable(filled), *_values(filled)]


def _values(containers: Iterable[dict]) -> Iterator[Any]:
    return chain.from_iterable(map(dict.values, containers))


def _identical(values: list, others: list) -> bool:
    return len(values) == len(others) and all(map(is_, values, others))
