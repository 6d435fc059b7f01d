"""Launches that a check may find fault with, and why."""

from typing import NamedTuple, Optional

from tests.aot.layers import Item


class Exempt(NamedTuple):
    """From ``check``, the name of a function in checks.py: what agrees with all that is given."""

    check: str
    kernel: str
    reason: str
    architectures: Optional[tuple[str, ...]] = None
    precisions: Optional[tuple[str, ...]] = None

    def covers(self, check: str, item: Item) -> bool:
        return (
            check == self.check
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
]


def excused(check: str, item: Item) -> bool:
    return any(one.covers(check, item) for one in EXEMPT)
