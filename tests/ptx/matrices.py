"""Matrix instructions of a warp: ldmatrix and mma.sync.

The layouts are those of "Matrix Fragments for mma.m16n8k8", "... m16n8k16", "... m16n8k32" and of "ldmatrix". Of lane
l, "groupID" is l / 4 and "threadID_in_group" is l % 4; here they are two dimensions, as in [programs, warps, 8, 4].

The ISA leaves the order of the sum within an mma free. Here products and their sum are made in float64, and rounded to
float32 once, with the accumulator.
"""

import re
from collections.abc import Callable
from typing import Any, NamedTuple, Optional

import numpy as np

from tests.ptx.arithmetic import canonical
from tests.ptx.conversions import widen_bf16, widen_e4m3
from tests.ptx.parse import Instruction, PtxError, Vector
from tests.ptx.registers import reader, writer
from tests.ptx.transfer import _address, place

Step = Callable[[Any], Optional[int]]


def _ldmatrix(instruction: Instruction) -> Step:
    """Warp-level matrix load instruction: ldmatrix. Lane l gives the address of row l % 8 of matrix l / 8."""
    found = re.fullmatch(r"ldmatrix\.sync\.aligned\.m8n8\.x([124])(\.trans)?\.shared\.b16", instruction.opcode)
    if found is None or instruction.guard is not None:
        raise PtxError(f"unknown: {instruction}")
    count, transposed = int(found[1]), bool(found[2])
    result, source = instruction.operands
    if not isinstance(result, Vector) or len(result.items) != count:
        raise PtxError(f"unknown: {instruction}")
    writers, address = [writer(one, "b32") for one in result.items], _address(source, "u32")

    def step(machine: Any) -> None:
        given = np.broadcast_to(np.arange(machine.width) % 32 < 8 * count, (machine.programs, machine.width))
        where = place(machine, address(machine), given, 16)
        rows = machine.shared.load(where, 2, instruction)
        # [programs, warps, matrices, rows, halves]
        matrices = rows.reshape(machine.programs, -1, count, 8, 8)
        if transposed:
            matrices = matrices.swapaxes(3, 4)
        pairs = np.ascontiguousarray(matrices).view(np.uint32)
        for i, write in enumerate(writers):
            write(machine, pairs[:, :, i].reshape(machine.programs, machine.width), None)

    return step


def _stmatrix(instruction: Instruction) -> Step:
    """Warp-level matrix store instruction: stmatrix. As ldmatrix, the other way."""
    found = re.fullmatch(r"stmatrix\.sync\.aligned\.m8n8\.x([124])(\.trans)?\.shared\.b16", instruction.opcode)
    target, source = instruction.operands
    if found is None or instruction.guard is not None or not isinstance(source, Vector):
        raise PtxError(f"unknown: {instruction}")
    count, transposed = int(found[1]), bool(found[2])
    readers, address = [reader(one, "b32") for one in source.items], _address(target, "u32")

    def step(machine: Any) -> None:
        given = np.broadcast_to(np.arange(machine.width) % 32 < 8 * count, (machine.programs, machine.width))
        pairs = np.stack([machine.each(read(machine)).reshape(machine.programs, -1, 8, 4) for read in readers], 2)
        matrices = np.ascontiguousarray(pairs).view(np.uint16)
        if transposed:
            matrices = np.ascontiguousarray(matrices.swapaxes(3, 4))
        machine.shared.store(place(machine, address(machine), given, 16), matrices.reshape(-1, 8), instruction)

    return step


class Kind(NamedTuple):
    """Of an mma: the depth of the product, how many numbers a register holds, and how they are read from its bits."""

    depth: int
    packed: int
    decode: Callable[[np.ndarray], np.ndarray]
    result: str


def _truncate(bits: np.ndarray) -> np.ndarray:
    """tf32: the lower 13 bits of a float32 are not looked at (Alternate Floating-Point Data Formats)."""
    return (bits & np.uint32(0xFFFFE000)).view(np.float32)


