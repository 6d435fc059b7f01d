"""The convolution of conv.py at stride 1, read through tensor descriptors.

Motivation, and programs that make several tiles each: see gemm_descriptor.py. Here the descriptor is the image's,
``[N, H, W, C]``, and does more: it also replaces the gathering and the padding.

A tile is no run of BM output pixels but a box of ``TN images x TH rows x TW pixels``, TN * TH * TW = BM. At stride 1,
what tap (r, s) needs for such a box is again a box of the same size, whose corner lies ``r * dilation - padding`` rows
and ``s * dilation - padding`` pixels further. One instruction fetches it. The corner may lie outside the image, with
negative coordinates even: what is outside arrives as zero, which is just what padding means.

    TH = 2, TW = 4, padding 1, the first tile of an image, tap (0, 0):    0 0 0 0      row -1, outside
                                                                          0 a b c      row 0, pixels -1 to 2

The price is that boxes seldom divide an image: what a box sticks out over is computed and not stored. With boxes over
several images the sides may be small, so that large batches have little of that (``box``).

The position in the loop over (r, s, block of channels) is carried in counters, as in conv.py. That loop is long, so
filling its pipeline anew for each tile matters less than in gemm_descriptor.py, and it is not flattened.
"""

import functools
import math

import triton
import triton.language as tl
from resnet_fast.kernels.triton import descriptor
from resnet_fast.kernels.triton.convolution import Convolution
from resnet_fast.kernels.triton.epilogue import finish_tile
from resnet_fast.kernels.triton.plan import Launch, Plan, ceil_div


@triton.jit(do_not_specialize=["N", "P", "Q"])
def conv_descriptor_kernel(
    x,
    w,
    scale_ptr,
    shift_ptr,
    residual_ptr,
    y_ptr,
    N,
    P,
    Q,
    C: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    RELU: tl.constexpr,
    PRECISION: tl.constexpr,
    INDEX64: tl.constexpr,
    SPECIALISE: tl.constexpr,
    TN: tl.constexpr,
    TH: tl.constexpr,
    TW: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """``y = relu(conv(x, w) * scale + shift + residual)`` at stride 1, in one group.

    x: descriptor of [N, H, W, C], tiles [TN, TH, TW, BK]. w: descriptor of [K, R * S * ceil(C / BK) * BK], zero beyond
    C, tiles [BN, BK]. scale, shift [K]; residual, y [N, P, Q, K]. Without HAS_RESIDUAL residual is not read.
    """
    COLUMN_TILES: tl.constexpr = (K + BN - 1) // BN
    BLOCKS: tl.constexpr = (C + BK - 1) // BK

    boxes_across = tl.cdiv(Q, TW)
    boxes_down = tl.cdiv(P, TH)
    tiles = tl.cdiv(N, TN) * boxes_down * boxes_across * COLUMN_TILES
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), warp_specialize=SPECIALISE):
        box = tile // COLUMN_TILES
        first_column = (tile % COLUMN_TILES) * BN
        left = (box % boxes_across) * TW
        box = box // boxes_across
        top = (box % boxes_down) * TH
        first_image = (box // boxes_down) * TN

        acc = tl.zeros((BM, BN), tl.float32)
        h = top - PAD_H
        w_ = left - PAD_W
        first_channel = 0
        for step in range(R * S * BLOCKS):
            x_tile = tl.reshape(x.load([first_image, h, w_, first_channel]), (BM, BK))
            w_tile = w.load([first_column, step * BK])
            acc = tl.dot(x_tile, w_tile.T, acc, input_precision=PRECISION)

            # To the next block of channels, or the next tap's first, or the next row of taps' first.
            first_channel += BK
            next_tap = first_channel == BLOCKS * BK
            first_channel = tl.where(next_tap, 0, first_channel)
            w_ = tl.where(next_tap, w_ + DILATION_W, w_)
            next_row = w_ == left - PAD_W + S * DILATION_W
            w_ = tl.where(next_row, left - PAD_W, w_)
            h = tl.where(next_row, h + DILATION_H, h)

        pixels = tl.arange(0, BM)
        n = first_image + pixels // (TH * TW)
        p = top + pixels // TW % TH
        q = left + pixels % TW
        row_mask = (n < N) & (p < P) & (q < Q)
        if INDEX64:
            n = n.to(tl.int64)
        rows = (n * P + p) * Q + q
        finish_tile(
            acc, y_ptr, residual_ptr, scale_ptr, shift_ptr, rows * K, row_mask, first_column,
            K, BM, BN, SPLIT, HAS_RESIDUAL, RELU,
        )  # fmt: skip


def plan_conv_descriptor(conv: Convolution) -> Plan:
    """A convolution of stride 1 in one group."""
    (n, c, h, w), (_, k, p, q), (r, s) = conv.x.shape, conv.y.shape, conv.kernel
    tile, (_, padding, dilation, _), numbers = conv.tile, conv.geometry, conv.numbers()
    sides = box(n, p, q, tile.rows)
    boxes = math.prod(ceil_div(size, side) for size, side in zip((n, p, q), sides))
    tf32 = numbers["PRECISION"] == "tf32"
    image = descriptor.describe(conv.x, (n, h, w, c), (*sides, tile.reduction), tf32)
    launch = Launch(
        conv_descriptor_kernel,
        (descriptor.programs(boxes * ceil_div(k, tile.columns), tile, conv.target, conv.x),),
        (image, descriptor.weight(conv.packed, tile, tf32), *conv.epilogue(), n, p, q),
        {
            "C": c,
            "K": k,
            "R": r,
            "S": s,
            "PAD_H": padding[0],
            "PAD_W": padding[1],
            "DILATION_H": dilation[0],
            "DILATION_W": dilation[1],
            **conv.constants(),
            **numbers,
            "SPECIALISE": tile.kernel == "specialised",
            "TN": sides[0],
            "TH": sides[1],
            "TW": sides[2],
            **tile.constants(),
        },
    )
    return Plan((launch,), conv.y, image=conv.image)


@functools.lru_cache(maxsize=4096)
def box(n: int, p: int, q: int, size: int) -> tuple[int, int, int]:
    """Images, rows and pixels of a box of ``size`` output pixels, which is a power of two, for ``[n, p, q]`` of them.

    The sides are powers of two as well. Of all such boxes, the one that covers the images with the fewest copies; of
    several, over the fewest images, then the squarest, as its neighbours then read most of the same pixels.
    56x56 at 128 pixels: 2 images of 8x8, nothing wasted; of a single image 8x16, an eighth wasted.
    """
    powers = [1 << i for i in range(size.bit_length())]
    boxes = [(size // (th * tw), th, tw) for th in powers for tw in powers if th * tw <= size]
    return min(boxes, key=lambda b: (-(-n // b[0]) * -(-p // b[1]) * -(-q // b[2]), b[0], max(b[1:])))
