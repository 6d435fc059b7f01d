"""The definition of the primitives that training is made of, in plain PyTorch.

``resnet_fast/ops/block.py`` composes them into the forward and backward pass of a residual block. An
implementation (``triton.table``, ``native.training``) has the functions below, or those of them that its
``supports(case)`` covers (``case.op`` is the function's name), and is checked against these in float64.

Images are ``[N, C, H, W]`` in ``torch.channels_last``. What an image is followed by is not computed until it is read:
a convolution writes its **raw** result ``y``, and whoever reads it applies batch norm and ReLU on the way, as its
*prologue*: ``a = relu(y * scale + shift)``, in float32, rounded to the dtype of ``y``. Padding is zero after that.
Vectors of channels, statistics and gradients of weights are float32 (float64 for float64 images), sums of products at
least float32. ``weight`` has the dtype of ``x`` or is wider; it is rounded to the dtype of ``x``.

Batch norm's backward pass, for ``z = (y - mean) * rstd * gamma + beta`` over M values a channel and a gradient ``g`` of
z (Ioffe and Szegedy 2015, section 3): ``dbeta = total = sum(g)``, ``dgamma = rstd * product`` with ``product = sum(g *
(y - mean))``, and ``dy = a * g - b * (y - mean) - c`` with ``a = gamma * rstd``, ``b = a * rstd^2 * product / M``,
``c = a * total / M``. Nothing divides by gamma, which may be 0.
"""

from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_fast.kernels.contract import Affine, BatchNorm, Case, Gate, Geometry, Gradient, Pair, nhwc, wide

MOST_CANCELLATION = 16.0
"""How many times smaller than for uncorrelated channels an expand layer's variances may be: see ``gram_statistics``."""


def supports(case: Case) -> Optional[str]:
    """None: the definition covers every case."""
    return None


# --- forward ----------------------------------------------------------------------------------------------------------


def conv_statistics(
    x: Tensor, prologue: Optional[Affine], weight: Tensor, geometry: Geometry, norm: Optional[BatchNorm] = None
) -> tuple[Tensor, Tensor, Tensor]:
    """A convolution of ``prologue(x)``, and the statistics of its result as it is stored (rounded).

    Returns:
        ``y [N, K, P, Q]`` in the dtype of ``x``, ``mean [K]``, ``variance [K]`` (biased: divided by ``N * P * Q``);
        with ``norm``, which follows, ``y`` and what ``normalised`` makes of the other two.
    """
    y = _conv(activate(x, prologue), weight, geometry)
    values = y.to(wide(y))
    mean = values.mean((0, 2, 3))
    variance = (values - _channels(mean)).square().mean((0, 2, 3))
    return (y, mean, variance) if norm is None else (y, *normalised(mean, variance, norm, y[:, 0].numel()))


def normalised(mean: Tensor, variance: Tensor, norm: BatchNorm, count: Any) -> tuple[Tensor, Tensor]:
    """What a batch norm comes to with these statistics of ``count`` values a channel (a number, or a tensor of one).

    Returns:
        ``vectors [4, K]``: mean, rstd, and the scale and shift that it multiplies by and adds; and ``moments [2, K]``,
        towards which its running statistics move: mean and unbiased variance.
    """
    rstd = torch.rsqrt(variance + norm.eps)
    scale = (norm.scale * rstd).to(mean.dtype)
    vectors = torch.stack([mean, rstd, scale, (norm.shift - mean * scale).to(mean.dtype)])
    return vectors, torch.stack([mean, variance * (count / (count - 1))])


def gram(x: Tensor, prologue: Optional[Affine], stride: Pair) -> tuple[Tensor, Tensor]:
    """Mean and covariance of the channels of ``a = prologue(x)``, over every ``stride``-th pixel.

    They give the statistics of any 1x1 convolution of ``a`` with that stride: ``mean(w a) = w mean(a)`` and ``var(w a)
    = w cov(a) w^T``.

    Returns:
        ``mean [C]`` and ``covariance [C, C]`` (biased, symmetric).
    """
    a = activate(x, prologue)[:, :, :: stride[0], :: stride[1]]
    rows = a.permute(0, 2, 3, 1).reshape(-1, a.shape[1]).to(wide(x))
    mean = rows.mean(0)
    centred = rows - mean
    return mean, centred.T @ centred / rows.shape[0]


def expand_statistics(
    w: Tensor, input_mean: Tensor, covariance: Tensor, norm: BatchNorm, count: int
) -> tuple[Tensor, Tensor, Tensor]:
    """``normalised`` for a 1x1 convolution's result of ``count`` values, from its matrix ``w [K, C]`` and its input's
    ``gram``; and whether that lost too many digits (see ``gram_statistics``), a flag of no dimension."""
    mean, variance, cancels = gram_statistics(w, input_mean, covariance, norm.eps)
    return *normalised(mean, variance, norm, count), cancels


