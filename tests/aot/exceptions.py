"""Launches that a check may find fault with, and why."""

from typing import NamedTuple, Optional

import triton

from tests.aot.layers import Item

_RELEASE = triton.__version__.rpartition(".")[0]


class Exempt(NamedTuple):
    """From ``check``, the name of a function in checks.py: what agrees with all that is given.

    release: of Triton, as "3.6", for which alone it holds; by default the installed one, whichever that is.
    """

    check: str
    kernel: str
    reason: str
    architectures: Optional[tuple[str, ...]] = None
    precisions: Optional[tuple[str, ...]] = None
    release: str = _RELEASE

    def holds(self) -> bool:
        """With this Triton."""
        return self.release == _RELEASE

    def covers(self, check: str, item: Item) -> bool:
        return (
            self.holds()
            and check == self.check
            and item.launch.kernel.__name__ == self.kernel
            and item.architecture in (self.architectures or (item.architecture,))
            and item.precision in (self.precisions or (item.precision,))
        )


EXEMPT = [
    Exempt(
        "narrow",
        "wgrad_kernel",
        "TF32's instructions want the summed dimension side by side: pixels, where NHWC has channels; so 4 bytes each",
        precisions=("tf32",),
    ),
    *(
        Exempt(
            "narrow",
            kernel,
            "Triton 3.8 copies float32 to gfx950's local memory without registers between, and then 4 bytes at a time",
            architectures=("gfx950",),
            precisions=("ieee",),
        )
        for kernel in ("conv_kernel", "gemm_kernel", "dgrad_kernel", "wgrad_kernel")
    ),
    # Only where every other tile would cost all launches, or all releases, more than these few accesses cost one.
    Exempt(
        "spills",
        "gemm_kernel",
        "8 accesses with prologue and residual, of 128x256x16 as many; 128x128x32 is 9 % slower by the model",
        architectures=("sm_90",),
        precisions=("tf32",),
    ),
    Exempt(
        "spills",
        "gram_kernel",
        "8 accesses of 128x64 with prologue; 128x32 has up to 8 % more instructions for each product",
        architectures=("sm_80",),
        precisions=("fp16", "bf16"),
        release="3.4",
    ),
    Exempt(
        "spills",
        "max_pool_kernel",
        "2 accesses of 32x64 with prologue; 16x64 has 5 to 7 % more instructions for each number",
        architectures=("sm_90",),
        precisions=("fp16", "bf16"),
        release="3.4",
    ),
]


def excused(check: str, item: Item) -> bool:
    return any(one.covers(check, item) for one in EXEMPT)
