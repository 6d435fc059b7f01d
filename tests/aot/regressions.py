"""The figures of every shipped binary, checked in (``expected/``), and what is worse now than they say.

A kernel that still compiles without spilling may have lost much: a loop with twice the instructions, or one register
too many for a second program on the multiprocessor. So each binary's figures are kept, one line each:

    "name of Item.entry()": [registers, bytes of shared memory, instructions of the main loop, products among them]

A kernel without products is all loop (assembly.py). Worse is: more than 5 % more instructions per product, or fewer
programs to a multiprocessor. ``python -m tests.aot.report --record`` writes the files anew, and prints what changed.

Another release of Triton compiles to other instructions, for which these figures say nothing.
"""

import functools
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import triton

from tests.aot.checks import Result, resident_programs
from tests.aot.layers import Item
from tests.aot.offline import Compiled

FOLDER = Path(__file__).parent / "expected"
RECORD = "python -m tests.aot.report --record"
_SLACK = 1.05


class Figures(NamedTuple):
    registers: int
    shared: int
    instructions: int
    products: int

    def cost(self) -> float:
        """Instructions per product, of a kernel that has some."""
        return self.instructions / max(self.products, 1)


def figures(made: Compiled) -> Figures:
    return Figures(made.registers, made.shared, made.loop.instructions, made.loop.products)


@functools.cache
def recorded(architecture: str) -> dict[str, Figures]:
    return {name: Figures(*numbers) for name, numbers in _read(architecture)["binaries"].items()}


def recorded_with(architecture: str) -> str:
    """The version of Triton."""
    return _read(architecture)["triton"]


def _read(architecture: str) -> dict[str, Any]:
    path = FOLDER / f"{architecture}.json"
    return json.loads(path.read_text()) if path.exists() else {"triton": triton.__version__, "binaries": {}}


def regressions(results: Iterable[Result]) -> list[str]:
    """What got worse, readable, and what has no figures yet. Skips the test with another release of Triton."""
    found = []
    for launch, made in results:
        _require_the_same_triton(launch.architecture)
        if made is None:
            continue
        before = recorded(launch.architecture).get(launch.entry())
        worse = [f"no figures; {RECORD}"] if before is None else compare(before, made, launch.architecture)
        found += [f"{launch.architecture} {launch.entry()} ({launch.name}): {what}" for what in worse]
    return found


@functools.cache
def _require_the_same_triton(architecture: str) -> None:
    version = recorded_with(architecture)
    if version != triton.__version__:
        pytest.skip(f"figures are Triton {version}'s, and other instructions may come from this, {triton.__version__}")


def compare(before: Figures, made: Compiled, architecture: str) -> list[str]:
    now = figures(made)
    worse = []
    if (now.products == 0) != (before.products == 0) or now.cost() > before.cost() * _SLACK:
        worse.append(f"the main loop's instructions per product: {_loop(before)} before, {_loop(now)} now")
    fitted = resident_programs(architecture, made._replace(registers=before.registers, shared=before.shared))
    fit = resident_programs(architecture, made)
    if fit < fitted:
        worse.append(
            f"programs to a multiprocessor: {fitted} before, {fit} now; {before.registers} registers and "
            f"{before.shared} bytes of shared memory before, {now.registers} and {now.shared} now"
        )
    return worse


def _loop(one: Figures) -> str:
    return f"{one.instructions}/{one.products} = {one.cost():.1f}" if one.products else f"{one.instructions}"


def unused(architecture: str, launches: Iterable[Item]) -> list[str]:
    """Entries that none of ``launches``, which must be all of the architecture's, has."""
    _require_the_same_triton(architecture)
    return sorted(set(recorded(architecture)) - {one.entry() for one in launches})


def save(architecture: str, table: Mapping[str, Figures]) -> None:
    FOLDER.mkdir(exist_ok=True)
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(list(table[name]))}" for name in sorted(table))
    text = f'{{\n"triton": {json.dumps(triton.__version__)},\n"binaries": {{\n{lines}\n}}\n}}\n'
    (FOLDER / f"{architecture}.json").write_text(text)
    forget()


def forget() -> None:
    """What was read of the files."""
    recorded.cache_clear()
    _require_the_same_triton.cache_clear()
