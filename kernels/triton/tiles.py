"""Tile sizes, read from ``tiles/<architecture>.json``.

A file lists tiles for each precision. A forward convolution gets one of them by its class: what kind of convolution it
is (cost.KINDS), its columns and the length of its inner dimension, both rounded up to a power of two, and within the
class by its number of rows, so that a batch gets what a batch of about its size gets. A class that the file does not
have is served by the nearest one. Which tile is best for a class is what a static model says (cost.py);
``python -m tests.aot.make_tiles`` asks it, and writes these files. None of the choices was measured on a GPU; that
the tiles compile without spilling registers is tested ahead of time (tests/aot). ``override`` is for choices that were
measured.

Other kernels' tiles are listed from the largest to the smallest. A large tile reads each input fewer times; a small one
makes more programs. So a problem gets the largest tile that still gives every multiprocessor a program, or else the
last tile.

    multiprocessors   of the GPU that the file is made for (gpus.py)
    shared_memory     bytes that a program may use
    smallest          [BM, BN, BK] below which a tile is not cut down to fit a small problem
    half, tf32, ieee  [BM, BN, BK, warps, stages, split], and if they are not Tile's defaults, kernel and parts; split:
                      finish the tile in two halves (see epilogue.py)
    classes           "kind precision columns inner": [most rows (of all groups together), position in the list], ...
    code              for each family of kernels, the numbers of cost.Code
    max_pool, average_pool  [BM, BN, warps]
    dgrad_half, wgrad_half, ..._ieee  like half, for the gradients; never split
    pointwise         [BM, BN, warps] of the backward passes that only move data
    sum_rows          [BM, elements of the tile, warps]
    chain             for each precision, [widest, BM, BN, warps, stages, split]: for chain.py, where neither the first
                      convolution's input nor the second one's output has more than ``widest`` channels
    int8, fp8         like half, for convolutions of 8-bit numbers
    quantise          [BLOCK, warps] of the passes from real to 8-bit numbers and back
"""

import functools
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Optional

from resnet_fast.kernels.triton.cost_model import cost, gpus
from resnet_fast.kernels.triton.cost_model.cost import Problem
from resnet_fast.kernels.triton.cost_model.tile import Tile

_FOLDER = Path(__file__).parent / "tiles"
_NARROWEST = 16  # channels that a matrix instruction takes


_measured: dict[tuple[str, Problem], Tile] = {}  # for an architecture


class ChainTile(NamedTuple):
    """One program of chain.py takes so many rows through both products, ``columns`` of what lies between at a time."""

    rows: int
    columns: int
    warps: int
    stages: int
    split: bool

    def constants(self, channels: int, last: int) -> dict[str, Any]:
        """For so many channels at the beginning, and so many at the end."""
        return {
            "BM": self.rows,
            "BN": self.columns,
            "BK": max(_NARROWEST, power_of_two(channels)),
            "BL": max(_NARROWEST, power_of_two(last)),
            "SPLIT": self.split,
            "num_warps": self.warps,
            "num_stages": self.stages,
        }


@functools.cache
def load(architecture: str) -> dict[str, Any]:
    """The tiles of the nearest architecture that has some."""
    return json.loads(path(nearest(architecture)).read_text())


def path(architecture: str) -> Path:
    """Where the file of an architecture is, or would be."""
    return _FOLDER / f"{architecture}.json"


def nearest(architecture: str) -> str:
    """The file for ``"sm_87"``, ``"gfx90a"``, ``"interpreter"``.

    NVIDIA: of the files, the newest that is not newer. AMD: gfx942's, whose local memory no later GPU undercuts.
    """
    if architecture.startswith("gfx"):
        return architecture if path(architecture).exists() else "gfx942"
    if not architecture.startswith("sm_"):
        return architecture
    capability = int(architecture.removeprefix("sm_"))
    known = sorted(int(one.stem.removeprefix("sm_")) for one in _FOLDER.glob("sm_*.json"))
    return f"sm_{max((one for one in known if one <= capability), default=known[0])}"


