"""Every algorithm on every instruction set, against the definition in float64."""

import itertools
import subprocess
import sys
import threading

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from resnet_fast.kernels.native import abi
from resnet_fast.kernels.native import inference as native
from resnet_fast.kernels.native.abi import ALGORITHMS, Shape
from tests.cpu.ops.cases import Conv, make
from tests.native.harness import TRICKY, Expected, Poisoned, algorithms_for, convolve, placed, resnet_convs, run

COMBINATIONS = list(itertools.product((False, True), (False, True)))  # residual, relu


def _check_all(conv: Conv, seed: int = 0, combinations=COMBINATIONS, pool: bool = False, threads: int = 1) -> set[str]:
    """Every algorithm that serves ``conv``, at aligned and at odd addresses, gives the right result."""
    data, algorithms = make(conv, torch.float32, seed), algorithms_for(conv, pool)
    for residual, relu in combinations:
        expected = Expected(data, residual, relu, pool)
        for algorithm, misaligned in itertools.product(algorithms, (False, True)):
            poisoned = Poisoned(misaligned)
            expected.check(convolve(data, algorithm, residual, relu, poisoned, pool, threads), algorithm)
            poisoned.check()
    return set(algorithms)


# --- convolutions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TRICKY)
def test_tricky_shapes(name, variant):
    """All four epilogues at every edge of the kernels."""
    _check_all(TRICKY[name])


def test_tricky_shapes_reach_every_algorithm(variant):
    reached = {
        algorithm for conv in TRICKY.values() for pool in (False, True) for algorithm in algorithms_for(conv, pool)
    }
    assert reached == set(ALGORITHMS)


@pytest.mark.parametrize("name", resnet_convs())
def test_layers_of_resnets(name, variant):
    """Every convolution of torchvision's ten ResNets, its channels kept, its image made small."""
    conv = resnet_convs()[name]
    _check_all(conv, combinations=[(True, True)])
    if conv.c == 3:
        _check_all(conv, combinations=[(False, True)], pool=True)


@st.composite
def _convs(draw) -> Conv:
    def pair(low: int, high: int) -> tuple[int, int]:
        return draw(st.integers(low, high)), draw(st.integers(low, high))

    kind = draw(st.sampled_from(["any", "3x3", "3x3", "grouped", "image"]))
    kernel, dilation, padding, stride, groups = pair(1, 5), pair(1, 3), pair(0, 6), pair(1, 3), 1
    c, k = draw(st.integers(1, 70)), draw(st.integers(1, 70))
    if kind == "3x3":
        kernel, dilation, stride, padding = (3, 3), (1, 1), draw(st.sampled_from([(1, 1), (1, 1), (2, 2)])), pair(0, 3)
    elif kind == "grouped":
        groups = draw(st.sampled_from([2, 3, 4, 8, 16, 32]))
        c = groups * draw(st.sampled_from([1, 2, 3, 4, 8, 12, 16]))
        k = draw(st.sampled_from([c, c, groups, 3 * groups]))
    elif kind == "image":
        c, stride, dilation = 3, (draw(st.integers(1, 3)), 2), (1, 1)
        kernel = pair(1, 8)
    least = [max(1, d * (r - 1) + 1 - 2 * p) for r, d, p in zip(kernel, dilation, padding)]
    h, w = (draw(st.integers(low, low + 13)) for low in least)
    # Of few images, Winograd's algorithm has tiles of every kind in a block; of many, blocks of one kind.
    n = draw(st.sampled_from([1, 2, 3, 8] if c * k < 400 else [1, 2, 3]))
    return Conv(n, c, h, w, k, kernel, stride, padding, dilation, groups)


