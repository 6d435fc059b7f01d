"""Packed weights, cached until a tensor they were made from changes.

A pack is derived data: it belongs to no module, is in no state_dict, and neither ``deepcopy`` nor ``pickle`` sees it.
It is found again by the memory of its source tensors and goes with that of the first. Nothing hangs on the tensors
themselves: ``torch.utils.swap_tensors`` takes none that somebody has weak references to.

PyTorch raises a tensor's ``_version`` at most in-place writes, but not at those of optimisers with ``fused=True``, nor
at those through ``.data``. So every optimiser step drops all packs, and what the sources hold is compared, as far as
contents.py does. For anything else there is ``clear_all``. (Batch norm does not raise the version of its running
statistics either: whoever makes a pack of those names ``num_batches_tracked`` among its sources.)

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
from resnet_fast.kernels.contents import Contents

_PACKS_KEPT = 4  # per weight: oneDNN's layout depends on the input size, and detectors see many sizes

clearings = 0
"""Rises with every ``clear_all``: whoever keeps something else made from tensors keeps this number with it."""

holders: Optional[list[Any]] = None
"""Within ``held``, takes every pack that is asked for."""

_caches: "weakref.WeakSet[PackCache]" = weakref.WeakSet()


def place(tensor: torch.Tensor) -> Hashable:
    """Where a tensor's elements are."""
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


class _Source:
    """A tensor's memory, and the version that the tensor had when the pack was made."""

    __slots__ = ("place", "storage", "version")

    def __init__(self, tensor: torch.Tensor, forget: Any = None) -> None:
        self.storage = weakref.ref(tensor.untyped_storage(), forget)
        self.place, self.version = place(tensor), tensor._version

    def unchanged(self, tensor: torch.Tensor) -> bool:
        return (
            self.storage() is tensor.untyped_storage()
            and place(tensor) == self.place
            and not tensor.is_inference()  # which has no version
            and tensor._version == self.version
        )


class _Entry(NamedTuple):
    sources: tuple[_Source, ...]
    held: Contents
    vectors: tuple[bytes, ...]
    packs: dict[Hashable, tuple[Any, Optional[streams.Made]]]

    def unchanged(self, sources: tuple[torch.Tensor, ...], vectors: tuple[bytes, ...]) -> bool:
        return (
            len(self.sources) == len(sources)
            and self.vectors == vectors
            and all(map(_Source.unchanged, self.sources, sources))
            and self.held.unchanged(sources)
        )


class PackCache:
    """Values made from tensors, kept while these live and stay as they are."""

    def __init__(self) -> None:
        self._entries: dict[Hashable, _Entry] = {}  # by the place of the first source; goes with its memory
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
        a stream makes while it is captured, nor a view of the first source, which would keep that alive.
        """
        entry, contents = self._entries.get(place(sources[0])), tuple(map(_content, vectors))
        if entry is None or not entry.unchanged(sources, contents):
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
            if (index is None or not streams.capturing(index)) and not _shares_memory(pack, sources[0]):
                if len(packs) >= _PACKS_KEPT:
                    packs.pop(next(iter(packs), None), None)
                packs[key] = pack, None if index is None else streams.Made(index, pack)
        if holders is not None:
            holders.append(pack)
        return pack

    def _new_entry(self, sources: tuple[torch.Tensor, ...], vectors: tuple[bytes, ...]) -> _Entry:
        where, entries = place(sources[0]), self._entries

        def forget(storage: weakref.ref) -> None:
            entry = entries.get(where)
            if entry is not None and entry.sources[0].storage is storage:
                entries.pop(where, None)

        remembered = (_Source(sources[0], forget), *map(_Source, sources[1:]))
        entry = entries[where] = _Entry(remembered, Contents(sources), vectors, {})
        return entry

    def clear(self) -> None:
        self._entries.clear()


def _shares_memory(pack: Any, source: torch.Tensor) -> bool:
    return isinstance(pack, torch.Tensor) and pack.untyped_storage() is source.untyped_storage()


def _content(vector: torch.Tensor) -> bytes:
    vector = vector.contiguous()
    return string_at(vector.data_ptr(), vector.nbytes)


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
