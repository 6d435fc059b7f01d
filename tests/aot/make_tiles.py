"""Makes ``kernels/triton/tiles/<architecture>.json``: ``python -m tests.aot.make_tiles [--arch sm_90] [--code]``.

For the convolutions of the forward pass, it

1. compiles a few tiles and counts what the model wants to know of the compiler's output (``cost.Code``); only with
   ``--code``, or where a file has no such numbers;
2. lists all tiles that might do, and asks the model (cost.py) how long each takes on every layer of torchvision's
   ResNets, for batches from 1 to 256;
3. chooses the few tiles among which these layers together find the best ones (all would take a user, and the tests,
   too long to compile), and for each shape class and number of rows the best of the few;
4. compiles every form that the layers would launch. A tile that spills registers, or breaks any other rule of
   checks.py, is struck from the list of its kind of convolution, and step 3 is done again.

What was compiled is kept in Triton's cache. All that the script does not make stays as it is: lists of other kernels,
and numbers of other tools. The files of GPUs with sm_80's instructions take from sm_80's what they lack.
"""

import argparse
import itertools
import json
from collections.abc import Iterator
from typing import Any, NamedTuple, Optional

import numpy as np
import torch
from scipy.optimize import nnls

from resnet_fast.kernels.contract import Affine
from resnet_fast.kernels.triton import forward, tiles
from resnet_fast.kernels.triton.cost_model import cost
from resnet_fast.kernels.triton.cost_model.cost import Code, Problem
from resnet_fast.kernels.triton.cost_model.gpus import Gpu
from resnet_fast.kernels.triton.problem import conv_problem
from resnet_fast.kernels.triton.tiles import Tile
from tests.aot.checks import Compiler, Result, narrow, races, spills, too_large, wrong_units
from tests.aot.exceptions import excused
from tests.aot.head_layers import head_launches
from tests.aot.layers import Item, distinct, image, items, launches, model_layers
from tests.aot.offline import Compiled, lanes
from tests.aot.shipped import forms
from tests.aot.training_layers import forward_launches

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942", "gfx950")
MODELS = (
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "resnext101_64x4d",
    "wide_resnet50_2",
    "wide_resnet101_2",
)
BATCHES = (1, 2, 4, 8, 16, 24, 32, 64, 128, 256)
BUCKETS = (*(2**k for k in range(7, 21)), None)
"""Most rows of each, None: any number. Twice as many rows are one more bucket, as twice the batch is."""

KERNELS = {"sm_90": ("descriptors", "pointers"), "sm_100": ("specialised", "pointers")}
"""Values of ``Tile.kernel`` for architectures that have more than pointers."""
KERNEL_OF = {None: "pointers", False: "descriptors", True: "specialised"}
"""By the constant SPECIALISE of a launch."""
PARTS = (1, 2, 4, 8)
"""Values of ``Tile.parts``. Kernels with descriptors have one."""

_SIZES = {"half": 9, "tf32": 6, "ieee": 4}
"""How many tiles a list has, at most; one third more where there is more than one kernel."""
_PARENTS = {"sm_86": "sm_80", "sm_89": "sm_80", "sm_120": "sm_80"}
_GAIN = 0.002  # share of the time of an average layer that another tile of the list must save
_ROUNDS = 10  # of choosing and compiling
_UNFIT = 1e3  # times the best: a tile that would be cut down to another one


class Choice(NamedTuple):
    """A list of tiles, and for each class pairs of the most rows and a position in the list."""

    tiles: list[Tile]
    classes: dict[str, list[tuple[Optional[int], int]]]


