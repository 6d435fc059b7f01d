"""Shared memory of programs: what was written to it, what is still on its way, and who may touch it.

Every byte knows the last instruction that wrote it and the last that read it, warp by warp. Since the last barrier, a
byte that one warp wrote may not be touched by another, nor may one that a warp read be written by another: their order
would be chance. That is looked at between warps, not within one, and bytes that every instruction of the kernel takes
together are looked at together ("granules").

An asynchronous copy may write at any time between its issue and the end of the wait for it, so nothing may touch its
bytes until then; then it counts as a write of the thread that waited.
"""

import numpy as np

from tests.ptx.parse import Instruction, PtxError
from tests.ptx.registers import BITS

START = 1024  # where a program's own shared memory begins: the driver keeps the first KiB
_FLYING = 2**31 - 1
_ARRIVED = -1  # by the copy engine, and waited for by every thread
_ROUNDING = 2.0**-20  # of the largest number of a store: a few units in its last place


class Place:
    """What an instruction touches: threads [n] of programs [n], and byte offsets [n]."""

    def __init__(self, programs: np.ndarray, threads: np.ndarray, offsets: np.ndarray, size: int) -> None:
        self.programs, self.threads, self.offsets, self.size = programs, threads, offsets, size


class Shared:
    def __init__(self, programs: int, size: int, warps: int, granule: int) -> None:
        self.size, self._granule = size, granule
        padded = -(-size // 16) * 16
        self._bytes = np.zeros((programs, padded), np.uint8)
        granules = padded // granule
        # Serial numbers of instructions; 0: none yet.
        self._written = np.zeros((programs, granules), np.int32)
        self._writer = np.zeros((programs, granules), np.int8)
        self._read = np.zeros((warps, programs, granules), np.int32)
        self._barrier = self._fence = 0
        self._lent = np.zeros((programs, granules), np.int16)  # to how many products under way, and mbarriers
        self._history: list[Instruction] = []
        self.disagreements: list[Instruction] = []  # stores whose result is chance, in its last places

    def of(self, programs: np.ndarray) -> "Shared":
        """That of some of the programs, on their own from now on."""
        made = object.__new__(Shared)
        made.__dict__.update(self.__dict__)
        for name in ("_bytes", "_written", "_writer", "_lent"):
            setattr(made, name, getattr(self, name)[programs])
        made._read, made._history = self._read[:, programs], list(self._history)
        return made

    def barrier(self) -> None:
        self._barrier = len(self._history)

    def fence(self) -> None:
        """From now on the tensor cores see what was written before."""
        self._fence = len(self._history)

    def lend(self, place: Place, width: int, instruction: Instruction) -> np.ndarray:
        """To a product of a warpgroup, until it is given back. Between any warp's write and this lies a barrier."""
        programs, _, granules = self._granules(place)
        written = self._written[programs, granules]
        wrong = (written == 0) | (written > self._barrier)
        if wrong.any():
            self._refuse(place, wrong, written, "reads")
        if (written > self._fence).any():
            raise self._error(place, int((written > self._fence).any(1).argmax()), "written after the last fence.proxy")
        np.add.at(self._lent, (programs, granules), 1)
        return self._rows(width, place.size)[place.programs, place.offsets // place.size]

    def give_back(self, place: Place, instruction: Instruction) -> None:
        """The product was waited for: its four warps have read."""
        programs, warps, granules = self._granules(place)
        np.subtract.at(self._lent, (programs, granules), 1)
        self._history.append(instruction)
        for warp in range(4):
            self._read[warps + warp, programs, granules] = len(self._history)

    def load(self, place: Place, width: int, instruction: Instruction) -> np.ndarray:
        """``[n, size / width]`` numbers of ``width`` bytes."""
        programs, warps, granules = self._granules(place)
        written = self._written[programs, granules]
        others = (written > self._barrier) & ((self._writer[programs, granules] != warps) | (written == _FLYING))
        if others.any() or (written == 0).any():
            self._refuse(place, (written == 0) | others, written, "reads")
        self._history.append(instruction)
        self._read[warps, programs, granules] = len(self._history)
        return self._rows(width, place.size)[place.programs, place.offsets // place.size]

    def store(self, place: Place, values: np.ndarray, instruction: Instruction) -> None:
        self._claim(place, instruction, len(self._history) + 1)
        rows, at = self._rows(values.dtype.itemsize, place.size), (place.programs, place.offsets // place.size)
        rows[at] = values
        if not np.array_equal(rows[at], values):
            self._disagree(place, values, rows[at], instruction)

    def begin(self, place: Place, instruction: Instruction) -> None:
        """A copy to there is issued."""
        self._claim(place, instruction, _FLYING)

    def land(self, place: Place, values: np.ndarray, instruction: Instruction) -> None:
        """It has been waited for."""
        programs, warps, granules = self._granules(place)
        self._history.append(instruction)
        self._written[programs, granules] = len(self._history)
        self._writer[programs, granules] = warps
        self._rows(values.dtype.itemsize, place.size)[place.programs, place.offsets // place.size] = values

    def begin_bulk(self, place: Place, instruction: Instruction) -> None:
        """A copy to there is given to the copy engine, which has to see what threads wrote there before."""
        programs, _, granules = self._granules(place)
        written = self._written[programs, granules]
        unfenced = (written > self._fence) & (written != _FLYING)
        if unfenced.any():
            raise self._error(place, int(unfenced.any(1).argmax()), "written after the last fence.proxy")
        self._claim(place, instruction, _FLYING)

    def land_bulk(self, place: Place, values: np.ndarray) -> None:
        """It has been waited for, by every thread."""
        programs, _, granules = self._granules(place)
        self._written[programs, granules] = _ARRIVED
        self._rows(values.dtype.itemsize, place.size)[place.programs, place.offsets // place.size] = values

    def hold(self, place: Place, held: bool = True) -> None:
        """What lies there is an mbarrier: nobody may write to it."""
        programs, _, granules = self._granules(place)
        np.add.at(self._lent, (programs, granules), 1 if held else -1)

    def _disagree(self, place: Place, values: np.ndarray, kept: np.ndarray, instruction: Instruction) -> None:
        """Threads that hold the same sum may have rounded it otherwise: which of them wins is chance, but little hangs
        on it, so it is noted. Everything else is an error.

        That happens where a product was fused with the first addition of a butterfly: each lane of a pair has its own
        product exact and the other's rounded.
        """
        wrong = (values != kept).any(1)
        if values.dtype == np.uint32:
            ours, theirs = values.view(np.float32), kept.view(np.float32)
            wrong &= ~(np.abs(ours - theirs) <= _ROUNDING * np.abs(ours[np.isfinite(ours)]).max(initial=0)).all(1)
        if wrong.any():
            raise self._error(place, int(wrong.argmax()), "threads store different values")
        self.disagreements.append(instruction)

    def _claim(self, place: Place, instruction: Instruction, serial: int) -> None:
        """Marks as written, unless another warp, or a copy, has to do with it."""
        programs, warps, granules = self._granules(place)
        written = self._written[programs, granules]
        writer = self._writer[programs, granules]
        # A copy on its way is in the way of its own warp, too.
        others = (written > self._barrier) & ((writer != warps) | (written == _FLYING))
        if others.any():
            self._refuse(place, others, written, "writes")
        lent = self._lent[programs, granules] > 0
        if lent.any():
            raise self._error(place, int(lent.any(1).argmax()), "which a product under way, or an mbarrier, has")
        read = self._read[:, programs, granules]
        foreign = (read > self._barrier) & (np.arange(len(read))[:, None, None] != warps)
        if foreign.any():
            reader = read.max(0, initial=0, where=foreign)
            self._refuse(place, foreign.any(0), reader, "writes")
        self._history.append(instruction)
        self._written[programs, granules] = serial
        self._writer[programs, granules] = warps

    def _granules(self, place: Place) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Programs [n, 1], warps [n, 1] and granules [n, k]."""
        size, offsets = place.size, place.offsets
        outside = (offsets < 0) | (offsets + size > self.size)
        if outside.any():
            raise self._error(place, int(outside.argmax()), f"outside the program's {self.size} bytes of shared memory")
        if (offsets % size).any():
            raise self._error(place, int((offsets % size).argmax()), f"not a multiple of its size, {size}")
        granules = (offsets // self._granule)[:, None] + np.arange(size // self._granule)
        return place.programs[:, None], (place.threads // 32)[:, None], granules

    def _rows(self, width: int, size: int) -> np.ndarray:
        """[programs, accesses, numbers]"""
        return self._bytes.view(BITS[width]).reshape(len(self._bytes), -1, size // width)

    def _refuse(self, place: Place, wrong: np.ndarray, serials: np.ndarray, does: str) -> None:
        first = int(wrong.any(1).argmax())
        serial = int(serials[first][wrong[first]][0])
        if serial == 0:
            raise self._error(place, first, "which nothing was written to")
        if serial == _FLYING:
            raise self._error(place, first, "which an asynchronous copy is on its way to")
        raise self._error(
            place, first, f"{does} what another warp touched, without a barrier, at {self._history[serial - 1]}"
        )

    def _error(self, place: Place, at: int, text: str) -> PtxError:
        return PtxError(
            f"thread {place.threads[at]} of program {place.programs[at]}, shared address {place.offsets[at]:#x}: {text}"
        )
