"""Packed weights, cached until a tensor they were made from changes.

A pack is derived data: it belongs to no module, is in no state_dict, and neither ``deepcopy`` nor ``pickle`` sees it.
It is found again by the identity of its source tensors and goes with the first of them.

PyTorch raises a tensor's ``_version`` at most in-place writes, but not at those of optimisers with ``fused=True``, nor
at those through ``.data``. So every optimiser step drops all packs, and the first bytes of CPU tensors are compared,
which shows the usual whole-tensor writes through ``.data`` (moving averages, weights copied the old way). For anything
else there is ``clear_all``. (Batch norm does not raise the version of its running statistics either: whoever
makes a pack of those names ``num_batches_tracked`` among its sources.)

Scale and shift are other tensors in every call where the batch norm is folded outside: in compiled and exported
graphs, and under autograd. They are short, so on a CPU their contents count, whoever holds them.

On a GPU, a pack is ordered before its use on other streams than the one that made it: see ``streams.py``.
"""

import contextlib
import weakref
from collections.abc import Callable, Hashable, Iterator
from ctypes import string_at
from typing import Any, NamedTuple, Optional

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from resnet_fast.kernels import streams

_PROBED_BYTES = 64
_PACKS_KEPT = 4  # per weight: oneDNN's layout depends on the input size, and detectors see many sizes

clearings = 0
"""Rises with every ``clear_all``: whoever keeps something else made from tensors keeps this number with it."""

holders: Optional[list[Any]] = None
"""Within ``held``, takes every pack that is asked for."""

_caches: "weakref.WeakSet[PackCache]" = weakref.WeakSet()


class _Source(NamedTuple):
    """A tensor, and what it held when the pack was made."""

    reference: weakref.ref
    version: int
    pointer: int
    probed: int  # how many bytes from the pointer on are compared
    probe: bytes

    def unchanged(self, tensor: torch.Tensor) -> bool:
        return (
            self.reference() is tensor
            and tensor._version == self.version
            and tensor.data_ptr() == self.pointer
            and (not self.probed or string_at(self.pointer, self.probed) == self.probe)
        )


def _remember(tensor: torch.Tensor, forget: Any = None) -> _Source:
    pointer = tensor.data_ptr()
    probed = probed_bytes(tensor) if tensor.device.type == "cpu" else 0
    return _Source(weakref.ref(tensor, forget), tensor._version, pointer, probed, string_at(pointer, probed))


def probed_bytes(tensor: torch.Tensor) -> int:
    """How many bytes of a CPU tensor, from its pointer on, are compared to see writes through ``.data``."""
    if not tensor.numel():
        return 0
    storage = tensor.untyped_storage()
    return min(_PROBED_BYTES, storage.data_ptr() + storage.nbytes() - tensor.data_ptr())


class _Entry(NamedTuple):
    sources: tuple[_Source, ...]
    contents: tuple[bytes, ...]
    packs: dict[Hashable, tuple[Any, Optional[streams.Made]]]


class PackCache:
    """Values made from tensors, kept while these live and stay as they are."""

    def __init__(self) -> None:
        self._entries: dict[int, _Entry] = {}  # by the id of the first source, which removes its entry when it dies
        _caches.add(self)

    def get(
        self,
        sources: tuple[torch.Tensor, ...],
        key: Hashable,
        make: Callable[[], Any],
        vectors: tuple[torch.Tensor, ...] = (),
    ) -> Any:
        """The pack ``key`` of ``sources``, from ``make()`` if there is none or a source has changed.

        It is also made of ``vectors``, on the CPU, which may be other tensors in the next call: their contents count.

        Tensors made under ``torch.inference_mode`` carry no version, so what is made of them is never kept. Nor is what
        a stream makes while it is captured.
        """
        entry, contents = self._entries.get(id(sources[0])), tuple(map(_content, vectors))
        if entry is None or entry.contents != contents or not _all_unchanged(entry.sources, sources):
            if any(source.is_inference() for source in sources):
                return make()
            entry = self._new_entry(sources, contents)
        packs = entry.packs
        kept = packs.get(key)
        if kept is not None:
            pack, made = kept
            if made is not None:
                made.order()
        else:
            # Ordinary tensors even when first asked for under inference_mode: autograd may want to save them later.
            with torch.inference_mode(False), torch.no_grad():
                pack = make()
            index = sources[0].device.index if sources[0].is_cuda else None
            if index is None or not streams.capturing(index):
                if len(packs) >= _PACKS_KEPT:
                    packs.pop(next(iter(packs), None), None)
                packs[key] = pack, None if index is None else streams.Made(index, pack)
        if holders is not None:
            holders.append(pack)
        return pack

    def _new_entry(self, sources: tuple[torch.Tensor, ...], contents: tuple[bytes, ...]) -> _Entry:
        identity, entries = id(sources[0]), self._entries

        def forget(reference: weakref.ref) -> None:
            entry = entries.get(identity)
            if entry is not None and entry.sources[0].reference is reference:
                entries.pop(identity, None)

        entry = _Entry((_remember(sources[0], forget), *map(_remember, sources[1:])), contents, {})
        entries[identity] = entry
        return entry

    def clear(self) -> None:
        self._entries.clear()


def _content(vector: torch.Tensor) -> bytes:
    vector = vector.contiguous()
    return string_at(vector.data_ptr(), vector.nbytes)


def _all_unchanged(remembered: tuple[_Source, ...], sources: tuple[torch.Tensor, ...]) -> bool:
    return len(remembered) == len(sources) and all(map(_Source.unchanged, remembered, sources))


@contextlib.contextmanager
def held() -> Iterator[list[Any]]:
    """Collects all packs that are asked for meanwhile, in any thread.

    For whoever keeps their addresses, as a CUDA graph does: a cache drops packs that are still up to date when it has
    too many.
    """
    global holders
    before, holders = holders, []
    try:
        yield holders
    finally:
        holders = before


def clear_all() -> None:
    """Forget every pack. Needed by hand only after writes that nothing above can see."""
    global clearings
    clearings += 1
    for cache in list(_caches):
        cache.clear()


register_optimizer_step_post_hook(lambda *_: clear_all())
