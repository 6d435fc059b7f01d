"""Training's primitives (``reference/training.py``) as Triton kernels.

    training_forward.py, training_backward.py    from tensors to launches
    prologue.py, statistics.py, gram.py, tail.py    what the forward pass adds to conv.py, gemm.py and pool.py
    dgrad.py, wgrad.py, tail_backward.py, gate.py   the backward pass

Importing this module imports neither Triton nor a kernel; the first call of a primitive does.
"""

from typing import Any, Optional

from resnet_fast.kernels.contract import Case
from resnet_fast.kernels.triton import device

_FORWARD = ("conv_statistics", "gram", "conv_affine", "tail", "tail_pool")
_BACKWARD = ("tail_backward", "tail_pool_backward", "bn_backward", "dgrad", "dgrad_expand", "wgrad")

__all__ = [*_FORWARD, *_BACKWARD, "supports"]


def supports(case: Case) -> Optional[str]:
    """None if the kernels cover the case, else the reason why not. Asks a driver only about a case on a GPU."""
    if case.op not in _FORWARD + _BACKWARD:
        return f"no kernel for {case.op}"
    return device.supports(case)


def __getattr__(name: str) -> Any:
    if name not in _FORWARD + _BACKWARD:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from resnet_fast.kernels.triton import training_backward, training_forward

    globals().update({op: getattr(training_forward, op) for op in _FORWARD})
    globals().update({op: getattr(training_backward, op) for op in _BACKWARD})
    return globals()[name]
