"""What a ``plan_*`` function makes: launches that are decided, and not started.

A ``plan_*`` function decides everything about its launches: it brings the inputs into the layout that the kernel reads
(operands.py), picks the tile (tiles.py), allocates the output and lists the arguments. ``Plan.run`` launches. The split
lets the tests compile exactly what would be launched, for a GPU that is not there.
"""

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple, Optional

import torch

OPTIONS = {"enable_fp_fusion": True}
"""What every kernel is compiled with: multiply-adds rounded once. Triton 3.10 leaves them out unless it is asked."""


class Launch(NamedTuple):
    """``kernel[grid](*args, **constants)``."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    constants: dict[str, Any]


class Plan(NamedTuple):
    """Launches that follow each other, and what they leave: the ``result``, as the op returns it.

    ``image`` makes the first argument of x, in a plan that holds for other images of the same shapes as well: all other
    tensors among the arguments but the residual, the ``workspaces`` and the result are then made of the weights alone
    (see prepared.py).
    """

    launches: tuple[Launch, ...]
    result: Any
    workspaces: tuple[torch.Tensor, ...] = ()
    image: Optional[Callable[[torch.Tensor], torch.Tensor]] = None

    def run(self) -> Any:
        self.start()
        return self.result

    def start(self) -> list[Any]:
        """Launch all; gives the compiled kernels, None for each in the interpreter."""
        first = self.launches[0].args[0]
        device = getattr(first, "base", first).device  # that of a tensor descriptor's tensor
        # Triton launches on the current device, which need not be the tensors'.
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            return [one.kernel[one.grid](*one.args, **one.constants, **OPTIONS) for one in self.launches]


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)
