"""The backward pass of a residual block: see ``block.py``."""

from typing import NamedTuple, Optional

from torch import Tensor

from resnet_fast.kernels.contract import Gate, Gradient
from resnet_fast.kernels.reference.training import coefficients, expand_gradients
from resnet_fast.ops.block import Block, Image, Layer, Norm, Pick, Primitives, expands, matrix, norm_of, output_shape
from resnet_fast.ops.block_norm import means


class _Saved:
    """Reads what forward kept, in order."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self._tensors = iter(tensors)

    def next(self) -> Tensor:
        return next(self._tensors)

    def norm(self, block: Block, count: int) -> Norm:
        vectors = self.next()
        return norm_of(vectors, self.next() if block.process_group else count)


class _State(NamedTuple):
    """A layer, its input, and what forward kept of it."""

    layer: Layer
    image: Image
    gate: Optional[Gate]  # of its input
    norm: Optional[Norm] = None
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


def _states(block: Block, x: Tensor, residual: Optional[Tensor], saved: list[Tensor]) -> list[_State]:
    """Of all layers, the shortcut's last."""
    read = _Saved(saved)
    states = []
    image, gate = Image(x), None
    for i, layer in enumerate(block.main):
        last = i == len(block.main) - 1
        state = _state(block, layer, image, gate, read, last)
        states.append(state)
        if last:
            break
        if state.norm is not None:
            assert state.y is not None
            image, gate = Image(state.y, state.norm.affine), Gate(state.norm.affine, state.norm.mean)
        else:
            image, gate = Image(read.next()), Gate()
    if block.projection:
        source = x if residual is None else residual
        states.append(_state(block, block.layers[-1], Image(source), None, read, True))
    return states


def _state(block: Block, layer: Layer, image: Image, gate: Optional[Gate], read: _Saved, last: bool) -> _State:
    if not layer.batch_statistics:
        return _State(layer, image, gate)
    n, _, p, q = output_shape(image.x.shape, layer)
    norm = read.norm(block, n * p * q)
    if last and expands(block, layer, image.x.shape):
        return _State(layer, image, gate, norm, None, (read.next(), read.next(), read.next()))
    return _State(layer, image, gate, norm, read.next())


def backward(
    block: Block,
    grad: Tensor,
    x: Tensor,
    residual: Optional[Tensor],
    out: Optional[Tensor],
    saved: list[Tensor],
    wanted: Wanted,
    pick: Pick,
) -> Gradients:
    """Gradients for ``x``, the residual and every layer's tensors. ``out``: forward's result, for the tail's ReLU."""
    pass_ = _Backward(block, wanted, Primitives(pick))
    states = _states(block, x, residual, saved)
    main = states[: len(block.main)]
    projection = states[-1] if block.projection else None
    gradient, product = pass_.tail(main[-1], projection, grad, out)
    g = gradient.g

    # What the shortcut adds to the gradient of its source.
    if projection is not None:
        from_x = residual is None
        needed = wanted.x if from_x else wanted.residual
        total = None if gradient.total is None else gradient.total.clone()  # both layers' gradient of shift
        back = pass_.layer(len(states) - 1, projection, Gradient(g, total, product), needed, None, keep=True)
        shortcut = None if back is None else back.g
    else:
        from_x = block.identity
        shortcut = g if block.identity or residual is not None else None

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
    """Back through one part of a block after the other; gathers the gradients of layers' tensors."""

    def __init__(self, block: Block, wanted: Wanted, run: Primitives) -> None:
        count = len(block.layers)
        self._block, self._wanted, self._run = block, wanted, run
        self.weights: list[Optional[Tensor]] = [None] * count
        self.scales: list[Optional[Tensor]] = [None] * count
        self.shifts: list[Optional[Tensor]] = [None] * count

    def tail(
        self, last: _State, projection: Optional[_State], grad: Tensor, out: Optional[Tensor]
    ) -> tuple[Gradient, Optional[Tensor]]:
        """The gradient of the tail's sum, with the products that raw results in it need."""
        if self._block.pool:
            assert last.y is not None and last.norm is not None
            back = self._run.pass_("tail_pool_backward", last.y)
            return back(grad, last.y, last.norm.affine, last.norm.mean), None
        back = self._run.pass_("tail_backward", grad)
        return back(grad, out if self._block.relu else None, *_raw_of(last), *_raw_of(projection))

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
        self.shifts[i] = gradient.total
        if not (needed or self._wanted.weights[i]):
            self.scales[i] = product * state.norm.rstd
            return None
        sums = means(self._block, state.norm, gradient.total, product)
        dy, dgamma = self._run.pass_("bn_backward", y)(gradient.g, y, state.norm.vectors, *sums, not keep)
        # Over several processes, a scale's gradient is still that of this process's loss.
        self.scales[i] = product * state.norm.rstd if self._block.process_group else dgamma
        if self._wanted.weights[i]:
            self.weights[i] = self._wgrad(state, dy)
        return self._dgrad(state, dy, state.layer.weight, added) if needed else None

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
        """From what its input's statistics tell of the result, which nobody kept."""
        layer, norm, x = state.layer, state.norm, state.image.x
        assert norm is not None and state.gram is not None and gradient.total is not None
        w, total, gx = matrix(layer, x), gradient.total, self._wgrad(state, gradient.g)
        input_mean, covariance, _ = state.gram
        if self._block.process_group:
            product = (gx.flatten(1) * w).sum(1) - norm.mean * total
            slopes = coefficients(norm.rstd, norm.affine.scale, *means(self._block, norm, total, product))
            n, _, p, q = output_shape(x.shape, layer)
            given = norm.mean, *slopes, n * p * q, product * norm.rstd
            found = expand_gradients(gx, w, input_mean, covariance, *given)
        else:
            back = self._run.pass_("expand_backward", x)
            found = back(gx, w, input_mean, covariance, norm.vectors, total, norm.count)
        dw, self.scales[i], *rest = found
        self.shifts[i] = total
        if self._wanted.weights[i]:
            self.weights[i] = dw
        if not needed:
            return None
        dgrad = self._run.conv("dgrad_expand", x, layer.weight, layer.geometry)
        return dgrad(gradient.g, *rest, layer.geometry.stride, *state.image, state.gate, added)


def _raw_of(state: Optional[_State]) -> tuple[Optional[Tensor], Optional[Tensor]]:
    """A layer's raw result and mean, where it was kept."""
    if state is None or state.y is None or state.norm is None:
        return None, None
    return state.y, state.norm.mean
