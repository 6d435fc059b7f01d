"""Weight gradients and covariances on every instruction set, against the definition in float64."""

import itertools
import subprocess
import sys

import pytest
import torch

from resnet_fast.kernels.contract import Affine, Case, Geometry
from resnet_fast.kernels.native import wgrad
from resnet_fast.kernels.reference import training as reference_training
from tests.cpu.ops.cases import Conv, assert_channels_last, nhwc
from tests.native.gradients import SHAPES, Wgrad, check_gram, double, prologue_of, run_gram
from tests.native.harness import Poisoned, resnet_convs


def _check_all(conv: Conv, prologue: bool, threads: int = 1) -> set[str]:
    case = Wgrad(conv, prologue)
    for algorithm, misaligned in itertools.product(case.algorithms(), (False, True)):
        poisoned = Poisoned(misaligned)
        case.check(case.run(algorithm, poisoned, threads), algorithm)
        poisoned.check()
    return set(case.algorithms())


# --- wgrad ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prologue", [False, True])
@pytest.mark.parametrize("name", SHAPES)
def test_shapes(name, prologue, variant):
    _check_all(SHAPES[name], prologue)


def test_shapes_reach_every_algorithm():
    reached = {name for conv in SHAPES.values() for name in Wgrad(conv, False).algorithms()}
    assert reached == set(wgrad.ALGORITHMS)


@pytest.mark.parametrize("name", resnet_convs())
def test_layers_of_resnets(name):
    """Every convolution of torchvision's ten ResNets, its channels kept, its image made small."""
    _check_all(resnet_convs()[name], prologue=resnet_convs()[name].c != 3)


SHARED = {
    "1x1": Conv(3, 48, 15, 14, 70, (1, 1), padding=(0, 0)),
    "3x3": Conv(3, 34, 17, 15, 130),
    "3x3/2, 2 groups": Conv(2, 32, 21, 30, 24, stride=(2, 2), groups=2),
    "one tile": Conv(2, 8, 5, 4, 8),
}


@pytest.mark.parametrize("name", SHARED)
def test_threads_and_repeats_change_no_bit(name):
    """Every sum has one owner and one order."""
    case = Wgrad(SHARED[name], SHARED[name].c % 16 == 0)
    for algorithm in case.algorithms():
        alone = case.run(algorithm, Poisoned())
        case.check(alone, algorithm)
        for threads in (1, 2, 3, 5, 2):
            assert torch.equal(case.run(algorithm, Poisoned(), threads), alone), f"{algorithm}, {threads} threads"


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("operand", ["dy", "x"])
@pytest.mark.parametrize("prologue", [False, True])
def test_nan_and_infinity_propagate(value, operand, prologue):
    """To every weight that multiplies the channel they are in, and to no other. Winograd makes NaN of infinity."""
    case = Wgrad(Conv(2, 32, 9, 10, 24), prologue)
    if prologue:
        case.prologue = Affine(case.prologue.scale.abs(), case.prologue.shift)
    getattr(case, operand)[1, 3, 4, 5] = value
    for algorithm in case.algorithms():
        dw = case.run(algorithm, Poisoned())
        hit = (dw if operand == "dy" else dw.transpose(0, 1)).isfinite()
        assert not hit[3].any(), algorithm
        assert hit[:3].all() and hit[4:].all(), algorithm
        if value != value or (algorithm == "gemm" and operand == "x"):
            assert torch.equal(dw.isnan(), case.exact.isnan())


@pytest.mark.parametrize("name", ["17 channels", "2 groups", "several chunks of tiles", "1x1/2", "no image"])
@pytest.mark.parametrize("prologue", [False, True])
def test_wgrad(name, prologue):
    """The function that training calls, with the algorithm it chooses, in any layout of its operands."""
    case = Wgrad(SHAPES[name], prologue)
    dy, x, affine, weight, geometry = case.args
    algorithm = wgrad.choose(case.shape)
    dw = wgrad.wgrad(dy, x, affine, weight, geometry)
    case.check(dw, algorithm)
    assert_channels_last(dw)
    assert dw.dtype == torch.float32
    assert torch.equal(wgrad.wgrad(dy.contiguous(), x.contiguous(), affine, weight, geometry), dw)


def test_empty_weight():
    dw = wgrad.wgrad(torch.zeros(2, 0, 5, 5), torch.zeros(2, 3, 5, 5), None, torch.zeros(0, 3, 1, 1), Geometry())
    assert dw.shape == (0, 3, 1, 1)


# --- gram -------------------------------------------------------------------------------------------------------------

IMAGES = [(2, 64, 8, 8), (1, 1, 1, 1), (3, 17, 7, 9), (1, 33, 1, 5), (2, 100, 20, 15), (5, 16, 30, 3), (1, 8, 2, 1)]