def test_random_shapes(variant):
    """Hundreds of shapes that nobody chose; the same ones at every run, a failing one is printed."""

    @settings(max_examples=250, deadline=None, derandomize=True, database=None)
    @given(_convs(), st.integers(0, 99), st.sampled_from(COMBINATIONS), st.booleans(), st.sampled_from([1, 1, 1, 2, 3]))
    def check(conv, seed, combination, pool, threads):
        pool = pool and conv.groups == 1 and not combination[0]
        _check_all(conv, seed, [combination], pool, threads)

    check()


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_the_same_bits_whatever_the_threads(threads, variant):
    """No sum is split among threads: the result depends neither on their number nor on which one came first."""
    edges = "three and two left of a tile, stride 2, eight images"
    for name in ("one more than a tile", edges, "1x1", "5x3, asymmetric", "groups of 8", "groups of 3 to 5", "RGB"):
        data = make(TRICKY[name], torch.float32)
        for pool in (False, True):
            for algorithm in algorithms_for(data.conv, pool):
                first = convolve(data, algorithm, False, True, Poisoned(), pool)
                for _ in range(3):
                    again = convolve(data, algorithm, False, True, Poisoned(), pool, threads)
                    assert torch.equal(first, again), (name, algorithm)


@pytest.mark.parametrize("name", TRICKY)
def test_the_same_bits_wherever_an_image_lies(name, variant):
    """In batches of any size, at any place in them: programs cut batches, and a result must not tell how."""
    data = make(TRICKY[name]._replace(n=9), torch.float32)
    for pool in (False, True):
        for algorithm in algorithms_for(data.conv, pool):
            together = convolve(data, algorithm, not pool, True, Poisoned(), pool)
            for first, end in ((0, 1), (3, 4), (2, 4), (1, 6), (0, 8)):
                x, residual, conv = data.x[first:end], data.residual[first:end], data.conv._replace(n=end - first)
                some = data._replace(conv=conv, x=x, residual=residual)
                alone = convolve(some, algorithm, not pool, True, Poisoned(), pool)
                assert torch.equal(alone, together[first:end]), (algorithm, first, end)


def test_several_python_threads(variant):
    """Each with images of its own, through the op's implementation: weights are packed once and shared."""
    layers = [make(TRICKY[name], torch.float32) for name in ("one more than a tile", "1x1", "groups of 8")]
    errors = []

    def work(seed: int) -> None:
        try:
            for _ in range(10):
                for data in layers:
                    mine = make(data.conv, torch.float32, seed)._replace(
                        weight=data.weight, scale=data.scale, shift=data.shift
                    )
                    exact = F.conv2d(mine.x.double(), data.weight.double(), None, *data.conv.geometry)
                    exact = exact * data.scale.view(1, -1, 1, 1) + data.shift.view(1, -1, 1, 1) + mine.residual
                    actual = native.conv_bn_act(*mine.args(True, False))
                    torch.testing.assert_close(actual.double(), exact, rtol=1e-4, atol=1e-4)
        except BaseException as error:
            errors.append(error)

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert not worker.is_alive(), "a call hangs"
    assert not errors, errors[0]


