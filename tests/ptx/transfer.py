"""Loads, stores, asynchronous copies, and exchanges between the threads of a warp."""

import re
from collections.abc import Callable
from typing import Any, NamedTuple, Optional

import numpy as np

from tests.ptx.parse import Address, Immediate, Instruction, Kernel, Operand, PtxError, Register, Symbol, Vector
from tests.ptx.registers import TYPES, masker, reader, width, writer
from tests.ptx.shared import START, Place
from tests.ptx.tensors import Misplaced

Step = Callable[[Any], Optional[int]]


class Access(NamedTuple):
    """``ld.space.vN.type`` or ``st``."""

    space: str
    count: int
    type_name: str

    @property
    def size(self) -> int:
        return self.count * width(self.type_name)


_ACCESS = re.compile(r"(?:ld|st)\.(param|global|shared)(?:\.v([24]))?\.([busf]\d+)$")


def access(instruction: Instruction) -> Access:
    found = _ACCESS.match(instruction.opcode)
    if found is None or found[3] not in TYPES:
        raise PtxError(f"unknown: {instruction.opcode}")
    return Access(found[1], int(found[2] or 1), found[3])


def shared_granule(kernel: Kernel) -> int:
    """The fewest bytes that an instruction takes from shared memory, or brings there, at once."""
    sizes = [16]
    for one in kernel.instructions:
        if one.name == "mbarrier":
            sizes.append(8)
        elif "shared" in one.modifiers:
            if one.name in ("ld", "st"):
                sizes.append(access(one).size)
            elif one.opcode.startswith("cp.async"):
                sizes.append(_copy_size(one))
    return min(sizes)


def _items(operand: Operand, count: int) -> tuple[Operand, ...]:
    items = operand.items if isinstance(operand, Vector) else (operand,)
    if len(items) != count:
        raise PtxError(f"{len(items)} registers for {count} values")
    return items


def _address(operand: Operand, type_name: str) -> Callable[[Any], np.ndarray]:
    """An address in shared (u32) or global memory (u64)."""
    if not isinstance(operand, Address) or not isinstance(operand.base, Register):
        raise PtxError(f"{operand} is not an address in a register")
    base, offset = reader(operand.base, type_name), TYPES[type_name](operand.offset % 2**32)
    return lambda machine: base(machine) + offset


def place(machine: Any, addresses: np.ndarray, mask: Optional[np.ndarray], size: int) -> Place:
    """Where in shared memory, for those threads that the mask lets through."""
    programs, threads = machine.threads(mask)
    offsets = machine.each(addresses)[programs, threads].astype(np.int64) - START
    return Place(programs, threads, offsets, size)


def _guarded(instruction: Instruction, step: Callable[[Any, Optional[np.ndarray]], None]) -> Step:
    mask_of = masker(instruction)
    return lambda machine: step(machine, mask_of(machine))


def _load(instruction: Instruction) -> Step:
    """Data Movement: ld."""
    space, count, type_name = access(instruction)
    result, source = instruction.operands
    size, item = count * width(type_name), width(type_name)
    writers = [writer(one, type_name) for one in _items(result, count)]
    if space == "param":
        if not isinstance(source, Address) or not isinstance(source.base, Symbol) or source.offset or count > 1:
            raise PtxError(f"unknown: {instruction}")
        name = source.base.name
        return _guarded(instruction, lambda m, mask: writers[0](m, m.parameter(name, type_name), mask))
    address = _address(source, "u32" if space == "shared" else "u64")

    def step(machine: Any, mask: Optional[np.ndarray]) -> None:
        programs, threads = machine.threads(mask)
        if space == "shared":
            values = machine.shared.load(place(machine, address(machine), mask, size), item, instruction)
        else:
            values = _of_tensors(
                machine, programs, threads, address(machine), lambda at: machine.tensors.load(at, item, count)
            )
        spread = np.zeros((machine.programs, machine.width, count), values.dtype)
        spread[programs, threads] = values
        spread = spread.view(TYPES[type_name])
        for i, write in enumerate(writers):
            write(machine, spread[:, :, i], mask)

    return _guarded(instruction, step)


