"""From tensors to kernel launches: the backward primitives of ``reference/training.py``.

As in ``launch.py``, a ``plan_*`` function decides everything and starts nothing. Here it may take several launches,
``Steps``: the kernel, and the sum of what its programs left in a workspace.
"""

import math
from typing import Any, NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_fast.kernels.contract import Affine, Gate, Geometry, Gradient, Pair
from resnet_fast.kernels.reference import training as reference
from resnet_fast.kernels.triton import forward, pack, tiles
from resnet_fast.kernels.triton.device import STEM_CHANNELS
from resnet_fast.kernels.triton.dgrad import dgrad_kernel
from resnet_fast.kernels.triton.forward import Plan
from resnet_fast.kernels.triton.gradient_epilogue import sum_rows_kernel
from resnet_fast.kernels.triton.tail_backward import (
    bn_backward_kernel,
    pool_backward_kernel,
    pool_winner_kernel,
    tail_backward_kernel,
)
from resnet_fast.kernels.triton.wgrad import wgrad_kernel

_PART = 1024  # pixels below which a part of wgrad's sum would not be worth its share of the workspace
_WAVES = 2  # programs to aim at, for every multiprocessor, where their number is free
_SMALLEST = 2.0**-64  # of the largest numbers of dgrad_expand's matrices, which are made about 1


class Steps(NamedTuple):
    """Launches that follow each other, and what they leave."""

    plans: tuple[Plan, ...]
    result: Any

    def run(self) -> Any:
        for plan in self.plans:
            plan.run()
        return self.result


def tail_backward(
    grad: Tensor,
    out: Optional[Tensor],
    y: Optional[Tensor],
    mean: Optional[Tensor],
    residual: Optional[Tensor],
    residual_mean: Optional[Tensor],
) -> tuple[Gradient, Optional[Tensor]]:
    """See ``reference_training.tail_backward``."""
    if grad.numel() == 0:
        return reference.tail_backward(grad, out, y, mean, residual, residual_mean)
    return plan_tail_backward(
        grad, out, y, mean, residual, residual_mean, forward.architecture(grad.device)
    ).run()  # fmt: skip


def tail_pool_backward(grad: Tensor, y: Tensor, affine: Affine, mean: Optional[Tensor]) -> Gradient:
    """See ``reference_training.tail_pool_backward``."""
    if y.numel() == 0:
        return reference.tail_pool_backward(grad, y, affine, mean)
    return plan_tail_pool_backward(grad, y, affine, mean, forward.architecture(y.device)).run()


def bn_backward(g: Tensor, y: Tensor, mean: Tensor, a: Tensor, b: Tensor, c: Tensor, overwrite: bool) -> Tensor:
    """See ``reference_training.bn_backward``."""
    if g.numel() == 0:
        return reference.bn_backward(g, y, mean, a, b, c, overwrite)
    return plan_bn_backward(g, y, mean, a, b, c, overwrite, forward.architecture(g.device)).run()


def dgrad(
    dy: Tensor, weight: Tensor, geometry: Geometry, x: Tensor, gate: Optional[Gate], residual: Optional[Tensor]
) -> Gradient:
    """See ``reference_training.dgrad``."""
    if dy.numel() == 0 or x.numel() == 0:
        return reference.dgrad(dy, weight, geometry, x, gate, residual)
    return plan_dgrad(dy, weight, geometry, x, gate, residual, forward.architecture(x.device)).run()


def dgrad_expand(
    g: Tensor,
    weight: Tensor,
    q: Tensor,
    c: Tensor,
    stride: Pair,
    x: Tensor,
    prologue: Optional[Affine],
    gate: Optional[Gate],
    residual: Optional[Tensor],
) -> Gradient:
    """See ``reference_training.dgrad_expand``. ``weight`` and ``q`` are rounded to the dtype of ``x``, without loss of
    small numbers."""
    if g.numel() == 0 or x.numel() == 0:
        return reference.dgrad_expand(g, weight, q, c, stride, x, prologue, gate, residual)
    return plan_dgrad_expand(
        g, weight, q, c, stride, x, prologue, gate, residual, forward.architecture(x.device)
    ).run()  # fmt: skip


