"""Everything that ships: every form of every family's launches, and the few of them that stand for all.

The compiler is told the number of channels, so that every layer of every model is a binary of its own, and users bring
more of them. What ships are the forms that they take: a kernel, its tile, the dtypes, the flags, and what the channels
are to the tile. Of each form, the binary with the most channels is made.
"""

import functools
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import NamedTuple

from resnet_fast.kernels.triton import device
from tests.aot import regressions
from tests.aot.backward_layers import backward_launches
from tests.aot.chain_layers import chain_launches
from tests.aot.head_layers import head_launches
from tests.aot.layers import ARCHITECTURES, EIGHT_BITS, PRECISIONS, REAL, Item, distinct, launches
from tests.aot.quantised_layers import quantised_launches
from tests.aot.training_layers import forward_launches


class Family(NamedTuple):
    """(architecture, precision) -> launches; none where there are none. And the precisions of which it can be asked."""

    launches: Callable[[str, str], Iterator[Item]]
    precisions: tuple[str, ...] = REAL


# Another kind of launch is added here, and nowhere else: then it is compiled, checked and recorded with the others.
FAMILIES = {
    "inference": Family(launches),
    "head": Family(head_launches),
    "chain": Family(chain_launches),
    "8 bits": Family(quantised_launches, EIGHT_BITS),
    "training forward": Family(forward_launches),
    "training backward": Family(backward_launches),
}

Target = tuple[str, str]  # architecture, precision


def _computes(architecture: str, precision: str) -> bool:
    if precision == "tf32":
        return not architecture.startswith("gfx")  # there PyTorch's own convolutions compute float32 in float32
    return precision != "fp8" or device.no_fp8(architecture) is None


TARGETS: list[Target] = [(a, p) for a in ARCHITECTURES for p in PRECISIONS if _computes(a, p)]


@functools.cache
def everything(target: Target) -> list[Item]:
    """One launch per form."""
    asked = (family for family in FAMILIES.values() if target[1] in family.precisions)
    return forms(one for family in asked for one in family.launches(*target))


def forms(launches: Iterable[Item]) -> list[Item]:
    """Of each form, the launch with the most channels."""
    found: dict[Hashable, Item] = {}
    for one in distinct(launches):
        form = _form(one)
        found[form] = max(found.get(form, one), one, key=_channels)
    return list(found.values())


_SIZES = ("C", "K", "L", "GROUPS", "PARTS", "PIXEL", "ROW_UNIT")  # constants that follow from a layer's size


def _form(one: Item) -> Hashable:
    constants = one.launch.constants
    c, k = constants.get("C"), constants.get("K")
    arguments = one.entry().split()[1].replace("a", "n").replace("1", "n")  # heights and widths that 16 divides
    sizes = {
        "one of several": {name: constants[name] > 1 for name in ("GROUPS", "PARTS") if name in constants},
        "odd pixels": c is not None and c % 16 != 0,
        # Tails that need a mask, and a loop that is none.
        "tail of columns": k is not None and k % constants.get("BN", 1) != 0,
        "tail of channels": c is not None and c % constants.get("BK", constants.get("BN", 1)) != 0,
        "one block": c is not None and c <= constants.get("BK", 0),
    }
    flags = tuple((name, value) for name, value in constants.items() if name not in _SIZES)
    return one.launch.kernel.__name__, arguments, flags, repr(sizes)


def _channels(one: Item) -> tuple[int, int, str]:
    return one.launch.constants.get("C", 0), one.launch.constants.get("K", 0), one.entry()


@functools.cache
def subset() -> dict[Target, list[Item]]:
    """Few launches that hold every kernel on every architecture, every precision of every kernel, every precision of
    every architecture, and every tile of every architecture: with tensor descriptors, in parts and on numbers of 8 bits
    a tile is another one.

    Of those that could stand for the same, the nearest to spilling: the one with the most registers, as recorded.
    """
    hardest_first = sorted((one for target in TARGETS for one in everything(target)), key=_ease)
    chosen: dict[Target, list[Item]] = {target: [] for target in TARGETS}
    covered: set[Hashable] = set()
    for one in hardest_first:
        features = set(_features(one))
        if not features <= covered:
            covered |= features
            chosen[one.architecture, one.precision].append(one)
    return chosen


def _ease(one: Item) -> tuple[int, int, str]:
    figures = regressions.recorded(one.architecture).get(one.entry())
    constants = one.launch.constants
    size = constants["BLOCK"] if "BLOCK" in constants else constants.get("BM", 1) * constants["BN"]
    return -figures.registers if figures else 0, -size, one.entry()


def _features(one: Item) -> Iterable[Hashable]:
    kernel, constants = one.launch.kernel.__name__, one.launch.constants
    yield one.architecture, kernel
    yield kernel, one.precision
    yield one.architecture, one.precision
    if "BK" in constants:
        tile = (constants.get(name) for name in ("BM", "BN", "BK", "BL", "num_warps", "num_stages"))
        descriptors = kernel if "descriptor" in kernel else None
        eight_bits = one.precision if one.precision in EIGHT_BITS else None
        yield one.architecture, descriptors, eight_bits, constants.get("PARTS", 1) > 1, *tile
