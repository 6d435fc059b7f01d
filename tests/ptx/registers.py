"""Registers as arrays over [programs, threads], and how operands are read and results written.

An array's dimension is 1 where all programs, or all threads, have the same value: NumPy broadcasts it, so that what is
uniform costs next to nothing. Values are kept as unsigned integers of the register's width, predicates as bool.
"""

from collections.abc import Callable
from typing import Any, Optional

import numpy as np

from tests.ptx.parse import Immediate, Instruction, Operand, PtxError, Register, Special

# The types of instructions (Fundamental Types). NumPy has no bf16: its bits, which conversions.py knows how to read.
TYPES: dict[str, Any] = {
    "pred": np.bool_, "b8": np.uint8, "b16": np.uint16, "b32": np.uint32, "b64": np.uint64,
    "u8": np.uint8, "u16": np.uint16, "u32": np.uint32, "u64": np.uint64,
    "s8": np.int8, "s16": np.int16, "s32": np.int32, "s64": np.int64,
    "f16": np.float16, "f32": np.float32, "f64": np.float64,
    "bf16": np.uint16, "f16x2": np.uint32, "bf16x2": np.uint32,
}  # fmt: skip
BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}

Reader = Callable[[Any], np.ndarray]
Writer = Callable[[Any, np.ndarray, Optional[np.ndarray]], None]


def width(type_name: str) -> int:
    """Bytes of a type."""
    return np.dtype(TYPES[type_name]).itemsize


def register_type(register: Register) -> Any:
    return TYPES[register.kind]


def reader(operand: Operand, type_name: str) -> Reader:
    """Gives the operand as the type has it, of a machine."""
    dtype = np.dtype(TYPES[type_name])
    if isinstance(operand, Immediate):
        constant = immediate(operand.value, type_name)
        return lambda machine: constant
    if not isinstance(operand, Register):
        raise PtxError(f"{operand} is not a {type_name}")
    name, size = operand.name, np.dtype(register_type(operand)).itemsize
    if (operand.kind == "pred") != (type_name == "pred") or size < dtype.itemsize:
        raise PtxError(f"{name} is not a {type_name}")
    if size == dtype.itemsize:
        return lambda machine: machine.value(name).view(dtype)
    # Operand Size Exceeding Instruction-Type Size: the low bits.
    bits = BITS[dtype.itemsize]
    return lambda machine: machine.value(name).astype(bits).view(dtype)


def immediate(value: int, type_name: str) -> np.ndarray:
    if type_name == "pred":
        return np.full((1, 1), value != 0)
    size = width(type_name)
    return np.full((1, 1), value % 2 ** (8 * size), BITS[size]).view(TYPES[type_name])


def writer(operand: Operand, type_name: str) -> Writer:
    """Stores a result of the type in a register, where the mask holds (None: everywhere)."""
    if isinstance(operand, Special) and operand.name == "_":
        return lambda machine, value, mask: None
    if not isinstance(operand, Register):
        raise PtxError(f"{operand} does not take a result")
    name, kept = operand.name, np.dtype(register_type(operand))
    if (operand.kind == "pred") != (type_name == "pred") or kept.itemsize < width(type_name):
        raise PtxError(f"{name} does not hold a {type_name}")
    wider = kept.itemsize > width(type_name)

    def write(machine: Any, value: np.ndarray, mask: Optional[np.ndarray]) -> None:
        # A wider register gets sign or zeros in its upper bits.
        bits = value.astype(_signed(kept) if value.dtype.kind == "i" else kept) if wider else value
        machine.write(name, bits.view(kept), mask)

    return write


def _signed(kept: np.dtype) -> np.dtype:
    return np.dtype(f"i{kept.itemsize}")


def masker(instruction: Instruction) -> Callable[[Any], Optional[np.ndarray]]:
    """For whom the instruction is executed: None is all (Predicated Execution)."""
    if instruction.guard is None:
        return lambda machine: None
    name = instruction.guard.name
    if instruction.negated:
        return lambda machine: ~machine.value(name)
    return lambda machine: machine.value(name)
