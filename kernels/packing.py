"""Packed weights, cached until a tensor they were made from changes.

A pack is derived data: it belongs to no module, is in no state_dict, and neither ``deepcopy`` nor ``pickle`` sees it.
It is found again by the identity of its source tensors and goes with the first of them. PyTorch bumps a tensor's
``_version`` at every in-place write but those through ``.data``; the first bytes of CPU tensors are compared as well,
so that the usual whole-tensor writes through ``.data`` (old optimisers, moving averages) are seen too.
"""

import ctypes
import weakref
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch.utils.weak import WeakIdKeyDictionary

_PROBED_BYTES = 64
_PACKS_KEPT = 4  # per weight: oneDNN's layout depends on the input size, and detectors see many sizes


_caches: "weakref.WeakSet[PackCache]" = weakref.WeakSet()


class _Entry(NamedTuple):
    others: tuple[weakref.ref, ...]  # the sources after the first, which is the dictionary's key
    states: tuple[Hashable, ...]
    packs: dict[Hashable, Any]


def _state(tensor: torch.Tensor) -> Hashable:
    """A value that changes when the tensor's contents do."""
    pointer = tensor.data_ptr()
    probe = b""
    if tensor.device.type == "cpu":
        # A dense tensor's elements fill nbytes from its pointer on; a strided view holds at least its first element.
        size = tensor.nbytes if tensor.is_contiguous() else tensor.element_size()
        probe = ctypes.string_at(pointer, min(_PROBED_BYTES, size)) if tensor.numel() else b""
    return tensor._version, pointer, probe


class PackCache:
    """Values made from tensors, kept while these live and stay as they are."""

    def __init__(self) -> None:
        self._entries = WeakIdKeyDictionary()
        _caches.add(self)

    def get(self, sources: tuple[torch.Tensor, ...], key: Hashable, make: Callable[[], Any]) -> Any:
        """The pack ``key`` of ``sources``, from ``make()`` if there is none or a source has changed.

        Tensors made under ``torch.inference_mode`` carry no version, so what is made of them is never kept.
        """
        if any(source.is_inference() for source in sources):
            return make()
        states = tuple(map(_state, sources))
        entry = self._entries.get(sources[0])
        if (
            entry is None
            or entry.states != states
            or any(ref() is not other for ref, other in zip(entry.others, sources[1:]))
        ):
            entry = _Entry(tuple(weakref.ref(other) for other in sources[1:]), states, {})
            self._entries[sources[0]] = entry
        packs = entry.packs
        if key not in packs:
            if len(packs) >= _PACKS_KEPT:
                packs.pop(next(iter(packs)), None)
            # Ordinary tensors even when first asked for under inference_mode: autograd may want to save them later.
            with torch.inference_mode(False), torch.no_grad():
                packs[key] = make()
        return packs[key]

    def clear(self) -> None:
        self._entries.clear()


def clear_all() -> None:
    """Forget every pack. Needed only after writes through ``.data`` that no check can see."""
    for cache in _caches:
        cache.clear()
