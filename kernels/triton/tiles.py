"""Tile sizes, read from ``tiles/<architecture>.json``.

A file lists, for each precision, tiles from the largest to the smallest. A large tile reads each input fewer times; a
small one makes more programs. So a problem gets the largest tile that still gives every multiprocessor a program, or
else the last tile. None of these choices was measured on a GPU; that they compile without spilling registers is
tested ahead of time (tests/aot).

    multiprocessors   of the largest GPU of the architecture
    shared_memory     bytes that a program may use, on the smallest GPU that takes this file
    smallest          [BM, BN, BK] below which a tile is not cut down to fit a small problem
    half, tf32, ieee  [BM, BN, BK, warps, stages, split]; split: finish the tile in two halves (see epilogue.py)
    max_pool, average_pool  [BM, BN, warps]
    dgrad_half, wgrad_half, ..._ieee  like half, for the gradients; never split
    pointwise         [BM, BN, warps] of the backward passes that only move data
    sum_rows          [BM, elements of the tile, warps]
    int8, fp8         like half, for convolutions of 8-bit numbers
    quantise          [BLOCK, warps] of the passes from real to 8-bit numbers and back
"""

import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

_FOLDER = Path(__file__).parent / "tiles"


class Tile(NamedTuple):
    """One program makes [rows, columns] of the output, ``reduction`` elements of the inner dimension at a time.

    kernel: "pointers", or another way to the same result, where there is one (launch.py). parts: of the inner
    dimension, each made by programs of its own and summed afterwards.
    """

    rows: int
    columns: int
    reduction: int
    warps: int
    stages: int
    split: bool
    kernel: str = "pointers"
    parts: int = 1

    def constants(self) -> dict[str, Any]:
        return {
            "BM": self.rows,
            "BN": self.columns,
            "BK": self.reduction,
            "SPLIT": self.split,
            "num_warps": self.warps,
            "num_stages": self.stages,
        }


@functools.cache
def load(architecture: str) -> dict[str, Any]:
    """The tiles of the nearest architecture that has some."""
    return json.loads((_FOLDER / f"{nearest(architecture)}.json").read_text())


def nearest(architecture: str) -> str:
    """The file for ``"sm_89"``, ``"gfx90a"``, ``"interpreter"``.

    NVIDIA: of the files, the newest that is not newer. AMD: gfx942's, whose local memory no later GPU undercuts.
    """
    if architecture.startswith("gfx"):
        return architecture if (_FOLDER / f"{architecture}.json").exists() else "gfx942"
    if not architecture.startswith("sm_"):
        return architecture
    capability = int(architecture.removeprefix("sm_"))
    if capability >= 120:
        # GeForce Blackwell has the tensor instructions and the shared memory of Ampere, not those of sm_100.
        return "sm_80"
    known = sorted(int(path.stem.removeprefix("sm_")) for path in _FOLDER.glob("sm_*.json"))
    return f"sm_{max((one for one in known if one <= capability), default=known[0])}"


@functools.lru_cache(maxsize=4096)
def pick(architecture: str, precision: str, rows: int, columns: int, reduction: int, groups: int) -> Tile:
    """The tile for ``groups`` products of ``[rows, taps * reduction] @ [taps * reduction, columns]``.

    precision: "half", "tf32", "ieee", "int8" or "fp8".
    """
    data = load(architecture)
    smallest_rows, smallest_columns, smallest_reduction = data["smallest"]
    widest = max(power_of_two(columns), smallest_columns)
    for tile in data[precision]:
        bm, bn, bk, warps, stages, split = tile
        if bn <= widest and groups * -(-rows // bm) * -(-columns // bn) >= data["multiprocessors"]:
            break
    size = bm * bn
    bm = max(min(bm, power_of_two(rows)), smallest_rows)
    split = bool(split) and bn <= widest
    bn = min(bn, widest)
    # Rather more steps than a last step that is mostly padding.
    shortest = max(smallest_reduction, min(32, power_of_two(reduction)))
    while bk > shortest and -(-reduction // (bk // 2)) * (bk // 2) < -(-reduction // bk) * bk:
        bk //= 2
    return Tile(bm, bn, bk, min(warps, max(4, warps * bm * bn // size)), stages, split)


def power_of_two(value: int) -> int:
    """The next power of two from ``value`` on."""
    return 1 << (value - 1).bit_length()
