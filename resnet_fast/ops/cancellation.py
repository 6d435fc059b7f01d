"""Whether an expand layer's statistics lost too many digits (``block_norm.from_gram``), without waiting for a GPU.

On a CPU each call decides for itself. A GPU finds out long after its host has to know which kernels to start next. So
there, what a call finds is copied to the host meanwhile, and decides the next call with the same weight. Only the first
call waits. Features seldom begin to cancel from one step to the next; where they do, that one call goes by statistics
with fewer digits. Once they cancel, the weight's statistics are taken from its results, which is always right, until
many calls on end would have done without: two kinds of batches in turn, say, do not surprise it again and again.

All of that follows from what the calls computed, in their order, and never from how fast a GPU was.
"""

from weakref import WeakKeyDictionary

import torch
from torch import Tensor, UntypedStorage

from resnet_fast.kernels import streams

CALLS = 100
"""After a call that cancelled, so many go by their results."""


class _Reading:
    """A flag of a GPU, on its way to the host."""

    def __init__(self) -> None:
        self._host, self._copied = torch.empty((), dtype=torch.bool, pin_memory=True), torch.cuda.Event()

    def start(self, flag: Tensor) -> None:
        self._host.copy_(flag, non_blocking=True)
        self._copied.record(torch.cuda.current_stream(flag.device))

    def value(self) -> bool:
        """Waits for the copy alone, which was behind the kernels of the call before."""
        self._copied.synchronize()
        return bool(self._host)


class _Weight:
    """What the calls with one weight found. ``left``: how many more go by their results."""

    def __init__(self, cancelled: bool) -> None:
        self.left, self.reading = CALLS if cancelled else 0, _Reading()


_weights: "WeakKeyDictionary[UntypedStorage, dict[int, _Weight]]" = WeakKeyDictionary()
"""By their memory, and by their places in it."""


def cancelled(flag: Tensor, weight: Tensor) -> bool:
    """Whether to take the statistics of a call with ``weight`` from its result. ``flag``: whether the others cancel."""
    if not flag.is_cuda:
        return bool(flag)
    there, place = _weights.setdefault(weight.untyped_storage(), {}), int(weight.storage_offset())
    known = there.get(place)
    if streams.capturing(flag.device.index):  # nobody may wait, and a replay decides nothing
        return known is None or known.left > 0
    if known is None:
        known = there[place] = _Weight(bool(flag))
    elif known.reading.value():
        known.left = CALLS
    else:
        known.left = max(0, known.left - 1)
    known.reading.start(flag)
    return known.left > 0