_KINDS = {
    "m16n8k16.row.col.f32.f16.f16.f32": Kind(16, 2, lambda bits: bits.view(np.float16), "f32"),
    "m16n8k16.row.col.f32.bf16.bf16.f32": Kind(16, 2, lambda bits: widen_bf16(bits.view(np.uint16)), "f32"),
    "m16n8k8.row.col.f32.tf32.tf32.f32": Kind(8, 1, _truncate, "f32"),
    "m16n8k32.row.col.f32.e4m3.e4m3.f32": Kind(32, 4, lambda bits: widen_e4m3(bits.view(np.uint8)), "f32"),
    "m16n8k32.row.col.satfinite.s32.s8.s8.s32": Kind(32, 4, lambda bits: bits.view(np.int8), "s32"),
}
_NARROW = canonical(lambda total: total.astype(np.float32))
_INT32 = np.iinfo(np.int32)


def _mma(instruction: Instruction) -> Step:
    """Multiply-and-Accumulate Instruction: mma.sync. d [16, 8] = a [16, k] @ b [k, 8] + c."""
    prefix = "mma.sync.aligned."
    kind = _KINDS.get(instruction.opcode.removeprefix(prefix))
    sizes = [len(one.items) for one in instruction.operands if isinstance(one, Vector)]
    if not instruction.opcode.startswith(prefix) or kind is None or sizes != [4, 4, 2, 4] or instruction.guard:
        raise PtxError(f"unknown: {instruction}")
    d, a, b, c = (one.items for one in instruction.operands)
    writers = [writer(one, kind.result) for one in d]
    a_readers, b_readers = ([reader(one, "b32") for one in items] for items in (a, b))
    c_readers = [reader(one, kind.result) for one in c]

    def step(machine: Any) -> None:
        left = machine.fragment("a", kind, [read(machine) for read in a_readers], _left)
        right = machine.fragment("b", kind, [read(machine) for read in b_readers], _right)
        before = _stack(machine, [read(machine) for read in c_readers])
        # Rows g and g + 8, columns 2t and 2t + 1: registers (row half, column) -> [row half, g, t, column].
        p, w = before.shape[:2]
        before = before.reshape(p, w, 8, 4, 2, 2).transpose(0, 1, 4, 2, 3, 5).reshape(p, w, 16, 8)
        total = np.matmul(left, right) + before
        if kind.result == "s32":
            total = np.clip(total, _INT32.min, _INT32.max).astype(np.int32)
        else:
            total = _NARROW(total)
        after = total.reshape(p, w, 2, 8, 4, 2).transpose(0, 1, 3, 4, 2, 5).reshape(p, w * 32, 4)
        for i, write in enumerate(writers):
            write(machine, after[:, :, i], None)

    return step


def _stack(machine: Any, registers: list[np.ndarray]) -> np.ndarray:
    """[programs, warps, 8, 4, registers]"""
    stacked = np.stack([machine.each(one) for one in registers], axis=-1)
    return stacked.reshape(machine.programs, -1, 8, 4, len(registers))


def _decoded(machine: Any, kind: Kind, registers: list[np.ndarray]) -> np.ndarray:
    """[programs, warps, g, t, register, number in it], in float64."""
    bits = np.ascontiguousarray(_stack(machine, registers))
    return kind.decode(bits).astype(np.float64).reshape(*bits.shape, kind.packed)


def _left(machine: Any, kind: Kind, registers: list[np.ndarray]) -> np.ndarray:
    """a: registers 0 and 2 have row g, 1 and 3 row g + 8; 0 and 1 the first half of the columns, 2 and 3 the second."""
    numbers = _decoded(machine, kind, registers)
    p, w = numbers.shape[:2]
    # [p, w, g, t, column half, row half, number] -> [p, w, row half, g, column half, t, number]
    split = numbers.reshape(p, w, 8, 4, 2, 2, kind.packed).transpose(0, 1, 5, 2, 4, 3, 6)
    return split.reshape(p, w, 16, kind.depth)


def _right(machine: Any, kind: Kind, registers: list[np.ndarray]) -> np.ndarray:
    """b: column g; register 0 has the first half of the rows, 1 the second."""
    numbers = _decoded(machine, kind, registers)
    p, w = numbers.shape[:2]
    # [p, w, g, t, row half, number] -> [p, w, row half, t, number, g]
    return numbers.transpose(0, 1, 4, 3, 5, 2).reshape(p, w, kind.depth, 8)


BUILDERS = {"ldmatrix": _ldmatrix, "stmatrix": _stmatrix, "mma": _mma}
