"""A residual block's training pass, composed of the primitives of ``kernels/reference/training.py``.

A chain is convolutions in a row, each followed by batch norm and, but for the last, ReLU; its tail adds a shortcut and
applies ReLU, or ReLU and a stem's max-pool. That is a residual block (He et al. 2015), or a stem. Forward writes every
convolution's raw result once; batch norm and ReLU are applied by whoever reads it. Kept for the backward pass are those
raw results and vectors of channels. Two kinds of layer keep less:

- **frozen**: batch norm by running statistics is part of the convolution; its result is kept, where the ReLU left it.
- **expand**: a 1x1 convolution to at least twice the channels, last in its chain or on the shortcut. Its statistics
  come from the mean and covariance of its *input* (``gram``), so that convolution, batch norm, shortcut and ReLU are
  one kernel, and its raw result, the widest tensor of the block, is neither written nor kept. Where the statistics
  lose too many digits that way, they are taken from the result, which backward then makes again.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Optional

import torch
import torch.distributed as dist
from torch import Tensor

from resnet_fast.kernels.contract import Case
from resnet_fast.kernels.reference.training import Affine, Gate, Geometry, Gradient, wide
from resnet_fast.ops.inference import conv_output

EXPANSION = 2
"""Expand layers have at least so many times as many output as input channels, and output pixels as output channels."""

MOST_CANCELLATION = 16.0
"""How many times smaller than for uncorrelated channels an expand layer's variances may be: see ``_from_gram``."""


class Layer(NamedTuple):
    """A convolution and its batch norm."""

    weight: Tensor  # [K, C/groups, R, S]
    scale: Tensor  # [K]: gamma, or with frozen statistics what the convolution's result is multiplied by
    shift: Tensor  # [K]: beta, or what is added then
    eps: float
    geometry: Geometry
    batch_statistics: bool


class Chain(NamedTuple):
    """The layers, and what is around them. With ``projection``, the last layer is the shortcut's."""

    layers: tuple[Layer, ...]
    identity: bool  # the shortcut is the chain's input
    projection: bool  # the shortcut is a convolution and batch norm, of the residual if there is one, else of the input
    relu: bool
    pool: bool  # a 3x3 max-pool of stride 2 follows the ReLU
    process_group: str  # over which batch statistics are taken; "": this process alone

    @property
    def main(self) -> tuple[Layer, ...]:
        return self.layers[:-1] if self.projection else self.layers


Pick = Callable[[Case], Any]
"""Gives the implementation of a primitive."""


class _Primitives:
    """The primitives by name, each run by the implementation that covers the case."""

    def __init__(self, pick: Pick) -> None:
        self._pick = pick

    def conv(self, name: str, x: Tensor, weight: Tensor, geometry: Geometry) -> Callable[..., Any]:
        channels = weight.shape[1] * geometry.groups, weight.shape[0]
        kernel = weight.shape[2], weight.shape[3]
        stride, padding, dilation, groups = geometry
        case = Case(name, x.device.type, x.dtype, *channels, kernel, stride, padding, dilation, groups)
        return getattr(self._pick(case), name)

    def pass_(self, name: str, x: Tensor) -> Callable[..., Any]:
        return getattr(self._pick(Case(name, x.device.type, x.dtype, x.shape[1], x.shape[1])), name)


def output_shape(shape: Any, layer: Layer) -> list[Any]:
    """``[N, K, P, Q]`` of a layer's result for an input of ``shape``."""
    return conv_output(shape, layer.weight.shape, *layer.geometry[:3])


def expands(chain: Chain, layer: Layer, x_shape: Any) -> bool:
    """Whether the layer, at the end of its chain or on the shortcut, takes its statistics from its input's.

    Before a pool, which reads raw results, none does.
    """
    if chain.pool or not layer.batch_statistics:
        return False
    k, c, r, s = layer.weight.shape
    n, _, p, q = output_shape(x_shape, layer)
    pointwise = r == 1 and s == 1 and layer.geometry.padding == (0, 0) and layer.geometry.groups == 1
    return pointwise and k >= EXPANSION * c and n * p * q >= EXPANSION * k


