"""The head of a classifier in one launch: global average pool and fully connected layer.

Motivation: the two are the last and smallest of a network's steps, and at batch 1 a launch takes longer than what it
does. So each program pools the channels that it then multiplies, and the pooled image is never written.

The price is reading again. A program makes BN classes of one image, for which it needs all of that image and BN rows of
the weight; so the image is read ``classes / BN`` times, and the weight once for every image. All but the first of these
reads come from the cache. They are bytes that two launches (pool.py, then a matrix product) would not read::

    again = (classes / BN - 1) * bytes of the images + (images - 1) * bytes of the weight

``launch.plan_head`` fuses up to 8 MiB of them. At 4 TB/s from the cache, they would take two microseconds, about what
a second launch would cost; both are assumptions, nothing was measured. In float16 with 1000 classes and BN = 32:

    ResNet-18, 1 image      1.6 MB     ResNet-50, 1 image      6.2 MB    one launch
    ResNet-18, 128 images   330 MB     ResNet-50, 128 images  1320 MB    two launches

With few classes, as after fine-tuning, nothing of the images is read again: ResNet-50 with 10 classes takes one launch
up to 205 images.

There is no matrix product to speak of in one image times a matrix, so no tensor cores: products are made and added in
float32. Two launches use them, as the second is a 1x1 convolution of one pixel.
"""

import triton
import triton.language as tl


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
