"""What a command says: JSON for programs, on stdout or in a file, and tables for people, on stderr."""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Optional

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

_quiet = False


def set_quiet(wanted: bool) -> None:
    """Have ``console`` print nothing, or everything again; errors are printed without it."""
    global _quiet
    _quiet = wanted


def quiet() -> bool:
    """Whether ``--quiet`` was given."""
    return _quiet


def console() -> Console:
    """A console on stderr, so that stdout carries nothing but JSON."""
    # A log file has no width: do not break a table's lines at the 80 columns that rich assumes.
    width = None if sys.stderr.isatty() else 140
    return Console(stderr=True, quiet=_quiet, highlight=False, emoji=False, width=width)  # :cat: may be a folder's name


@contextmanager
def stages(console: Console, title: str) -> Iterator[Callable[[str, int, Optional[int]], None]]:
    """A spinner, and a bar for each stage that the yielded function is told of: its name, steps done, and steps.

    A stage may say more behind a colon: ``learning: epoch 2/3`` takes the place of ``learning: epoch 1/3``.
    """
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        SpinnerColumn,
        TaskID,
        TextColumn,
        TimeElapsedColumn,
    )

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bars:
        bars.add_task(title, total=None)
        tasks: dict[str, TaskID] = {}

        def tell(stage: str, done: int, total: Optional[int]) -> None:
            name = stage.partition(":")[0]
            if name not in tasks:
                tasks[name] = bars.add_task(stage, total=total)
            bars.update(tasks[name], description=stage, completed=done, total=total)

        yield tell


def warn_if_busy(console: Console) -> Optional[float]:
    """Say so where other processes take time that is about to be measured; return the load, if the system tells."""
    from resnet_fast.bench.machine import load

    busy = load()
    if busy is not None and busy > 0.5:
        console.print(f"[yellow]this machine is busy (load {busy}): the times below are too long[/]")
    return busy


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]], numbers: Sequence[str] = ()) -> Table:
    """A table with the columns in ``numbers`` set flush right, without a header if no column has a name."""
    style: dict[str, Any] = {"title_justify": "left", "title_style": "bold", "box": box.SIMPLE_HEAD}
    result = Table(title=escape(title), show_header=any(columns), **style)
    for column in columns:
        result.add_column(
            escape(column), justify="right" if column in numbers else "left", no_wrap=column in numbers, overflow="fold"
        )
    for row in rows:
        result.add_row(*(escape(str(cell)) for cell in row))
    return result


def write_json(data: Any, target: Optional[str]) -> None:
    """Write ``data`` to the file ``target``, whole or not at all; ``-`` is stdout, None is nowhere."""
    if target is None:
        return
    from resnet_fast.utils.files import json_text, replacing

    text = json_text(data)
    if target == "-":
        try:
            text.encode(sys.stdout.encoding or "utf-8")
        except UnicodeEncodeError:
            text = json_text(data, ascii=True)
        sys.stdout.write(text)
        sys.stdout.flush()
        return
    with replacing(target) as temporary:
        temporary.write_text(text, encoding="utf-8")
