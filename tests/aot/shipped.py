"""Everything that ships: the binaries of every family of launches, and the few of them that stand for all."""

import functools
from collections.abc import Callable, Hashable, Iterable, Iterator

from tests.aot import regressions
from tests.aot.backward_layers import backward_launches
from tests.aot.layers import ARCHITECTURES, PRECISIONS, Launch, distinct, launches
from tests.aot.training_layers import forward_launches

# (architecture, precision) -> launches; none where there are none. Another kind of launch is added here, and nowhere
# else: then it is compiled, checked and recorded with the others.
FAMILIES: dict[str, Callable[[str, str], Iterator[Launch]]] = {
    "inference": launches,
    "training forward": forward_launches,
    "training backward": backward_launches,
}

Target = tuple[str, str]  # architecture, precision

# On AMD, PyTorch's own convolutions compute float32 in float32.
TARGETS: list[Target] = [(a, p) for a in ARCHITECTURES for p in PRECISIONS if not (a.startswith("gfx") and p == "tf32")]


@functools.cache
def everything(target: Target) -> list[Launch]:
    """One launch per binary."""
    return distinct(one for family in FAMILIES.values() for one in family(*target))


@functools.cache
def subset() -> dict[Target, list[Launch]]:
    """Few launches that hold every kernel on every architecture, every precision of every kernel, every precision of
    every architecture, and every tile of every architecture.

    Of those that could stand for the same, the nearest to spilling: the one with the most registers, as recorded.
    """
    hardest_first = sorted((one for target in TARGETS for one in everything(target)), key=_ease)
    chosen: dict[Target, list[Launch]] = {target: [] for target in TARGETS}
    covered: set[Hashable] = set()
    for one in hardest_first:
        features = set(_features(one))
        if not features <= covered:
            covered |= features
            chosen[one.architecture, one.precision].append(one)
    return chosen


def _ease(one: Launch) -> tuple[int, int, str]:
    figures = regressions.recorded(one.architecture).get(one.entry())
    constants = one.plan.constants
    return -figures.registers if figures else 0, -constants.get("BM", 1) * constants["BN"], one.entry()


def _features(one: Launch) -> Iterable[Hashable]:
    kernel, constants = one.plan.kernel.__name__, one.plan.constants
    yield one.architecture, kernel
    yield kernel, one.precision
    yield one.architecture, one.precision
    if "BK" in constants:
        yield one.architecture, *(constants[name] for name in ("BM", "BN", "BK", "num_warps", "num_stages"))
