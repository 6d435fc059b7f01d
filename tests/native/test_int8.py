"""int8 on every instruction set: the very integers that exact arithmetic gives."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from resnet_fast.kernels.native import abi, library
from resnet_fast.kernels.native import quantised as native
from resnet_fast.kernels.native.abi import Op, Shape
from resnet_fast.kernels.reference import quantised as reference
from tests.cpu.ops.cases import Conv
from tests.native.harness import TRICKY, Poisoned, placed, resnet_convs
from tests.native.int8_cases import algorithms_for, convolve, exact, make, run, shape_of
from tests.native.test_kernels import _convs

FLAGS = list(itertools.product((False, True), repeat=3))  # residual, relu, to_float


def _check(conv: Conv, seed: int = 0, flags=FLAGS, pool: bool = False, threads: int = 1) -> None:
    data = make(conv, seed)
    for residual, relu, to_float in flags:
        expected = exact(data, residual, relu, to_float, pool)
        for algorithm in algorithms_for(conv, pool):
            poisoned = Poisoned(misaligned=bool(seed % 2))
            actual = convolve(data, algorithm, residual, relu, to_float, poisoned, pool, threads)
            assert torch.equal(actual, expected), (conv, algorithm, residual, relu, to_float)
            poisoned.check()


@pytest.mark.parametrize("name", TRICKY)
def test_tricky_shapes(name, variant):
    _check(TRICKY[name])


@pytest.mark.parametrize("name", resnet_convs())
def test_layers_of_resnets(name, variant):
    conv = resnet_convs()[name]
    _check(conv, flags=[(True, True, False)])
    if conv.c == 3:
        _check(conv, flags=[(False, True, False)], pool=True)


def test_random_shapes(variant):
    """Shapes that nobody chose; the same ones at every run, a failing one is printed."""

    @settings(max_examples=150, deadline=None, derandomize=True, database=None)
    @given(_convs(), st.integers(0, 99), st.sampled_from(FLAGS), st.booleans(), st.sampled_from([1, 1, 2, 3]))
    def check(conv, seed, flags, pool, threads):
        pool = pool and conv.groups == 1 and not flags[0] and not flags[2]
        _check(conv, seed, [flags], pool, threads)

    check()


def test_the_largest_sums(variant):
    """Every product is the largest, or the smallest, that there is: nothing saturates on the way."""
    for x, w in ((-128, -128), (-128, 127), (127, -128), (127, 127)):
        for conv in (
            Conv(1, 512, 3, 3, 32, groups=1),
            Conv(1, 8, 3, 4, 8, groups=2),
            Conv(1, 3, 9, 9, 16, (7, 7), (2, 2)),
        ):
            data = make(conv)
            data = data._replace(x=torch.full_like(data.x, x), weight=torch.full_like(data.weight, w))
            for algorithm in algorithms_for(conv):
                actual = convolve(data, algorithm, False, False, True, Poisoned())
                assert torch.equal(actual, exact(data, False, False, True)), (algorithm, x, w)


def test_what_is_no_number_or_too_large(variant):
    """NaN becomes -128, as below every number; infinities saturate."""
    data = make(Conv(1, 16, 3, 3, 20))
    values = torch.tensor([torch.nan, torch.inf, -torch.inf, 3e9, -3e9, 1e20, -1e20, 127.5, -128.5, 0.5])
    data.shift.copy_(values.repeat(2))
    data.scale.zero_()
    expected = reference.quantise(data.shift, 1.0, torch.int8)
    for relu in (False, True):
        actual = convolve(data, "gemm", False, relu, False, Poisoned())
        nan = expected == -128 if relu else torch.zeros(20, dtype=torch.bool)
        wanted = torch.where(nan & ~data.shift.isnan(), 0, expected) if relu else expected
        assert torch.equal(actual.reshape(-1, 20)[0], wanted)


def test_conversions_and_layouts(variant):
    for n, c, h, w in ((1, 1, 1, 1), (2, 3, 5, 4), (1, 64, 3, 3), (1, 70, 6, 5)):
        poisoned = Poisoned()
        real = torch.randn(n, c, h, w) * 90
        real.view(-1)[:1] = torch.nan
        q = placed(torch.zeros(real.numel(), dtype=torch.int8), poisoned)
        op = Op(abi.QUANTISE, 0, Shape(abi.FLOAT32, n, h, w, c))
        op.factor = 0.75
        run(op, placed(real.flatten(), poisoned), q)
        assert torch.equal(q.flatten(), reference.quantise(real * 0.75, 1.0, torch.int8).flatten())
        back = placed(torch.zeros(real.numel()), poisoned)
        op = Op(abi.DEQUANTISE, 0, Shape(abi.INT8, n, h, w, c))
        op.factor = 0.75
        run(op, q, back)
        assert torch.equal(back, q.float() * 0.75)
        image = torch.randint(-128, 128, (n, c, h, w), dtype=torch.int8)
        nhwc, nchw = (placed(torch.zeros(image.numel(), dtype=torch.int8), poisoned) for _ in range(2))
        run(Op(abi.TO_NHWC, 0, Shape(abi.INT8, n, h, w, c)), placed(image.flatten(), poisoned), nhwc)
        assert torch.equal(nhwc.view(n, h, w, c), image.permute(0, 2, 3, 1))
        run(Op(abi.TO_NCHW, 0, Shape(abi.INT8, n, h, w, c)), nhwc, nchw)
        assert torch.equal(nchw.view_as(image), image)
        if min(h, w) > 1:
            p, q_ = (h - 1) // 2 + 1, (w - 1) // 2 + 1
            pooled = placed(torch.zeros(n, c, p, q_, dtype=torch.int8), poisoned)
            run(Op(abi.MAX_POOL, 0, Shape(abi.INT8, n, h, w, c, p, q_, c, 3, 3, 2, 2, 1, 1, 1, 1, 1)), nhwc, pooled)
            assert torch.equal(pooled, F.max_pool2d(image.float(), 3, 2, 1).permute(0, 2, 3, 1).to(torch.int8))
        poisoned.check()


def test_packs_are_hardly_longer_than_the_weights(variant):
    """At most a tenth: a row of what sums begin with, for panels of 64 products and more."""
    for conv in resnet_convs().values():
        if conv.c // conv.groups % 64 == 0 and variant != "portable":
            weights = conv.k * conv.taps
            assert library.packed_bytes(shape_of(conv), "gemm") <= 1.1 * weights, conv


@pytest.mark.parametrize("out_dtype", [torch.int8, torch.float32, torch.float16])
@pytest.mark.parametrize("residual", [None, torch.int8, torch.float32])
def test_the_op(residual, out_dtype, variant):
    """At most a step from the definition in float64, and there only beside the middle between two steps."""
    for conv in (
        Conv(2, 17, 6, 5, 33),
        Conv(1, 64, 5, 4, 64, groups=16),
        Conv(1, 3, 11, 12, 8, (7, 7), (2, 2), (3, 3)),
    ):
        data = make(conv)
        other = None if residual is None else data.residual.to(residual)
        rest = (other, 0.02, 0.05, *conv.geometry, True, out_dtype)
        scale, shift = data.scale * 0.05, data.shift * 0.05
        actual = native.conv_quantised(data.x, data.weight, scale, shift, *rest)
        real = reference.conv_quantised(data.x, data.weight, scale.double(), shift.double(), *rest[:-1], torch.float64)
        assert actual.dtype == out_dtype
        assert actual.is_contiguous(memory_format=torch.channels_last)
        if out_dtype == torch.int8:
            steps = real / 0.05
            # Five roundings of numbers up to the largest that were added.
            most = (data.conv.taps * 2**14 * data.scale.abs().max() + data.shift.abs().max() + 128).item()
            error = 5 * torch.finfo(torch.float32).eps * most
            assert ((actual.double() - steps.clamp(-128, 127)).abs() <= 0.5 + error).all()
        else:
            torch.testing.assert_close(actual.double(), real, rtol=torch.finfo(out_dtype).eps, atol=1e-5)


def test_the_ops_of_conversion(variant):
    x = torch.randn(2, 5, 3, 4) * 3
    q = native.quantise(x, 0.05, torch.int8)
    wanted = x.double() / 0.05
    assert ((q.double() - wanted.clamp(-128, 127)).abs() <= 0.5 + 1e-5).all()
    assert torch.equal(native.dequantise(q, 0.05, torch.float32), reference.dequantise(q, 0.05, torch.float32))
    assert native.dequantise(q, 0.05, torch.bfloat16).dtype == torch.bfloat16
