"""Half Precision Floating Point Instructions on two numbers of 16 bits at once. Adds opcodes to ``arithmetic.PURE``."""

import re
from collections.abc import Callable
from typing import Any, Optional

import numpy as np

from tests.ptx.arithmetic import PURE, Pure
from tests.ptx.parse import Instruction, PtxError, Vector
from tests.ptx.registers import TYPES, masker, reader, writer


def _split(pair: np.ndarray, dtype: type = np.float16) -> tuple[np.ndarray, np.ndarray]:
    """The lower and the upper half."""
    halves = np.ascontiguousarray(pair).view(dtype).reshape(*pair.shape, 2)
    return halves[..., 0], halves[..., 1]


def _each(opcode: str) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    function, dtype = PURE[opcode].function, TYPES[PURE[opcode].result]

    def both(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        low, high = (function(x, y) for x, y in zip(_split(a, dtype), _split(b, dtype)))
        return np.stack(np.broadcast_arrays(low, high), -1).view(np.uint32)[..., 0]

    return both


for _opcode in ("max.f16", "min.f16", "max.NaN.f16", "min.NaN.f16", "max.NaN.bf16"):
    PURE[f"{_opcode}x2"] = Pure(("b32", "b32"), "b32", _each(_opcode))


def _compare(instruction: Instruction) -> Callable[[Any], Optional[int]]:
    """setp.f16x2 p|q: p of the lower halves, q of the upper ones."""
    found = re.fullmatch(r"(setp\.\w+\.f16)x2", instruction.opcode)
    result = instruction.operands[0]
    if found is None or found[1] not in PURE or not isinstance(result, Vector) or len(result.items) != 2:
        raise PtxError(f"unknown: {instruction.opcode}")
    function, mask_of = PURE[found[1]].function, masker(instruction)
    writers = [writer(one, "pred") for one in result.items]
    a, b = (reader(one, "b32") for one in instruction.operands[1:])

    def step(machine: Any) -> None:
        for write, x, y in zip(writers, _split(a(machine)), _split(b(machine))):
            write(machine, function(x, y), mask_of(machine))

    return step


BUILDERS = {"setp": _compare}
