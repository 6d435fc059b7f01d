"""Registers of sm_90's asynchronous products (wgmma) that are written again before these have read them.

A wgmma whose first operand lies in registers reads them while the program goes on, until a wait says that it is done;
then only may they be written (PTX ISA, wgmma.mma_async). Compilers have got that wrong: Triton in its PTX (issues 9433
and 9514), ptxas in its choice of registers. What they made is in the binary, so it is looked at there.
"""

import re

from tests.aot.assembly import Instruction

_PRODUCT = re.compile(r"[HIQ]GMMA\.")
_FIRST = re.compile(r"R\d+\w*(?:\.\w+)?, R(\d+)")  # the result, then the first operand: in registers, not "gdesc[UR4]"
_OPERAND = 4  # registers of a thread, of 64 rows of 32 bytes over 128 threads
_COMMIT = "gsb0"  # the last product of a group
_WAIT = "WARPGROUP.DEPBAR"
_MOST = 8  # groups that are told apart; nobody waits with more under way

_NO_RESULT = (
    "ST",
    "RED",
    "BAR",
    "BRA",
    "BSYNC",
    "BSSY",
    "EXIT",
    "WARP",
    "DEPBAR",
    "LDGSTS",
    "LDGDEPBAR",
    "SYNCS",
    "NOP",
)
_NO_RESULT += (
    "ISETP",
    "FSETP",
    "HSETP2",
    "DSETP",
    "PLOP3",
    "R2P",
    "UTMA",
    "FENCE",
    "CCTL",
    "MEMBAR",
    "ERRBAR",
    "ARRIVES",
)
_RESULT = re.compile(r"(?:[!U]*P[T\d]\w*, )*R(\d+)\b")
_WIDTHS = ((r"\.128\b|\.M88\.4\b|\.MT88\.4\b", 4), (r"\.64\b|\.WIDE\b|\.M88\.2\b|\.MT88\.2\b|CS2R|\bD[A-Z]+\b", 2))


def hazards(code: list[Instruction]) -> list[str]:
    """Each instruction that writes to registers of a product that may still be read, after this one."""
    found = []
    for start, product in enumerate(code):
        first = _FIRST.match(product.operands.strip()) if _PRODUCT.match(product.name) else None
        if first is None:
            continue
        operand = set(range(int(first[1]), int(first[1]) + _OPERAND))
        # Where one may be, whether the product's own group is closed, and how many have been closed after that.
        todo = [(following, _COMMIT in product.operands, 0) for following in _next(code, start)]
        seen = set(todo)
        while todo:
            position, closed, later = todo.pop()
            one = code[position]
            if one.name.startswith(_WAIT) and closed and later >= _left(one):
                continue
            if _PRODUCT.match(one.name) and _COMMIT in one.operands:
                closed, later = True, min(later + closed, _MOST)
            elif not _PRODUCT.match(one.name) and operand & _written(one):
                found.append(f"{one.name} {one.operands.strip()} after {product.name} {product.operands.strip()}")
                continue
            ways = {(following, closed, later) for following in _next(code, position)} - seen
            seen |= ways
            todo += ways
    return found


def _next(code: list[Instruction], position: int) -> list[int]:
    one = code[position]
    ways = [] if one.target is None else [one.target]
    return [*ways, position + 1] if one.goes_on and position + 1 < len(code) else ways


def _left(wait: Instruction) -> int:
    """How many groups may still be under way after a wait: "gsb0, 0x1"."""
    return int(wait.operands.rsplit(",", 1)[1], 16)


def _written(one: Instruction) -> set[int]:
    """The registers of its result. Taken too many, they are a false alarm, and never the opposite."""
    result = _RESULT.match(one.operands.strip())
    if result is None or one.name.startswith(_NO_RESULT):
        return set()
    width = next((width for pattern, width in _WIDTHS if re.search(pattern, one.name)), 1)
    return set(range(int(result[1]), int(result[1]) + width))
