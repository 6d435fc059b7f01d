"""``exact()``: convolutions on the CPU as exact as PyTorch's, for some of the speed."""

from types import TracebackType
from typing import Optional

from resnet_fast.kernels.native import planner


class exact:  # used as ``torch.no_grad`` is
    """Do without Winograd's algorithm, from now on or, as a context manager, within it.

    Winograd's algorithm makes most 3x3 convolutions on the CPU several times as fast, and their rounding errors up to
    about five times those of PyTorch: within 5e-5 of the largest result. Without it, float32 results are as near to
    float64's as PyTorch's own. GPUs do not use it. It holds for all threads and models, accelerated before or after.

    Args:
        wanted: False to use it again.
    """

    def __init__(self, wanted: bool = True) -> None:
        self._before = planner.exact()
        planner.set_exact(wanted)

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: Optional[type[BaseException]], error: Optional[BaseException], where: Optional[TracebackType]
    ) -> None:
        planner.set_exact(self._before)
