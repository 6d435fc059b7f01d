"""Asynchronous Warpgroup Level Matrix Instructions of sm_90: wgmma.

A product reads its operands from shared memory at any time between its issue and the end of the wait for its group:
until then nothing may write there, nor touch its accumulators. What threads wrote is seen after fence.proxy.async.
Where an element lies is said by "Shared Memory Matrix Layout" and "Matrix Descriptor Format".
"""

import re
from collections.abc import Callable
from typing import Any, NamedTuple, Optional

import numpy as np

from tests.ptx.arithmetic import canonical
from tests.ptx.conversions import widen_bf16, widen_e4m3
from tests.ptx.parse import Immediate, Instruction, PtxError, Register, Vector
from tests.ptx.registers import reader, writer
from tests.ptx.shared import START, Place

_GROUP = 128  # threads
_PITCHES = {1: 128, 2: 64, 3: 32}  # bytes of a row, by the swizzle's number; the other one is of no use to Triton
_BYTES = {"f16": 2, "bf16": 2, "tf32": 4, "s8": 1, "e4m3": 1}  # of an element
_DECODE = {
    "f16": lambda bits: bits.view(np.float16),
    "bf16": widen_bf16,
    "tf32": lambda bits: (bits & np.uint32(0xFFFFE000)).view(np.float32),
    "s8": lambda bits: bits.view(np.int8),
    "e4m3": widen_e4m3,
}
# Without .satfinite, what int32 does not hold loses its upper bits.
_NARROW = {
    "f32": canonical(lambda total: total.astype(np.float32)),
    "s32": lambda total: total.astype(np.int64).astype(np.int32),
}


class Product(NamedTuple):
    """One that is under way: what it reads, and its registers."""

    places: tuple[Place, ...]
    sources: frozenset[str]
    results: frozenset[str]
    instruction: Instruction


class Products:
    """Those of a machine that nobody has waited for yet, in groups."""

    def __init__(self) -> None:
        self._open: list[Product] = []
        self._groups: list[list[Product]] = []
        self.results: frozenset[str] = frozenset()  # registers that nobody may read
        self.registers: frozenset[str] = frozenset()  # nor these be written
        self.follows = False  # but by a product

    def of(self, part: Callable[[Place], Place]) -> "Products":
        """Of some of the programs."""
        made = Products()
        made._open = [one._replace(places=tuple(map(part, one.places))) for one in self._open]
        made._groups = [[one._replace(places=tuple(map(part, one.places))) for one in group] for group in self._groups]
        made._count()
        return made

    def check(self, name: str, taken: frozenset[str]) -> None:
        if taken and name in taken and not self.follows:
            raise PtxError(f"{name} belongs to a product that was not waited for")

    def begin(self, product: Product) -> None:
        self._open.append(product)
        self._count()

    def commit(self) -> None:
        self._groups.append(self._open)
        self._open = []

    def finish(self, left: int, shared: Any) -> None:
        """All groups but the last ``left``."""
        done = max(len(self._groups) - left, 0)
        for product in (one for group in self._groups[:done] for one in group):
            for place in product.places:
                shared.give_back(place, product.instruction)
        del self._groups[:done]
        self._count()

    def _count(self) -> None:
        under_way = [*self._open, *(one for group in self._groups for one in group)]
        self.results = frozenset().union(*(one.results for one in under_way))
        self.registers = self.results.union(*(one.sources for one in under_way))


