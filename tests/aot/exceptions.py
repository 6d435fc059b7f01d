"""Launches that a check may find fault with, and why."""

from typing import Any, NamedTuple, Optional

from tests.aot.layers import Launch


class Exempt(NamedTuple):
    """From ``check``, the name of a function in checks.py: what agrees with all that is given."""

    check: str
    kernel: str
    reason: str
    architectures: Optional[tuple[str, ...]] = None
    precisions: Optional[tuple[str, ...]] = None
    constants: dict[str, Any] = {}  # noqa: RUF012

    def covers(self, check: str, item: Launch) -> bool:
        return (
            check == self.check
            and item.plan.kernel.__name__ == self.kernel
            and item.architecture in (self.architectures or (item.architecture,))
            and item.precision in (self.precisions or (item.precision,))
            and all(item.plan.constants.get(name) == value for name, value in self.constants.items())
        )


_FEW = "known since all forms are compiled; which tile near it does not spill has not been tried yet"


def _tile(rows: int, columns: int, reduction: int, **constants: Any) -> dict[str, Any]:
    return {"BM": rows, "BN": columns, "BK": reduction, **constants}


def _spills(
    kernel: str, architectures: tuple[str, ...], precisions: tuple[str, ...], constants: dict[str, Any], most: int
) -> Exempt:
    """``most``: bytes of a thread."""
    return Exempt("spills", kernel, f"{_FEW}; at most {most} bytes", architectures, precisions, constants)


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
    _spills("wgrad_kernel", ("sm_86", "sm_89"), ("fp16", "bf16"), _tile(64, 64, 64, PROLOGUE=True), 8),
    _spills("conv_kernel", ("sm_86", "sm_89"), ("bf16",), _tile(64, 64, 64, STRIDE_H=2, STATISTICS=True), 8),
    _spills("dgrad_kernel", ("sm_86", "sm_89"), ("tf32",), _tile(64, 64, 32, EXPAND=True), 8),
    _spills("conv_kernel", ("sm_86", "sm_89"), ("ieee",), _tile(64, 64, 32, R=7), 8),
    _spills("conv_kernel", ("sm_86", "sm_89"), ("ieee",), _tile(128, 32, 32, STRIDE_H=2, GROUPS=8), 8),
    _spills("gemm_kernel", ("sm_86", "sm_89"), ("ieee",), _tile(64, 64, 32, PROLOGUE=True, HAS_RESIDUAL=True), 8),
    _spills("wgrad_kernel", ("sm_100",), ("fp16", "bf16"), _tile(128, 64, 64, PROLOGUE=True), 16),
    _spills("gemm_kernel", ("sm_100",), ("tf32",), _tile(128, 64, 32, STATISTICS=True), 8),
    _spills("gemm_kernel", ("sm_100",), ("ieee",), _tile(64, 64, 32, PARTS=8), 8),
    _spills("gram_kernel", ("sm_120",), ("fp16", "bf16"), {"BN": 128, "BP": 64, "PROLOGUE": True}, 40),
    _spills("dgrad_kernel", ("sm_120",), ("fp16", "bf16"), _tile(128, 128, 64, EXPAND=True, STRIDE_H=2), 8),
    _spills("wgrad_kernel", ("sm_120",), ("bf16",), _tile(64, 64, 64, PROLOGUE=True, STRIDE_H=2), 24),
    _spills("wgrad_kernel", ("sm_120",), ("bf16",), _tile(64, 32, 32, PROLOGUE=True, STRIDE_H=2, R=3), 8),
    _spills("dgrad_kernel", ("sm_120",), ("tf32",), _tile(128, 128, 32), 8),
    _spills("dgrad_kernel", ("sm_120",), ("tf32",), _tile(128, 64, 32, EXPAND=True), 16),
    _spills("dgrad_kernel", ("gfx942",), ("fp16", "bf16"), _tile(64, 32, 64, EXPAND=True), 20),
    _spills("dgrad_kernel", ("gfx942",), ("fp16",), _tile(64, 64, 64, EXPAND=True), 20),
]


def excused(check: str, item: Launch) -> bool:
    return any(one.covers(check, item) for one in EXEMPT)
