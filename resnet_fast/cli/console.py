"""What a command says: JSON for programs, on stdout or in a file, and tables for people, on stderr."""

import sys
from collections.abc import Iterable, Sequence
from typing import Any, Optional

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table


def console() -> Console:
    """A console on stderr, so that stdout carries nothing but JSON."""
    # A log file has no width: do not break a table's lines at the 80 columns that rich assumes.
    return Console(stderr=True, highlight=False, width=None if sys.stderr.isatty() else 140)


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
        sys.stdout.write(text)
        sys.stdout.flush()
        return
    with replacing(target) as temporary:
        temporary.write_text(text, encoding="utf-8")
