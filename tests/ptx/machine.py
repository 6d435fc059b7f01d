"""Programs of a grid in lockstep, instruction by instruction.

All threads of a program must take the same branches, or else the machine stops. Programs need not: where they part,
they go on as two machines. Warps do not run ahead of each other, as they would on a GPU; that nothing depends on it is
what shared.py looks at.
"""

from collections.abc import Callable
from typing import Any, Optional, Union

import numpy as np

from tests.ptx import bulk, conversions, halves, matrices, transfer, wgmma
from tests.ptx.arithmetic import PURE
from tests.ptx.parse import Immediate, Instruction, Kernel, Label, PtxError, Register, Special, Symbol, Vector
from tests.ptx.registers import TYPES, masker, reader, width, writer
from tests.ptx.shared import START, Place, Shared
from tests.ptx.tensor_maps import TensorMap
from tests.ptx.tensors import Tensors

assert conversions and halves  # their opcodes are in PURE now


class Parted(Exception):
    """At a branch: where those programs go on that take it, and which they are."""


Step = Callable[[Any], Optional[int]]
Shuffle = Callable[[Any, Any, list[np.ndarray]], np.ndarray]


class Machine:
    """``programs [n, 3]`` of a grid: registers, shared memory and copies on their way.

    parameters: the kernel's, as bits, or tensor maps. shared: bytes of shared memory of a program.
    """

    def __init__(
        self,
        kernel: Kernel,
        programs: np.ndarray,
        grid: tuple[int, ...],
        parameters: dict[str, Union[int, TensorMap]],
        tensors: Tensors,
        shared: int,
    ) -> None:
        self.programs, self.width, self.tensors = len(programs), kernel.threads, tensors
        self.shared = Shared(self.programs, shared, -(-kernel.threads // 32), transfer.shared_granule(kernel))
        self.copies: list[transfer.Copy] = []
        self._groups: list[list[transfer.Copy]] = []
        self.products = wgmma.Products()
        self.barriers = bulk.Barriers(self.programs)
        self._parameters = {name: one for name, one in parameters.items() if not isinstance(one, TensorMap)}
        self._names = programs
        threads = np.arange(kernel.threads, dtype=np.uint32)[None]
        self._special = {"%tid.x": threads, "%laneid": threads % np.uint32(32)}
        self._special["%tid.y"] = self._special["%tid.z"] = np.zeros((1, 1), np.uint32)
        self._special["%ntid.x"] = np.full((1, 1), kernel.threads, np.uint32)
        for i, axis in enumerate("xyz"):
            self._special[f"%ctaid.{axis}"] = programs[:, i : i + 1].astype(np.uint32)
            self._special[f"%nctaid.{axis}"] = np.full((1, 1), grid[i], np.uint32)
        self._symbols = {name: np.full((1, 1), START + offset, np.uint32) for name, offset in kernel.shared.items()}
        maps = {name: one for name, one in parameters.items() if isinstance(one, TensorMap)}
        self._symbols |= {name: np.full((1, 1), 128 * i, np.uint32) for i, name in enumerate(maps)}
        self.maps = {bulk.GENERIC + 128 * i: one for i, one in enumerate(maps.values())}
        self._values: dict[str, np.ndarray] = {}
        self._fragments: dict[tuple, Any] = {}
        self._everybody: Optional[tuple[np.ndarray, np.ndarray]] = None

    # --- what instructions ask for ------------------------------------------------------------------------------------

    def value(self, name: str) -> np.ndarray:
        self.products.check(name, self.products.results)
        value = self._values.get(name)
        if value is None:
            raise PtxError(f"{name} was never written")
        return value

    def write(self, name: str, value: np.ndarray, mask: Optional[np.ndarray]) -> None:
        self.products.check(name, self.products.registers)
        if mask is not None:
            before = self._values.get(name)
            # What nobody has written is all ones: NaN, or an address of nothing.
            missing = value.dtype.type(np.iinfo(value.dtype).max) if value.dtype != np.bool_ else np.True_
            value = np.where(mask, value, missing if before is None else before)
        self._values[name] = value

    def each(self, value: np.ndarray) -> np.ndarray:
        """Of each thread: [programs, threads]."""
        return np.broadcast_to(value, (self.programs, self.width))

    def threads(self, mask: Optional[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Programs [n] and threads [n] that the mask lets through."""
        if mask is not None:
            programs, threads = np.nonzero(self.each(mask))
            return programs, threads
        if self._everybody is None:
            programs, threads = np.nonzero(np.ones((self.programs, self.width), np.bool_))
            self._everybody = programs, threads
        return self._everybody

    def parameter(self, name: str, type_name: str) -> np.ndarray:
        bits = self._parameters[name] % 2 ** (8 * width(type_name))
        return np.full((1, 1), bits, f"u{width(type_name)}").view(TYPES[type_name])

    def name(self, program: int) -> tuple[int, ...]:
        return tuple(int(one) for one in self._names[program])

    def special(self, name: str) -> np.ndarray:
        if name not in self._special:
            raise PtxError(f"unknown: {name}")
        return self._special[name]

    def symbol(self, name: str) -> np.ndarray:
        if name not in self._symbols:
            raise PtxError(f"unknown: {name}")
        return self._symbols[name]

    def fragment(self, side: str, kind: Any, registers: list[np.ndarray], make: Shuffle) -> np.ndarray:
        """The matrix that registers of a warp hold together; kept until the next barrier: many products share it."""
        places = (one.__array_interface__ for one in registers)
        key = (side, id(kind), *((one["data"][0], one["strides"]) for one in places))
        if key not in self._fragments:
            self._fragments[key] = (
                make(self, kind, registers),
                registers,
            )  # these too, so that their memory stays theirs
        return self._fragments[key][0]

    def barrier(self) -> None:
        self._fragments.clear()
        self.shared.barrier()

    def commit_copies(self) -> None:
        self._groups.append(self.copies)
        self.copies = []

    def land_copies(self, left: int) -> None:
        """All groups but the last ``left`` have arrived: as late as a wait allows."""
        done = len(self._groups) - left
        for group in self._groups[: max(done, 0)]:
            for copy in group:
                self.shared.land(*copy)
        del self._groups[: max(done, 0)]

    # --- control flow -------------------------------------------------------------------------------------------------

    def of(self, chosen: np.ndarray) -> "Machine":
        """Some of the programs, as a machine of their own."""
        made = object.__new__(Machine)
        made.__dict__.update(self.__dict__)
        made.programs, made._names = len(chosen), self._names[chosen]
        made._everybody, made._fragments = None, {}
        made.shared = self.shared.of(chosen)

        def pick(values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            return {name: one[chosen] if one.shape[0] > 1 else one for name, one in values.items()}

        made._values, made._special = pick(self._values), pick(self._special)
        made.products = self.products.of(lambda place: _part_of_place(place, chosen))
        made.barriers = self.barriers.of(chosen)
        made.copies = [_part(copy, chosen) for copy in self.copies]
        made._groups = [[_part(copy, chosen) for copy in group] for group in self._groups]
        return made

    def run(self, steps: list[Step], instructions: list[Instruction]) -> None:
        going: list[tuple[Machine, int]] = [(self, 0)]
        with np.errstate(all="ignore"):
            while going:
                machine, at = going.pop()
                while at < len(steps):
                    try:
                        target = steps[at](machine)
                    except PtxError as error:
                        raise PtxError(f"{instructions[at]}\n{error}") from None
                    except Parted as parted:
                        target, taken = parted.args
                        going.append((machine.of(np.flatnonzero(~taken)), at + 1))
                        machine = machine.of(np.flatnonzero(taken))
                    at = at + 1 if target is None else target
                machine.barriers.check_idle()


def _part(copy: transfer.Copy, chosen: np.ndarray) -> transfer.Copy:
    kept = np.isin(copy.place.programs, chosen)
    return transfer.Copy(_part_of_place(copy.place, chosen), copy.values[kept], copy.instruction)


def _part_of_place(place: Place, chosen: np.ndarray) -> Place:
    kept = np.isin(place.programs, chosen)
    programs = np.searchsorted(chosen, place.programs[kept])
    return Place(programs, place.threads[kept], place.offsets[kept], place.size)


def steps(kernel: Kernel) -> list[Step]:
    """What each instruction does to a machine; raises for the first that is not known."""
    return [step(one, kernel) for one in kernel.instructions]


def step(instruction: Instruction, kernel: Kernel) -> Step:
    try:
        if instruction.opcode in PURE:
            return _pure(instruction)
        if instruction.name in ("bra", "ret"):
            return _branch(instruction, kernel)
        if instruction.name in _BUILDERS:
            return _BUILDERS[instruction.name](instruction)
    except (PtxError, ValueError) as error:
        raise PtxError(f"{instruction}\n{error}") from None
    raise PtxError(f"{instruction}\nunknown: {instruction.opcode}")


def _pure(instruction: Instruction) -> Step:
    pure = PURE[instruction.opcode]
    result, *sources = instruction.operands
    if len(sources) != len(pure.sources):
        raise PtxError(f"{len(sources)} operands, not {len(pure.sources)}")
    readers = [reader(one, type_name) for one, type_name in zip(sources, pure.sources)]
    write, mask_of, function = writer(result, pure.result), masker(instruction), pure.function
    return lambda machine: write(machine, function(*(read(machine) for read in readers)), mask_of(machine))


def _move(instruction: Instruction) -> Step:
    """Data Movement: mov, also of halves and of special registers."""
    if instruction.opcode not in {f"mov.{one}" for one in ("pred", "b16", "b32", "b64", "u16", "u32", "u64")}:
        raise PtxError(f"unknown: {instruction.opcode}")
    type_name, mask_of = instruction.modifiers[0], masker(instruction)
    result, source = instruction.operands
    if isinstance(result, Vector):
        items = f"b{8 * width(type_name) // len(result.items)}"
        read, writers = reader(source, type_name), [writer(one, items) for one in result.items]

        def unpack(machine: Machine) -> None:
            value = np.ascontiguousarray(read(machine))
            parts = value.view(TYPES[items]).reshape(*value.shape, len(writers))
            for i, write_part in enumerate(writers):
                write_part(machine, parts[:, :, i], mask_of(machine))

        return unpack
    write = writer(result, type_name)
    if isinstance(source, Vector):
        items = f"b{8 * width(type_name) // len(source.items)}"
        readers = [reader(one, items) for one in source.items]

        def pack(machine: Machine) -> None:
            parts = np.broadcast_arrays(*(read_part(machine) for read_part in readers))
            write(machine, np.stack(parts, axis=-1).view(TYPES[type_name])[:, :, 0], mask_of(machine))

        return pack
    read = _simple_source(source, type_name)
    return lambda machine: write(machine, read(machine), mask_of(machine))


def _simple_source(source: Union[Register, Immediate, Special, Symbol], type_name: str):
    if isinstance(source, Special):
        return lambda machine: machine.special(source.name)
    if isinstance(source, Symbol):
        return lambda machine: machine.symbol(source.name)
    return reader(source, type_name)


def _branch(instruction: Instruction, kernel: Kernel) -> Step:
    """Control Flow Instructions: bra, ret."""
    if instruction.opcode not in ("bra", "bra.uni", "ret"):
        raise PtxError(f"unknown: {instruction.opcode}")
    target = len(kernel.instructions)
    if instruction.name == "bra":
        (label,) = instruction.operands
        if not isinstance(label, Label) or label.name not in kernel.labels:
            raise PtxError(f"no label {label}")
        target = kernel.labels[label.name]
    mask_of = masker(instruction)

    def branch(machine: Machine) -> Optional[int]:
        mask = mask_of(machine)
        if mask is None:
            return target
        if (mask != mask[:, :1]).any():
            raise PtxError("threads of one program part at a branch")
        taken = mask[:, 0]
        if taken.all():
            return target
        if not taken.any():
            return None
        raise Parted(target, taken)

    return branch


def _barrier(instruction: Instruction) -> Step:
    """Parallel Synchronization: bar.sync of all threads; bar.warp.sync, since lanes of a warp never part here."""
    if instruction.opcode == "bar.warp.sync" and instruction.operands == (Immediate(-1),):
        return lambda machine: None
    if instruction.opcode == "bar.sync" and instruction.operands == (Immediate(0),) and instruction.guard is None:
        return lambda machine: machine.barrier()
    raise PtxError(f"unknown: {instruction}")


_BUILDERS: dict[str, Callable[[Instruction], Step]] = {
    "mov": _move,
    "bar": _barrier,
    **transfer.BUILDERS,
    **bulk.BUILDERS,
    "cp": lambda one: bulk.copy(one) if "bulk" in one.modifiers else transfer.BUILDERS["cp"](one),
    **matrices.BUILDERS,
    **halves.BUILDERS,
    **wgmma.BUILDERS,
}