@pytest.mark.parametrize("image", IMAGES, ids=str)
@pytest.mark.parametrize("stride", [(1, 1), (2, 2), (3, 1)], ids=str)
@pytest.mark.parametrize("prologue", [False, True])
def test_gram(image, stride, prologue, variant):
    x, affine = nhwc(torch.randn(image)), prologue_of(image[1]) if prologue else None
    for misaligned in (False, True):
        poisoned = Poisoned(misaligned)
        check_gram(run_gram(x, affine, stride, poisoned), x, affine, stride)
        poisoned.check()


@pytest.mark.parametrize("mean", [1e2, 1e4, -1e6])
def test_gram_of_small_deviations(mean, variant):
    """The error is relative to the deviations, not to the values."""
    x = nhwc(torch.randn(3, 40, 15, 14, dtype=torch.float64) + mean).float()
    _, covariance = run_gram(x, None, (1, 1), Poisoned())
    _, exact = reference_training.gram(x.double(), None, (1, 1))
    rounding = (abs(mean) * torch.finfo(torch.float32).eps) ** 2  # of the mean, squared
    assert (covariance.double() - exact).abs().max() <= 2e-6 * exact.diag().max() + rounding


def test_gram_of_constants(variant):
    """Channels that do not vary have no variance but the square of their mean's rounding."""
    x = nhwc(torch.tensor([0.1, 3.0, -7e5]).view(1, 3, 1, 1).expand(2, 3, 20, 21))
    mean, covariance = run_gram(x, None, (1, 1), Poisoned())
    rounding = x[0, :, 0, 0].abs() * torch.finfo(torch.float32).eps
    assert ((mean - x[0, :, 0, 0]).abs() <= rounding).all()
    assert (covariance.abs() <= rounding.outer(rounding)).all()


def test_gram_threads_and_repeats_change_no_bit():
    x, affine = nhwc(torch.randn(2, 70, 19, 23)), prologue_of(70)
    alone = run_gram(x, affine, (1, 1), Poisoned())
    for threads in (1, 2, 3, 5, 2):
        for one, other in zip(alone, run_gram(x, affine, (1, 1), Poisoned(), threads)):
            assert torch.equal(one, other)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_gram_propagates_nan_and_infinity(value):
    x = nhwc(torch.randn(2, 20, 5, 6))
    x[1, 3, 2, 4] = value
    mean, covariance = run_gram(x, None, (1, 1), Poisoned())
    expected_mean, expected = reference_training.gram(x.double(), None, (1, 1))
    assert torch.equal(mean.isfinite(), expected_mean.isfinite())
    assert torch.equal(covariance.isfinite(), expected.isfinite())


@pytest.mark.parametrize("prologue", [False, True])
def test_gram_gives_the_statistics_of_a_convolution(prologue):
    """What it is for: mean and variance of a 1x1 convolution that nobody computes."""
    x, affine = nhwc(torch.randn(2, 24, 9, 10)), prologue_of(24) if prologue else None
    weight = torch.randn(50, 24, 1, 1) / 5
    mean, covariance = wgrad.gram(x.contiguous(), affine, (2, 2))
    _, expected_mean, expected_variance = reference_training.conv_statistics(
        x.double(), double(affine), weight.double(), Geometry((2, 2))
    )
    w = weight.flatten(1).double()
    torch.testing.assert_close(w @ mean.double(), expected_mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close((w @ covariance.double() * w).sum(1), expected_variance, rtol=1e-5, atol=0)


# --- both -------------------------------------------------------------------------------------------------------------


def test_refusals():
    def case(**changes):
        return Case("wgrad", "cpu", torch.float32, 64, 64, (3, 3), padding=(1, 1))._replace(**changes)

    assert wgrad.refusal(case()) is None
    assert wgrad.refusal(case(in_channels=128, out_channels=256, groups=2)) is None
    assert wgrad.refusal(case(groups=2)) == "no groups of fewer than 64 channels"
    assert wgrad.refusal(case(dtype=torch.float64)) == "no torch.float64"
    assert "cuda" in wgrad.refusal(case(device="cuda"))


def test_between_pages_without_access(variant):
    """In a process of its own, which a wrong access would end."""
    program = [sys.executable, "-m", "tests.native.gradients", variant]
    done = subprocess.run(program, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.endswith("done\n"), done.stdout[-300:] + done.stderr[-2000:]


def test_library_says_what_it_serves():
    """Winograd: 3x3, stride 1, one group."""
    served = {name: Wgrad(SHAPES[name], False).algorithms() for name in ("17 channels", "1x1/2", "2 groups")}
    assert served == {"17 channels": list(wgrad.ALGORITHMS), "1x1/2": ["gemm"], "2 groups": ["gemm"]}