def wgrad(dy: Tensor, x: Tensor, prologue: Optional[Affine], weight: Tensor, geometry: Geometry) -> Tensor:
    """See ``reference_training.wgrad``."""
    if dy.numel() == 0 or x.numel() == 0:
        return reference.wgrad(dy, x, prologue, weight, geometry)
    dw = plan_wgrad(dy, x, prologue, weight.shape, geometry, forward.architecture(x.device)).run()
    return _diagonal(dw, weight.shape)


def plan_tail_backward(
    grad: Tensor,
    out: Optional[Tensor],
    y: Optional[Tensor],
    mean: Optional[Tensor],
    residual: Optional[Tensor],
    residual_mean: Optional[Tensor],
    target: str,
) -> Steps:
    grad = forward.nhwc(grad)
    g = grad if out is None else forward.allocate(grad, tuple(grad.shape))
    n, c, h, w = grad.shape
    grid, share, constants = _shares(target, n * h * w, c)
    quantities = 1 + (y is not None) + (residual is not None)
    sums = forward.allocate_floats(grad, (quantities, grid[0], c))
    plan = Plan(
        tail_backward_kernel,
        grid,
        (
            grad, _nhwc(out), _nhwc(y), _vector(mean), _nhwc(residual), _vector(residual_mean),
            g, sums, n * h * w, share,
        ),
        {
            "C": c,
            "RELU": out is not None,
            "PRODUCT": y is not None,
            "RESIDUAL_PRODUCT": residual is not None,
            "INDEX64": forward.index64(grad, grad),
            **constants,
        },
        g,
    )  # fmt: skip
    total = _plan_sum_rows(sums, target)
    rest = list(total.output[1:])
    gradient = Gradient(g, total.output[0], None if y is None else rest.pop(0))
    return Steps((plan, total), (gradient, None if residual is None else rest.pop(0)))


def plan_tail_pool_backward(grad: Tensor, y: Tensor, affine: Affine, mean: Optional[Tensor], target: str) -> Steps:
    grad, y = forward.nhwc(grad), forward.nhwc(y)
    scale, shift = map(forward.vector, affine)
    n, c, h, w = y.shape
    p, q = grad.shape[2:]
    g = forward.allocate(y, (n, c, h, w))
    winner = allocate_bytes(y, (n, p, q, c))
    bm, bn, warps = tiles.load(target)["max_pool"]
    find = Plan(
        pool_winner_kernel,
        (forward.ceil_div(n * p * q, bm), forward.ceil_div(c, bn)),
        (y, scale, shift, winner, n, h, w, p, q),
        {"C": c, "INDEX64": forward.index64(y, y), "BM": bm, "BN": bn, "num_warps": warps},
        winner,
    )
    grid, share, constants = _shares(target, n * h * w, c)
    sums = forward.allocate_floats(y, (1 if mean is None else 2, grid[0], c))
    gather = Plan(
        pool_backward_kernel,
        grid,
        (grad, winner, y, scale, shift, _vector(mean), g, sums, n, h, w, p, q, share),
        {"C": c, "PRODUCT": mean is not None, "INDEX64": forward.index64(y, y), **constants},
        g,
    )
    total = _plan_sum_rows(sums, target)
    return Steps((find, gather, total), Gradient(g, total.output[0], None if mean is None else total.output[1]))


def plan_bn_backward(
    g: Tensor, y: Tensor, mean: Tensor, a: Tensor, b: Tensor, c: Tensor, overwrite: bool, target: str
) -> Steps:
    g = forward.nhwc(g)
    n, channels, h, w = g.shape
    dy = g if overwrite else forward.allocate(g, (n, channels, h, w))
    bm, bn, warps = tiles.load(target)["pointwise"]
    plan = Plan(
        bn_backward_kernel,
        (forward.ceil_div(n * h * w, bm), forward.ceil_div(channels, bn)),
        (g, forward.nhwc(y), *map(forward.vector, (mean, a, b, c)), dy, n * h * w),
        {"C": channels, "INDEX64": forward.index64(g, g), "BM": bm, "BN": bn, "num_warps": warps},
        dy,
    )
    return Steps((plan,), dy)


