"""GPU (NVIDIA and AMD): the inference ops as Triton kernels.

    support.py    which cases are covered
    launch.py     from tensors to launches: layout, packs, tiles, grid, output
    prepared.py   launches kept, so that a repeated call is little Python
    planner.py    what was measured: our tiles against PyTorch's convolutions (cudnn.py), timed by measuring.py
    pack.py       the shapes in which the kernels want to read weights and images
    problem.py    a convolution as the products that the kernels make of it
    tiles.py      tile sizes per architecture and shape class, read from tiles/*.json
    cost.py       the static model that these were made with; gpus.py has its data
    conv.py, gemm.py, parts.py, pool.py, classifier.py, epilogue.py    the kernels
    descriptor.py, conv_descriptor.py, gemm_descriptor.py    the same convolutions through tensor descriptors
    chain.py, chain_launch.py    two convolutions in one kernel
    training.py   the primitives of training, and what belongs to them
    quantised.py  the ops on 8-bit numbers, and what belongs to them

Importing this package imports neither Triton nor a kernel; the first call of an op does. No file may have an op's name,
since importing it would make it the package's attribute in the op's place.
"""

import importlib
from typing import Any

from resnet_fast.kernels.triton.device import chain_pays, supports

_OPS = {
    "conv_bn_act": "launch",
    "conv_chain": "chain_launch",
    "stem": "launch",
    "global_avg_pool": "launch",
    "head": "launch",
}

__all__ = [*_OPS, "chain_pays", "supports"]


def __getattr__(name: str) -> Any:
    if name not in _OPS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = getattr(importlib.import_module(f"{__name__}.{_OPS[name]}"), name)
    return globals()[name]
