"""The convolutions of a training step, forward and back to the input, against their definition in float64."""

import itertools
from typing import Optional

import pytest
import torch
from torch import Tensor

from resnet_fast.kernels.contract import Affine, Case, Gate, Geometry
from resnet_fast.kernels.native import inference as native
from resnet_fast.kernels.native import library, planner, training
from resnet_fast.kernels.reference import training as reference
from tests.cpu.ops.cases import WEIRD, Conv, Poison, assert_channels_last, network_convs, nhwc
from tests.native.harness import TRICKY, Poisoned, algorithms_for, shape_of

EPS = torch.finfo(torch.float32).eps
CONVS = {
    **WEIRD,
    **TRICKY,
    "stride 2, round": Conv(2, 32, 16, 16, 48, stride=(2, 2)),
    "stride 2, odd": Conv(1, 17, 17, 9, 33, stride=(2, 2)),
    "stride 2, one pixel": Conv(3, 16, 1, 1, 20, stride=(2, 2)),
    "stride 2, two rows": Conv(1, 33, 2, 19, 5, stride=(2, 2)),
    "5x5/2": Conv(2, 20, 11, 12, 18, (5, 5), (2, 2), (2, 2)),
    "3x3/3": Conv(2, 16, 10, 9, 18, (3, 3), (3, 3), (1, 1)),
    "3x3/2x1": Conv(2, 16, 10, 9, 18, (3, 3), (2, 1), (1, 1)),
    "grouped 3x3/2": Conv(2, 64, 10, 9, 64, (3, 3), (2, 2), (1, 1), groups=16),
}
COMBINATIONS = list(itertools.product((False, True), (False, True)))  # residual, relu
FORCED = ("gemm", "winograd2", "winograd4", None)
"""Algorithms to ask for, where they serve the shape; None is the planner's choice."""


