"""GPU (NVIDIA and AMD): the inference ops as Triton kernels.

    support.py    which cases are covered
    launch.py     from tensors to launches: layout, packs, tiles, grid, output
    schedule.py   the tile and the compile-time constants of a launch
    pack.py       the shapes in which the kernels want to read weights and images
    tiles.py      tile sizes per architecture, read from tiles/*.json
    conv.py, gemm.py, pool.py, epilogue.py    the kernels
    chain.py, chain_launch.py    two convolutions in one kernel
    training.py   the primitives of training, and what belongs to them

Importing this package imports neither Triton nor a kernel; the first call of an op does.
"""

import importlib
from typing import Any

from resnet_fast.kernels.triton.support import chain_pays, supports

_OPS = {"conv_bn_act": "launch", "conv_chain": "chain_launch", "stem": "launch", "global_avg_pool": "launch"}

__all__ = [*_OPS, "chain_pays", "supports"]


def __getattr__(name: str) -> Any:
    if name not in _OPS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = getattr(importlib.import_module(f"{__name__}.{_OPS[name]}"), name)
    return globals()[name]
