"""CPU, float32: the convolutions of a training step, forward and back to their input, on the kernels of inference.

The gradient of a convolution's input is a convolution of the result's gradient, with the weight's channels exchanged
and its taps from the last to the first. With a stride, pixels that are congruent to each other see the same taps, every
``stride``-th one, and are a small convolution of their own (``_parts``): nothing is multiplied by a zero. Or Winograd's
algorithm makes all of them at once (``_upsampling``).

A step reads every weight once forward and once back, and then changes it: packs are made anew for every call, in memory
that is kept.
"""

import ctypes
import functools
import itertools
import os
import platform
import threading
from ctypes import c_void_p
from typing import NamedTuple, Optional

import torch
from torch import Tensor

from resnet_fast.kernels.contract import Affine, BatchNorm, Case, Gate, Geometry, Gradient, Pair, nhwc
from resnet_fast.kernels.native import abi, library, passes, planner
from resnet_fast.kernels.native.abi import ALGORITHMS, NOWHERE, Op, Ref, Shape
from resnet_fast.kernels.native.inference import conv_shape, refusal
from resnet_fast.kernels.native.passes import tail, tail_backward, tail_pool, tail_pool_backward
from resnet_fast.kernels.native.wgrad import gram, wgrad
from resnet_fast.kernels.native.wgrad import refusal as wgrad_refusal
from resnet_fast.kernels.reference.training import coefficients, normalised

_FORWARD = ("conv_statistics", "conv_affine")
_BACKWARD = ("dgrad", "dgrad_expand")
_WEIGHTS = [function.__name__ for function in (gram, wgrad)]
_PASSES = ["bn_backward", *(one.__name__ for one in (tail, tail_pool, tail_backward, tail_pool_backward))]

__all__ = [*_FORWARD, *_BACKWARD, *_WEIGHTS, *_PASSES, "supports"]


def supports(case: Case) -> Optional[str]:
    """None if this implementation covers the case, else the reason why not."""
    if case.op in _WEIGHTS:
        return wgrad_refusal(case)
    if case.op in _PASSES:
        return passes.refusal(case)
    if case.op not in (*_FORWARD, *_BACKWARD):
        return f"no {case.op}"
    reason = refusal(case, [torch.float32])
    if reason is not None:
        return reason
    if case.op in _BACKWARD and any(step > 1 and spread > 1 for step, spread in zip(case.stride, case.dilation)):
        return "no gradient through a stride and a dilation at once"
    return library.unavailable()


# --- forward ----------------------------------------------------------------------------------------------------------