def _offsets(descriptor: int, lines: int, depth: int, item: int, transposed: bool) -> np.ndarray:
    """Of 16 bytes each, from shared memory's start: [lines, pieces], or transposed [depth, pieces of the lines]."""
    start, leading, stride = ((descriptor >> at & 0x3FFF) << 4 for at in (0, 16, 32))
    pitch = _PITCHES.get(descriptor >> 62)
    if pitch is None or descriptor & ~(0xC000_3FFF_3FFF_3FFF):
        raise PtxError(f"unknown: matrix descriptor {descriptor:#x}")
    if transposed:
        k, piece = np.arange(depth)[:, None], 16 * np.arange(lines * item // 16)[None]
        linear = start + piece // pitch * leading + k // 8 * stride + k % 8 * pitch + piece % pitch
    else:
        line, piece = np.arange(lines)[:, None], 16 * np.arange(depth * item // 16)[None]
        linear = start + line // 8 * stride + line % 8 * pitch + piece
    return (linear ^ ((linear >> 7) & (pitch // 16 - 1)) << 4) - START


def _matrix(
    machine: Any, descriptors: np.ndarray, lines: int, depth: int, type_name: str, transposed: bool, why: Instruction
) -> tuple[np.ndarray, Place]:
    """[programs, groups, lines, depth] of what lies there, and where that is."""
    item = _BYTES[type_name]
    each = machine.each(descriptors).reshape(machine.programs, -1, _GROUP)
    if (each != each[:, :, :1]).any():
        raise PtxError("threads of a warpgroup have different descriptors")
    found, inverse = np.unique(each[:, :, 0], return_inverse=True)
    tables = np.stack([_offsets(int(one), lines, depth, item, transposed) for one in found])
    offsets = tables[inverse.reshape(each.shape[:2])]
    programs, groups = np.indices(each.shape[:2])
    shape = offsets.shape[2:]
    spread = [np.broadcast_to(one[:, :, None, None], offsets.shape).reshape(-1) for one in (programs, _GROUP * groups)]
    place = Place(*spread, offsets.reshape(-1), 16)
    values = machine.shared.lend(place, item, why).reshape(*each.shape[:2], shape[0], -1)
    decoded = _DECODE[type_name](np.ascontiguousarray(values)).astype(np.float64)
    return (decoded.swapaxes(2, 3) if transposed else decoded), place


_NAME = re.compile(r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k(\d+)\.([fs]32)\.(\w+)\.(\w+)")


def _product(instruction: Instruction) -> Callable[[Any], Optional[int]]:
    found = _NAME.fullmatch(instruction.opcode)
    d, a, b, scale, *flags = instruction.operands
    if found is None or found[4] != found[5] or not isinstance(d, Vector) or instruction.guard is not None:
        raise PtxError(f"unknown: {instruction}")
    columns, depth, result, type_name = int(found[1]), int(found[2]), found[3], found[4]
    if type_name not in _BYTES or (result == "s32") != (type_name == "s8") or depth * _BYTES[type_name] != 32:
        raise PtxError(f"unknown: {instruction}")
    in_registers = isinstance(a, Vector)
    transposed = [one == Immediate(1) for one in flags[2:]]
    # Signs of a and b, which integers have not; then, of 16 bits alone, whether what is in shared memory is transposed.
    signs = 0 if result == "s32" else 2
    expected = signs + (0 if _BYTES[type_name] != 2 else 1 if in_registers else 2)
    if flags[:signs] != [Immediate(1)] * signs or len(flags) != expected or len(d.items) != columns // 2:
        raise PtxError(f"unknown: {instruction}")
    transposed_a = not in_registers and bool(transposed) and transposed[0]
    transposed_b = bool(transposed) and transposed[-1]
    results = frozenset(one.name for one in d.items if isinstance(one, Register))
    readers, writers = [reader(one, result) for one in d.items], [writer(one, result) for one in d.items]
    a_readers = [reader(one, "b32") for one in a.items] if isinstance(a, Vector) else []
    a_descriptor = None if isinstance(a, Vector) else reader(a, "b64")
    b_descriptor, scaled = reader(b, "b64"), reader(scale, "pred")
    sources = frozenset(one.name for one in a.items if isinstance(one, Register)) if in_registers else frozenset()

    def step(machine: Any) -> None:
        machine.products.follows = True  # on the same accumulators, products wait for each other
        shape = machine.programs, machine.width // _GROUP
        places = []
        if a_descriptor is None:
            left = _of_registers(machine, [read(machine) for read in a_readers], type_name, depth)
        else:
            left, place = _matrix(machine, a_descriptor(machine), 64, depth, type_name, transposed_a, instruction)
            places.append(place)
        right, place = _matrix(machine, b_descriptor(machine), columns, depth, type_name, transposed_b, instruction)
        places.append(place)
        total = left @ right.swapaxes(2, 3)
        adds = machine.each(scaled(machine)).reshape(*shape, -1)
        if (adds != adds[:, :, :1]).any():
            raise PtxError("threads of a warpgroup differ in scale-d")
        if adds.any():
            # Warp w has rows 16 w and on: registers (8 columns, row half, column) of lane (g, t).
            before = np.stack([machine.each(read(machine)) for read in readers], -1)
            before = before.reshape(*shape, 4, 8, 4, columns // 8, 2, 2).transpose(0, 1, 2, 6, 3, 5, 4, 7)
            total = total + np.where(adds[:, :, :1, None], before.reshape(*shape, 64, columns), 0)
        made = _NARROW[result](total).reshape(*shape, 4, 2, 8, columns // 8, 4, 2).transpose(0, 1, 2, 4, 6, 5, 3, 7)
        made = made.reshape(machine.programs, machine.width, columns // 2)
        for i, write in enumerate(writers):
            write(machine, made[:, :, i], None)
        machine.products.follows = False
        machine.products.begin(Product(tuple(places), sources, results, instruction))

    return step


def _of_registers(machine: Any, registers: list[np.ndarray], type_name: str, depth: int) -> np.ndarray:
    """As the left operand of an mma.sync, 16 rows a warp."""
    bits = np.ascontiguousarray(np.stack([machine.each(one) for one in registers], -1))
    bits = bits.view(f"u{_BYTES[type_name]}")
    numbers = _DECODE[type_name](bits).astype(np.float64)
    # [p, group, warp, g, t, column half, row half, number] -> [p, group, warp, row half, g, column half, t, number]
    split = numbers.reshape(machine.programs, -1, 4, 8, 4, 2, 2, depth // 8)
    return split.transpose(0, 1, 2, 6, 3, 5, 4, 7).reshape(machine.programs, -1, 64, depth)


def _wgmma(instruction: Instruction) -> Callable[[Any], Optional[int]]:
    if instruction.name == "wgmma" and instruction.modifiers[0] == "mma_async":
        return _product(instruction)
    if instruction.guard is None:
        if instruction.opcode == "wgmma.commit_group.sync.aligned":
            return lambda machine: machine.products.commit()
        if instruction.opcode == "wgmma.wait_group.sync.aligned" and isinstance(instruction.operands[0], Immediate):
            left = instruction.operands[0].value
            return lambda machine: machine.products.finish(left, machine.shared)
        if instruction.opcode == "wgmma.fence.sync.aligned":
            return lambda machine: None
    raise PtxError(f"unknown: {instruction}")


def _fence(instruction: Instruction) -> Callable[[Any], Optional[int]]:
    """Parallel Synchronization: fence.proxy.async."""
    if instruction.opcode != "fence.proxy.async.shared::cta" or instruction.guard is not None:
        raise PtxError(f"unknown: {instruction}")
    return lambda machine: machine.shared.fence()


BUILDERS = {"wgmma": _wgmma, "fence": _fence}