def make(architecture: str, compiler: Compiler, measure_code: bool) -> dict[str, Any]:
    """The file's contents."""
    contents = inherited(architecture)
    gpu = tiles.gpu_of(architecture)
    contents |= {"multiprocessors": gpu.multiprocessors, "shared_memory": gpu.program_shared_memory}
    if measure_code or "code" not in contents:
        contents["code"] = codes(gpu, compiler)
    contents["classes"] = {}
    for precision in precisions(gpu):
        problems = list(dict.fromkeys(layer_problems(precision)))
        possible = list(enumerate_tiles(gpu, precision))
        predictions = Predictions(gpu, problems, possible, tiles.codes_of(contents))
        size = _SIZES[precision] * (4 if len({tile.kernel for tile in possible}) > 1 else 3) // 3
        struck: set[tuple[str, Tile]] = set()
        for _ in range(_ROUNDS):
            choice = choose(predictions, struck, size)
            install(architecture, contents, precision, choice)
            found = compiler.results(demanding(architecture, precision))
            offending = set().union(
                *(_to_strike(one, made, choice.tiles, possible) for one, made in found if not sound(one, made))
            )
            print(f"{architecture} {precision}: {len(choice.tiles)} of {len(possible)} tiles, {len(found)} binaries")
            if not offending:
                break
            assert not offending <= struck, f"{architecture} {precision}: nothing fits"
            print(f"  {len(offending - struck)} struck, of {sorted({(kind, tile[:4]) for kind, tile in offending})}")
            struck |= offending
        else:
            raise RuntimeError(f"{architecture} {precision}: still not sound after {_ROUNDS} rounds")
    return contents


def sound(one: Item, made: Optional[Compiled]) -> bool:
    """Whether the tile may be shipped, as far as this launch tells."""
    return made is not None and not any(
        wrong(one, made) and not excused(wrong.__name__, one)
        for wrong in (spills, too_large, wrong_units, narrow, races)
    )


def _to_strike(one: Item, made: Optional[Compiled], listed: list[Tile], possible: list[Tile]) -> set[tuple[str, Tile]]:
    """Of the launch's kind the tile that it was made from; and unless that only takes too much memory, those which
    differ from it in the number of stages. A tile that does not fit the kernel with pointers is struck for all kernels,
    since that one serves where the others cannot."""
    launched = _tile(one)
    if launched.kernel != "pointers":
        listed, possible = ([tile for tile in some if tile.kernel == launched.kernel] for some in (listed, possible))
    whole = [tile for tile in listed if tile[:6] == launched[:6]]
    made_from = whole or [tile for tile in listed if tile[:6] == (*launched[:2], tile.reduction, *launched[3:6])]
    large = made is not None and too_large(one, made) and not spills(one, made)

    def alike(tile: Tile) -> tuple:
        return tile[:4], tile.split, tile.stages if large else None

    return {(_kind(one), tile) for source in made_from for tile in possible if alike(tile) == alike(source)}


def inherited(architecture: str) -> dict[str, Any]:
    """What the file has, and of a file that lacks something, its parent's. "classes" are its own."""
    path = tiles.path(architecture)
    own = json.loads(path.read_text()) if path.exists() else {}
    parent = json.loads(tiles.path(_PARENTS[architecture]).read_text()) if architecture in _PARENTS else {}
    return {name: own.get(name, value) for name, value in parent.items() if name != "classes"} | own


def precisions(gpu: Gpu) -> list[str]:
    return ["half", "ieee"] if gpu.architecture.startswith("gfx") else ["half", "tf32", "ieee"]


