"""The gradient of a convolution's input, as an implicit matrix product in NHWC.

Tap (r, s) took the input pixel (h, w) to the output pixel (p, q) with ``p * stride = h + padding - r * dilation``. So a
pixel of the gradient is a sum over the taps for which that division comes out even: of ``dy`` at (p, q), times the
weight with its two numbers of channels exchanged. It reads like ``conv.py``'s convolution, backwards.

Stride: which taps divide evenly depends on (h modulo stride, w modulo stride) alone. So the pixels are sorted into
these classes, the second axis of the grid, and each class runs over its own taps only: with a 3x3 kernel and stride 2
that is 1, 2, 2 and 4 of the 9. Trying all taps for all pixels would compute four products and use one.

Within a class, taps are STEP apart and each moves p by the same whole number of rows, so that one scalar, ``dy_step``,
moves the whole tile of pointers, as in the forward pass.

Expand: a 1x1 convolution whose batch norm's statistics came from its input's covariance has no result to go back
through. The gradient is ``dy weight - a q - c`` instead, with ``a = prologue(x)``: a second matrix product into the
same accumulators, before the first one. Both matrices may be small numbers, for which float16 has few digits, so they
come multiplied by a power of two, which is taken out of the accumulators in between and at the end.
"""

import math
from typing import NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

import triton
import triton.language as tl
from resnet_fast.kernels.contract import Affine, Gate, Geometry, Gradient, Pair
from resnet_fast.kernels.triton import device, operands, pack, tiles
from resnet_fast.kernels.triton.gradient_epilogue import finish_gradient, plan_sum_rows
from resnet_fast.kernels.triton.plan import Launch, Plan, ceil_div
from resnet_fast.kernels.triton.prologue import activate, add_product, load_affine

_SMALLEST = 2.0**-64  # of the largest numbers of dgrad_expand's matrices, which are made about 1


