"""``python -m tests.ptx FILE.ptx [...]``: the opcodes of the files, how often, and which the machine does not know."""

import sys
from collections import Counter
from pathlib import Path

from tests.ptx.machine import step
from tests.ptx.parse import PtxError, parse


def main(files: list[str]) -> int:
    """1 if there is an unknown one."""
    counted: Counter[str] = Counter()
    unknown: dict[str, str] = {}
    for file in files:
        kernel = parse(Path(file).read_text())
        for one in kernel.instructions:
            counted[one.opcode] += 1
            try:
                step(one, kernel)
            except PtxError as error:
                unknown.setdefault(one.opcode, f"{file}, {error}")
    for opcode, count in sorted(counted.items()):
        print(f"{count:8} {opcode}{'' if opcode not in unknown else '    unknown'}")
    for why in unknown.values():
        print(why)
    return 1 if unknown else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
