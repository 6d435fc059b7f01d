"""In which precision the steps of a quantised model's plan run, and what the values between them are then.

A layer with ranges reads int8. The value that it reads is written so by its producer, if that is such a layer too and
all who read the value agree on its scale; else a step that quantises stands between, one for each value and scale.
Max-pools and changes of layout keep the order of numbers, so quantising before them is the same as after: they pass
int8 on. What must be float32 is: results, what is averaged or added by itself, and what layers read that were left out.
Pools read int8 where their input exists in it, as they do in the exported file.
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple, Optional

import torch
from torch import Tensor

from resnet_fast.graph import batch_norm
from resnet_fast.graph.conditions import Path
from resnet_fast.kernels.native import abi
from resnet_fast.kernels.reference.quantised import MOST_PRODUCTS
from resnet_fast.kernels.symmetric import quantised_weight, scale_of
from resnet_fast.network.steps import NotPlanned, Step, Storage, of_int8

_PASSING = (abi.MAX_POOL, abi.TO_NHWC, abi.TO_NCHW)
_POOLS = (abi.MAX_POOL, abi.AVG_POOL)

Form = Optional[float]
"""What a value is written in: int8 of this scale, or float32."""

Covers = Callable[[abi.Shape], str]
"""Why there is no kernel for a convolution in int8, or ''."""


class Mixed(NamedTuple):
    """Steps of which some run in int8, and why others with ranges do not, by the path of the layer."""

    steps: list[Step]
    refusals: dict[Path, str]


def mixed(steps: list[Step], results: list[Storage], covers: Covers) -> Mixed:
    """The same computation with all layers in int8 that have ranges and a kernel."""
    refusals = {id(step): _refusal(step, covers) for step in steps if step.ranges is not None}
    in_int8 = {one for one, reason in refusals.items() if not reason}
    writer = _Writer(in_int8, _wanted(steps, results, in_int8), steps[0].shape.n)
    for step in steps:
        writer.add(step)
    for value in results:
        writer.value(value, None)
    return Mixed(writer.steps, {step.path: refusals[id(step)] for step in steps if refusals.get(id(step))})


def _refusal(step: Step, covers: Covers) -> str:
    s = step.shape
    assert step.ranges is not None
    if step.residual is not None and step.ranges.residual is None:
        return "no range is known for what is added to its result"
    if s.c // s.groups * s.r * s.s > MOST_PRODUCTS:
        return f"more than {MOST_PRODUCTS} products a sum may not fit 32 bits"
    return covers(of_int8(s))


def _wanted(steps: list[Step], results: list[Storage], in_int8: set[int]) -> dict[Storage, set[Form]]:
    """The forms in which each value is read. A pool whose result nobody wants in one int8 takes what there is."""
    wanted: dict[Storage, set[Form]] = defaultdict(set)
    for value in results:
        wanted[value].add(None)
    for step in reversed(steps):
        if id(step) in in_int8:
            assert step.ranges is not None
            wanted[step.x].add(scale_of(step.ranges.input))
            if step.residual is not None:
                assert step.ranges.residual is not None
                wanted[step.residual].add(scale_of(step.ranges.residual))
        elif step.kind in _PASSING and _one_scale(wanted[step.y]) is not None:
            wanted[step.x] |= wanted[step.y]
        elif step.kind not in _POOLS:
            wanted[step.x].add(None)
            if step.residual is not None:
                wanted[step.residual].add(None)
    return wanted


def _one_scale(forms: set[Form]) -> Form:
    """The scale that all readers agree on."""
    return next(iter(forms)) if len(forms) == 1 else None


class _Writer:
    """Writes the steps again, and those that quantise and dequantise between them."""

    def __init__(self, in_int8: set[int], wanted: dict[Storage, set[Form]], batch: int) -> None:
        self.steps: list[Step] = []
        self._in_int8, self._wanted = in_int8, wanted
        self._batch = batch
        self._forms: dict[Storage, dict[Form, Storage]] = {}  # of each value, the one that it is written in first

    def add(self, step: Step) -> None:
        scale = _one_scale(self._wanted[step.y])
        x, residual, form, shape = step.x, step.residual, None, step.shape
        if id(step) in self._in_int8:
            assert step.ranges is not None
            x = self.value(x, scale_of(step.ranges.input))
            if residual is not None:
                assert step.ranges.residual is not None
                residual = self.value(residual, scale_of(step.ranges.residual))
            form, shape = scale, of_int8(shape)
        elif step.kind in _PASSING:
            form = self._first(x) if scale is None else scale
            x = self.value(x, form)
            shape = shape if form is None else of_int8(shape)
        else:
            x = self.value(x, None)
            residual = None if residual is None else self.value(residual, None)
        y = step.y if form is None else Storage(step.y.size, form)
        self._forms[step.y] = {form: y}
        if shape.dtype == abi.INT8 and shape.pool and form is None:
            shape, x = self._unpooled(step, shape, x)
            step = Step(abi.MAX_POOL, shape, x, y)
        self.steps.append(replace(step, shape=shape, x=x, residual=residual, y=y))

    def _unpooled(self, step: Step, shape: abi.Shape, x: Storage) -> tuple[abi.Shape, Storage]:
        """Write the stem's convolution alone, for no kernel pools in float32 what it reads in int8; give its pool."""
        n, c, h, w = shape.n, shape.k, shape.p, shape.q
        shape.pool = 0  # a copy
        y = Storage(n * c * h * w)
        self.steps.append(replace(step, shape=shape, x=x, y=y))
        p, q = (h - 1) // 2 + 1, (w - 1) // 2 + 1
        return abi.Shape(abi.FLOAT32, n, h, w, c, p, q, c, 3, 3, 2, 2, 1, 1, 1, 1, 1), y

    def value(self, value: Storage, form: Form) -> Storage:
        """The value in that form, converted once."""
        forms = self._forms.setdefault(value, {None: value})
        if form not in forms:
            original = next(iter(forms.values())) if form is None else self.value(value, None)
            kind, dtype = (abi.DEQUANTISE, abi.INT8) if form is None else (abi.QUANTISE, abi.FLOAT32)
            forms[form] = value if form is None else Storage(value.size, form)
            shape = abi.Shape(dtype, self._batch, 1, 1, value.size // self._batch)
            self.steps.append(Step(kind, shape, original, forms[form]))
        return forms[form]

    def _first(self, value: Storage) -> Form:
        return next(iter(self._forms.get(value, {None: value})))


# --- weights ----------------------------------------------------------------------------------------------------------


class Quantised(NamedTuple):
    """A layer's weights in int8, its norm folded into them, and what belongs to a sum of products."""

    weight: Tensor  # [K, C/groups, R, S], int8
    scale: Tensor  # [K], float32
    shift: Tensor  # [K], float64


def quantise_weights(step: Step) -> Quantised:
    """As the export to ONNX does: folded in float64, rounded to float32, then to int8.

    Raises:
        NotPlanned: they hold NaN or infinity.
    """
    assert step.weights is not None
    weight, bias, norm = step.weights
    exact = weight.detach().double().reshape(weight.shape[0], -1, step.shape.r, step.shape.s)
    if norm is None:
        shift = torch.zeros(len(exact), dtype=torch.float64, device=exact.device) if bias is None else bias.double()
    else:
        scale, shift = batch_norm.fold_exactly(norm, bias)
        exact = exact * scale.view(-1, 1, 1, 1)
    single = exact.float()
    if not (bool(single.isfinite().all()) and bool(shift.isfinite().all())):
        raise NotPlanned(f"{'.'.join(step.path)} has weights with NaN or infinity")
    return Quantised(*quantised_weight(single), shift)


def requantised(step: Step, quantised: Quantised) -> tuple[Tensor, Tensor]:
    """``scale`` and ``shift``, each ``[K]`` float32, that make a sum of products a number of the step's result."""
    assert step.x.scale is not None
    unit = step.y.scale or 1.0
    scale = quantised.scale.double() * (step.x.scale / unit)
    return scale.float(), (quantised.shift.float().double() / unit).float()