# --- batch norm -------------------------------------------------------------------------------------------------------


class _Norm(NamedTuple):
    """A batch norm's statistics, as backward needs them; ``count`` is the number of values a channel."""

    mean: Tensor
    rstd: Tensor
    affine: Affine
    count: Any  # a number, or with a process group a tensor of one


def _normalise(chain: Chain, layer: Layer, mean: Tensor, variance: Tensor, count: int) -> tuple[_Norm, Tensor]:
    """Batch norm from this process's statistics; and what its running statistics move towards, ``[2, K]``."""
    total: Any = count
    if chain.process_group:
        mean, variance, total = _joined(chain.process_group, mean, variance, count)
    rstd = torch.rsqrt(variance + layer.eps)
    scale = layer.scale * rstd
    norm = _Norm(mean, rstd, Affine(scale, layer.shift - mean * scale), total)
    return norm, torch.stack([mean, variance * (total / (total - 1))])


def _joined(group_name: str, mean: Tensor, variance: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Statistics over all processes, in the order of their ranks (Chan et al. 1979, pairwise sums of squares)."""
    group = dist.distributed_c10d._resolve_process_group(group_name)  # type: ignore[arg-type]
    mine = torch.cat([mean, variance, mean.new_tensor([count])])
    parts = mine.new_empty(dist.get_world_size(group), mine.numel())
    dist.all_gather(list(parts), mine, group)
    means, variances, counts = parts.split([mean.numel(), mean.numel(), 1], 1)
    total = counts.sum(0)
    share = counts / total
    joined = (means * share).sum(0)
    return joined, ((variances + (means - joined).square()) * share).sum(0), total


def _coefficients(chain: Chain, layer: Layer, norm: _Norm, total: Tensor, product: Tensor) -> tuple[Tensor, ...]:
    """``a``, ``b`` and ``c`` of batch norm's backward pass, over all processes."""
    if chain.process_group:
        group = dist.distributed_c10d._resolve_process_group(chain.process_group)  # type: ignore[arg-type]
        sums = torch.cat([total, product])
        dist.all_reduce(sums, group=group)
        total, product = sums.chunk(2)
    a = layer.scale * norm.rstd
    return a, a * norm.rstd.square() * product / norm.count, a * total / norm.count


# --- forward ----------------------------------------------------------------------------------------------------------


class _Image(NamedTuple):
    """A tensor, and what whoever reads it applies."""

    x: Tensor
    prologue: Optional[Affine] = None


class Result(NamedTuple):
    out: Tensor
    statistics: list[Tensor]  # [2, K] for each layer with batch statistics: mean and unbiased variance
    saved: list[Tensor]  # what backward needs beside inputs and result, in the order of ``saved_shapes``


def saved_shapes(chain: Chain, x: Any, residual: Any) -> list[Optional[Sequence[Any]]]:
    """Of ``Result.saved``, for inputs of these shapes: of images four numbers, of vectors fewer; None: a flag."""
    shapes: list[Optional[Sequence[Any]]] = []
    shape = x
    for i, layer in enumerate(chain.main):
        shapes += _layer_shapes(chain, layer, shape, last=i == len(chain.main) - 1)
        shape = output_shape(shape, layer)
    if chain.projection:
        shapes += _layer_shapes(chain, chain.layers[-1], x if residual is None else residual, last=True)
    return shapes


def _layer_shapes(chain: Chain, layer: Layer, x: Any, last: bool) -> list[Optional[Sequence[Any]]]:
    k, c = layer.weight.shape[:2]
    if not layer.batch_statistics:
        return [] if last else [output_shape(x, layer)]
    count: list[Optional[Sequence[Any]]] = [(1,)] if chain.process_group else []
    vectors: list[Optional[Sequence[Any]]] = [(k,), (k,), (k,), (k,), *count]
    if last and expands(chain, layer, x):
        return [*vectors, (c,), (c, c), None]
    return [*vectors, output_shape(x, layer)]


def _norm_tensors(chain: Chain, norm: _Norm) -> list[Tensor]:
    return [norm.mean, norm.rstd, *norm.affine, *([norm.count] if chain.process_group else [])]


def forward(chain: Chain, x: Tensor, residual: Optional[Tensor], pick: Pick) -> Result:
    """``x`` and ``residual`` in channels_last."""
    run = _Primitives(pick)
    statistics: list[Tensor] = []
    saved: list[Tensor] = []
    image = _Image(x)
    for layer in chain.main[:-1]:
        image = _inner(chain, layer, image, run, statistics, saved)

    last = chain.main[-1]
    shortcut: Optional[_Image] = None
    projection_statistics: list[Tensor] = []
    projection_saved: list[Tensor] = []
    if chain.projection:
        source = _Image(x if residual is None else residual)
        shortcut = _outer(chain, chain.layers[-1], source, run, projection_statistics, projection_saved)
    elif chain.identity:
        shortcut = _Image(x)
    elif residual is not None:
        shortcut = _Image(residual)

    if last.batch_statistics and not expands(chain, last, image.x.shape):
        y, norm = _raw(chain, last, image, run, statistics, saved)
        if chain.pool:
            out = run.pass_("tail_pool", y)(y, norm.affine)
        else:
            out = run.pass_("tail", y)(y, norm.affine, *(shortcut or (None, None)), chain.relu)
    else:
        affine = _affine(chain, last, image, run, statistics, saved)
        added = None if shortcut is None else _settled(shortcut, run)
        convolve = run.conv("conv_affine", image.x, last.weight, last.geometry)
        out = convolve(*image, last.weight, affine, added, last.geometry, chain.relu)
    return Result(out, statistics + projection_statistics, saved + projection_saved)


def _inner(
    chain: Chain, layer: Layer, image: _Image, run: _Primitives, statistics: list[Tensor], saved: list[Tensor]
) -> _Image:
    """A layer that a ReLU follows."""
    if layer.batch_statistics:
        y, norm = _raw(chain, layer, image, run, statistics, saved)
        return _Image(y, norm.affine)
    convolve = run.conv("conv_affine", image.x, layer.weight, layer.geometry)
    y = convolve(*image, layer.weight, Affine(layer.scale, layer.shift), None, layer.geometry, True)
    saved.append(y)
    return _Image(y)


def _outer(
    chain: Chain, layer: Layer, image: _Image, run: _Primitives, statistics: list[Tensor], saved: list[Tensor]
) -> _Image:
    """The shortcut's layer: ready, or its raw result with the batch norm still to be applied (without a ReLU)."""
    if layer.batch_statistics and not expands(chain, layer, image.x.shape):
        y, norm = _raw(chain, layer, image, run, statistics, saved)
        return _Image(y, norm.affine)
    affine = _affine(chain, layer, image, run, statistics, saved)
    convolve = run.conv("conv_affine", image.x, layer.weight, layer.geometry)
    return _Image(convolve(*image, layer.weight, affine, None, layer.geometry, False))


def _settled(shortcut: _Image, run: _Primitives) -> Tensor:
    if shortcut.prologue is None:
        return shortcut.x
    return run.pass_("tail", shortcut.x)(shortcut.x, shortcut.prologue, None, None, False)


def _raw(
    chain: Chain, layer: Layer, image: _Image, run: _Primitives, statistics: list[Tensor], saved: list[Tensor]
) -> tuple[Tensor, _Norm]:
    convolve = run.conv("conv_statistics", image.x, layer.weight, layer.geometry)
    y, mean, variance = convolve(*image, layer.weight, layer.geometry)
    norm, moved = _normalise(chain, layer, mean, variance, y.shape[0] * y.shape[2] * y.shape[3])
    statistics.append(moved)
    saved += [*_norm_tensors(chain, norm), y]
    return y, norm


def _affine(
    chain: Chain, layer: Layer, image: _Image, run: _Primitives, statistics: list[Tensor], saved: list[Tensor]
) -> Affine:
    """What an expand layer's or a frozen layer's result is multiplied by, and what is added."""
    if not layer.batch_statistics:
        return Affine(layer.scale, layer.shift)
    n, _, p, q = output_shape(image.x.shape, layer)
    input_mean, covariance = run.pass_("gram", image.x)(*image, layer.geometry.stride)
    mean, variance, cancels = _from_gram(layer, image.x, input_mean, covariance)
    if cancels:
        convolve = run.conv("conv_statistics", image.x, layer.weight, layer.geometry)
        _, mean, variance = convolve(*image, layer.weight, layer.geometry)
    norm, moved = _normalise(chain, layer, mean, variance, n * p * q)
    statistics.append(moved)
    saved += [*_norm_tensors(chain, norm), input_mean, covariance, cancels]
    return norm.affine


def _matrix(layer: Layer, x: Tensor) -> Tensor:
    """An expand layer's weight ``[K, C]`` as the convolution multiplies by it, in the precision of statistics."""
    return layer.weight.flatten(1).to(x.dtype).to(wide(x))


def _from_gram(layer: Layer, x: Tensor, input_mean: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and variance of a 1x1 convolution's result from those of its input; and whether that lost too many digits.

    The variance of ``w a`` is a sum of ``C^2`` terms ``w_i w_j cov_ij``, each off by about ``eps * |w_i w_j| * sqrt(
    cov_ii cov_jj)`` in either direction: together by ``eps * sum_i(w_i^2 cov_ii)``, which is eps times the variance
    for uncorrelated channels. If it is ``k`` times the variance, the result is off by ``k eps / 2`` of its deviation,
    and a convolution's rounding, which meets the same cancellation, by ``sqrt(k) eps``: twice that is reached at 16.
    """
    w = _matrix(layer, x)
    variance = ((w @ covariance) * w).sum(1).clamp_(min=0)
    uncorrelated = w.square() @ covariance.diagonal()
    cancels = (uncorrelated > MOST_CANCELLATION * (variance + layer.eps)).any()
    return w @ input_mean, variance, cancels


# --- backward ---------------------------------------------------------------------------------------------------------


class _Saved:
    """Reads ``Result.saved`` in order."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self._tensors = iter(tensors)

    def next(self) -> Tensor:
        return next(self._tensors)

    def norm(self, chain: Chain, count: int) -> _Norm:
        mean, rstd, scale, shift = (self.next() for _ in range(4))
        return _Norm(mean, rstd, Affine(scale, shift), self.next() if chain.process_group else count)


class _State(NamedTuple):
    """A layer, its input, and what forward kept of it."""

    layer: Layer
    image: _Image
    gate: Optional[Gate]  # of its input
    norm: Optional[_Norm] = None
    y: Optional[Tensor] = None  # its raw result, if that was kept
    gram: Optional[tuple[Tensor, Tensor, Tensor]] = None  # an expand layer's: see ``_affine``


class Wanted(NamedTuple):
    """Which gradients are asked for; those of layers by their number."""

    x: bool
    residual: bool
    weights: tuple[bool, ...]
    vectors: tuple[bool, ...]  # scale or shift


class Gradients(NamedTuple):
    x: Optional[Tensor]
    residual: Optional[Tensor]
    weights: list[Optional[Tensor]]
    scales: list[Optional[Tensor]]
    shifts: list[Optional[Tensor]]


def _states(chain: Chain, x: Tensor, residual: Optional[Tensor], saved: list[Tensor]) -> list[_State]:
    """Of all layers, the shortcut's last."""
    read = _Saved(saved)
    states = []
    image, gate = _Image(x), None
    for i, layer in enumerate(chain.main):
        last = i == len(chain.main) - 1
        state = _state(chain, layer, image, gate, read, last)
        states.append(state)
        if last:
            break
        if state.norm is not None:
            assert state.y is not None
            image, gate = _Image(state.y, state.norm.affine), Gate(state.norm.affine, state.norm.mean)
        else:
            image, gate = _Image(read.next()), Gate()
    if chain.projection:
        source = x if residual is None else residual
        states.append(_state(chain, chain.layers[-1], _Image(source), None, read, True))
    return states


def _state(chain: Chain, layer: Layer, image: _Image, gate: Optional[Gate], read: _Saved, last: bool) -> _State:
    if not layer.batch_statistics:
        return _State(layer, image, gate)
    n, _, p, q = output_shape(image.x.shape, layer)
    norm = read.norm(chain, n * p * q)
    if last and expands(chain, layer, image.x.shape):
        return _State(layer, image, gate, norm, None, (read.next(), read.next(), read.next()))
    return _State(layer, image, gate, norm, read.next())


def backward(
    chain: Chain,
    grad: Tensor,
    x: Tensor,
    residual: Optional[Tensor],
    out: Optional[Tensor],
    saved: list[Tensor],
    wanted: Wanted,
    pick: Pick,
) -> Gradients:
    """Gradients for ``x``, the residual and every layer's tensors. ``out``: forward's result, for the tail's ReLU."""
    pass_ = _Backward(chain, wanted, _Primitives(pick))
    states = _states(chain, x, residual, saved)
    main = states[: len(chain.main)]
    projection = states[-1] if chain.projection else None
    gradient, product = pass_.tail(main[-1], projection, grad, out)
    g = gradient.g

    # What the shortcut adds to the gradient of its source.
    if projection is not None:
        from_x = residual is None
        needed = wanted.x if from_x else wanted.residual
        back = pass_.layer(len(states) - 1, projection, Gradient(g, gradient.total, product), needed, None, keep=True)
        shortcut = None if back is None else back.g
    else:
        from_x = chain.identity
        shortcut = g if chain.identity or residual is not None else None

    d_x: Optional[Gradient] = gradient
    for i in reversed(range(len(main))):
        needed = wanted.x or any(wanted.weights[:i]) or any(wanted.vectors[:i])
        added = shortcut if i == 0 and from_x else None
        assert d_x is not None
        keep = d_x is gradient and (shortcut is g or g is grad)
        d_x = pass_.layer(i, main[i], d_x, needed, added, keep)
        if not needed:
            break
    return Gradients(
        None if d_x is None else d_x.g,
        shortcut if wanted.residual and not from_x else None,
        pass_.weights,
        pass_.scales,
        pass_.shifts,
    )


class _Backward:
    """Back through one part of a chain after the other; gathers the gradients of layers' tensors."""

    def __init__(self, chain: Chain, wanted: Wanted, run: _Primitives) -> None:
        count = len(chain.layers)
        self._chain, self._wanted, self._run = chain, wanted, run
        self.weights: list[Optional[Tensor]] = [None] * count
        self.scales: list[Optional[Tensor]] = [None] * count
        self.shifts: list[Optional[Tensor]] = [None] * count

    def tail(
        self, last: _State, projection: Optional[_State], grad: Tensor, out: Optional[Tensor]
    ) -> tuple[Gradient, Optional[Tensor]]:
        """The gradient of the tail's sum, with the products that raw results in it need."""
        if self._chain.pool:
            assert last.y is not None and last.norm is not None
            back = self._run.pass_("tail_pool_backward", last.y)
            return back(grad, last.y, last.norm.affine, last.norm.mean), None
        back = self._run.pass_("tail_backward", grad)
        return back(grad, out if self._chain.relu else None, *_raw_of(last), *_raw_of(projection))

    def layer(
        self, i: int, state: _State, gradient: Gradient, needed: bool, added: Optional[Tensor], keep: bool
    ) -> Optional[Gradient]:
        """From the gradient of batch norm's result to that of the layer's input plus ``added``, if that is needed.

        ``keep``: ``gradient.g`` is used again by others.
        """
        if state.norm is None:
            return self._frozen(i, state, gradient, needed, added)
        if state.gram is not None and not state.gram[2]:
            return self._expand(i, state, gradient, needed, added)
        y, product = state.y, gradient.product
        if y is None:
            convolve = self._run.conv("conv_statistics", state.image.x, state.layer.weight, state.layer.geometry)
            y = convolve(*state.image, state.layer.weight, state.layer.geometry)[0]
        if product is None:
            back = self._run.pass_("tail_backward", gradient.g)
            product = back(gradient.g, None, y, state.norm.mean, None, None)[0].product
        assert gradient.total is not None
        a, b, c = self._vectors(i, state, gradient.total, product)
        if not (needed or self._wanted.weights[i]):
            return None
        dy = self._run.pass_("bn_backward", y)(gradient.g, y, state.norm.mean, a, b, c, not keep)
        if self._wanted.weights[i]:
            self.weights[i] = self._wgrad(state, dy)
        return self._dgrad(state, dy, state.layer.weight, added) if needed else None

    def _vectors(self, i: int, state: _State, total: Tensor, product: Tensor) -> tuple[Tensor, ...]:
        assert state.norm is not None
        self.scales[i], self.shifts[i] = product * state.norm.rstd, total
        return _coefficients(self._chain, state.layer, state.norm, total, product)

    def _wgrad(self, state: _State, dy: Tensor) -> Tensor:
        wgrad = self._run.conv("wgrad", state.image.x, state.layer.weight, state.layer.geometry)
        return wgrad(dy, *state.image, state.layer.weight, state.layer.geometry)

    def _dgrad(self, state: _State, dy: Tensor, weight: Tensor, added: Optional[Tensor]) -> Gradient:
        dgrad = self._run.conv("dgrad", state.image.x, weight, state.layer.geometry)
        return dgrad(dy, weight, state.layer.geometry, state.image.x, state.gate, added)

    def _frozen(
        self, i: int, state: _State, gradient: Gradient, needed: bool, added: Optional[Tensor]
    ) -> Optional[Gradient]:
        """The result is ``conv(x, w) * scale + shift``: the gradient of scale is that of the scaled weight times w."""
        layer = state.layer
        scale = layer.scale.view(-1, 1, 1, 1)
        if self._wanted.weights[i] or self._wanted.vectors[i]:
            scaled = self._wgrad(state, gradient.g)
            self.weights[i] = scaled * scale
            self.scales[i] = (scaled * layer.weight.to(scaled.dtype)).sum((1, 2, 3))
            self.shifts[i] = gradient.total
        return self._dgrad(state, gradient.g, layer.weight * scale, added) if needed else None

    def _expand(
        self, i: int, state: _State, gradient: Gradient, needed: bool, added: Optional[Tensor]
    ) -> Optional[Gradient]:
        """With ``y = w x`` never read: ``sum(g y) = (g^T x) . w``, and ``dy``'s part in y is a product of x.

        ``dw = a g^T x - b (y - mean)^T x - c 1^T x`` and ``dx = g (a w) - x (w^T b w) - (c - b mean) w``, where ``1^T x
        = M m`` and ``(y - mean)^T x = M (w cov + (w m - mean) m^T)`` with the mean m and covariance of x.
        """
        layer, norm, x = state.layer, state.norm, state.image.x
        assert norm is not None and state.gram is not None and gradient.total is not None
        w, total = _matrix(layer, x), gradient.total
        input_mean, covariance, _ = state.gram
        gx = self._wgrad(state, gradient.g).flatten(1)
        product = (gx * w).sum(1) - norm.mean * total
        a, b, c = self._vectors(i, state, total, product)
        if self._wanted.weights[i]:
            n, _, p, q = output_shape(x.shape, layer)
            centred = w @ covariance + torch.outer(w @ input_mean - norm.mean, input_mean)
            dw = a[:, None] * gx - n * p * q * (b[:, None] * centred + torch.outer(c, input_mean))
            self.weights[i] = dw.view(layer.weight.shape)
        if not needed:
            return None
        dgrad = self._run.conv("dgrad_expand", x, layer.weight, layer.geometry)
        q_matrix, constant = w.T @ (b[:, None] * w), (c - b * norm.mean) @ w
        return dgrad(
            gradient.g, a[:, None] * w, q_matrix, constant, layer.geometry.stride, *state.image, state.gate, added
        )


def _raw_of(state: Optional[_State]) -> tuple[Optional[Tensor], Optional[Tensor]]:
    """A layer's raw result and mean, where it was kept."""
    if state is None or state.y is None or state.norm is None:
        return None, None
    return state.y, state.norm.mean