def conv_statistics(
    x: Tensor, prologue: Optional[Affine], weight: Tensor, geometry: Geometry, norm: Optional[BatchNorm] = None
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``reference_training.conv_statistics``."""
    shape = conv_shape(x.shape, weight.shape, *geometry, False, False)
    y = _convolve(shape, x, weight, prologue=prologue)
    statistics = passes.statistics(y)
    return (y, *statistics) if norm is None else (y, *normalised(*statistics, norm, y.numel() // y.shape[1]))


def conv_affine(
    x: Tensor,
    prologue: Optional[Affine],
    weight: Tensor,
    affine: Affine,
    residual: Optional[Tensor],
    geometry: Geometry,
    relu: bool,
) -> Tensor:
    """As ``reference_training.conv_affine``. The scale is multiplied into the weight."""
    shape = conv_shape(x.shape, weight.shape, *geometry, relu, False)
    return _convolve(shape, x, weight, affine.scale, affine.shift, residual, prologue=prologue)


# --- backward ---------------------------------------------------------------------------------------------------------


def bn_backward(
    g: Tensor, y: Tensor, vectors: Tensor, total: Tensor, product: Tensor, count: int, overwrite: bool
) -> tuple[Tensor, Tensor]:
    """As ``reference_training.bn_backward``."""
    mean, rstd, scale, _ = vectors.unbind(0)
    slopes = coefficients(rstd, scale, total, product, count)
    return passes.bn_gradient(g, y, mean, *slopes, overwrite), product * rstd


def dgrad(
    dy: Tensor, weight: Tensor, geometry: Geometry, x: Tensor, gate: Optional[Gate], residual: Optional[Tensor]
) -> Gradient:
    """As ``reference_training.dgrad``."""
    parts = _parts(dy.shape, weight.shape, geometry, x.shape)
    whole = _upsampling(dy.shape, weight.shape, geometry, x.shape)
    if whole is not None and _seconds(whole) < sum(_seconds(part.shape) for part in parts):
        return passes.gate(_convolve(whole, dy, weight, residual=residual, backward=True), x, gate, None)
    if geometry.stride == (1, 1):
        (part,) = parts
        return passes.gate(_convolve(part.shape, dy, weight, residual=residual, backward=True), x, gate, None)
    everywhere = sum(part.shape.p * part.shape.q for part in parts) == x.shape[2] * x.shape[3]
    dx = (torch.empty_like if everywhere else torch.zeros_like)(x, memory_format=torch.channels_last)
    for part in parts:
        _convolve(part.shape, dy, weight[part.taps], out=dx, pixels=part.pixels, backward=True)
    return passes.gate(dx, x, gate, residual)


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
    """As ``reference_training.dgrad_expand``: two products, the second one added to the first in its place."""
    dense, (k, channels) = stride == (1, 1), weight.shape
    shape = conv_shape(x.shape, (channels, channels, 1, 1), stride, (0, 0), (1, 1), 1, False, False)
    minus_q = -q.t().unsqueeze(2).unsqueeze(3)
    rows = _convolve(shape, x, minus_q, shift=-c, residual=residual if dense else None, prologue=prologue)
    weight = weight.view(k, channels, 1, 1)
    (part,) = _parts(g.shape, weight.shape, Geometry(), rows.shape)
    _convolve(part.shape, g, weight, residual=rows, out=rows, backward=True)
    if dense:
        return passes.gate(rows, x, gate, None)
    dx = torch.zeros_like(x, memory_format=torch.channels_last)
    dx[:, :, :: stride[0], :: stride[1]] = rows
    return passes.gate(dx, x, gate, residual)


def _upsampling(dy: torch.Size, weight: torch.Size, geometry: Geometry, x: torch.Size) -> Optional[Shape]:
    """The gradient as one convolution, where Winograd's algorithm goes back through a stride of 2."""
    if geometry.stride != (2, 2) or geometry.padding != (1, 1):
        return None
    (n, k, p, q), (_, c, h, w) = dy, x
    sizes = (n, p, q, k, h, w, c, *weight[2:], -2, -2, 0, 0, *geometry.dilation)
    shape = Shape(abi.FLOAT32, *sizes, geometry.groups, 0, 0)
    return shape if planner.supports(shape, "winograd4") else None


def _seconds(shape: Shape) -> float:
    threads = torch.get_num_threads()
    return planner.estimate(shape, planner.choose_native(shape, threads), threads)


class _Part(NamedTuple):
    """Some pixels of a convolution's input, and the convolution that makes their gradient of the result's."""

    pixels: tuple[slice, slice]
    taps: tuple[slice, ...]  # of the weight
    shape: Shape


def _parts(dy: torch.Size, weight: torch.Size, geometry: Geometry, x: torch.Size) -> list[_Part]:
    """The pixels of ``x`` in classes that see the same taps; without those that see none, whose gradient is 0."""
    (n, k, p, q), c, dilation, every = dy, x[1], geometry.dilation, slice(None)
    axes = zip(x[2:], weight[2:], geometry.stride, geometry.padding, dilation)
    high, wide = (_phases(*axis) for axis in axes)
    parts = []
    for i, j in itertools.product(high, wide):
        sizes = (n, p, q, k, i.size, j.size, c, i.window, j.window, 1, 1, i.padding, j.padding, *dilation)
        shape = Shape(abi.FLOAT32, *sizes, geometry.groups, 0, 0)
        parts.append(_Part((i.pixels, j.pixels), (every, every, i.taps, j.taps), shape))
    return parts


class _Phase(NamedTuple):
    """A ``_Part`` along one axis."""

    pixels: slice
    taps: slice
    size: int  # pixels
    window: int  # taps
    padding: int  # before the first result


def _phases(size: int, window: int, stride: int, padding: int, dilation: int) -> list[_Phase]:
    """Result ``p`` sees pixel ``i`` through tap ``t`` where ``i = p * stride - padding + t * dilation``.

    With a stride there is no dilation: pixel ``first + stride * j`` is seen through every ``stride``-th tap from
    ``(first + padding) % stride`` on, by a result one further back each time. With a stride of 1, all pixels are one
    class, seen through all taps by results ``dilation`` further back each time.
    """
    phases = []
    for first in range(min(stride, size)):
        back, tap = divmod(first + padding, stride)
        taps = len(range(tap, window, stride))
        if taps:
            count = len(range(first, size, stride))
            before = dilation * (taps - 1) - back
            phases.append(_Phase(slice(first, None, stride), slice(tap, None, stride), count, taps, before))
    return phases


# --- shared -----------------------------------------------------------------------------------------------------------


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # mallopt(3)
_MOST = 2**31 - 1  # an int


@functools.cache
def _keep_freed() -> None:
    """Have the process keep the memory that it frees, as a training step needs the same again.

    glibc maps every image of 32 MiB and more anew and hands it back at once, and of smaller ones all beyond 64 MiB.
    New pages cost a fault and are filled with zeros first: a tenth of a step of ResNet-50 at batch 16. What the user
    has set in the environment stands.
    """
    chosen = any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ)
    if platform.libc_ver()[0] == "glibc" and not chosen:
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, _MOST)
        libc.mallopt(_M_TRIM_THRESHOLD, _MOST)


