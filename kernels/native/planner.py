"""Which algorithm serves a convolution: what was measured on this machine for its shape, else a rule.

``resnet_fast.tune`` measures. The choices are kept in a file per user and CPU (``choices.py``), and hold for a shape and a
number of threads.
"""

import contextlib
from collections.abc import Iterator
from typing import Optional

from resnet_fast.kernels.native import choices, library
from resnet_fast.kernels.native.library import Shape

ONEDNN = "onednn"
CANDIDATES = (*library.ALGORITHMS, ONEDNN)
"""What ``choose`` may answer: our algorithms, and PyTorch's."""

version = 0
"""Rises whenever ``choose`` may answer differently: whoever keeps an answer keeps this number with it."""

_forced: Optional[str] = None


def supports(shape: Shape, algorithm: str) -> bool:
    """Whether ``algorithm``, one of ``CANDIDATES``, can serve ``shape``."""
    return not shape.pool if algorithm == ONEDNN else library.supports(shape, algorithm)


def choose(shape: Shape, threads: int) -> str:
    """The algorithm for ``shape`` on ``threads`` threads, one of ``CANDIDATES``."""
    if _forced is not None and supports(shape, _forced):
        return _forced
    measured = choices.measured(describe(shape, threads))
    if measured in CANDIDATES and supports(shape, measured):
        return measured
    return _rule(shape)


def choose_native(shape: Shape, threads: int) -> str:
    """The same among our own algorithms, for programs that the library runs alone."""
    algorithm = choose(shape, threads)
    return _rule(shape) if algorithm == ONEDNN else algorithm


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
    return f"{s.n}x{s.h}x{s.w}x{s.c} {s.k} {window}{' pool' if s.pool else ''} {threads} threads"


def _rule(shape: Shape) -> str:
    for algorithm in ("direct", "grouped", "winograd4"):
        if library.supports(shape, algorithm):
            return algorithm
    return "gemm"