def plan_dgrad(
    dy: Tensor,
    weight: Tensor,
    geometry: Geometry,
    x: Tensor,
    gate: Optional[Gate],
    residual: Optional[Tensor],
    target: str,
) -> Steps:
    k, c, groups = weight.shape[0], x.shape[1], geometry.groups
    merge = pack.merged(groups, max(c, k) // groups)
    geometry = geometry._replace(groups=groups // merge)
    tile = _dgrad_tile(target, x, k, geometry)
    exchanged = weight.unflatten(0, (groups, k // groups)).transpose(1, 2).flatten(0, 1)
    packed = pack.weight(exchanged, x.dtype, groups, merge, tile.reduction)
    return _plan_dgrad(dy, packed, weight.shape[2:], geometry, x, None, gate, residual, tile, target)


def plan_dgrad_expand(
    g: Tensor,
    weight: Tensor,
    q: Tensor,
    c: Tensor,
    stride: Pair,
    x: Tensor,
    prologue: Optional[Affine],
    gate: Optional[Gate],
    residual: Optional[Tensor],
    target: str,
) -> Steps:
    geometry = Geometry(stride)
    tile = _dgrad_tile(target, x, weight.shape[0], geometry)
    packed, w_factor = _scaled(weight, x.dtype, tile.reduction)
    packed_q, q_factor = _scaled(q, x.dtype, tile.reduction)
    second = _Second(prologue, packed_q, forward.vector(c), w_factor, q_factor)
    return _plan_dgrad(g, packed, (1, 1), geometry, x, second, gate, residual, tile, target)


class _Second(NamedTuple):
    """The second product of ``dgrad_expand``."""

    prologue: Optional[Affine]
    q: Tensor
    c: Tensor
    w_factor: Tensor
    q_factor: Tensor


def _plan_dgrad(
    dy: Tensor,
    packed: Tensor,
    kernel: tuple[int, ...],
    geometry: Geometry,
    x: Tensor,
    second: Optional[_Second],
    gate: Optional[Gate],
    residual: Optional[Tensor],
    tile: tiles.Tile,
    target: str,
) -> Steps:
    dy, x = forward.nhwc(dy), forward.nhwc(x)
    n, c, h, w = x.shape
    k, p, q = dy.shape[1:]
    stride, padding, dilation, groups = geometry
    classes = stride[0] * stride[1]
    row_tiles = forward.ceil_div(_class_pixels(x, stride), tile.rows)
    g = forward.allocate(x, (n, c, h, w))
    prologue = None if second is None else second.prologue
    affine = None if gate is None else gate.affine
    mean = None if gate is None else gate.mean
    # A kernel does not read what is None, but without a gate it still computes where its row of sums would be.
    sums = g if gate is None else forward.allocate_floats(x, (1 if mean is None else 2, classes * row_tiles, c))
    plan = Plan(
        dgrad_kernel,
        (row_tiles * forward.ceil_div(c // groups, tile.columns), classes, groups),
        (
            dy, packed, x, _nhwc(residual), g, *_vectors(prologue),
            *((None,) * 4 if second is None else second[1:]),
            *_vectors(affine), _vector(mean), sums, n, h, w, p, q,
        ),
        {
            "C": c // groups,
            "K": k // groups,
            "GROUPS": groups,
            "R": kernel[0],
            "S": kernel[1],
            **_geometry(stride, padding, dilation),
            "STEP_H": stride[0] // math.gcd(stride[0], dilation[0]),
            "STEP_W": stride[1] // math.gcd(stride[1], dilation[1]),
            "EXPAND": second is not None,
            "PROLOGUE": prologue is not None,
            "HAS_RESIDUAL": residual is not None,
            "GATE": gate is not None,
            "AFFINE": affine is not None,
            "PRODUCT": mean is not None,
            "PRECISION": _dot_precision(x, target),
            "INDEX64": forward.index64(dy, x),
            **_constants(tile),
        },
        g,
    )  # fmt: skip
    if gate is None:
        return Steps((plan,), Gradient(g))
    total = _plan_sum_rows(sums, target)
    return Steps((plan, total), Gradient(g, total.output[0], None if mean is None else total.output[1]))


def plan_wgrad(
    dy: Tensor, x: Tensor, prologue: Optional[Affine], shape: tuple[int, ...], geometry: Geometry, target: str
) -> Steps:
    """Leaves ``[groups, K, R, S, C]``, for ``_diagonal``. ``shape`` is the weight's."""
    stride, padding, dilation, groups = geometry
    k, channels, r, s = shape
    dy = forward.nhwc(dy)
    n, _, p, q = dy.shape
    rows = groups == 1 and channels <= STEM_CHANNELS and s > 1 and dilation[1] == 1 and prologue is None
    if rows:
        # Few channels: all taps of one kernel row side by side.
        pixel = pack.pixel_width(channels)
        x = pack.pixels(x, padding)
        h, w, merge = x.shape[1], x.shape[2], 1
        row, row_unit = w * pixel, pack.ROW_UNIT
        c, taps_w, padding = s * pixel, 1, (0, 0)
    else:
        x = forward.nhwc(x)
        h, w = x.shape[2:]
        pixel = x.shape[1]
        row, row_unit = w * pixel, pixel
        merge = pack.merged(groups, max(channels, k // groups))
        c, taps_w = channels * merge, s
    groups, k = groups // merge, k // groups * merge
    pixels = n * p * q
    most_parts = forward.ceil_div(pixels, _PART)
    tile = tiles.pick(target, _key("wgrad", x, target), k, c, pixels, groups * r * taps_w * most_parts)
    programs = forward.ceil_div(k, tile.rows) * forward.ceil_div(c, tile.columns) * r * taps_w
    part = _part_size(pixels, programs * groups, tile.reduction, target)
    parts = forward.ceil_div(pixels, part)
    sums = forward.allocate_floats(x, (1, parts, groups * k * r * taps_w * c))
    plan = Plan(
        wgrad_kernel,
        (programs, parts, groups),
        (dy, x, *_vectors(prologue), sums, n, h, w, row // row_unit, p, q, part),
        {
            "C": c,
            "K": k,
            "GROUPS": groups,
            "R": r,
            "S": taps_w,
            **_geometry(stride, padding, dilation),
            "PIXEL": pixel,
            "ROW_UNIT": row_unit,
            "PROLOGUE": prologue is not None,
            "PRECISION": _dot_precision(x, target),
            "INDEX64": forward.index64(x, dy),
            **_constants(tile),
        },
        sums,
    )  # fmt: skip
    plans, dw = (plan,), sums
    if parts > 1:
        total = _plan_sum_rows(sums, target)
        plans, dw = (plan, total), total.output
    return Steps(plans, dw.view(groups, k, r, s, -1)[..., : channels * merge])


def _diagonal(dw: Tensor, shape: tuple[int, ...]) -> Tensor:
    """``[groups, K, R, S, C]`` with ``groups`` that may be several merged ones -> the weight's shape."""
    k, channels, r, s = shape
    merge = dw.shape[-1] // channels
    parts = dw.unflatten(1, (merge, -1)).unflatten(-1, (merge, channels)).diagonal(dim1=1, dim2=5).movedim(-1, 1)
    return parts.reshape(k, r, s, channels).permute(0, 3, 1, 2)


def _plan_sum_rows(x: Tensor, target: str) -> Plan:
    """float32 ``[L, rows, C]`` -> ``[L, C]``."""
    layers, rows, c = x.shape
    y = forward.allocate_floats(x, (layers, c))
    bm, elements, warps = tiles.load(target)["sum_rows"]
    bm = min(bm, tiles.power_of_two(rows))
    bn = elements // bm
    return Plan(
        sum_rows_kernel,
        (forward.ceil_div(c, bn), layers),
        (x, y, rows),
        {"C": c, "INDEX64": forward.index64(x, x), "BM": bm, "BN": bn, "num_warps": warps},
        y,
    )


def allocate_bytes(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A workspace of a launch over ``x``, uint8."""
    return torch.empty(shape, dtype=torch.uint8, device=x.device)


def _shares(target: str, pixels: int, channels: int) -> tuple[tuple[int, int], int, dict[str, int]]:
    """For a kernel that sums over pixels: the grid, the pixels of each program, the constants."""
    data = tiles.load(target)
    bm, bn, warps = data["pointwise"]
    columns = forward.ceil_div(channels, bn)
    most = forward.ceil_div(_WAVES * data["multiprocessors"], columns)
    share = forward.ceil_div(forward.ceil_div(pixels, most), bm) * bm
    return (forward.ceil_div(pixels, share), columns), share, {"BM": bm, "BN": bn, "num_warps": warps}


def _part_size(pixels: int, programs: int, step: int, target: str) -> int:
    """The pixels in one part of wgrad's sum, a multiple of ``step``, where one part has ``programs`` programs."""
    parts = max(1, min(_WAVES * tiles.load(target)["multiprocessors"] // programs, pixels // _PART))
    return forward.ceil_div(forward.ceil_div(pixels, parts), step) * step


def _dgrad_tile(target: str, x: Tensor, k: int, geometry: Geometry) -> tiles.Tile:
    stride, groups = geometry.stride, geometry.groups
    programs = stride[0] * stride[1] * groups
    return tiles.pick(
        target, _key("dgrad", x, target), _class_pixels(x, stride), x.shape[1] // groups, k // groups, programs
    )  # fmt: skip


def _class_pixels(x: Tensor, stride: Pair) -> int:
    """How many pixels of ``x`` one class of a strided dgrad has, see dgrad.py."""
    n, _, h, w = x.shape
    return n * forward.ceil_div(h, stride[0]) * forward.ceil_div(w, stride[1])


def _scaled(matrix: Tensor, dtype: torch.dtype, block: int) -> tuple[Tensor, Tensor]:
    """``[rows, columns]`` -> ``[columns, rows]`` in ``dtype``, divided by a power of two, rows padded with zeros to a
    multiple of ``block``; and the power of two.

    It brings the largest number to between a half and 1: float16 holds numbers below 6e-5 with fewer digits.
    """
    matrix = matrix.detach().float()
    largest = matrix.abs().amax().clamp(min=_SMALLEST)
    factor = largest / torch.frexp(largest).mantissa
    factor = torch.where(factor.isfinite(), factor, 1.0).reshape(1)
    packed = (matrix / factor).to(dtype).t()
    return forward.vector(F.pad(packed, (0, -packed.shape[1] % block))), forward.vector(factor)


def _geometry(stride: Pair, padding: Pair, dilation: Pair) -> dict[str, int]:
    return {
        "STRIDE_H": stride[0],
        "STRIDE_W": stride[1],
        "PAD_H": padding[0],
        "PAD_W": padding[1],
        "DILATION_H": dilation[0],
        "DILATION_W": dilation[1],
    }


def _constants(tile: tiles.Tile) -> dict[str, Any]:
    """Without SPLIT: no backward kernel finishes its tile in halves."""
    return {name: value for name, value in tile.constants().items() if name != "SPLIT"}


def _key(kernel: str, x: Tensor, target: str) -> str:
    """The name of a list of tiles."""
    return f"{kernel}_{forward.precision_of(x.dtype, target)}"


def _dot_precision(x: Tensor, target: str) -> str:
    return "tf32" if forward.precision_of(x.dtype, target) == "tf32" else "ieee"


def _nhwc(x: Optional[Tensor]) -> Optional[Tensor]:
    return None if x is None else forward.nhwc(x)


def _vector(v: Optional[Tensor]) -> Optional[Tensor]:
    return None if v is None else forward.vector(v)


def _vectors(affine: Optional[Affine]) -> tuple[Optional[Tensor], Optional[Tensor]]:
    return (None, None) if affine is None else (forward.vector(affine.scale), forward.vector(affine.shift))
