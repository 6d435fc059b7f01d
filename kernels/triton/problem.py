"""A convolution as the matrix products that the kernels make of it."""

from resnet_fast.kernels.contract import Pair, output_size
from resnet_fast.kernels.triton import pack
from resnet_fast.kernels.triton.cost_model.cost import Problem


def conv_problem(
    x_shape: tuple[int, ...],
    weight_shape: tuple[int, ...],
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    precision: str,
    residual: bool = False,
    prologue: bool = False,
    statistics: bool = False,
) -> Problem:
    """The products that the plans make of a convolution; by their kind it chooses the kernel."""
    n, c, h, w = x_shape
    k, _, r, s = weight_shape
    flags = residual, prologue, statistics
    if (r, s, *stride, *padding, groups) == (1, 1, 1, 1, 0, 0, 1):
        return Problem(precision, n * h * w, k, c, 1, "1x1", 1, *flags)
    p, q = output_size((h, w), (r, s), stride, padding, dilation)
    if not prologue and groups == 1 and c <= pack.STEM_CHANNELS and s > 1 and dilation[1] == 1:
        return Problem(precision, n * p * q, k, s * pack.pixel_width(c), 1, "stem", r, *flags)
    groups //= pack.merged(groups, c // groups)
    kind = "grouped" if groups > 1 else "rxs" if stride == (1, 1) else "strided"
    return Problem(precision, n * p * q, k // groups, c // groups, groups, kind, r * s, *flags)