# --- NaN and infinities -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ["17 to 1", "1x1", "one more than a tile", "groups of 8", "groups of 3 to 5", "RGB"])
def test_nan_and_inf_in_the_image(name, value, variant):
    """They reach the outputs that they reach in a plain convolution, through a ReLU and a max-pool too.

    With Winograd's algorithm more than those, in the same tile; never fewer.
    """
    data = make(TRICKY[name], torch.float32)
    data.x[0, 0, data.conv.h // 2, data.conv.w // 2] = value
    for relu, pool in itertools.product((False, True), (False, True)):
        for algorithm in algorithms_for(data.conv, pool):
            expected = Expected(data, False, relu, pool)
            actual = convolve(data, algorithm, False, relu, Poisoned(), pool)
            if algorithm.startswith("winograd"):
                assert not actual[~expected.exact.isfinite()].isfinite().any()
            else:
                expected.check(actual, algorithm)


@pytest.mark.parametrize("op", ["max", "mean", "add"])
def test_nan_and_inf_elsewhere(op, variant):
    x = torch.randn(2, 9, 7, 21)
    x[0, 3, 2, 4], x[1, 5, 5, 2], x[1, 0, 0, 0] = torch.nan, torch.inf, -torch.inf
    if op == "add":
        _check_add(x, torch.randn_like(x), True)
    else:
        _check_pool(x, (3, 2), (2, 1), (1, 1), op == "mean")


# --- the other operations ---------------------------------------------------------------------------------------------


def _check_pool(x, window, stride, padding, mean: bool, threads: int = 1) -> None:
    n, c, h, w = x.shape
    if mean:
        exact = F.avg_pool2d(x.double(), window, stride, padding, count_include_pad=False)
    else:
        exact = F.max_pool2d(x, window, stride, padding)
    p, q = exact.shape[2:]
    shape = Shape(abi.FLOAT32, n, h, w, c, p, q, c, *window, *stride, *padding, 1, 1, 1, 0, 0)
    poisoned = Poisoned()
    kind = abi.AVG_POOL if mean else abi.MAX_POOL
    actual = run(kind, shape, placed(x, poisoned), (n, p, q, c), poisoned, threads).permute(0, 3, 1, 2)
    poisoned.check()
    if mean:
        torch.testing.assert_close(actual.double(), exact, rtol=1e-6, atol=1e-6, equal_nan=True)
    else:
        torch.testing.assert_close(actual, exact, rtol=0, atol=0, equal_nan=True)


def _check_add(x, residual, relu: bool, threads: int = 1) -> None:
    n, c, h, w = x.shape
    poisoned = Poisoned()
    shape = Shape(abi.FLOAT32, n, h, w, c, h, w, c, 1, 1, 1, 1, 0, 0, 1, 1, 1, relu, 0)
    added = None if residual is None else placed(residual, poisoned)
    actual = run(abi.ADD, shape, placed(x, poisoned), (n, h, w, c), poisoned, threads, residual=added)
    poisoned.check()
    expected = x if residual is None else x + residual
    expected = F.relu(expected) if relu else expected
    torch.testing.assert_close(actual.permute(0, 3, 1, 2), expected, rtol=0, atol=0, equal_nan=True)


SIZES = st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 12), st.integers(1, 12))


def test_random_pools_and_sums(variant):
    """Max and mean over windows with padding, addition, ReLU, and the two changes of layout."""

    @settings(max_examples=200, deadline=None, derandomize=True, database=None)
    @given(SIZES, st.tuples(*[st.integers(1, 4)] * 2), st.tuples(*[st.integers(1, 3)] * 2), st.data())
    def check(size, window, stride, data):
        n, c, h, w = size
        x = torch.randn(size, generator=torch.Generator().manual_seed(c))
        threads, mean = data.draw(st.sampled_from([1, 1, 3])), data.draw(st.booleans())
        padding = tuple(data.draw(st.integers(0, side // 2)) for side in window)
        if h + 2 * padding[0] >= window[0] and w + 2 * padding[1] >= window[1]:
            _check_pool(x, window, stride, padding, mean, threads)
        _check_add(x, x.flip(0) if mean else None, data.draw(st.booleans()), threads)
        shape = Shape(abi.FLOAT32, n, h, w, c, h, w, c, 1, 1, 1, 1, 0, 0, 1, 1, 1, 0, 0)
        poisoned = Poisoned()
        image = run(abi.TO_NHWC, shape, placed(x.flatten(), poisoned), (n, h, w, c), poisoned, threads)
        assert torch.equal(image, x.permute(0, 2, 3, 1))
        assert torch.equal(run(abi.TO_NCHW, shape, placed(x, poisoned), size, poisoned, threads), x)
        poisoned.check()

    check()


@pytest.mark.parametrize("base", [0.0, 0.3, 10.0])
def test_mean_of_a_large_image(base, variant):
    """Positive pixels by the ten thousand: in one float32 sum, roundings of the same sign would add up to 1e-4."""
    x = (torch.randn(1, 19, 224, 200, generator=torch.Generator().manual_seed(0)) + base).relu() + base
    exact = x.double().mean((2, 3), keepdim=True)
    torch.testing.assert_close(native.global_avg_pool(x).double(), exact, rtol=5e-6, atol=0)


# --- memory -----------------------------------------------------------------------------------------------------------


def test_no_access_beyond_an_operand(variant):
    """With a page without access right behind, or before, every operand. In a process that such an access may end."""
    program = f"from tests.native.guarded import main; main({variant!r})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    last = done.stdout.strip().splitlines()[-1:]
    assert done.returncode == 0, f"exit status {done.returncode} at {last}\n{done.stderr[-2000:]}"
    assert last == ["done"]
