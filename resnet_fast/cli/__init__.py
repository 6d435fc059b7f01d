"""The command ``resnet-fast``: one module per command, each of which imports what it needs only when it runs.

app.py         the commands, and what becomes of an exception
options.py     options that several commands share, and models by name
console.py     JSON for programs, tables for people
"""

from collections.abc import Sequence
from typing import Optional

__all__ = ["main"]


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """Run the command line (``sys.argv`` by default) and return its exit code; see ``resnet_fast.cli.app``."""
    from resnet_fast.cli.app import run

    return run(arguments)