def _generator(seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return lambda *size: torch.randn(size, generator=generator)


def _affine(channels: int, randn) -> Affine:
    return Affine(randn(channels), randn(channels))


def _double(value):
    """Every tensor in it in float64."""
    if isinstance(value, Tensor):
        return value.double()
    if isinstance(value, tuple):
        made = [_double(item) for item in value]
        return type(value)(*made) if hasattr(value, "_fields") else tuple(made)
    return value


def _poisoned(value, poison: Poison):
    """Every tensor in it between borders of NaN."""
    if isinstance(value, Tensor):
        return poison(value)
    if isinstance(value, (Affine, Gate)):
        return type(value)(*(_poisoned(item, poison) for item in value))
    return value


def _close(actual: Tensor, exact: Tensor, pytorch: Optional[Tensor], terms: int, winograd: bool) -> None:
    """Within twice PyTorch's error, and a floor from the length of the sums; Winograd's within design.md's bound.

    The partial sums of ``terms`` products of random sign are of the order of the largest result, and each addition errs
    by half an ulp of one, with random sign.
    """
    assert actual.dtype == torch.float32 and actual.shape == exact.shape
    if not exact.numel():
        return
    largest = exact.abs().max()
    allowed = (4 + terms**0.5) * EPS * largest + (5e-5 * largest if winograd else 0)
    if pytorch is not None:
        error = (pytorch.double() - exact).abs().max()
        allowed += 2 * error.minimum(terms * EPS * largest)  # a larger error is a bug of PyTorch, which excuses nothing
    worst = (actual.double() - exact).abs().max()
    assert worst <= allowed, f"error is {worst / largest:.3g} of the largest, allowed are {allowed / largest:.3g}"


def _run(op: str, args: tuple, conv: Conv, forced: Optional[str]):
    """Our result, after checks that inputs are left alone and that a second run gives the same bits; and those of the
    definition in float64 and, where PyTorch may be called, in float32."""
    poison = Poison()
    guarded = tuple(_poisoned(arg, poison) for arg in args)
    function = getattr(training, op)
    if forced is None:
        actual, again = function(*guarded), function(*guarded)
    else:
        with planner.forced(forced):
            actual, again = function(*guarded), function(*guarded)
    poison.check()
    for one, other in zip(_tensors(actual), _tensors(again)):
        assert torch.equal(one, other), "a second run gives other bits"
    definition = getattr(reference, op)
    return actual, definition(*_double(args)), None if conv.blind else definition(*args)


def _tensors(result) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [value for value in result if value is not None]


def _weight(conv: Conv, randn, backward: bool = False) -> Tensor:
    taps = conv.taps * conv.k // conv.c if backward else conv.taps
    return randn(conv.k, conv.c // conv.groups, *conv.kernel) / max(taps, 1) ** 0.5


# --- packing ----------------------------------------------------------------------------------------------------------


PACKED = (
    *("one more than a tile", "1x1", "5x3, asymmetric", "RGB"),
    *("depthwise", "groups of 4, dilated, strided", "groups of 3 to 5"),
)


@pytest.mark.parametrize("name", PACKED)
def test_packs_do_not_depend_on_the_layout(name, variant):
    """Contiguous, channels last or a slice with gaps; in float32 or float64; on one thread or three: the same bytes."""
    conv, randn = TRICKY[name], _generator()
    weight, scale = _weight(conv, randn), randn(conv.k)
    gaps = torch.full((*weight.shape[:3], 2 * weight.shape[3]), torch.nan)
    gaps[..., ::2] = weight
    for algorithm in algorithms_for(conv):
        shape = shape_of(conv, False)
        expected = library.pack(shape, algorithm, weight.double() * scale.double().view(-1, 1, 1, 1))
        for view in (weight, nhwc(weight), gaps[..., ::2], weight.double()):
            for threads in (1, 3):
                assert torch.equal(library.pack(shape, algorithm, view, scale, threads=threads), expected), algorithm


@pytest.mark.parametrize("groups", [1, 2, 16])
@pytest.mark.parametrize("window", [(1, 1), (3, 3), (2, 3)])
def test_backward_packs(groups, window, variant):
    """They are those of the weight with its channels exchanged and its taps reversed; borders are left alone."""
    c, k = 32, 64 if groups < 16 else 32
    weight = torch.randn(k, c // groups, *window)
    exchanged = weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1).flip(2, 3).contiguous()
    conv = Conv(1, k, 7, 8, c, window, padding=(0, 0), groups=groups)
    shape = shape_of(conv, False)
    for algorithm in algorithms_for(conv):
        for view in (weight, nhwc(weight)):
            place = Poisoned()
            packed = torch.from_numpy(place(library.packed_bytes(shape, algorithm)))
            library.pack(shape, algorithm, view, backward=True, threads=2, out=packed)
            place.check()
            assert torch.equal(packed, library.pack(shape, algorithm, exchanged)), algorithm


# --- forward ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("forced", FORCED)
@pytest.mark.parametrize("name", CONVS)
def test_conv_statistics(name, forced):
    _check_conv_statistics(CONVS[name], forced)


@pytest.mark.parametrize("name", network_convs())
def test_conv_statistics_of_networks(name):
    _check_conv_statistics(network_convs()[name], None)


def _served(conv: Conv, forced: Optional[str]) -> str:
    """The algorithm that serves a convolution when ``forced`` is asked for; skips where it is served otherwise too."""
    shape = shape_of(conv, False)
    if forced is None:
        return planner.choose_native(shape, torch.get_num_threads())
    if not library.supports(shape, forced):
        pytest.skip(f"not for {forced}")
    return forced


def _check_conv_statistics(conv: Conv, forced: Optional[str]) -> None:
    served, randn = _served(conv, forced), _generator()
    for prologue in (None, _affine(conv.c, randn)):
        args = (nhwc(randn(conv.n, conv.c, conv.h, conv.w)), prologue, _weight(conv, randn), Geometry(*conv.geometry))
        (y, mean, variance), exact, pytorch = _run("conv_statistics", args, conv, forced)
        assert_channels_last(y)
        _close(y, exact[0], pytorch and pytorch[0], conv.taps, "winograd" in served)
        values = y.double()
        _close(mean, values.mean((0, 2, 3)), None, values[:, 0].numel(), False)
        _close(variance, values.var((0, 2, 3), correction=0), None, values[:, 0].numel(), False)


@pytest.mark.parametrize(("residual", "relu"), COMBINATIONS)
@pytest.mark.parametrize("name", CONVS)
def test_conv_affine(name, residual, relu):
    conv, randn = CONVS[name], _generator()
    served = _served(conv, None)
    args = (
        nhwc(randn(conv.n, conv.c, conv.h, conv.w)),
        _affine(conv.c, randn) if relu else None,
        _weight(conv, randn),
        _affine(conv.k, randn),
        nhwc(randn(*conv.output)) if residual else None,
        Geometry(*conv.geometry),
        relu,
    )
    y, exact, pytorch = _run("conv_affine", args, conv, None)
    assert_channels_last(y)
    _close(y, exact, pytorch, conv.taps, "winograd" in served)


# --- backward ---------------------------------------------------------------------------------------------------------


def _gates(conv: Conv, randn) -> list[Optional[Gate]]:
    affine = _affine(conv.c, randn)
    return [None, Gate(), Gate(affine), Gate(affine, randn(conv.c))]


@pytest.mark.parametrize("forced", FORCED)
@pytest.mark.parametrize("name", CONVS)
def test_dgrad(name, forced, monkeypatch):
    if forced == "gemm":
        monkeypatch.setattr(training, "_upsampling", lambda *_: None)
    elif forced is not None:
        monkeypatch.setattr(training, "_seconds", lambda shape: shape.stride_h)  # rather than parts, of stride 1
    _check_dgrad(CONVS[name], forced)


@pytest.mark.parametrize("name", network_convs())
def test_dgrad_of_networks(name):
    _check_dgrad(network_convs()[name], None)


def _case(conv: Conv, op: str) -> Case:
    return conv.case(torch.float32, op)


def _check_dgrad(conv: Conv, forced: Optional[str]) -> None:
    if training.supports(_case(conv, "dgrad")):
        pytest.skip("refused")
    randn = _generator()
    input_size = (conv.n, conv.c, conv.h, conv.w)
    x, dy, residual = (nhwc(randn(*size)) for size in (input_size, conv.output, input_size))
    weight, geometry = _weight(conv, randn, True), Geometry(*conv.geometry)
    sizes = (dy.shape, weight.shape, geometry, x.shape)
    shapes = [training._upsampling(*sizes), *(part.shape for part in training._parts(*sizes))]
    if forced is not None and not any(shape and library.supports(shape, forced) for shape in shapes):
        pytest.skip(f"not for {forced}")
    winograd = forced != "gemm"
    for gate, added in zip(_gates(conv, randn), (None, residual, None, residual)):
        actual, exact, pytorch = _run("dgrad", (dy, weight, geometry, x, gate, added), conv, forced)
        terms = max(conv.taps * conv.k // conv.c, 1)
        _check_gradient(actual, exact, pytorch, x, gate, terms, winograd)


def _check_gradient(actual, exact, pytorch, x, gate, terms, winograd) -> None:
    """``g`` against the definition, and the sums against those of this very ``g``."""
    assert_channels_last(actual.g)
    _close(actual.g, exact.g, pytorch and pytorch.g, terms, winograd)
    assert [value is None for value in actual] == [value is None for value in exact]
    if gate is None:
        return
    g = actual.g.double()
    _close(actual.total, g.sum((0, 2, 3)), None, g[:, 0].numel(), False)
    if gate.mean is not None:
        product = (g * (x.double() - gate.mean.double().view(1, -1, 1, 1))).sum((0, 2, 3))
        _close(actual.product, product, None, g[:, 0].numel(), False)


EXPANDS = {
    "round": (2, 64, 8, 8, 256, 1),
    "odd": (3, 17, 5, 7, 33, 1),
    "one pixel": (1, 20, 1, 1, 40, 1),
    "strided": (2, 32, 9, 8, 48, 2),
    "strided, one pixel": (1, 16, 1, 1, 24, 2),
    "stride 3": (1, 5, 7, 10, 9, 3),
    "1 to 1": (2, 1, 4, 3, 1, 1),
}


@pytest.mark.parametrize("name", EXPANDS)
def test_dgrad_expand(name):
    n, channels, height, width, k, stride = EXPANDS[name]
    conv = Conv(n, channels, height, width, k, (1, 1), (stride, stride), (0, 0))
    randn = _generator()
    x, residual = (nhwc(randn(n, channels, height, width)) for _ in range(2))
    g = nhwc(randn(*conv.output))
    weight, q, c = randn(k, channels) / k**0.5, randn(channels, channels) / channels**0.5, randn(channels)
    for gate, prologue, added in zip(_gates(conv, randn), (None, _affine(channels, randn)) * 2, (None, residual) * 2):
        args = (g, weight, q, c, conv.stride, x, prologue, gate, added)
        actual, exact, pytorch = _run("dgrad_expand", args, conv, None)
        _check_gradient(actual, exact, pytorch, x, gate, k + channels, False)


@pytest.mark.parametrize("channels", [5, 17, 33, 64])
@pytest.mark.parametrize("first", [0, 1])
def test_results_apart_from_each_other(channels, first):
    """Every third row and second column of an image is written, from the first or the second on, and nothing else."""
    randn, poison = _generator(), Poisoned()
    x, weight = nhwc(randn(2, 8, 3, 5)), randn(channels, 8, 1, 1)
    image = torch.from_numpy(poison(2 * 8 * 10 * channels * 4)).view(torch.float32).view(2, 8, 10, channels).fill_(7)
    out, pixels = image.permute(0, 3, 1, 2), (slice(first, None, 3), slice(first, None, 2))
    shape = native.conv_shape(x.shape, weight.shape, *Geometry(), False, False)
    with planner.forced("gemm"):
        expected = training._convolve(shape, x, weight)
        training._convolve(shape, x, weight, out=out, pixels=pixels)
    poison.check()
    assert torch.equal(out[(..., *pixels)][:, :, :3, :5], expected)
    out[(..., *pixels)] = 7
    assert (out == 7).all()


# --- NaN, threads, refusals -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ["round", "1x1/2", "1x1, odd channels", "depthwise", "17 channels"])
def test_nan_and_inf_propagate(name, value):
    """At least to where they reach in the definition; with Winograd's algorithm to the rest of a tile too."""
    conv, randn = WEIRD[name], _generator()
    x, dy = nhwc(randn(conv.n, conv.c, conv.h, conv.w)), nhwc(randn(*conv.output))
    weight, geometry = _weight(conv, randn), Geometry(*conv.geometry)
    broken = x.clone()
    broken[0, 0, conv.h // 2, conv.w // 2] = value
    y, mean, _ = training.conv_statistics(broken, None, weight, geometry)
    exact, exact_mean, _ = reference.conv_statistics(broken, None, weight, geometry)
    assert not y[~exact.isfinite()].isfinite().any()
    assert not mean[~exact_mean.isfinite()].isfinite().any()
    dy[0, 0, 0, 0] = value
    dx, exact = (module.dgrad(dy, weight, geometry, x, None, None).g for module in (training, reference))
    assert not dx[~exact.isfinite()].isfinite().any()


SHARED = ("round", "1x1/2", "17 channels", "32 groups of 4", "three and two left of a tile, stride 2, eight images")


@pytest.mark.parametrize("name", SHARED)
@pytest.mark.parametrize("forced", ["gemm", "winograd4"])
def test_threads_give_the_same_bits(name, forced):
    """Of one algorithm: the planner's choice depends on their number."""
    conv, randn = CONVS[name], _generator()
    x, dy = nhwc(randn(conv.n, conv.c, conv.h, conv.w)), nhwc(randn(*conv.output))
    weight, geometry, prologue = _weight(conv, randn), Geometry(*conv.geometry), _affine(conv.c, randn)
    gate = Gate(prologue, randn(conv.c))

    def results() -> list[Tensor]:
        with planner.forced(forced):
            forward = training.conv_statistics(x, prologue, weight, geometry)
            return [*forward, *training.dgrad(dy, weight, geometry, x, gate, x)]

    expected = results()
    for threads in (2, 3):
        torch.set_num_threads(threads)
        for one, other in zip(results(), expected):
            assert torch.equal(one, other)


def test_any_layout_is_read():
    """Contiguous images and weights, and those in channels_last, give the same bits."""
    conv, randn = WEIRD["17 channels"], _generator()
    x, dy, weight = randn(conv.n, conv.c, conv.h, conv.w), randn(*conv.output), _weight(conv, randn)
    geometry, gate = Geometry(*conv.geometry), Gate(_affine(conv.c, randn), randn(conv.c))
    for one, other in zip(
        (*training.conv_statistics(x, None, weight, geometry), *training.dgrad(dy, weight, geometry, x, gate, x)),
        (
            *training.conv_statistics(nhwc(x), None, nhwc(weight), geometry),
            *training.dgrad(nhwc(dy), nhwc(weight), geometry, nhwc(x), gate, nhwc(x)),
        ),
    ):
        assert torch.equal(one, other)


def test_what_is_refused():
    case = Case("dgrad", "cpu", torch.float32, 64, 64, (3, 3), (1, 1), (1, 1))
    assert training.supports(case) is None
    assert training.supports(case._replace(dilation=(2, 2), padding=(2, 2))) is None
    assert training.supports(case._replace(stride=(2, 2))) is None
    assert "stride and a dilation" in training.supports(case._replace(stride=(2, 2), dilation=(2, 2)))
    assert training.supports(case._replace(op="conv_affine", stride=(2, 2), dilation=(2, 2))) is None
    assert training.supports(case._replace(dtype=torch.bfloat16)) == "no torch.bfloat16"
    assert training.supports(case._replace(device="cuda")) == "runs on cpu, not on cuda"
    assert training.supports(case._replace(op="stem")) == "no stem"
