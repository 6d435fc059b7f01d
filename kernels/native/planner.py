"""Which algorithm serves a convolution."""

from resnet_fast.kernels.native import library
from resnet_fast.kernels.native.library import Shape


def choose(shape: Shape, threads: int) -> str:
    """The name of the algorithm for ``shape`` on ``threads`` threads, one of ``library.ALGORITHMS``."""
    for algorithm in ("direct", "grouped", "winograd4"):
        if library.supports(shape, algorithm):
            return algorithm
    return "gemm"
