"""Which algorithm serves a convolution: what was measured on this machine for its shape, else a rule.

``resnet_fast.tune`` measures. The choices are kept in a file of the user's and hold for a CPU, a shape and a
number of threads.
"""

import contextlib
import functools
import platform
from collections.abc import Iterator
from typing import Optional

import torch

from resnet_fast.kernels.choices import Choices, own_version
from resnet_fast.kernels.native import abi, library
from resnet_fast.kernels.native.abi import Shape
from resnet_fast.utils.cpuinfo import first_processor

ONEDNN = "onednn"
CANDIDATES = (*abi.ALGORITHMS, ONEDNN)
"""What ``choose`` may answer: our algorithms, and PyTorch's."""

choices = Choices("cpu-choices.json")
"""What was measured: an algorithm for each shape, ``describe``, of each ``machine()``."""

version = 0
"""Rises whenever ``choose`` may answer differently: whoever keeps an answer keeps this number with it."""

_forced: Optional[str] = None

_exact = False


def exact() -> bool:
    """Whether Winograd's algorithm is not to be used."""
    return _exact


def set_exact(wanted: bool) -> None:
    global _exact
    _exact = wanted
    changed()


def allows(algorithm: str) -> bool:
    """Whether rounding as this algorithm rounds is wanted."""
    return not (_exact and algorithm.startswith("winograd"))


def supports(shape: Shape, algorithm: str) -> bool:
    """Whether ``algorithm``, one of ``CANDIDATES``, can serve ``shape``."""
    if not allows(algorithm):
        return False
    return not shape.pool if algorithm == ONEDNN else library.supports(shape, algorithm)


def choose(shape: Shape, threads: int) -> str:
    """The algorithm for ``shape`` on ``threads`` threads, one of ``CANDIDATES``."""
    if _forced is not None and supports(shape, _forced):
        return _forced
    return _measured(describe(shape, threads), shape, CANDIDATES) or _rule(shape, threads)


def choose_native(shape: Shape, threads: int) -> str:
    """The same among our own algorithms, for programs that the library runs alone."""
    algorithm = choose(shape, threads)
    if algorithm != ONEDNN:
        return algorithm
    return _measured(planned(describe(shape, threads)), shape, abi.ALGORITHMS) or _rule(shape, threads)


def _measured(key: str, shape: Shape, candidates: tuple[str, ...]) -> Optional[str]:
    """The choice that is kept under ``key``, unless it is none of the candidates or cannot serve ``shape``."""
    measured = choices.measured(machine(), key)
    return measured if measured in candidates and supports(shape, measured) else None


def layer_by_layer() -> bool:
    """Whether no program may be planned: PyTorch's convolutions are asked for, and have no place in one."""
    return _forced == ONEDNN


@contextlib.contextmanager
def forced(algorithm: str) -> Iterator[None]:
    """Within it, ``choose`` answers ``algorithm`` wherever that is supported, in every thread."""
    global _forced
    before, _forced = _forced, algorithm
    changed()
    try:
        yield
    finally:
        _forced = before
        changed()


def changed() -> None:
    """Tell everybody that ``choose`` may answer differently."""
    global version
    version += 1


def describe(shape: Shape, threads: int) -> str:
    """The key of a shape: ``1x56x56x64 64 3x3 s1x1 p1x1 d1x1 g1 2 threads``."""
    s = shape
    window = f"{s.r}x{s.s} s{s.stride_h}x{s.stride_w} p{s.pad_h}x{s.pad_w} d{s.dilation_h}x{s.dilation_w} g{s.groups}"
    kind = {abi.BFLOAT16: " bfloat16", abi.INT8: " int8"}.get(s.dtype, "")
    return f"{s.n}x{s.h}x{s.w}x{s.c} {s.k} {window}{' pool' if s.pool else ''}{kind} {threads} threads"


def planned(key: str) -> str:
    """The key of the fastest algorithm of ours, for a shape that PyTorch is faster for."""
    return f"{key}, planned"


@functools.cache
def machine() -> str:
    """All that a measurement depends on beside the shape: CPU, instruction set, versions."""
    versions = f"resnet-fast {own_version()} (interface {abi.ABI}), torch {torch.__version__}"
    return f"{_cpu()}, {library.variant()}, {versions}"


def _cpu() -> str:
    found = first_processor()
    # The name alone is a family on some virtual machines.
    numbers = [found[key] for key in ("cpu family", "model", "stepping") if key in found]
    return " ".join([found.get("model name") or platform.processor() or platform.machine(), *numbers])


# Seconds that a core takes for a multiply-add and for an element that is transformed, and all cores together for a byte
# of weights; the last is half of what memory takes, the other half hides behind arithmetic. Fitted to the layers of
# ResNets at batch 1 on a Zen 4 core with AVX-512, where they give the times of all 3x3 convolutions to within 10%; on
# other CPUs all three are longer or shorter, and their ratios similar.
_MULTIPLY_ADD, _TRANSFORM, _BYTE = 1 / 58e9, 0.13e-9, 0.5 / 32e9


def _rule(shape: Shape, threads: int) -> str:
    for algorithm in ("winograd_stem", "direct", "grouped"):
        if supports(shape, algorithm):
            return algorithm
    seconds = {name: estimate(shape, name, threads) for name in _BY_WEIGHTS if supports(shape, name)}
    fastest = min(seconds.values())
    return next(name for name in seconds if seconds[name] <= _WORTH * fastest)


_BY_WEIGHTS = ("gemm", "winograd2", "winograd4")  # the one with the smallest weights first
_WORTH = 1.05  # a few percent of time are not worth four times the memory for weights


def estimate(s: Shape, algorithm: str, threads: int) -> float:
    """About how many seconds a convolution takes."""
    products = library.products(s, algorithm)
    transformed = 0 if algorithm == "gemm" else products * (s.c + s.k)
    work = products * s.c * s.k / s.groups * _MULTIPLY_ADD + transformed * _TRANSFORM
    return work / threads + library.packed_bytes(s, algorithm) * _BYTE
