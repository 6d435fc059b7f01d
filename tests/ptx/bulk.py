"""The copy engine of sm_90, and the mbarriers that say when its copies have arrived.

"Parallel Synchronization: mbarrier" and "Data Movement: cp.async.bulk.tensor". An mbarrier's phase ends when all its
arrivals and all bytes that it expects are there. Copies arrive as late as they may: when a phase is waited for that
ends with them. A phase that would never end, or that would end before all of its copies have arrived, is refused, and
so is an arrival at a phase that has had all of its own.
"""

import re
from collections.abc import Callable
from typing import Any, NamedTuple, Optional

import numpy as np

from tests.ptx.parse import Element, Immediate, Instruction, PtxError, Vector
from tests.ptx.registers import reader, writer
from tests.ptx.shared import START, Place
from tests.ptx.transfer import _address, _guarded, place

Step = Callable[[Any], Optional[int]]

GENERIC = 1 << 40  # where the kernel's parameters begin among generic addresses
_SIZE = 8  # bytes of an mbarrier
_ALIGNMENT = 128  # of a copy's destination (Data Movement: cp.async.bulk.tensor)


class Copy(NamedTuple):
    """On their way, of programs [n]: to which mbarrier each, and to offsets [n, pieces] the values [n, pieces, 4]."""

    programs: np.ndarray
    barriers: np.ndarray
    offsets: np.ndarray
    values: np.ndarray

    def of(self, kept: np.ndarray) -> "Copy":
        return Copy(*(one[kept] for one in self))


class Barriers:
    """The mbarriers of a machine's programs, by their offset, and the copies that complete on them."""

    def __init__(self, programs: int) -> None:
        self._programs = programs
        # Of each program: the count of arrivals, those pending in this phase, the bytes that it expects, its number.
        self._states: dict[int, np.ndarray] = {}
        self.copies: list[Copy] = []

    def of(self, chosen: np.ndarray) -> "Barriers":
        """Of some of the programs."""
        made = Barriers(len(chosen))
        made._states = {at: state[:, chosen] for at, state in self._states.items()}
        for copy in self.copies:
            kept = copy.of(np.isin(copy.programs, chosen))
            if kept.programs.size:
                made.copies.append(kept._replace(programs=np.searchsorted(chosen, kept.programs)))
        return made

    def _each(self, programs: np.ndarray, offsets: np.ndarray):
        """The states of each mbarrier, and whose of the programs it is."""
        for at in np.unique(offsets):
            yield self._states.setdefault(int(at), np.zeros((4, self._programs), np.int64)), programs[offsets == at]

    def start(self, programs: np.ndarray, offsets: np.ndarray, count: int) -> None:
        for state, which in self._each(programs, offsets):
            state[:, which] = np.array([[count], [count], [0], [0]])

    def end(self, programs: np.ndarray, offsets: np.ndarray) -> None:
        for state, which in self._each(programs, offsets):
            self._check(state, which)
            state[:, which] = 0
            for copy in self.copies:
                if (np.isin(copy.programs, programs) & np.isin(copy.barriers, offsets)).any():
                    raise PtxError("a copy is on its way to complete on it")

    def arrive(self, programs: np.ndarray, offsets: np.ndarray, expected: np.ndarray) -> None:
        for (state, which), at in zip(self._each(programs, offsets), np.unique(offsets)):
            self._check(state, which)
            np.subtract.at(state[1], which, 1)
            np.add.at(state[2], which, expected[offsets == at])
            if (state[1] < 0).any():
                raise PtxError("arrives at an mbarrier whose phase has all of its arrivals")

    def add(self, copy: Copy) -> None:
        for state, which in self._each(copy.programs, copy.barriers):
            self._check(state, which)
        self.copies.append(copy)

    def wait(self, offsets: np.ndarray, parity: np.ndarray, land: Callable[[Copy], None]) -> None:
        """Of all programs, each on the mbarrier at its one of ``offsets``, until a phase of the parity has ended."""
        ending = np.zeros(self._programs, np.bool_)
        for state, which in self._each(np.arange(self._programs), offsets):
            self._check(state, which)
            # One of the other parity is the phase before, which has ended.
            ending[which] = state[3, which] % 2 == parity[which]
        arrived = np.zeros(self._programs, np.int64)
        left = []
        for copy in self.copies:
            done = ending[copy.programs] & (offsets[copy.programs] == copy.barriers)
            np.add.at(arrived, copy.programs[done], copy.values[0].nbytes)
            if done.any():
                land(copy.of(done))
            if not done.all():
                left.append(copy.of(~done))
        self.copies = left
        for state, which in self._each(np.flatnonzero(ending), offsets[ending]):
            if state[1, which].any():
                raise PtxError(f"waits for {state[1, which].max()} arrivals at an mbarrier that nobody makes")
            wrong = state[2, which] != arrived[which]
            if wrong.any():
                program = which[wrong.argmax()]
                raise PtxError(
                    f"program {program}: the phase of an mbarrier expects {state[2, program]} bytes, "
                    f"{arrived[program]} are copied"
                )
            state[1, which], state[2, which] = state[0, which], 0
            state[3, which] += 1

    def check_idle(self) -> None:
        """At the end of a program: its memory will be another's."""
        if self.copies:
            raise PtxError("a program ends with a bulk copy on its way")

    @staticmethod
    def _check(state: np.ndarray, which: np.ndarray) -> None:
        if (state[0, which] == 0).any():
            raise PtxError("no mbarrier lies there")