@triton.jit(do_not_specialize=["N", "H", "W", "P", "Q"])
def dgrad_kernel(
    dy_ptr,
    w_ptr,
    x_ptr,
    residual_ptr,
    g_ptr,
    prologue_scale_ptr,
    prologue_shift_ptr,
    q_ptr,
    c_ptr,
    w_factor_ptr,
    q_factor_ptr,
    gate_scale_ptr,
    gate_shift_ptr,
    mean_ptr,
    sums_ptr,
    N,
    H,
    W,
    P,
    Q,
    C: tl.constexpr,
    K: tl.constexpr,
    GROUPS: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    STEP_H: tl.constexpr,
    STEP_W: tl.constexpr,
    EXPAND: tl.constexpr,
    PROLOGUE: tl.constexpr,
    FLIP: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    GATE: tl.constexpr,
    AFFINE: tl.constexpr,
    PRODUCT: tl.constexpr,
    PRECISION: tl.constexpr,
    INDEX64: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """``g = gate(conv^T(dy, w) + residual)``, or with EXPAND ``g = gate(dy w - prologue(x) q - c + residual)``.

    C and K count the channels of one group. dy [N, P, Q, GROUPS * K]; w [GROUPS * C, R, S, ceil(K / BK) * BK] and
    q [C, ceil(C / BK) * BK], zero beyond K and C, to be multiplied by w_factor and q_factor [1]; x, residual, g
    [N, H, W, GROUPS * C]; sums [1 or 2, tiles, GROUPS * C], see gradient_epilogue.py. STEP: taps from one of a class to
    its next.
    """
    COLUMN_TILES: tl.constexpr = (C + BN - 1) // BN
    BLOCKS: tl.constexpr = (K + BK - 1) // BK
    TAPS_H: tl.constexpr = (R + STEP_H - 1) // STEP_H
    TAPS_W: tl.constexpr = (S + STEP_W - 1) // STEP_W
    PIXEL: tl.constexpr = GROUPS * K
    # How far one tap of a class is from the next, in pixels of dy.
    MOVE_H: tl.constexpr = STEP_H * DILATION_H // STRIDE_H
    MOVE_W: tl.constexpr = STEP_W * DILATION_W // STRIDE_W
    CHECK_BOUNDS: tl.constexpr = R > 1 or S > 1 or PAD_H > 0 or PAD_W > 0
    BOUNDS_IN_BITS: tl.constexpr = TAPS_H * TAPS_W <= 32

    tile = tl.program_id(0)
    stride_class = tl.program_id(1)
    group = tl.program_id(2)
    columns = (tile % COLUMN_TILES) * BN + tl.arange(0, BN)
    channels = tl.arange(0, BK)
    dy_ptr += group * K
    w_ptr += group * (C * R * S * BLOCKS * BK)

    # The class's pixels: every STRIDE-th of the image. And its taps: the first, and how many.
    class_h = stride_class // STRIDE_W
    class_w = stride_class % STRIDE_W
    rows_h = (H + STRIDE_H - 1) // STRIDE_H
    rows_w = (W + STRIDE_W - 1) // STRIDE_W
    rows = (tile // COLUMN_TILES) * BM + tl.arange(0, BM)
    image = rows // (rows_h * rows_w)
    h = rows // rows_w % rows_h * STRIDE_H + class_h
    w_ = rows % rows_w * STRIDE_W + class_w
    row_mask = (rows < N * rows_h * rows_w) & (h < H) & (w_ < W)
    first_r = R
    for i in tl.static_range(R):
        first_r = tl.where((class_h + PAD_H - (R - 1 - i) * DILATION_H) % STRIDE_H == 0, R - 1 - i, first_r)
    first_s = S
    for j in tl.static_range(S):
        first_s = tl.where((class_w + PAD_W - (S - 1 - j) * DILATION_W) % STRIDE_W == 0, S - 1 - j, first_s)
    taps_h = (R - first_r + STEP_H - 1) // STEP_H
    taps_w = (S - first_s + STEP_W - 1) // STEP_W

    p = (h + PAD_H - first_r * DILATION_H) // STRIDE_H
    q = (w_ + PAD_W - first_s * DILATION_W) // STRIDE_W
    if INDEX64:
        image = image.to(tl.int64)
    row_offsets = ((image * H + h) * W + w_) * (GROUPS * C)
    if CHECK_BOUNDS and BOUNDS_IN_BITS:
        inside_bits = tl.zeros((BM,), tl.int32)
        for i in tl.static_range(TAPS_H):
            for j in tl.static_range(TAPS_W):
                above = p - i * MOVE_H
                before = q - j * MOVE_W
                inside = row_mask & (above >= 0) & (above < P) & (before >= 0) & (before < Q)
                inside_bits |= inside.to(tl.int32) << (i * TAPS_W + j)

    acc = tl.zeros((BN, BM) if FLIP else (BM, BN), tl.float32)
    if EXPAND:
        acc = _subtract_input(
            acc, x_ptr, prologue_scale_ptr, prologue_shift_ptr, q_ptr, c_ptr, tl.load(q_factor_ptr), row_offsets,
            row_mask, columns, taps_h * taps_w, C, PROLOGUE, FLIP, PRECISION, BM, BN, BK,
        )  # fmt: skip
        w_factor = tl.load(w_factor_ptr)
        acc = acc / w_factor

    dy_tile = dy_ptr + (((image * P + p) * Q + q) * PIXEL)[:, None] + channels[None, :]
    w_tile = w_ptr + (columns * (R * S * BLOCKS * BK))[None, :] + channels[:, None]
    w_tile += (first_r * S + first_s) * (BLOCKS * BK)
    i = 0
    j = 0
    first_channel = 0
    dy_step = 0
    w_step = 0
    for _ in range(taps_h * taps_w * BLOCKS):
        if not CHECK_BOUNDS:
            inside = row_mask
        elif BOUNDS_IN_BITS:
            inside = ((inside_bits >> (i * TAPS_W + j)) & 1) != 0
        else:
            above = p - i * MOVE_H
            before = q - j * MOVE_W
            inside = row_mask & (above >= 0) & (above < P) & (before >= 0) & (before < Q)
        dy_mask = inside[:, None]
        if K % BK != 0:
            dy_mask = dy_mask & (first_channel + channels < K)[None, :]
        dy = tl.load(dy_tile + dy_step, mask=dy_mask, other=0.0)
        if C % BN != 0:
            w = tl.load(w_tile + w_step, mask=(columns < C)[None, :], other=0.0)
        else:
            w = tl.load(w_tile + w_step)
        acc = add_product(acc, dy, w, FLIP, PRECISION)

        # To the next block of channels, or the class's next tap, or the first of its next row of taps.
        first_channel += BK
        dy_step += BK
        w_step += BK
        next_tap = first_channel == BLOCKS * BK
        first_channel = tl.where(next_tap, 0, first_channel)
        j = tl.where(next_tap, j + 1, j)
        dy_step -= tl.where(next_tap, MOVE_W * PIXEL + BLOCKS * BK, 0)
        w_step += tl.where(next_tap, (STEP_W - 1) * (BLOCKS * BK), 0)
        next_row = j == taps_w
        j = tl.where(next_row, 0, j)
        i = tl.where(next_row, i + 1, i)
        dy_step += tl.where(next_row, (taps_w * MOVE_W - MOVE_H * Q) * PIXEL, 0)
        w_step += tl.where(next_row, (STEP_H * S - taps_w * STEP_W) * (BLOCKS * BK), 0)

    if FLIP:
        acc = tl.trans(acc)
    if EXPAND:
        acc = acc * w_factor
    row_tiles = tl.num_programs(0) // COLUMN_TILES
    total_ptr = sums_ptr + (stride_class * row_tiles + tile // COLUMN_TILES) * (GROUPS * C)
    finish_gradient(
        acc, g_ptr, residual_ptr, x_ptr, gate_scale_ptr, gate_shift_ptr, mean_ptr,
        total_ptr, total_ptr + STRIDE_H * STRIDE_W * row_tiles * (GROUPS * C),
        row_offsets, row_mask, group * C + columns, columns < C,
        GROUPS * C, C % BN != 0, HAS_RESIDUAL, GATE, AFFINE, PRODUCT,
    )  # fmt: skip


@triton.jit
def _subtract_input(
    acc,
    x_ptr,
    scale_ptr,
    shift_ptr,
    q_ptr,
    c_ptr,
    q_factor,
    row_offsets,
    row_mask,
    columns,
    taps,
    C: tl.constexpr,
    PROLOGUE: tl.constexpr,
    FLIP: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """``acc - prologue(x) q * q_factor - c``, in the class of pixels that the convolution read: the one with a tap."""
    BLOCKS: tl.constexpr = (C + BK - 1) // BK
    channels = tl.arange(0, BK)
    x_tile = x_ptr + row_offsets[:, None] + channels[None, :]
    q_tile = q_ptr + (columns * (BLOCKS * BK))[None, :] + channels[:, None]
    for block in range(taps * BLOCKS):
        first = block * BK
        x_mask = row_mask[:, None]
        if C % BK != 0:
            x_mask = x_mask & (first + channels < C)[None, :]
        a = tl.load(x_tile + first, mask=x_mask, other=0.0)
        if PROLOGUE:
            scale, shift = load_affine(scale_ptr, shift_ptr, first + channels, C, C % BK != 0)
            a = activate(a, scale, shift, row_mask, False)
        if C % BN != 0:
            q = tl.load(q_tile + first, mask=(columns < C)[None, :], other=0.0)
        else:
            q = tl.load(q_tile + first)
        acc = add_product(acc, a, q, FLIP, PRECISION)
    c = tl.load(c_ptr + columns, mask=columns < C, other=0.0)
    c = tl.where(taps > 0, c, 0.0)
    return -acc * q_factor - (c[:, None] if FLIP else c[None, :])


def plan_dgrad(
    dy: Tensor,
    weight: Tensor,
    geometry: Geometry,
    x: Tensor,
    gate: Optional[Gate],
    residual: Optional[Tensor],
    target: str,
) -> Plan:
    k, c, groups = weight.shape[0], x.shape[1], geometry.groups
    merge = pack.merged(groups, max(c, k) // groups)
    geometry = geometry._replace(groups=groups // merge)
    tile = _tile(target, x, k, geometry)
    if groups == 1:
        exchanged = weight.transpose(0, 1)
    else:
        exchanged = weight.unflatten(0, (groups, k // groups)).transpose(1, 2).flatten(0, 1)
    packed = pack.weight(exchanged, x.dtype, groups, merge, tile.reduction)
    return _plan(dy, packed, weight.shape[2:], geometry, x, None, gate, residual, tile, target)


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
) -> Plan:
    """``weight`` and ``q`` are rounded to the dtype of ``x``, without loss of small numbers."""
    geometry = Geometry(stride)
    tile = _tile(target, x, weight.shape[0], geometry)
    packed, w_factor = _scaled(weight, x.dtype, tile.reduction)
    packed_q, q_factor = _scaled(q, x.dtype, tile.reduction)
    second = _Second(prologue, packed_q, operands.vector(c), w_factor, q_factor)
    return _plan(g, packed, (1, 1), geometry, x, second, gate, residual, tile, target)


class _Second(NamedTuple):
    """The second product of ``dgrad_expand``."""

    prologue: Optional[Affine]
    q: Tensor
    c: Tensor
    w_factor: Tensor
    q_factor: Tensor


def _plan(
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
) -> Plan:
    dy, x = operands.nhwc(dy), operands.nhwc(x)
    n, c, h, w = x.shape
    k, p, q = dy.shape[1:]
    stride, padding, dilation, groups = geometry
    classes = stride[0] * stride[1]
    row_tiles = ceil_div(_class_pixels(x, stride), tile.rows)
    g = operands.allocate(x, (n, c, h, w))
    prologue = None if second is None else second.prologue
    affine, mean = gate or (None, None)
    # A kernel does not read what is None, but without a gate it still computes where its row of sums would be.
    sums = g if gate is None else operands.allocate_floats(x, (1 if mean is None else 2, classes * row_tiles, c))
    launch = Launch(
        dgrad_kernel,
        (row_tiles * ceil_div(c // groups, tile.columns), classes, groups),
        (
            dy, packed, x, operands.nhwc(residual), g, *operands.vectors(prologue),
            *((None,) * 4 if second is None else second[1:]),
            *operands.vectors(affine), operands.vector(mean), sums, n, h, w, p, q,
        ),
        {
            "C": c // groups,
            "K": k // groups,
            "GROUPS": groups,
            "R": kernel[0],
            "S": kernel[1],
            **operands.window(stride, padding, dilation),
            "STEP_H": stride[0] // math.gcd(stride[0], dilation[0]),
            "STEP_W": stride[1] // math.gcd(stride[1], dilation[1]),
            "EXPAND": second is not None,
            "PROLOGUE": prologue is not None,
            "FLIP": operands.flip(prologue, x.dtype, target),
            "HAS_RESIDUAL": residual is not None,
            "GATE": gate is not None,
            "AFFINE": affine is not None,
            "PRODUCT": mean is not None,
            "PRECISION": device.dot_precision(x.dtype, target),
            "INDEX64": operands.index64(dy, x),
            **tile.constants(split=False),
        },
    )  # fmt: skip
    if gate is None:
        return Plan((launch,), Gradient(g))
    total = plan_sum_rows(sums, target)
    return Plan((launch, *total.launches), Gradient(g, *total.result))


def _tile(target: str, x: Tensor, k: int, geometry: Geometry) -> tiles.Tile:
    stride, groups = geometry.stride, geometry.groups
    programs = stride[0] * stride[1] * groups
    key = f"dgrad_{device.precision_of(x.dtype, target)}"
    return tiles.pick(target, key, _class_pixels(x, stride), x.shape[1] // groups, k // groups, programs)


def _class_pixels(x: Tensor, stride: Pair) -> int:
    """How many pixels of ``x`` one class has."""
    n, _, h, w = x.shape
    return n * ceil_div(h, stride[0]) * ceil_div(w, stride[1])


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
    return operands.vector(F.pad(packed, (0, -packed.shape[1] % block))), operands.vector(factor)
