"""The matrix product of gemm.py, read through tensor descriptors, by programs that make several tiles each.

Motivation: the pointer kernel spends most of its instructions on addresses: every thread computes one for each 16 bytes
that it copies. Since sm_90 a copy engine does that. A descriptor tells it the shape and the strides of a whole matrix;
a program then asks for ``x[first_row : first_row + BM, k : k + BK]`` by its corner, in one instruction of one thread.
What lies outside the matrix arrives as zero, so tails in rows, columns and channels need no masks.

A program that ends after one tile leaves its multiprocessor idle while it stores and while the next one fills its
pipeline. So as many programs as run side by side are started, and each goes through the tiles
``program, program + programs, ...``. The two loops, over tiles and over channels, are flattened into one, so that the
first copies for the next tile are under way while a tile is stored. Tiles that share rows of x have neighbouring
numbers, as in gemm.py.

With ``SPECIALISE`` (sm_100) the warps of a program share the work out: one does nothing but copies, one nothing but
matrix instructions, whose sums sm_100 keeps in a memory of their own, and the others finish the tile before, so that
the three overlap. Triton makes that of the very same source; the loops need no flattening then.

The result is stored, and the residual read, through pointers, by the epilogue of all convolutions.
"""

import triton
import triton.language as tl
from resnet_fast.kernels.triton import descriptor
from resnet_fast.kernels.triton.convolution import Convolution
from resnet_fast.kernels.triton.epilogue import finish_tile
from resnet_fast.kernels.triton.plan import Launch, Plan, ceil_div


@triton.jit(do_not_specialize=["M"])
def gemm_descriptor_kernel(
    x,
    w,
    scale_ptr,
    shift_ptr,
    residual_ptr,
    y_ptr,
    M,
    C: tl.constexpr,
    K: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    RELU: tl.constexpr,
    PRECISION: tl.constexpr,
    INDEX64: tl.constexpr,
    SPECIALISE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """``y = relu(x @ w.T * scale + shift + residual)``.

    x: descriptor of [M, C], tiles [BM, BK]. w: descriptor of [K, ceil(C / BK) * BK], zero beyond C, tiles [BN, BK].
    scale, shift [K]; residual, y [M, K]. Without HAS_RESIDUAL residual is not read.
    """
    COLUMN_TILES: tl.constexpr = (K + BN - 1) // BN
    BLOCKS: tl.constexpr = (C + BK - 1) // BK

    tiles = tl.cdiv(M, BM) * COLUMN_TILES
    for tile in tl.range(
        tl.program_id(0), tiles, tl.num_programs(0), flatten=not SPECIALISE, warp_specialize=SPECIALISE
    ):
        first_row = (tile // COLUMN_TILES) * BM
        first_column = (tile % COLUMN_TILES) * BN
        acc = tl.zeros((BM, BN), tl.float32)
        for block in range(BLOCKS):
            x_tile = x.load([first_row, block * BK])
            w_tile = w.load([first_column, block * BK])
            acc = tl.dot(x_tile, w_tile.T, acc, input_precision=PRECISION)

        rows = first_row + tl.arange(0, BM)
        row_mask = rows < M
        if INDEX64:
            rows = rows.to(tl.int64)
        finish_tile(
            acc, y_ptr, residual_ptr, scale_ptr, shift_ptr, rows * K, row_mask, first_column,
            K, BM, BN, SPLIT, HAS_RESIDUAL, RELU,
        )  # fmt: skip


def plan_gemm_descriptor(conv: Convolution) -> Plan:
    """A 1x1 convolution of stride 1 without padding or groups."""
    (n, c, h, w), k, tile = conv.x.shape, conv.y.shape[1], conv.tile
    rows, numbers = n * h * w, conv.numbers()
    work = ceil_div(rows, tile.rows) * ceil_div(k, tile.columns)
    tf32 = numbers["PRECISION"] == "tf32"
    image = descriptor.describe(conv.x, (rows, c), (tile.rows, tile.reduction), tf32)
    launch = Launch(
        gemm_descriptor_kernel,
        (descriptor.programs(work, tile, conv.target, conv.x),),
        (image, descriptor.weight(conv.packed, tile, tf32), *conv.epilogue(), rows),
        {"C": c, "K": k, **conv.constants(), **numbers, "SPECIALISE": tile.kernel == "specialised", **tile.constants()},
    )
    return Plan((launch,), conv.y, image=conv.image)