@functools.lru_cache(maxsize=4096)
def pick(
    architecture: str,
    precision: str,
    rows: int,
    columns: int,
    reduction: int,
    groups: int,
    kind: Optional[str] = None,
    taps: int = 1,
) -> Tile:
    """The tile for ``groups`` products of ``[rows, taps * reduction] @ [taps * reduction, columns]``.

    precision: "half", "tf32" or "ieee", or the name of another list of tiles. kind: of cost.KINDS, for a convolution
    that has a class. These are the first fields of a Problem, in its order.
    """
    if kind is not None:
        measured = _measured.get((architecture, Problem(precision, rows, columns, reduction, groups, kind, taps)))
        if measured is not None:
            return measured
    data = load(architecture)
    listed = listed_tiles(architecture, precision)
    if kind is not None and "classes" in data:
        steps = _nearest_class(architecture, kind, precision, columns, taps * reduction)
        tile = listed[next(position for most, position in steps if most is None or rows * groups <= most)]
    else:
        widest = _widest(data, columns)
        for one in listed:
            tile = one
            programs = groups * -(-rows // tile.rows) * -(-columns // tile.columns)
            if tile.columns <= widest and programs >= data["multiprocessors"]:
                break
    return fit(architecture, tile, rows, columns, reduction)


@functools.lru_cache(maxsize=4096)
def candidates(architecture: str, problem: Problem, count: int) -> tuple[Tile, ...]:
    """Up to ``count`` different tiles for measuring: the table's choice, then what the model puts first.

    All are tiles that the table gives to convolutions of this kind, cut down to the problem.
    """
    choices = {cost.served(problem, pick(architecture, *problem[:7])): None}
    data = load(architecture)
    if "classes" in data:
        gpu, codes = gpu_of(architecture), codes_of(data)
        listed = listed_tiles(architecture, problem.precision)
        positions = positions_in_use(data, problem.precision, problem.kind)
        shape = problem.rows, problem.columns, problem.channels
        fitted = {cost.served(problem, fit(architecture, listed[position], *shape)) for position in positions}
        predicted = {tile: cost.predict(gpu, problem, tile, codes).cycles for tile in fitted}
        choices |= dict.fromkeys(sorted(fitted, key=lambda tile: (predicted[tile], tile)))
    return tuple(choices)[:count]


def override(architecture: str, choices: Mapping[Problem, Tile]) -> None:
    """From now on, ``pick`` gives these problems these tiles, as they are, and all others what the table says.

    Of a problem, residual, prologue and statistics do not count. Earlier choices for the architecture are forgotten.
    """
    for known in [one for one in _measured if one[0] == architecture]:
        del _measured[known]
    _measured.update({(architecture, Problem(*problem[:7])): tile for problem, tile in choices.items()})
    forget()


def forget() -> None:
    """Look everything up again, in what ``load`` returned."""
    for cached in (pick, candidates, listed_tiles, _nearest_class):
        cached.cache_clear()


def fit(architecture: str, tile: Tile, rows: int, columns: int, reduction: int) -> Tile:
    """``tile``, cut down to a problem that is smaller, in as many dimensions as it is."""
    data = load(architecture)
    smallest_rows, _, smallest_reduction = data["smallest"]
    widest = _widest(data, columns)
    bm = max(min(tile.rows, power_of_two(rows)), smallest_rows)
    bn = min(tile.columns, widest)
    # Rather more steps than a last step that is mostly padding; of those with the least padding, the fewest.
    shortest = max(smallest_reduction, min(32, power_of_two(reduction)))
    halved = [tile.reduction >> i for i in range(tile.reduction.bit_length())]
    steps = [bk for bk in halved if bk >= shortest] or [tile.reduction]
    bk = min(steps, key=lambda bk: -(-reduction // bk) * bk)
    warps = min(tile.warps, max(4, tile.warps * bm * bn // (tile.rows * tile.columns)))
    split = tile.split and tile.columns <= widest
    return tile._replace(rows=bm, columns=bn, reduction=bk, warps=warps, split=split)


@functools.lru_cache(maxsize=256)
def listed_tiles(architecture: str, precision: str) -> tuple[Tile, ...]:
    """The file's list, in its order. Warps of RDNA have 32 lanes, half as many as those that AMD's files are for."""
    found = tuple(from_list(one) for one in load(architecture)[precision])
    if architecture.startswith("gfx1"):
        return tuple(tile._replace(warps=2 * tile.warps) for tile in found)
    return found


def from_list(values: Iterable[Any]) -> Tile:
    """As a file has it."""
    rows, columns, reduction, warps, stages, split, *rest = values
    return Tile(rows, columns, reduction, warps, stages, bool(split), *rest)


def class_key(kind: str, precision: str, columns: int, inner: int) -> str:
    """The name of a class in a file."""
    return f"{kind} {precision} {power_of_two(columns)} {power_of_two(inner)}"


def positions_in_use(data: Mapping[str, Any], precision: str, kind: str) -> set[int]:
    """Positions in a precision's list of the tiles that some class of a kind takes."""
    classes = ((name.split()[:2], steps) for name, steps in data["classes"].items())
    return {position for of, steps in classes if of == [kind, precision] for _, position in steps}


def gpu_of(architecture: str) -> gpus.Gpu:
    """The GPU that the architecture's file is made for."""
    name = nearest(architecture)
    return next(gpu for gpu in gpus.GPUS.values() if gpu.architecture == name)


def codes_of(data: Mapping[str, Any]) -> dict[str, cost.Code]:
    """What the model wants to know of the compiler's output, by family of kernels, from the contents of a file."""
    return {family: cost.Code(*numbers) for family, numbers in data["code"].items()}


@functools.lru_cache(maxsize=4096)
def _nearest_class(architecture: str, kind: str, precision: str, columns: int, inner: int) -> list[list[Any]]:
    """The class itself, or of those of its kind and precision the one with the most similar number of columns, and of
    these the one with the most similar inner dimension."""
    classes: dict[str, list[list[Any]]] = load(architecture)["classes"]
    wanted = class_key(kind, precision, columns, inner)
    if wanted in classes:
        return classes[wanted]

    wide, long = (int(size).bit_length() for size in wanted.split()[2:])

    def distance(name: str) -> tuple[int, int, int]:
        columns, inner = (int(size).bit_length() for size in name.split()[2:])
        return abs(columns - wide), abs(inner - long), columns

    return classes[min((name for name in classes if name.startswith(f"{kind} {precision} ")), key=distance)]


def _widest(data: Mapping[str, Any], columns: int) -> int:
    return max(power_of_two(columns), data["smallest"][1])


@functools.lru_cache(maxsize=1024)
def pick_chain(architecture: str, precision: str, channels: int, last: int) -> Optional[ChainTile]:
    """The tile for a chain of convolutions from so many channels to so many; None: it does not fit a program."""
    fitting = [tile for widest, *tile in load(architecture)["chain"][precision] if max(channels, last) <= widest]
    return ChainTile(*fitting[0][:-1], bool(fitting[0][-1])) if fitting else None


def power_of_two(value: int) -> int:
    """The next power of two from ``value`` on."""
    return 1 << (value - 1).bit_length()
