"""GPU (NVIDIA and AMD): the inference ops as Triton kernels.

    support.py    which cases are covered
    launch.py     from tensors to launches: layout, packs, tiles, grid, output
    schedule.py   the tile and the compile-time constants of a launch
    pack.py       the shapes in which the kernels want to read weights and images
    tiles.py      tile sizes per architecture, read from tiles/*.json
    conv.py, gemm.py, pool.py, epilogue.py    the kernels
    training.py   the primitives of training, and what belongs to them
    quantised.py  the ops on 8-bit numbers, and what belongs to them

Importing this package imports neither Triton nor a kernel; the first call of an op does.
"""

from typing import Any

from resnet_fast.kernels.triton.support import supports

_OPS = ("conv_bn_act", "stem", "global_avg_pool")

__all__ = [*_OPS, "supports"]


def __getattr__(name: str) -> Any:
    if name not in _OPS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from resnet_fast.kernels.triton import launch

    globals().update({op: getattr(launch, op) for op in _OPS})
    return globals()[name]
