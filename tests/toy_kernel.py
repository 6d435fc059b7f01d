"""The kernel of CONTRIBUTING.md's recipe: an op ``double``, which tests add to the table."""

import triton
import triton.language as tl
from torch import Tensor

from resnet_fast.kernels.triton import operands
from resnet_fast.kernels.triton.plan import Launch, Plan, ceil_div


@triton.jit
def double_kernel(x_ptr, y_ptr, SIZE, INDEX64: tl.constexpr, BLOCK: tl.constexpr):
    """x [SIZE] -> y [SIZE], ``2 * x``."""
    block = tl.program_id(0)
    if INDEX64:
        block = block.to(tl.int64)
    at = block * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < SIZE, other=0.0)
    tl.store(y_ptr + at, (2 * x.to(tl.float32)).to(y_ptr.dtype.element_ty), mask=at < SIZE)


def plan_double(x: Tensor, target: str) -> Plan:
    x = operands.nhwc(x)
    y = operands.allocate(x, tuple(x.shape))
    block, warps = 2048, 4
    launch = Launch(
        double_kernel,
        (ceil_div(x.numel(), block),),
        (x, y, x.numel()),
        {"INDEX64": operands.index64(x, y), "BLOCK": block, "num_warps": warps},
    )
    return Plan((launch,), y)