def gram_statistics(w: Tensor, input_mean: Tensor, covariance: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and variance of a 1x1 convolution's result from those of its input; and whether that lost too many digits.

    The variance of ``w a`` is a sum of ``C^2`` terms ``w_i w_j cov_ij``, each off by about ``eps * |w_i w_j| * sqrt(
    cov_ii cov_jj)`` in either direction: together by ``eps * sum_i(w_i^2 cov_ii)``, which is eps times the variance
    for uncorrelated channels. If it is ``k`` times the variance, the result is off by ``k eps / 2`` of its deviation,
    and a convolution's rounding, which meets the same cancellation, by ``sqrt(k) eps``: twice that is reached at 16.
    """
    variance = ((w @ covariance) * w).sum(1).clamp_(min=0)
    uncorrelated = w.square() @ covariance.diagonal()
    cancels = (uncorrelated > MOST_CANCELLATION * (variance + eps)).any()
    return w @ input_mean, variance, cancels


def conv_affine(
    x: Tensor,
    prologue: Optional[Affine],
    weight: Tensor,
    affine: Affine,
    residual: Optional[Tensor],
    geometry: Geometry,
    relu: bool,
) -> Tensor:
    """``relu(conv(prologue(x)) * scale + shift + residual)``: ``[N, K, P, Q]``, rounded once, at the end."""
    y = F.conv2d(activate(x, prologue), weight.to(x.dtype), None, *geometry)
    return tail(y, affine, residual, None, relu)


def tail(
    y: Tensor, affine: Affine, residual: Optional[Tensor], residual_affine: Optional[Affine], relu: bool
) -> Tensor:
    """``relu(y * scale + shift + residual)``, the residual through ``residual_affine`` first if that is given."""
    z = _apply(y, affine)
    if residual is not None:
        z = z + (residual if residual_affine is None else _apply(residual, residual_affine))
    return nhwc((F.relu(z) if relu else z).to(y.dtype))


def tail_pool(y: Tensor, affine: Affine) -> Tensor:
    """``max_pool2d(relu(y * scale + shift), 3, 2, 1)``: the stem's tail. NaN wins."""
    return nhwc(F.max_pool2d(activate(y, affine), 3, 2, 1))


# --- backward ---------------------------------------------------------------------------------------------------------


def tail_backward(
    grad: Tensor,
    out: Optional[Tensor],
    y: Optional[Tensor],
    mean: Optional[Tensor],
    residual: Optional[Tensor],
    residual_mean: Optional[Tensor],
) -> tuple[Gradient, Optional[Tensor]]:
    """Back through the ReLU of ``tail``: ``g = grad`` where ``out > 0``, else 0 (everywhere if ``out`` is None).

    Returns:
        ``Gradient`` with ``total``, and ``product`` against ``y`` if that is given; and the product against
        ``residual``, if that is given (a raw one).
    """
    g = nhwc(grad) if out is None else torch.ops.aten.threshold_backward(nhwc(grad), out, 0)
    values = g.to(wide(g))
    gradient = Gradient(g, values.sum((0, 2, 3)), None if y is None else _product(values, y, mean))
    return gradient, None if residual is None else _product(values, residual, residual_mean)


def tail_pool_backward(grad: Tensor, y: Tensor, affine: Affine, mean: Optional[Tensor]) -> Gradient:
    """Back through ``tail_pool``: of equal values in a window, the first in reading order gets the gradient.

    ``product`` is None if ``mean`` is.
    """
    a = activate(y, affine)
    _, indices = torch.ops.aten.max_pool2d_with_indices(a, [3, 3], [2, 2], [1, 1])
    g = torch.ops.aten.max_pool2d_with_indices_backward(nhwc(grad), a, [3, 3], [2, 2], [1, 1], [1, 1], False, indices)
    return _gated(g, y, Gate(affine, mean))


def bn_backward(
    g: Tensor, y: Tensor, vectors: Tensor, total: Tensor, product: Tensor, count: int, overwrite: bool
) -> tuple[Tensor, Tensor]:
    """``dy`` and ``dgamma``, as above. ``vectors``: those of ``normalised``; ``count``: M.

    ``dy`` may be written over ``g`` and be it if ``overwrite``.
    """
    mean, rstd, scale, _ = vectors
    return bn_gradient(g, y, mean, *coefficients(rstd, scale, total, product, count)), product * rstd


def coefficients(
    rstd: Tensor, scale: Tensor, total: Tensor, product: Tensor, count: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """``a``, ``b`` and ``c`` of batch norm's backward pass; ``scale`` is ``a``: ``gamma * rstd``."""
    return scale, scale * rstd.square() * product / count, scale * total / count


def bn_gradient(g: Tensor, y: Tensor, mean: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """``a * g - b * (y - mean) - c``."""
    centred = y.to(wide(y)) - _channels(mean)
    return (_channels(a) * g - _channels(b) * centred - _channels(c)).to(g.dtype)


def dgrad(
    dy: Tensor, weight: Tensor, geometry: Geometry, x: Tensor, gate: Optional[Gate], residual: Optional[Tensor]
) -> Gradient:
    """The gradient of a convolution's input ``x``, plus ``residual``, through ``gate``.

    Without a gate neither ``total`` nor ``product`` is computed; with one whose mean is None, only ``total``.
    """
    dx, _, _ = torch.ops.aten.convolution_backward(
        dy, x, weight.to(dy.dtype), None, *geometry[:3], False, [0, 0], geometry.groups, [True, False, False]
    )
    return _gated(dx if residual is None else dx + residual, x, gate)


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
    """``g weight - a q - c`` at every ``stride``-th pixel and 0 elsewhere, plus ``residual``, through ``gate``.

    With ``a = prologue(x)``: the gradient of the input of a 1x1 convolution and the batch norm after it, from the
    gradient of the batch norm's result and without the convolution's. ``weight [K, C]``, ``q [C, C]``, ``c [C]``.
    """
    a = activate(x, prologue)[:, :, :: stride[0], :: stride[1]]
    rows = torch.einsum("nkpq,kc->ncpq", g.to(wide(x)), weight.to(wide(x)))
    rows = rows - torch.einsum("ncpq,cd->ndpq", a.to(wide(x)), q) - _channels(c)
    dx = torch.zeros_like(x, dtype=rows.dtype)
    dx[:, :, :: stride[0], :: stride[1]] = rows
    return _gated((dx if residual is None else dx + residual).to(x.dtype), x, gate)


def expand_backward(
    gx: Tensor, w: Tensor, input_mean: Tensor, covariance: Tensor, vectors: Tensor, total: Tensor, count: int
) -> tuple[Tensor, ...]:
    """Back through a 1x1 convolution and its batch norm, but for what is as large as an image.

    With ``y = w x`` never read: ``sum(g y) = (g^T x) . w``, and ``dy``'s part in y is a product of x.

    ``dw = a g^T x - b (y - mean)^T x - c 1^T x`` and ``dx = g (a w) - x (w^T b w) - (c - b mean) w``, where ``1^T x = M
    m`` and ``(y - mean)^T x = M (w cov + (w m - mean) m^T)`` with the mean m and covariance of x.

    gx: ``g^T x``, as ``wgrad`` gives it. w: the matrix ``[K, C]``. vectors: those of ``normalised``. count: M.

    Returns:
        ``dw [K, C, 1, 1]``, ``dgamma [K]``, and of dx ``a w [K, C]``, ``w^T b w [C, C]`` and ``(c - b mean) w [C]``.
    """
    mean, rstd, scale, _ = vectors
    product = (gx.flatten(1) * w).sum(1) - mean * total
    slopes = coefficients(rstd, scale, total, product, count)
    return expand_gradients(gx, w, input_mean, covariance, mean, *slopes, count, product * rstd)


def expand_gradients(
    gx: Tensor,
    w: Tensor,
    input_mean: Tensor,
    covariance: Tensor,
    mean: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    count: int,
    dgamma: Tensor,
) -> tuple[Tensor, ...]:
    """``expand_backward`` by the batch norm's ``a``, ``b`` and ``c``."""
    centred = w @ covariance + torch.outer(w @ input_mean - mean, input_mean)
    dw = a[:, None] * gx.flatten(1) - count * (b[:, None] * centred + torch.outer(c, input_mean))
    return dw.view(gx.shape), dgamma, a[:, None] * w, w.T @ (b[:, None] * w), (c - b * mean) @ w


def wgrad(dy: Tensor, x: Tensor, prologue: Optional[Affine], weight: Tensor, geometry: Geometry) -> Tensor:
    """The gradient of ``weight [K, C/groups, R, S]`` (of which only the shape is read), in float32."""
    a = activate(x, prologue)
    _, dw, _ = torch.ops.aten.convolution_backward(
        dy, a, weight.to(dy.dtype), None, *geometry[:3], False, [0, 0], geometry.groups, [False, True, False]
    )
    return dw.to(wide(x))


# --- shared -----------------------------------------------------------------------------------------------------------


def activate(x: Tensor, affine: Optional[Affine]) -> Tensor:
    """What a prologue makes of ``x``: ``relu(x * scale + shift)`` in the dtype of ``x``; ``x`` itself without one."""
    return x if affine is None else nhwc(F.relu(_apply(x, affine)).to(x.dtype))


def _apply(x: Tensor, affine: Affine) -> Tensor:
    return x.to(affine.scale.dtype) * _channels(affine.scale) + _channels(affine.shift)


def _gated(dx: Tensor, x: Tensor, gate: Optional[Gate]) -> Gradient:
    if gate is None:
        return Gradient(nhwc(dx))
    g = torch.ops.aten.threshold_backward(nhwc(dx), activate(x, gate.affine), 0)
    values = g.to(wide(g))
    return Gradient(g, values.sum((0, 2, 3)), None if gate.mean is None else _product(values, x, gate.mean))


def _product(g: Tensor, y: Tensor, mean: Optional[Tensor]) -> Tensor:
    assert mean is not None
    return (g * (y.to(g.dtype) - _channels(mean))).sum((0, 2, 3))


def _conv(x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    return nhwc(F.conv2d(x, weight.to(x.dtype), None, *geometry))


def _channels(vector: Tensor) -> Tensor:
    return vector.view(1, -1, 1, 1)