def _init(instruction: Instruction) -> Step:
    target, count = instruction.operands
    if not isinstance(count, Immediate) or not 0 < count.value < 2**20:
        raise PtxError(f"unknown: {instruction}")
    address = _address(target, "u32")

    def step(machine: Any, mask: Optional[np.ndarray]) -> None:
        where = place(machine, address(machine), mask, _SIZE)
        machine.shared.store(where, np.zeros((where.offsets.size, 2), np.uint32), instruction)
        machine.shared.hold(where)  # until mbarrier.inval it is nobody's memory
        machine.barriers.start(where.programs, where.offsets, count.value)

    return _guarded(instruction, step)


def _invalidate(instruction: Instruction) -> Step:
    address = _address(instruction.operands[0], "u32")

    def step(machine: Any, mask: Optional[np.ndarray]) -> None:
        where = place(machine, address(machine), mask, _SIZE)
        machine.barriers.end(where.programs, where.offsets)
        machine.shared.hold(where, False)
        machine.shared.store(where, np.zeros((where.offsets.size, 2), np.uint32), instruction)

    return _guarded(instruction, step)


def _arrive(instruction: Instruction) -> Step:
    """mbarrier.arrive.expect_tx: the phase expects so many bytes more, and has one of its arrivals."""
    _, target, count = instruction.operands
    address, expected = _address(target, "u32"), reader(count, "u32")

    def step(machine: Any, mask: Optional[np.ndarray]) -> None:
        where = place(machine, address(machine), mask, _SIZE)
        machine.shared.load(where, 4, instruction)
        of_each = machine.each(expected(machine))[where.programs, where.threads]
        machine.barriers.arrive(where.programs, where.offsets, of_each.astype(np.int64))

    return _guarded(instruction, step)


def _wait(instruction: Instruction) -> Step:
    """mbarrier.try_wait.parity, of all threads: true, for there is nothing else to wait for."""
    result, target, parity = instruction.operands
    if instruction.guard is not None:
        raise PtxError(f"unknown: {instruction}")
    write, address, parity_of = writer(result, "pred"), _address(target, "u32"), reader(parity, "u32")

    def step(machine: Any) -> None:
        where = place(machine, address(machine), None, _SIZE)
        machine.shared.load(where, 4, instruction)
        offsets, parities = where.offsets.reshape(machine.programs, -1), machine.each(parity_of(machine))
        if (offsets != offsets[:, :1]).any() or (parities != parities[:, :1]).any():
            raise PtxError("threads of one program wait for different phases")
        machine.barriers.wait(offsets[:, 0], parities[:, 0], lambda copy: machine.shared.land_bulk(*_spread(copy)))
        write(machine, np.ones((1, 1), np.bool_), None)

    return step


