"""Mistakes that a compiler, or who writes a kernel, might make, put into the PTX of a kernel of ours."""

import re
from collections.abc import Callable, Iterator
from typing import NamedTuple


class Mutation(NamedTuple):
    name: str
    change: Callable[[str], str]


def _lines(text: str, pattern: str) -> Iterator[tuple[int, re.Match]]:
    for i, line in enumerate(text.split("\n")):
        if found := re.search(pattern, line):
            yield i, found


def _replaced(text: str, at: int, line: str) -> str:
    lines = text.split("\n")
    assert lines[at] != line
    lines[at] = line
    return "\n".join(lines)


def _without(text: str, lines: list[int]) -> str:
    return "\n".join("" if i in lines else line for i, line in enumerate(text.split("\n")))


_STORE = r"^\s*(@!?%p\d+ )?st\.shared"
_BARRIER = r"^\s*bar\.sync"
_WRITE = r"^\s*(@!?%p\d+ )?(st\.shared|cp\.async\.c[ag])"
_WAIT = r"^\s*cp\.async\.wait_group\s+(\d+);"
_COMMIT = r"^\s*cp\.async\.commit_group"


def _between(text: str, first: int, last: int, pattern: str) -> bool:
    return any(first < i < last for i, _ in _lines(text, pattern))


def barriers(text: str) -> list[Mutation]:
    """Each barrier left out, unless there are only reads on both its sides, between which nothing has to be ordered."""
    at = [i for i, _ in _lines(text, _BARRIER)]
    sides = zip([-1, *at], at, [*at[1:], text.count("\n") + 1])
    needed = [i for before, i, after in sides if _between(text, before, after, _WRITE)]
    return [Mutation(f"no bar.sync in line {i + 1}", lambda text, i=i: _without(text, [i])) for i in needed]


def loop_barriers(text: str) -> list[Mutation]:
    """Those around the loop, up to the first store to shared memory.

    What the epilogue exchanges may lie elsewhere than what it exchanged before; then a barrier orders nothing.
    """
    first, _ = next(_lines(text, _STORE))
    head = "\n".join(text.split("\n")[: first + 1])
    return barriers(head)


def waits(text: str) -> list[Mutation]:
    """All waits for copies between two groups left out, as well as waiting for one group less.

    Not the last ones, for all groups that there are: nothing reads what the loop has copied in advance.
    """
    runs: list[list[tuple[int, int]]] = []
    for i, found in _lines(text, _WAIT):
        if runs and not _between(text, runs[-1][-1][0], i, _COMMIT):
            runs[-1].append((i, int(found[1])))
        else:
            runs.append([(i, int(found[1]))])
    made = []
    for run in runs:
        kept = [(i, groups) for i, groups in run if groups > 0]
        if kept:
            lines = [i for i, _ in kept]
            where = ", ".join(str(i + 1) for i in lines)
            made.append(Mutation(f"no wait_group in {where}", lambda text, lines=lines: _without(text, lines)))
            made.append(Mutation(f"one group less in {where}", lambda text, kept=kept: _fewer(text, kept)))
    return made


def _fewer(text: str, waits: list[tuple[int, int]]) -> str:
    for i, groups in waits:
        text = _replaced(text, i, f"\tcp.async.wait_group {groups + 1};")
    return text


def swizzles(text: str) -> list[Mutation]:
    """One bit of an address within shared memory flipped, where it is a constant."""
    return [
        Mutation(
            f"xor {found[2]} in line {i + 1}",
            lambda text, i=i, found=found: _replaced(text, i, f"{found[1]}{int(found[2]) ^ 32};"),
        )
        for i, found in _lines(text, r"^(\s*xor\.b32\s+%r\d+, %r\d+, )(\d+);")
    ]


