"""Batches in an order, and with an augmentation, that depend on seed and epoch alone.

Not on the number of workers or of processes, nor on what was drawn before: so a resumed run sees what the
uninterrupted one would have, and several processes share the batches that one of as many images would have.
"""

import hashlib
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Optional, Union

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Sampler

from resnet_fast.finetune.arguments import Settings
from resnet_fast.finetune.data import Arrays, Images
from resnet_fast.finetune.distributed import Processes
from resnet_fast.utils.cpuinfo import available_cores
from resnet_fast.utils.pictures import TRANSPARENT, Remarks

logger = logging.getLogger(__name__)

Key = tuple[int, int]  # index of an image, epoch


def seed_of(*parts: int) -> int:
    """A seed of 63 bits that differs for all different ``parts``, as (seed, epoch, index)."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class Batch(NamedTuple):
    """Images ``[N, 3, H, W]`` and labels ``[N]``, less those that could not be read: name and reason of each.

    ``transparent`` are the names of those that were laid on white.
    """

    images: Tensor
    labels: Tensor
    unreadable: list[tuple[str, str]]
    transparent: list[str]

    @property
    def usable(self) -> bool:
        """Whether the batch is enough to learn from: of one image that is left, batch norm may have no statistics."""
        return len(self.labels) > (1 if self.unreadable else 0)


@dataclass(frozen=True)
class Unreadable:
    name: str
    reason: str


@dataclass(frozen=True)
class Readable:
    image: Tensor
    label: int
    transparent: Optional[str]  # its name if it is


class Augmented(Dataset):
    """``images`` through ``transform``, whose random numbers depend on the seed, the epoch and the image."""

    def __init__(self, images: Images, transform: Any, seed: int) -> None:
        self._images, self._transform, self._seed = images, transform, seed

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, key: Key) -> Union[Readable, Unreadable]:
        index, epoch = key
        try:
            image = self._images.load(index)
        except Exception as error:  # a decoder of a broken file can raise anything
            return Unreadable(self._images.name(index), str(error) or type(error).__name__)
        transparent = self._images.name(index) if TRANSPARENT in getattr(image, "info", ()) else None
        before = torch.get_rng_state()
        torch.default_generator.manual_seed(seed_of(self._seed, epoch, index))
        try:
            return Readable(self._transform(image), self._images.label(index), transparent)
        finally:
            torch.set_rng_state(before)


def collate(items: Sequence[Union[Readable, Unreadable]]) -> Batch:
    readable = [item for item in items if isinstance(item, Readable)]
    unreadable = [(item.name, item.reason) for item in items if isinstance(item, Unreadable)]
    images = torch.stack([item.image for item in readable]) if readable else torch.empty(0)
    labels = torch.tensor([item.label for item in readable], dtype=torch.int64)
    return Batch(images, labels, unreadable, [item.transparent for item in readable if item.transparent])


class Loader:
    """Batches of one process, epoch by epoch; every unreadable image goes to the log once.

    Args:
        shuffled: whether they are learnt from: in another order each epoch, the same number for each process, without
            the last few images that would make a smaller batch.
    """

    def __init__(
        self, images: Images, transform: Any, settings: Settings, processes: Processes, *, shuffled: bool
    ) -> None:
        self._sampler = _Keys(len(images), settings.seed, processes, shuffled)
        self._remarks = Remarks(logger)
        workers = _default_workers(images) if settings.workers is None else settings.workers
        self._loader = DataLoader(
            Augmented(images, transform, settings.seed),
            batch_size=settings.batch_size,
            sampler=self._sampler,
            drop_last=shuffled and len(self._sampler) >= settings.batch_size,
            collate_fn=collate,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=processes.device.type == "cuda",
            generator=torch.Generator(),  # or it would draw from the global one
        )

    def __len__(self) -> int:
        return len(self._loader)

    def epoch(self, number: int) -> Iterator[Batch]:
        """The batches of an epoch. Batches may be empty, where no image could be read."""
        self._sampler.epoch = number
        for batch in self._loader:
            for name, reason in batch.unreadable:
                self._remarks.unreadable(name, reason)
            for name in batch.transparent:
                self._remarks.transparent(name)
            yield batch


class _Keys(Sampler[Key]):
    """The images of one process, each with the epoch, which so reaches the workers."""

    def __init__(self, count: int, seed: int, processes: Processes, shuffled: bool) -> None:
        self.epoch = 0
        rank, world = processes.rank, processes.world
        self._shuffled: Optional[DistributedSampler] = None
        if shuffled:
            self._shuffled = DistributedSampler(range(count), world, rank, seed=seed, drop_last=True)  # type: ignore[arg-type]
        self._in_order = range(rank, count, world)  # a DistributedSampler would show some images twice

    def __len__(self) -> int:
        return len(self._in_order if self._shuffled is None else self._shuffled)

    def __iter__(self) -> Iterator[Key]:
        indices: Iterable[int] = self._in_order
        if self._shuffled is not None:
            self._shuffled.set_epoch(self.epoch)
            indices = self._shuffled
        return ((index, self.epoch) for index in indices)


def _default_workers(images: Images) -> int:
    if isinstance(images, Arrays) and len(images) < 10_000:
        return 0  # sooner done than sent from one process to another
    return min(available_cores(), 8)
