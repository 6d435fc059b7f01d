"""The head of a classifier in one launch: global average pool and fully connected layer.

Motivation: the two are the last and smallest of a network's steps, and at batch 1 a launch takes longer than what it
does. So each program pools the channels that it then multiplies, and the pooled image is never written.

The price is reading again. A program makes BN classes of one image, for which it needs all of that image and BN rows of
the weight; so the image is read ``classes / BN`` times, and the weight once for every image. All but the first of these
reads come from the cache. They are bytes that two launches (pool.py, then a matrix product) would not read::

    again = (classes / BN - 1) * bytes of the images + (images - 1) * bytes of the weight

``plan_head`` fuses up to 8 MiB of them. At 4 TB/s from the cache, they would take two microseconds, about what
a second launch would cost; both are assumptions, nothing was measured. In float16 with 1000 classes and BN = 32:

    ResNet-18, 1 image      1.6 MB     ResNet-50, 1 image      6.2 MB    one launch
    ResNet-18, 128 images   330 MB     ResNet-50, 128 images  1320 MB    two launches

With few classes, as after fine-tuning, nothing of the images is read again: ResNet-50 with 10 classes takes one launch
up to 205 images.

There is no matrix product to speak of in one image times a matrix, so no tensor cores: products are made and added in
float32. Two launches use them, as the second is a 1x1 convolution of one pixel.
"""

from typing import Optional

from torch import Tensor

import triton
import triton.language as tl
from resnet_fast.kernels.triton import operands, pack, tiles
from resnet_fast.kernels.triton.forward import plan_conv_bn_act
from resnet_fast.kernels.triton.plan import Launch, Plan, ceil_div
from resnet_fast.kernels.triton.pool import plan_global_avg_pool

_TILE = (64, 32, 256, 8)  # pixels, classes, channels, warps: a 7x7 image in one step, on any GPU
_READ_AGAIN = 8 * 2**20  # bytes up to which the head is one launch


@triton.jit(do_not_specialize=["PIXELS"])
def head_kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
    y_ptr,
    PIXELS,
    C: tl.constexpr,
    K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    INDEX64: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BC: tl.constexpr,
):
    """``y = mean(x, pixels) @ w.T + bias``, the mean rounded to the dtype of x, as a pool of its own rounds it.

    x [N, PIXELS, C]; w [K, C] of the same dtype; bias [K] float32 or None; y [N, K].

    Program (j, n) makes classes j * BN to (j + 1) * BN of image n. It walks over the channels, BC at a time: adds up
    their pixels, BM at a time; multiplies with the weight; and keeps the products apart until the end, so that only one
    sum goes across threads. The order is fixed.
    """
    image = tl.program_id(1)
    classes = tl.program_id(0) * BN + tl.arange(0, BN)
    class_mask = classes < K
    pixels = tl.arange(0, BM)
    if INDEX64:
        image = image.to(tl.int64)
    x_ptr += image * PIXELS * C
    products = tl.zeros((BN, BC), tl.float32)
    for first_channel in range(0, C, BC):
        channels = first_channel + tl.arange(0, BC)
        w_mask = class_mask[:, None]
        if C % BC != 0:
            w_mask = w_mask & (channels < C)[None, :]
        w = tl.load(w_ptr + (classes * C)[:, None] + channels[None, :], mask=w_mask, other=0.0)
        total = tl.zeros((BM, BC), tl.float32)
        for first in range(0, PIXELS, BM):
            x_mask = (first + pixels < PIXELS)[:, None]
            if C % BC != 0:
                x_mask = x_mask & (channels < C)[None, :]
            x = tl.load(x_ptr + ((first + pixels) * C)[:, None] + channels[None, :], mask=x_mask, other=0.0)
            total += x.to(tl.float32)
        mean = (tl.sum(total, axis=0) / PIXELS).to(x_ptr.dtype.element_ty).to(tl.float32)
        products += w.to(tl.float32) * mean[None, :]
    y = tl.sum(products, axis=1)
    if HAS_BIAS:
        y += tl.load(bias_ptr + classes, mask=class_mask, other=0.0)
    tl.store(y_ptr + image * K + classes, y.to(y_ptr.dtype.element_ty), mask=class_mask)


def head(x: Tensor, weight: Tensor, bias: Optional[Tensor], target: str) -> Tensor:
    """See ``reference.head``."""
    y = plan_head(x, weight, bias, target).run()
    return y.squeeze_(3).squeeze_(2)  # not a view, which autograd would not let the caller change in place


def plan_head(x: Tensor, weight: Tensor, bias: Optional[Tensor], target: str) -> Plan:
    """In one launch or two; leaves ``[N, K, 1, 1]``."""
    x = operands.nhwc(x)
    n, c, h, w = x.shape
    k = weight.shape[0]
    bm, bn, bc, warps = _TILE
    read_again = (ceil_div(k, bn) - 1) * x.nbytes + (n - 1) * k * c * x.element_size()
    if read_again > _READ_AGAIN:
        pool = plan_global_avg_pool(x, target)
        ones, zeros = pack.constants(weight)
        conv = plan_conv_bn_act(
            pool.result, pack.as_conv(weight), ones, zeros if bias is None else pack.vector(bias), None,
            (1, 1), (0, 0), (1, 1), 1, False, target,
        )  # fmt: skip
        return Plan((*pool.launches, *conv.launches), conv.result)
    y = operands.allocate(x, (n, k, 1, 1))
    bn = min(bn, max(16, tiles.power_of_two(k)))
    bc = min(bc, max(16, tiles.power_of_two(c)))
    launch = Launch(
        head_kernel,
        (ceil_div(k, bn), n),
        (x, pack.matrix(weight, x.dtype), None if bias is None else pack.vector(bias), y, h * w),
        {
            "C": c,
            "K": k,
            "HAS_BIAS": bias is not None,
            "INDEX64": operands.index64(x, y),
            "BM": bm,
            "BN": bn,
            "BC": bc,
            "num_warps": warps,
        },
    )
    return Plan((launch,), y)