def products(text: str) -> list[Mutation]:
    """Two registers of the left operand of an mma exchanged."""
    pattern = r"^(\s*mma\.sync.*?\}, \{ )(%r\d+), (%r\d+)(, .*)$"
    return [
        Mutation(
            f"registers of the mma in line {i + 1}",
            lambda text, i=i, found=found: _replaced(text, i, f"{found[1]}{found[3]}, {found[2]}{found[4]}"),
        )
        for i, found in _lines(text, pattern)
    ]


def product_waits(text: str) -> list[Mutation]:
    """Each wait for products leaves one group more under way."""
    return [
        Mutation(
            f"one product more under way in line {i + 1}",
            lambda text, i=i, found=found: _replaced(text, i, f"{found[1]}{int(found[2]) + 1};"),
        )
        for i, found in _lines(text, r"^(\s*wgmma\.wait_group\.sync\.aligned )(\d+);")
    ]


def fences(text: str) -> list[Mutation]:
    return [
        Mutation(f"no fence in line {i + 1}", lambda text, i=i: _without(text, [i]))
        for i, _ in _lines(text, r"^\s*fence\.proxy\.async")
    ]


_PHASE_WAIT = r"^(\s*mbarrier\.try_wait\.parity\S* complete, \[%r\d+\], )(%r\d+);"
_BULK = r"^(\s*@%p\d+ cp\.async\.bulk.*\{)(%r\d+)(, .*)(%r\d+)(\}.*)$"
_EXPECT = r"^(\s*@%p\d+ mbarrier\.arrive\.expect_tx\S* _, \[%r\d+\], )(\d+);"


def phase_waits(text: str) -> list[Mutation]:
    """No wait for a phase, and a wait for the phase before it."""
    made = []
    for i, found in _lines(text, _PHASE_WAIT):
        made.append(Mutation(f"no wait in line {i + 1}", lambda text, i=i: _without(text, [i, i + 1])))
        for parity in (0, 1):
            line = f"{found[1]}{parity};"
            made.append(Mutation(f"parity {parity}, line {i + 1}", lambda text, i=i, o=line: _replaced(text, i, o)))
    return made


def expectations(text: str) -> list[Mutation]:
    """A phase that expects half of the bytes, and one that expects twice as many."""
    return [
        Mutation(
            f"{size} bytes in line {i + 1}",
            lambda text, i=i, line=f"{found[1]}{size};": _replaced(text, i, line),
        )
        for i, found in _lines(text, _EXPECT)
        for size in (int(found[2]) // 2, int(found[2]) * 2)
    ]


def arrivals(text: str) -> list[Mutation]:
    return [
        Mutation(f"no arrival in line {i + 1}", lambda text, i=i: _without(text, [i])) for i, _ in _lines(text, _EXPECT)
    ]


def bulk_copies(text: str) -> list[Mutation]:
    """Each copy left out, and with the first and the last of its coordinates exchanged."""
    made = []
    for i, found in _lines(text, _BULK):
        made.append(Mutation(f"no copy in line {i + 1}", lambda text, i=i: _without(text, [i])))
        if found[2] != found[4]:
            line = f"{found[1]}{found[4]}{found[3]}{found[2]}{found[5]}"
            made.append(Mutation(f"corner in line {i + 1}", lambda text, i=i, o=line: _replaced(text, i, o)))
    return made


def barriers_before_copies(text: str) -> list[Mutation]:
    """All of them between the wait for a phase and the next copy, which goes to where warps have read since."""
    lines, made = text.split("\n"), []
    waits = [i for i, _ in _lines(text, _PHASE_WAIT)]
    for i, _ in _lines(text, _BULK):
        before = [wait for wait in waits if wait < i]
        # Only the first copy after it: then comes another barrier, and that orders the next ones.
        if before and not _between(text, before[-1], i, _BULK):
            at = [j for j in range(before[-1], i) if re.search(_BARRIER, lines[j])]
            made.append(Mutation(f"no bar.sync in {at}", lambda text, at=at: _without(text, at)))
    return made
