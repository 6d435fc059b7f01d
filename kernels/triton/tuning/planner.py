"""Which implementation serves a convolution on a GPU: what was measured there for it, else the table of tiles.

Candidates are our kernels with several tiles, and PyTorch's own convolutions (cudnn.py). ``resnet_fast.tune`` measures
them (measuring.py), and the first call of a shape some of them (first_call.py). The choices are kept in a file of the
user's, ``gpu-choices.json``, by GPU and versions (``kernels/choices.py``).

Importing this module does not import Triton, and nothing here asks a driver but ``machine``.
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import NamedTuple, Optional

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from resnet_fast.kernels.choices import Choices, own_version
from resnet_fast.kernels.contract import Pair, output_size
from resnet_fast.kernels.triton import device, tiles
from resnet_fast.kernels.triton.problem import conv_problem
from resnet_fast.kernels.triton.tuning import cudnn
from resnet_fast.utils import compat

_TILES = 6  # of our own, at most, that are measured for a problem

version = 0
"""Rises whenever ``choose`` may answer differently: whoever keeps an answer keeps this number with it."""

choices = Choices("gpu-choices.json")

_recorder: Optional[list["Problem"]] = None
_served = WeakTensorKeyDictionary()


class Problem(NamedTuple):
    """A convolution, as far as its speed depends on it: x [n, c, h, w], weight [k, c/groups, *kernel]."""

    architecture: str  # "sm_90"
    dtype: torch.dtype
    precision: str  # which list of tiles: "half", "tf32" or "ieee"
    n: int
    c: int
    h: int
    w: int
    k: int
    kernel: Pair
    stride: Pair
    padding: Pair
    dilation: Pair
    groups: int
    residual: bool
    relu: bool

    def output(self) -> Pair:
        """Height and width of the result."""
        return output_size((self.h, self.w), self.kernel, self.stride, self.padding, self.dilation)

    def key(self) -> str:
        """``float16 b128 56x56x64 64 3x3 s1x1 p1x1 d1x1 g1 +relu``; batches up to the same power of two share one."""
        dtype = "tf32" if self.precision == "tf32" else str(self.dtype).removeprefix("torch.")
        (r, s), stride, padding, dilation = self.kernel, self.stride, self.padding, self.dilation
        window = f"{r}x{s} s{stride[0]}x{stride[1]} p{padding[0]}x{padding[1]} d{dilation[0]}x{dilation[1]}"
        tail = (" +residual" if self.residual else "") + (" +relu" if self.relu else "")
        batch = tiles.power_of_two(self.n)
        return f"{dtype} b{batch} {self.h}x{self.w}x{self.c} {self.k} {window} g{self.groups}{tail}"


class Candidate(NamedTuple):
    """One way to compute a problem: our kernel with ``tile``, or None and the ``name`` of PyTorch's (cudnn.py)."""

    name: str
    tile: Optional[tiles.Tile]


def candidates(problem: Problem) -> dict[str, Candidate]:
    """By name: the table's tile first, further tiles of ours, then PyTorch's."""
    found = {}
    for tile in _tiles(problem):
        name = describe(tile)
        found[name] = Candidate(name, tile)
    for name in cudnn.names(problem.relu):
        found[name] = Candidate(name, None)
    return found


def describe(tile: tiles.Tile) -> str:
    """``triton 128x64x64 4 warps 3 stages``."""
    text = f"triton {tile.rows}x{tile.columns}x{tile.reduction} {tile.warps} warps {tile.stages} stages"
    text += " split" if tile.split else ""
    text += f" {tile.kernel}" if tile.kernel != "pointers" else ""
    return text + (f" {tile.parts} parts" if tile.parts > 1 else "")


def _tiles(problem: Problem) -> tuple[tiles.Tile, ...]:
    """The table's tile, and those that the static model puts next."""
    p = problem
    weight = (p.k, p.c // p.groups, *p.kernel)
    shape = conv_problem(
        (p.n, p.c, p.h, p.w), weight, p.stride, p.padding, p.dilation, p.groups, p.precision, p.residual
    )
    return tiles.candidates(p.architecture, shape, _TILES)


def choose(problem: Problem, index: int) -> Optional[Candidate]:
    """The measured choice on GPU number ``index``; None where there is none, and the table decides."""
    if _recorder is not None:
        _recorder.append(problem)
    name = choices.measured(machine(index), problem.key())
    return None if name is None else candidates(problem).get(name)


def note(weight: torch.Tensor, problem: Problem, choice: Optional[Candidate]) -> None:
    """Remember what served a call with ``weight``, for ``served``."""
    name = next(iter(candidates(problem))) if choice is None else choice.name
    _served[weight] = f"{name} ({'table' if choice is None else 'measured'})"


def served(weight: torch.Tensor) -> Optional[str]:
    """What served the last call with ``weight`` that was not prepared: ``cudnn fused (measured)``; None before any."""
    return _served.get(weight)


def keep(index: int, chosen: dict[str, str]) -> None:
    """Have ``choose`` answer so from now on, by ``Problem.key``; raises as ``Choices.add`` does."""
    changed()
    choices.add(machine(index), chosen)


def changed() -> None:
    """Tell everybody that ``choose`` may answer differently."""
    global version
    version += 1


def recording() -> bool:
    """Whether somebody is within ``recorded``."""
    return _recorder is not None


@contextlib.contextmanager
def recorded() -> Iterator[list[Problem]]:
    """Collects the problems that ``choose`` is asked for, in every thread; all of them, since no call is prepared."""
    global _recorder
    before, _recorder = _recorder, []
    changed()
    try:
        yield _recorder
    finally:
        _recorder = before
        changed()


@functools.cache
def machine(index: int) -> str:
    """All that a measurement on GPU number ``index`` depends on beside the problem: GPU, driver, versions."""
    properties = torch.cuda.get_device_properties(index)
    architecture = device.architecture(torch.device("cuda", index))
    driver = f"HIP {torch.version.hip}" if torch.version.hip else f"CUDA driver {compat.cuda_driver()}"
    library = f"{cudnn.LIBRARY} {torch.backends.cudnn.version()}"
    ours = f"resnet-fast {own_version()}, torch {torch.__version__}, triton {_triton_version()}"
    units = f"{properties.multi_processor_count} multiprocessors"
    return f"{properties.name}, {architecture}, {units}, {driver}, {library}, {ours}"


def _triton_version() -> str:
    import importlib.metadata

    for name in ("triton", "pytorch-triton", "pytorch-triton-rocm"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    return "unknown"