_MBARRIER = {"init": _init, "inval": _invalidate, "arrive": _arrive, "try_wait": _wait}
_KNOWN = re.compile(r"mbarrier\.(init|inval|arrive\.expect_tx|try_wait\.parity)\.shared(::cta)?\.b64")


def _mbarrier(instruction: Instruction) -> Step:
    """mbarrier.try_wait: acquire, at the level of the program, where it says nothing else."""
    if _KNOWN.fullmatch(instruction.opcode) is None:
        raise PtxError(f"unknown: {instruction.opcode}")
    return _MBARRIER[instruction.modifiers[0]](instruction)


_COPY = re.compile(
    r"cp\.async\.bulk\.tensor\.(\d)d\.shared::(?:cta|cluster)\.global\.mbarrier::complete_tx::bytes"
)  # a program is the only one of its cluster, so that it is all of that one's memory


def copy(instruction: Instruction) -> Step:
    """cp.async.bulk.tensor, from global to shared memory, tiled."""
    found = _COPY.fullmatch(instruction.opcode)
    target, element, barrier = instruction.operands
    if found is None or not isinstance(element, Element) or len(element.corner.items) != int(found[1]):
        raise PtxError(f"unknown: {instruction}")
    address, barrier_address = _address(target, "u32"), _address(barrier, "u32")
    map_of, corner = reader(element.tensor_map, "u64"), [reader(one, "s32") for one in element.corner.items]

    def step(machine: Any, mask: Optional[np.ndarray]) -> None:
        on = place(machine, barrier_address(machine), mask, _SIZE)
        machine.shared.load(on, 4, instruction)
        programs, threads = on.programs, on.threads
        if not programs.size:
            return
        (which,) = np.unique(machine.each(map_of(machine))[programs, threads])
        tensor_map = machine.maps.get(int(which))
        if tensor_map is None or len(tensor_map.box) != len(corner):
            raise PtxError(f"no tensor map of {len(corner)} dimensions lies at {int(which):#x}")
        starts = machine.each(address(machine))[programs, threads].astype(np.int64)
        if (starts % _ALIGNMENT).any():
            raise PtxError(f"the destination {int(starts.max()):#x} is not a multiple of {_ALIGNMENT}")
        corners = np.stack([machine.each(read(machine))[programs, threads] for read in corner], 1)
        offsets = tensor_map.offsets(starts) - START
        made = Copy(programs, on.offsets, offsets, tensor_map.load(machine.tensors, corners))
        machine.barriers.add(made)
        where, _ = _spread(made, threads)
        machine.shared.begin_bulk(where, instruction)

    return _guarded(instruction, step)


def _spread(made: Copy, threads: Optional[np.ndarray] = None) -> tuple[Place, np.ndarray]:
    count = made.offsets.shape[1]
    threads = np.zeros_like(made.programs) if threads is None else threads
    where = Place(np.repeat(made.programs, count), np.repeat(threads, count), made.offsets.reshape(-1), 16)
    return where, made.values.reshape(-1, 4)


def _elect(instruction: Instruction) -> Step:
    """Parallel Synchronization: elect.sync. Which lane of a warp it is, the ISA leaves open: here the last one."""
    result, members = instruction.operands
    if instruction.opcode != "elect.sync" or members != Immediate(-1) or not isinstance(result, Vector):
        raise PtxError(f"unknown: {instruction}")
    if instruction.guard is not None:
        raise PtxError(f"unknown: {instruction}")
    write_lane, write = writer(result.items[0], "b32"), writer(result.items[1], "pred")

    def step(machine: Any) -> None:
        write_lane(machine, np.full((1, 1), 31, np.uint32), None)
        write(machine, (np.arange(machine.width) % 32 == 31)[None], None)

    return step


def _generic(instruction: Instruction) -> Step:
    """Data Movement: cvta, of the address of a parameter."""
    if instruction.opcode != "cvta.param.u64":
        raise PtxError(f"unknown: {instruction}")
    result, source = instruction.operands
    write, read = writer(result, "u64"), reader(source, "u64")
    return _guarded(instruction, lambda machine, mask: write(machine, read(machine) + np.uint64(GENERIC), mask))


BUILDERS = {"mbarrier": _mbarrier, "elect": _elect, "cvta": _generic}
