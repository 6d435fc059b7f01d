"""In which order the steps of a plan run, on which images, and where their values lie.

At batch 16 a tensor of a ResNet-50's first stage has 51 MB, so that layer after layer would stream it from memory and
back. The first steps run on a few images at a time instead, all of them before the next images, and their values stay
in the cache; the later steps, with small images and large weights, run on the whole batch.
"""

import functools
from pathlib import Path
from typing import NamedTuple

from resnet_fast.kernels.native import abi
from resnet_fast.network import memory
from resnet_fast.network.steps import Image, Step, Storage

_LARGEST_CACHE = 32 << 20  # virtual machines see that of the whole socket, which they share with others
_USUAL_CACHE = 8 << 20
_TILES = 3  # of the kernels, per thread and step: fewer cannot be shared out evenly
_TILE = 14  # rows of a matrix product


class Split(NamedTuple):
    """The first ``steps`` run on ``images`` at a time."""

    steps: int
    images: int


class Part(NamedTuple):
    """A step for ``images`` images from the ``first`` on."""

    step: Step
    first: int
    images: int


def needed(steps: list[Step], wanted: list[Storage]) -> list[Step]:
    """The steps that the wanted values depend on."""
    alive, kept = set(wanted), []
    for step in reversed(steps):
        if step.y in alive:
            kept.append(step)
            alive |= set(_read(step))
    return kept[::-1]


def split(steps: list[Step], batch: int, threads: int) -> Split:
    """How many steps run on how many images at a time.

    They end before the first one whose weights have more bytes than an image's values, for it would read its weights
    again for every few images; and with the last one before it whose values for the whole batch take more than half the
    cache, so that they would have left it when they are read.

    The images are as many as fit a quarter of the cache with all values that are alive at once (the rest is for
    weights, what the kernels work in, and input and results on their way), but enough to keep every thread busy. The
    choice of algorithms comes later, for that many images. On a Zen 4 core with 32 MB of cache, ResNet-50 at batch 16
    was fastest with the first two stages on one image at a time, or two on two threads.
    """
    count = 0
    for i, step in enumerate(steps):
        weights = 0 if step.weights is None else step.weights.weight.numel() * step.x.element
        values = step.y.bytes + sum(value.bytes for value in _read(step))
        if weights > values // batch:
            break
        if values > _cache() // 2:
            count = i + 1
    convolutions = [step.shape for step in steps[:count] if step.kind == abi.CONV]
    if not convolutions:
        return Split(0, batch)
    fitting = _cache() // 4 // (_most_alive(steps[:count]) // batch)
    busy = max(-(-threads * _TILES * _TILE // _rows(shape)) for shape in convolutions)
    parts = -(-batch // max(fitting, busy))
    images = -(-batch // parts)
    return Split(count, images) if images < batch else Split(0, batch)


def _rows(shape: abi.Shape) -> int:
    """Of one image's matrix products: its pixels, or Winograd's squares of four by four where it may serve."""
    side = 4 if shape.r == shape.s == 3 and shape.groups == 1 else 1
    return -(-shape.p // side) * -(-shape.q // side)


def order(steps: list[Step], split: Split, batch: int) -> list[Part]:
    firsts = range(0, batch, split.images)
    first_steps = [Part(step, i, min(split.images, batch - i)) for i in firsts for step in steps[: split.steps]]
    return first_steps + [Part(step, 0, batch) for step in steps[split.steps :]]


class Places:
    """Where every value lies: in the arena, which is buffer 0; the input, 1; or a result, 2 and so on."""

    def __init__(self, steps: list[Step], split: Split, given: Image, results: list[Storage]) -> None:
        self._batch = given.shape[0]
        self._refs = {given.storage: abi.Ref(1, 0, 0)}
        self._refs |= {storage: abi.Ref(2 + i, 0, 0) for i, storage in enumerate(results)}
        last = last_reads(steps)
        # Values that only the first steps know have room for the images at a time; others have it for the batch.
        self._passing = {
            step.y for i, step in enumerate(steps) if i < split.steps > last[step.y] and step.y not in self._refs
        }
        owner: dict[Storage, Storage] = {}  # value -> the value whose place it takes
        spans: dict[Storage, list[int]] = {}
        for i, step in enumerate(steps):
            y, residual = step.y, step.residual
            if y in self._refs:
                continue
            kept = i < split.steps and y not in self._passing  # while the first steps run again
            # A sum may take the place of its residual: the same thread reads each element before it writes it.
            dies = residual is not None and residual is not step.x and last[residual] == i
            dies = dies and residual.element == y.element  # type: ignore[union-attr]
            if residual is not None and dies and residual in owner and not kept:
                place = owner[residual]
            else:
                place = y
                spans[place] = [0 if kept else i, i]
            owner[y] = place
            spans[place][1] = last[y]
        images = [split.images if place in self._passing else self._batch for place in spans]
        sizes = [place.bytes // self._batch * count for place, count in zip(spans, images)]
        intervals = [memory.Interval(first, end, size) for (first, end), size in zip(spans.values(), sizes)]
        offsets, self.arena_bytes = memory.assign(intervals)
        at = dict(zip(spans, offsets))
        self._refs |= {value: abi.Ref(0, 0, at[place]) for value, place in owner.items()}

    def at(self, value: Storage, image: int) -> abi.Ref:
        """Where the value begins for the images from this one on."""
        ref = self._refs[value]
        if value in self._passing:
            return ref
        return abi.Ref(ref.buffer, 0, ref.offset + value.bytes // self._batch * image)


def _read(step: Step) -> list[Storage]:
    return [step.x] if step.residual is None else [step.x, step.residual]


def last_reads(steps: list[Step]) -> dict[Storage, int]:
    """By value, the last step that reads it, or writes it."""
    last: dict[Storage, int] = {}
    for i, step in enumerate(steps):
        last |= dict.fromkeys([*_read(step), step.y], i)
    return last


def _most_alive(steps: list[Step]) -> int:
    """Bytes of the values that are alive in the same step, at most."""
    last = last_reads(steps)
    alive: set[Storage] = set()
    most = 0
    for i, step in enumerate(steps):
        alive |= {*_read(step), step.y}
        most = max(most, sum(value.bytes for value in alive))
        alive = {value for value in alive if last[value] > i}
    return most


@functools.cache
def _cache() -> int:
    """Bytes of the last-level cache, as far as they can be counted on."""
    try:
        size = Path("/sys/devices/system/cpu/cpu0/cache/index3/size").read_text().strip()
        return min(int(size.removesuffix("K")) << 10, _LARGEST_CACHE)
    except (OSError, ValueError):
        return _USUAL_CACHE
