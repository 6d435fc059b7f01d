"""Results of one CUDA stream that are kept for all, ordered before their use on another.

A pack is made by kernels on the stream of whoever needs it first, and found again by calls on any stream. Nothing
orders another stream's work behind those kernels: it could read the pack before it is written. So whoever keeps such a
thing keeps a ``Made`` with it, which is an event, and every other stream waits for it once, on the GPU.

Memory goes back to the stream that it was allocated for, when the last reference to it goes, though another stream's
kernels may still be waiting to read it. The allocator is told of such a stream too.

Captures into CUDA graphs: a stream that is captured must not wait for anything outside the graph (CUDA's error 905),
so it does not; ``torch.cuda.graph`` waits for all of the GPU before it begins. And what is made in a capture is there
when the graph has run, if it ever does, so it is not to be kept (``capturing``). No event is asked whether it is over
either: while any thread captures, CUDA forbids the question. A wait for one that is over costs the GPU nothing.
"""

from collections.abc import Iterator
from typing import Any

import torch

current: Any = getattr(torch._C, "_cuda_getCurrentRawStream", None)  # a PyTorch without GPUs has none
"""The address of the stream that is current on the GPU of that number."""


class Made:
    """What kernels that were just started on the current stream of a GPU leave in ``things``.

    things: tensors, and tuples and lists of anything, of which only tensors count. They are kept alive.
    """

    __slots__ = ("_event", "_index", "_ordered", "_tensors")

    def __init__(self, index: int, things: Any) -> None:
        self._index, self._tensors = index, tuple(_tensors(things))
        self._event = torch.cuda.Event()
        self._event.record(torch.cuda.current_stream(index))
        self._ordered = {current(index)}  # the streams that need not wait

    def order(self) -> None:
        """Have the current stream use it only when it is there."""
        stream = current(self._index)
        if stream not in self._ordered and not capturing(self._index):
            waiting = torch.cuda.current_stream(self._index)
            waiting.wait_event(self._event)
            for tensor in self._tensors:
                tensor.record_stream(waiting)
            self._ordered.add(stream)


def capturing(index: int) -> bool:
    """Whether the current stream of the GPU of that number is being captured."""
    with torch.cuda.device(index):
        return torch.cuda.is_current_stream_capturing()


def _tensors(things: Any) -> Iterator[torch.Tensor]:
    if isinstance(things, torch.Tensor):
        yield things
    elif isinstance(things, (tuple, list)):
        for thing in things:
            yield from _tensors(thing)