def _store(instruction: Instruction) -> Step:
    """Data Movement: st."""
    space, count, type_name = access(instruction)
    target, source = instruction.operands
    size = count * width(type_name)
    bits = f"b{8 * width(type_name)}"
    readers = [reader(one, bits) for one in _items(source, count)]
    address = _address(target, "u32" if space == "shared" else "u64")

    def step(machine: Any, mask: Optional[np.ndarray]) -> None:
        programs, threads = machine.threads(mask)
        values = np.stack([machine.each(read(machine))[programs, threads] for read in readers], axis=1)
        if space == "shared":
            machine.shared.store(place(machine, address(machine), mask, size), values, instruction)
        else:
            _of_tensors(machine, programs, threads, address(machine), lambda at: machine.tensors.store(at, values))

    return _guarded(instruction, step)


def _of_tensors(machine: Any, programs, threads, addresses: np.ndarray, function: Callable[[np.ndarray], Any]) -> Any:
    """The function of the threads' addresses; an error says whose is wrong."""
    at = machine.each(addresses)[programs, threads]
    try:
        return function(at)
    except Misplaced as error:
        text, which = error.args
        name = machine.name(programs[which])
        raise PtxError(f"thread {threads[which]} of program {name}: address {int(at[which]):#x} {text}") from None


class Copy(NamedTuple):
    """A copy that is on its way."""

    place: Place
    values: np.ndarray
    instruction: Instruction


def _copy_size(instruction: Instruction) -> int:
    size = instruction.operands[2] if len(instruction.operands) > 2 else None
    return size.value if isinstance(size, Immediate) else 16


def _copy(instruction: Instruction) -> Step:
    """Data Movement: cp.async, commit_group, wait_group. Groups are those of all threads: control flow is uniform."""
    if instruction.opcode == "cp.async.commit_group" and instruction.guard is None:
        return lambda machine: machine.commit_copies()
    if instruction.opcode == "cp.async.wait_group" and instruction.guard is None:
        (left,) = instruction.operands
        if isinstance(left, Immediate):
            return lambda machine: machine.land_copies(left.value)
    found = re.fullmatch(r"cp\.async\.(ca|cg)\.shared\.global", instruction.opcode)
    size = _copy_size(instruction)
    if found is None or size not in (4, 8, 16) or (found[1] == "cg" and size != 16):
        raise PtxError(f"unknown: {instruction}")
    target, source = _address(instruction.operands[0], "u32"), _address(instruction.operands[1], "u64")
    size_of = reader(instruction.operands[3], "u32") if len(instruction.operands) > 3 else None

    def step(machine: Any, mask: Optional[np.ndarray]) -> None:
        """From where src-size is 0, nothing is read, and zeros are written."""
        where = place(machine, target(machine), mask, size)
        programs, threads = machine.threads(mask)
        given = machine.each(size_of(machine))[programs, threads] if size_of else np.full(programs.shape, size)
        if ((given != 0) & (given != size)).any():
            raise PtxError("unknown: a copy that fills up a part with zeros")
        read = given == size
        values = np.zeros((programs.size, size // 4), np.uint32)
        values[read] = _of_tensors(
            machine, programs[read], threads[read], source(machine), lambda at: machine.tensors.load(at, 4, size // 4)
        )
        machine.shared.begin(where, instruction)
        machine.copies.append(Copy(where, values, instruction))

    return _guarded(instruction, step)


def _shuffle(instruction: Instruction) -> Step:
    """Data Movement: shfl.sync, over whole warps."""
    found = re.fullmatch(r"shfl\.sync\.(bfly|idx)\.b32", instruction.opcode)
    result, source, lane, clamp, members = instruction.operands if len(instruction.operands) == 5 else (None,) * 5
    if found is None or clamp != Immediate(31) or members not in (Immediate(-1), Immediate(0xFFFFFFFF)):
        raise PtxError(f"unknown: {instruction}")
    write, read, by = writer(result, "b32"), reader(source, "b32"), reader(lane, "u32")

    def step(machine: Any, mask: Optional[np.ndarray]) -> None:
        if mask is not None:
            raise PtxError("a shuffle under a predicate")
        lanes = np.arange(machine.width, dtype=np.uint32)[None]
        chosen = by(machine) & np.uint32(31)
        other = (lanes ^ chosen) if found[1] == "bfly" else (lanes & ~np.uint32(31)) | chosen
        write(machine, np.take_along_axis(machine.each(read(machine)), machine.each(other).astype(np.int64), 1), None)

    return _guarded(instruction, step)


BUILDERS = {"ld": _load, "st": _store, "cp": _copy, "shfl": _shuffle}