def layer_problems(precision: str) -> Iterator[Problem]:
    """Every layer of the models, in every batch."""
    for layer in model_layers(MODELS):
        weight = (layer.k, layer.c // layer.groups, *layer.kernel)
        for batch in BATCHES:
            yield conv_problem(
                (batch, layer.c, layer.h, layer.w), weight, layer.stride, layer.padding, (1, 1), layer.groups,
                precision, layer.residual,
            )  # fmt: skip


def enumerate_tiles(gpu: Gpu, precision: str) -> Iterator[Tile]:
    """Tiles that might do: as far as formulas tell they fit the GPU. Of equals, ``choose`` takes the first."""
    amd = gpu.architecture.startswith("gfx")
    scalar = precision == "ieee" and not amd
    # Accumulators of a thread. wgmma's, tcgen05's and mfma's are not copied on the way; without tensor cores a thread
    # also holds rows and columns of both operands.
    most = 32 if scalar else 128 if amd or gpu.architecture in ("sm_90", "sm_100") else 64
    sizes = itertools.product(
        (64, 128, 256) if amd and precision == "half" else (64, 128),
        (32, 64, 128, 256) if precision != "ieee" else (32, 64),
        (32, 64, 128) if precision == "half" else (16, 32),
        (4, 8),
        (2,) if amd else (3,) if scalar else (5, 4, 3, 2),
    )
    kernels = KERNELS.get(gpu.architecture, ("pointers",)) if precision != "ieee" else ("pointers",)
    variants = [(kernel, parts) for kernel in kernels for parts in (PARTS if kernel == "pointers" else (1,))]
    for (rows, columns, reduction, warps, stages), (kernel, parts) in itertools.product(sizes, variants):
        tile = Tile(rows, columns, reduction, warps, stages, columns == 256, kernel, parts)
        accumulators = rows * columns // (warps * lanes(gpu.architecture))
        if 8 <= accumulators <= most and cost.shared_memory(gpu, precision, tile) <= gpu.program_shared_memory:
            yield tile


class Predictions:
    """The model's cycles for all problems and tiles, ``[problems, tiles]``."""

    def __init__(self, gpu: Gpu, problems: list[Problem], possible: list[Tile], model: dict[str, Code]) -> None:
        self.problems, self.tiles = problems, possible
        self.cycles = np.array([[_cycles(gpu, problem, tile, model) for tile in possible] for problem in problems])


def _cycles(gpu: Gpu, problem: Problem, tile: Tile, model: dict[str, Code]) -> float:
    fitted = tiles.fit(gpu.architecture, tile, problem.rows, problem.columns, problem.channels)
    predicted = cost.predict(gpu, problem, fitted, model)
    # One tile in several guises would be compiled several times. But short inner dimensions need no tile of their own,
    # and are cut in as many parts as there are.
    whole = fitted._replace(reduction=tile.reduction)
    cut = fitted != tile and (whole != tile or problem.channels > 32)
    other = cost.served(problem, fitted)[:-1] != fitted[:-1]
    return predicted.cycles * (_UNFIT if cut or other or predicted.violations else 1.0)


def choose(predictions: Predictions, struck: set[tuple[str, Tile]], count: int, gain: float = _GAIN) -> Choice:
    """Up to ``count`` tiles: one after the other that which helps most, then each exchanged if another is better."""
    cycles = predictions.cycles.copy()
    for i, problem in enumerate(predictions.problems):
        for j, tile in enumerate(predictions.tiles):
            if (problem.kind, tile) in struck:
                cycles[i, j] *= _UNFIT
    logarithms = np.log(cycles)

    def total(columns: list[int]) -> float:
        return logarithms[:, columns].min(axis=1).sum()

    chosen: list[int] = []
    others = range(len(predictions.tiles))
    while len(chosen) < min(count, len(others)):
        best = min((j for j in others if j not in chosen), key=lambda j: total([*chosen, j]))
        if chosen and total(chosen) - total([*chosen, best]) < gain * len(logarithms):
            break
        chosen.append(best)
    for place in range(len(chosen)):
        rest = chosen[:place] + chosen[place + 1 :]
        chosen[place] = min((j for j in others if j not in rest), key=lambda j: total([*rest, j]))
    chosen.sort(key=lambda j: _largest_first(predictions.tiles[j]))  # of equals, a class takes the first
    classes = _classes(predictions.problems, logarithms[:, chosen])
    used = sorted({j for steps in classes.values() for _, j in steps})
    position = {j: i for i, j in enumerate(used)}
    return Choice(
        [predictions.tiles[chosen[j]] for j in used],
        {name: [(most, position[j]) for most, j in steps] for name, steps in classes.items()},
    )


def _classes(problems: list[Problem], logarithms: np.ndarray) -> dict[str, list[tuple[Optional[int], int]]]:
    members: dict[str, dict[int, list[int]]] = {}
    for i, problem in enumerate(problems):
        name = tiles.class_key(problem.kind, problem.precision, problem.columns, problem.inner)
        rows = problem.rows * problem.groups
        bucket = next(b for b, most in enumerate(BUCKETS) if most is None or rows <= most)
        members.setdefault(name, {}).setdefault(bucket, []).append(i)
    classes: dict[str, list[tuple[Optional[int], int]]] = {}
    for name in sorted(members, key=_class_order):
        steps: list[tuple[Optional[int], int]] = []
        for bucket, rows_of in sorted(members[name].items()):
            best = int(logarithms[rows_of].sum(axis=0).argmin())
            if steps and steps[-1][1] == best:
                steps.pop()
            steps.append((BUCKETS[bucket], best))
        classes[name] = [*steps[:-1], (None, steps[-1][1])]
    return classes


def _class_order(name: str) -> tuple[int, int, int]:
    kind, _, columns, inner = name.split()
    return cost.KINDS.index(kind), int(columns), int(inner)


def _largest_first(tile: Tile) -> tuple:
    return -tile.rows * tile.columns, -tile.rows, -tile.reduction, tile


def install(architecture: str, contents: dict[str, Any], precision: str, choice: Choice) -> None:
    """Into the contents, and for this process into what ``tiles`` has read."""
    contents[precision] = [_as_list(tile) for tile in choice.tiles]
    classes = {name: steps for name, steps in contents["classes"].items() if name.split()[1] != precision}
    contents["classes"] = classes | {name: [list(step) for step in steps] for name, steps in choice.classes.items()}
    loaded = tiles.load(architecture)
    loaded.clear()
    loaded.update(contents)
    tiles.forget()


def _as_list(tile: Tile) -> list[Any]:
    values = [*tile[:5], int(tile.split), *tile[6:]]
    return values[:6] if tile[6:] == ("pointers", 1) else values


def demanding(architecture: str, precision: str) -> list[Item]:
    """Every form (shipped.py) of the kernels that take these tiles: as the gate looks at it, and whatever the batch."""
    found: list[Item] = []
    for name in ("fp16", "bf16") if precision == "half" else (precision,):
        gate = *launches(architecture, name), *head_launches(architecture, name), *forward_launches(architecture, name)
        found += forms(gate)
        found += forms((*launches(architecture, name, BATCHES), *forward_launches(architecture, name, BATCHES)))
    return distinct(one for one in found if "SPLIT" in one.launch.constants)


def _kind(one: Item) -> str:
    """Of cost.KINDS."""
    constants = {"GROUPS": 1, "STRIDE_H": 1, "STRIDE_W": 1, "PIXEL": one.launch.constants["C"]} | one.launch.constants
    if one.launch.kernel.__name__.startswith("gemm"):
        return "1x1"
    if constants["PIXEL"] < constants["C"]:
        return "stem"
    if constants["GROUPS"] > 1:
        return "grouped"
    return "rxs" if constants["STRIDE_H"] == constants["STRIDE_W"] == 1 else "strided"


def _tile(one: Item) -> Tile:
    """What it was launched with, in one part."""
    constants = one.launch.constants
    names = ("BM", "BN", "BK", "num_warps", "num_stages", "SPLIT")
    return Tile(*map(constants.get, names), KERNEL_OF[constants.get("SPECIALISE")])


_SAMPLES = [
    Tile(rows, columns, reduction, warps, 3, False)
    for rows, columns, reduction, warps in (
        (128, 128, 64, 8), (128, 64, 64, 4), (64, 64, 64, 4), (128, 32, 64, 4), (64, 128, 32, 4), (64, 32, 128, 4),
    )
]  # fmt: skip
"""Tiles of different proportions, from which ``Code`` is fitted. AMD's have two stages."""


def codes(gpu: Gpu, compiler: Compiler) -> dict[str, list[float]]:
    """For both families, what the samples' main loops are in instructions, in the terms of ``cost.instructions``."""
    found = {}
    for family in ("gemm", "conv"):
        plain = compiler.results(_sample(gpu, family, tile, prologue=False) for tile in _SAMPLES)
        activated = compiler.results(_sample(gpu, family, tile, prologue=True) for tile in _SAMPLES)
        found[family] = [round(float(number), 2) for number in _fit_code(gpu, plain, activated)]
    return found


def _sample(gpu: Gpu, family: str, tile: Tile, prologue: bool) -> Item:
    """A convolution with a loop too long to be unrolled."""
    if gpu.architecture.startswith("gfx"):
        tile = tile._replace(stages=2)
    size, padding = ((1, 1), (0, 0)) if family == "gemm" else ((3, 3), (1, 1))
    x = image(128, 2048, 14, 14, torch.float16)
    weight = torch.empty(512, 2048, *size, dtype=torch.float16, device="meta")
    vectors = [torch.empty(channels, device="meta") for channels in (512, 512, 2048, 2048)]
    plan = forward.plan_conv_bn_act(
        x, weight, vectors[0], vectors[1], None, (1, 1), padding, (1, 1), 1, True, gpu.architecture,
        Affine(vectors[2], vectors[3]) if prologue else None, tile,
    )  # fmt: skip
    (item,) = items(family, gpu.architecture, "fp16", plan)
    return item


def _fit_code(gpu: Gpu, plain: list[Result], activated: list[Result]) -> Code:
    """By least squares, nothing below zero."""
    parts, issued, elements, more, accumulators, registers = [], [], [], [], [], []
    for (one, made), (_, with_prologue) in zip(plain, activated):
        assert made is not None and made.loop.rolled and with_prologue is not None and with_prologue.loop.rolled
        tile = _tile(one)
        threads = tile.warps * lanes(gpu.architecture)
        x, w = (side * tile.reduction / threads for side in (tile.rows, tile.columns))
        steps = made.loop.wide_loads / ((x + w) / 8)  # of which the compiler may put several into one round
        parts.append([1.0, x / 8, w / 8, cost.products(gpu, "half", tile)])
        issued.append(made.loop.instructions / steps)
        elements.append([x])
        steps_with = steps * with_prologue.loop.products / made.loop.products
        more.append(max(0.0, with_prologue.loop.instructions / steps_with - issued[-1]))
        accumulators.append([1.0, tile.rows * tile.columns / threads])
        registers.append(float(made.registers))
    return Code(
        *nnls(np.array(parts), np.array(issued))[0],
        *nnls(np.array(elements), np.array(more))[0],
        *nnls(np.array(accumulators), np.array(registers))[0],
    )


def text(contents: dict[str, Any]) -> str:
    """JSON with one entry a line, or if that would be too long one of its entries."""
    lines = []
    for name, value in contents.items():
        line = f"  {json.dumps(name)}: {json.dumps(value)}"
        if isinstance(value, dict) and len(line) > 120:
            inner = ",\n".join(f"    {json.dumps(key)}: {json.dumps(one)}" for key, one in value.items())
            line = f"  {json.dumps(name)}: {{\n{inner}\n  }}"
        lines.append(line)
    return "{\n" + ",\n".join(lines) + "\n}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", action="append", choices=ARCHITECTURES)
    parser.add_argument("--code", action="store_true", help="count instructions again")
    options = parser.parse_args()
    with Compiler() as compiler:
        for architecture in options.arch or ARCHITECTURES:
            path = tiles.path(architecture)
            if not path.exists():  # from now on, it is an architecture of its own
                path.write_text(text(inherited(architecture)))
            path.write_text(text(make(architecture, compiler, options.code)))


if __name__ == "__main__":
    main()