class _Memory(threading.local):
    """For packs: one thread's, as large as its largest."""

    def __init__(self) -> None:
        self.packed = torch.empty(0, dtype=torch.uint8)


_memory = _Memory()


def _convolve(
    shape: Shape,
    x: Tensor,
    weight: Tensor,
    scale: Optional[Tensor] = None,
    shift: Optional[Tensor] = None,
    residual: Optional[Tensor] = None,
    *,
    prologue: Optional[Affine] = None,
    out: Optional[Tensor] = None,
    pixels: Optional[tuple[slice, slice]] = None,
    backward: bool = False,
) -> Tensor:
    """The convolution that ``shape`` describes; with ``backward``, of a gradient.

    ``out`` is what is returned: it may be the residual, and where ``pixels`` are named, the result is these pixels of
    it, and there is no residual.
    """
    _keep_freed()
    threads = torch.get_num_threads()
    algorithm = planner.choose_native(shape, threads)
    if prologue is not None and algorithm not in abi.ACTIVATING:
        x, prologue = passes.activate(x, prologue), None
    if out is not None and pixels is not None and algorithm not in abi.SPREADING:
        out[(..., *pixels)] = _convolve(shape, x, weight, scale, shift, prologue=prologue, backward=backward)
        return out
    x = nhwc(x)
    if out is None:
        size = (shape.n, shape.k, shape.p, shape.q)
        out = torch.empty(size, dtype=x.dtype, device="cpu", memory_format=torch.channels_last)
    packed = library.pack(shape, algorithm, weight.to(x.dtype), scale, backward, threads, _memory.packed)
    _memory.packed = packed
    op = Op(abi.CONV, ALGORITHMS.index(algorithm), shape, 0, packed.data_ptr())
    shift = torch.zeros(shape.k, device="cpu") if shift is None else shift.to(x.dtype).contiguous()
    op.shift, op.x, op.y, op.residual = shift.data_ptr(), Ref(0, 0, 0), Ref(1, 0, 0), NOWHERE
    buffers = [x.data_ptr(), out.data_ptr()]
    if residual is not None:
        residual, op.residual = nhwc(residual), Ref(2, 0, 0)
        buffers.append(residual.data_ptr())
    if prologue is not None:
        prologue = Affine(*(vector.to(x.dtype).contiguous() for vector in prologue))
        op.x_scale, op.x_shift = prologue.scale.data_ptr(), prologue.shift.data_ptr()
    if pixels is not None:
        rows, columns = pixels
        _, _, op.y_h, op.y_w = out.shape
        op.step_h, op.step_w = rows.step, columns.step
        op.y.offset = (rows.start * op.y_w + columns.start) * shape.k * out.element_size()
    library.run((Op * 1)(op), 1, (c_void_p * len(buffers))(*buffers), threads)
    return out
