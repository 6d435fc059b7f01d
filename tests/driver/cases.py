"""The calls that are made on the stub: each kind of kernel that is ever prepared, on the GPUs that it is for."""

from typing import NamedTuple, Optional

import torch

from resnet_fast.kernels.triton.tiles import Tile
from resnet_fast.kernels.triton.tuning import cudnn
from resnet_fast.utils import compat

SM90, SM80, SM100 = range(3)  # the stub's devices

_FP16, _BF16, _FP32 = torch.float16, torch.bfloat16, torch.float32


class Case(NamedTuple):
    """A convolution, and the names of the kernels that serve it."""

    kernels: tuple[str, ...]
    device: int = SM90
    dtype: torch.dtype = _FP16
    tf32: bool = False
    c: int = 64
    k: int = 64
    kernel: int = 3
    stride: int = 1
    groups: int = 1
    residual: bool = False
    tile: Optional[Tile] = None  # in place of the table's
    choice: Optional[str] = None  # as if measured

    def refused(self) -> bool:
        """Whether this Triton has not what the kernel asks for; see descriptor.py."""
        kind = self.tile.kernel if self.tile else "pointers"
        if kind == "pointers":
            return False
        rounds = kind == "specialised" or self.tf32
        return not compat.has_descriptors() or (rounds and not compat.descriptors_round())


_TILE = Tile(64, 64, 64, 4, 4, False)
_DESCRIPTORS, _SPECIALISED = _TILE._replace(kernel="descriptors"), _TILE._replace(kernel="specialised", warps=8)

CASES = {
    "1x1": Case(("gemm_kernel",), kernel=1, k=256, residual=True),
    "1x1 on sm_80": Case(("gemm_kernel",), SM80, kernel=1),
    "1x1 bf16": Case(("gemm_kernel",), dtype=_BF16, kernel=1),
    "1x1 tf32": Case(("gemm_kernel",), dtype=_FP32, tf32=True, kernel=1),
    "3x3": Case(("conv_kernel",)),
    "3x3 on sm_80": Case(("conv_kernel",), SM80, residual=True),
    "3x3 fp32": Case(("conv_kernel",), dtype=_FP32),
    "3x3 stride 2": Case(("conv_kernel",), stride=2),
    "3x3 in groups": Case(("conv_kernel",), groups=2),
    "3x3 of odd channels": Case(("conv_kernel",), c=27, k=40),
    "3x3 in parts": Case(("conv_kernel", "add_parts_kernel"), residual=True, tile=_TILE._replace(parts=3)),
    "1x1 in parts": Case(("gemm_kernel", "add_parts_kernel"), kernel=1, c=256, tile=_TILE._replace(parts=2)),
    "stem": Case(("conv_kernel",), c=3, kernel=7, stride=2),
    "3x3, tuned": Case(("conv_kernel",), c=32, choice="triton"),
    "3x3, cuDNN and a pass": Case(("tail_kernel",), residual=True, choice=cudnn.POINTWISE),
    "1x1 with descriptors": Case(("gemm_descriptor_kernel",), kernel=1, tile=_DESCRIPTORS, residual=True),
    "3x3 with descriptors": Case(("conv_descriptor_kernel",), tile=_DESCRIPTORS),
    "1x1 tf32 with descriptors": Case(
        ("gemm_descriptor_kernel",), dtype=_FP32, tf32=True, kernel=1, tile=_DESCRIPTORS._replace(reduction=32)
    ),
    "1x1 specialised": Case(("gemm_descriptor_kernel",), SM100, kernel=1, tile=_SPECIALISED),
    "3x3 specialised": Case(("conv_descriptor_kernel",), SM100, tile=_SPECIALISED, residual=True),
}  # fmt: skip
