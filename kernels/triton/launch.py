"""From tensors to kernel launches.

A ``plan_*`` function decides everything about a launch and starts nothing: it brings the inputs into the layout that
the kernel reads, picks the tile, allocates the output and lists the arguments. ``Plan.run`` launches. The split lets
the tests compile exactly what would be launched, for a GPU that is not there.
"""

import contextlib
import functools
from typing import Any, NamedTuple, Optional

import torch

from resnet_fast.kernels import reference
from resnet_fast.kernels.triton import pack, tiles
from resnet_fast.kernels.triton.conv import conv_kernel
from resnet_fast.kernels.triton.gemm import gemm_kernel
from resnet_fast.kernels.triton.pool import average_pool_kernel, max_pool_kernel
from resnet_fast.kernels.triton.support import STEM_CHANNELS, interpreted

Pair = tuple[int, int]

_INT32_ELEMENTS = 2**31  # from here on, offsets are computed in 64 bits


class Plan(NamedTuple):
    """One launch: ``kernel[grid](*args, **constants)`` fills ``output``, and ``workspace`` for a launch after it."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    constants: dict[str, Any]
    output: torch.Tensor
    workspace: Optional[torch.Tensor] = None

    def run(self) -> torch.Tensor:
        # Triton launches on the current device, which need not be the tensors'.
        on_device = torch.cuda.device(self.output.device) if self.output.is_cuda else contextlib.nullcontext()
        with on_device:
            self.kernel[self.grid](*self.args, **self.constants)
        return self.output


def conv_bn_act(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    residual: Optional[torch.Tensor],
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    relu: bool,
) -> torch.Tensor:
    """See ``reference.conv_bn_act``."""
    if x.numel() == 0 or weight.numel() == 0:
        return reference.conv_bn_act(x, weight, scale, shift, residual, stride, padding, dilation, groups, relu)
    return plan_conv(
        x, weight, scale, shift, residual, stride, padding, dilation, groups, relu, architecture(x.device)
    ).run()


def stem(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """See ``reference.stem``.

    The convolution and the max-pool are two kernels. In one, every pooled pixel would recompute its window's
    convolutions, 2.25 times the products (tiles of pooled pixels share no accumulators in Triton); by the byte and
    instruction counts that costs about what writing and reading the convolution's output does, so the simpler way won.
    """
    if x.numel() == 0 or weight.numel() == 0:
        return reference.stem(x, weight, scale, shift)
    target = architecture(x.device)
    y = plan_conv(x, weight, scale, shift, None, (2, 2), (3, 3), (1, 1), 1, True, target).run()
    return plan_max_pool(y, target).run()


def global_avg_pool(x: torch.Tensor) -> torch.Tensor:
    """See ``reference.global_avg_pool``."""
    if x.numel() == 0:
        return reference.global_avg_pool(x)
    return plan_average_pool(x, architecture(x.device)).run()


def plan_conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: Optional[torch.Tensor],
    shift: Optional[torch.Tensor],
    residual: Optional[torch.Tensor],
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    relu: bool,
    target: str,
    prologue: Optional[tuple[torch.Tensor, torch.Tensor]] = None,
    tile: Optional[tiles.Tile] = None,
) -> Plan:
    """A convolution, as a plain matrix product where it is one. ``target`` is the architecture to choose the tile for,
    unless one is given.

    ``prologue``: scale and shift of a batch norm and ReLU that x still has to go through. Without scale and shift of
    its own, the result is stored as it is, and ``workspace [row tiles, 2, K]`` takes its statistics (statistics.py).
    """
    n, c, h, w = x.shape
    k, _, r, s = weight.shape
    p = (h + 2 * padding[0] - dilation[0] * (r - 1) - 1) // stride[0] + 1
    q = (w + 2 * padding[1] - dilation[1] * (s - 1) - 1) // stride[1] + 1
    y = allocate(x, (n, k, p, q))
    if residual is not None:
        residual = nhwc(residual)
    statistics = scale is None
    scale, shift, *prologue = (None if v is None else vector(v) for v in (scale, shift, *(prologue or (None, None))))
    operands = (scale, shift, y if residual is None else residual, y, *prologue)
    precision = precision_of(x.dtype, target)
    shared = {
        "PROLOGUE": prologue[0] is not None,
        "STATISTICS": statistics,
        "HAS_RESIDUAL": residual is not None,
        "RELU": relu,
        "PRECISION": "tf32" if precision == "tf32" else "ieee",
    }

    if (r, s, *stride, *padding, groups) == (1, 1, 1, 1, 0, 0, 1):
        x = nhwc(x)
        rows = n * h * w
        tile = tile or tiles.pick(target, precision, rows, k, c, 1)
        packed = pack.weight(weight, x.dtype, 1, 1, tile.reduction)
        row_tiles = ceil_div(rows, tile.rows)
        partials = allocate_floats(x, (row_tiles, 2, k)) if statistics else None
        return Plan(
            gemm_kernel,
            (row_tiles * ceil_div(k, tile.columns),),
            (x, packed, *operands, partials, rows),
            {"C": c, "K": k, **shared, "INDEX64": index64(x, y), **tile.constants()},
            y,
            partials,
        )

    if prologue[0] is None and groups == 1 and c <= STEM_CHANNELS and s > 1 and dilation[1] == 1:
        # Few channels: all taps of one kernel row side by side.
        pixel = pack.pixel_width(c)
        tile = tile or tiles.pick(target, precision, n * p * q, k, s * pixel, 1)
        packed = pack.row_weight(weight, x.dtype, pixel, tile.reduction)
        x = pack.pixels(x, padding)
        h = x.shape[1]
        row, row_unit = x.shape[2] * pixel, pack.ROW_UNIT
        c, s, padding = s * pixel, 1, (0, 0)
    else:
        x = nhwc(x)
        pixel, row, row_unit = c, w * c, c
        merge = pack.merged(groups, c // groups)
        groups_before, groups = groups, groups // merge
        c, k = c // groups, k // groups
        tile = tile or tiles.pick(target, precision, n * p * q, k, c, groups)
        packed = pack.weight(weight, x.dtype, groups_before, merge, tile.reduction)
    row_tiles = ceil_div(n * p * q, tile.rows)
    partials = allocate_floats(x, (row_tiles, 2, groups * k)) if statistics else None
    return Plan(
        conv_kernel,
        (row_tiles * ceil_div(k, tile.columns), groups),
        (x, packed, *operands, partials, n, h, w, row // row_unit, p, q),
        {
            "C": c,
            "K": k,
            "GROUPS": groups,
            "R": r,
            "S": s,
            "STRIDE_H": stride[0],
            "STRIDE_W": stride[1],
            "PAD_H": padding[0],
            "PAD_W": padding[1],
            "DILATION_H": dilation[0],
            "DILATION_W": dilation[1],
            "PIXEL": pixel,
            "ROW_UNIT": row_unit,
            **shared,
            "INDEX64": index64(x, y),
            **tile.constants(),
        },
        y,
        partials,
    )


def plan_max_pool(x: torch.Tensor, target: str, prologue: Optional[tuple[torch.Tensor, torch.Tensor]] = None) -> Plan:
    """3x3, stride 2, padding 1, of x or of ``relu(x * scale + shift)``."""
    x = nhwc(x)
    scale, shift = (None, None) if prologue is None else map(vector, prologue)
    n, c, h, w = x.shape
    p, q = (h - 1) // 2 + 1, (w - 1) // 2 + 1
    y = allocate(x, (n, c, p, q))
    bm, bn, warps = tiles.load(target)["max_pool"]
    return Plan(
        max_pool_kernel,
        (ceil_div(n * p * q, bm), ceil_div(c, bn)),
        (x, scale, shift, y, n, h, w, p, q),
        {
            "C": c,
            "PROLOGUE": prologue is not None,
            "INDEX64": index64(x, y),
            "BM": bm,
            "BN": bn,
            "num_warps": warps,
        },
        y,
    )


def plan_average_pool(x: torch.Tensor, target: str) -> Plan:
    x = nhwc(x)
    n, c, h, w = x.shape
    y = allocate(x, (n, c, 1, 1))
    bm, bn, warps = tiles.load(target)["average_pool"]
    return Plan(
        average_pool_kernel,
        (n, ceil_div(c, bn)),
        (x, y, h * w),
        {"C": c, "INDEX64": index64(x, y), "BM": bm, "BN": bn, "num_warps": warps},
        y,
    )


def allocate(x: torch.Tensor, shape: tuple[int, ...], dtype: Optional[torch.dtype] = None) -> torch.Tensor:
    """An output in NHWC, like ``x`` or of another dtype."""
    return torch.empty(shape, dtype=dtype or x.dtype, device=x.device, memory_format=torch.channels_last)


def allocate_floats(x: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Statistics or a workspace of a launch over ``x``, float32."""
    return torch.empty(shape, dtype=torch.float32, device=x.device)


def architecture(device: torch.device) -> str:
    """``"sm_90"``, ``"gfx942"``, or ``"interpreter"``."""
    if interpreted():
        return "interpreter"
    return _architecture(device.index if device.index is not None else torch.cuda.current_device())


@functools.cache
def _architecture(index: int) -> str:
    if torch.version.hip:
        return torch.cuda.get_device_properties(index).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm_{major}{minor}"


def precision_of(dtype: torch.dtype, target: str) -> str:
    """Which list of tiles: float32 goes through TF32 where PyTorch's own convolutions would."""
    if dtype != torch.float32:
        return "half"
    return "tf32" if target.startswith("sm_") and torch.backends.cudnn.conv.fp32_precision == "tf32" else "ieee"


def nhwc(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def vector(v: torch.Tensor) -> torch.Tensor:
    return v.detach().contiguous()


def index64(x: torch.Tensor, y: torch.Tensor) -> bool:
    return max(x.numel(), y.numel()) >= _INT32_ELEMENTS


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)
