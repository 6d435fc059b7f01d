"""The planner's candidates against the definition: our kernel with the tiles that may be measured, PyTorch's
convolution followed by our pass, and its fused ops, played by CPU operators where there is no cuDNN."""

import pytest
import torch
import torch.nn.functional as F

from resnet_fast.kernels.reference import inference as reference
from resnet_fast.kernels.triton import forward
from resnet_fast.kernels.triton.tuning import cudnn, measuring, planner
from tests.interpreter.cases import CONVS, DTYPES, each_dtype
from tests.interpreter.checking import (
    assert_as_good_as_pytorch,
    assert_within,
    conv_exact,
    conv_tolerance,
    sum_tolerance,
)

NAMES = ("round", "round without relu", "17 channels", "3 channels, stride 2", "5x3, asymmetric",
         "dilation 2", "1x1/2", "2 groups", "32 groups of 4, ResNeXt", "neither residual nor relu")  # fmt: skip


def _candidate(name: str) -> planner.Candidate:
    return planner.Candidate(name, None)


@pytest.fixture
def played(monkeypatch):
    """cuDNN's two ops, and a note of the calls."""
    calls = []

    def relu(x, weight, bias, stride, padding, dilation, groups):
        calls.append("relu")
        for tensor in (x, weight):
            assert tensor.is_contiguous(memory_format=torch.channels_last)
        assert x.dtype == weight.dtype == bias.dtype
        return F.relu(F.conv2d(x, weight, bias, stride, padding, dilation, groups))

    def add_relu(x, weight, z, alpha, bias, stride, padding, dilation, groups):
        calls.append("add_relu")
        assert z.is_contiguous(memory_format=torch.channels_last)
        assert x.dtype == weight.dtype == bias.dtype == z.dtype
        return F.relu(F.conv2d(x, weight, bias, stride, padding, dilation, groups) + alpha * z)

    monkeypatch.setattr(torch, f"{cudnn.LIBRARY}_convolution_relu", relu)
    monkeypatch.setattr(torch, f"{cudnn.LIBRARY}_convolution_add_relu", add_relu)
    return calls


@each_dtype
@pytest.mark.parametrize("name", NAMES)
def test_a_convolution_and_our_pass(name, dtype):
    conv = CONVS[name]
    inputs, geometry = conv.inputs(dtype), conv.geometry()
    for repetition in range(2):  # decided, and from what was kept
        actual, call, _ = forward.carry_out(_candidate(cudnn.POINTWISE), *inputs, *geometry)
        if repetition:
            actual = call(inputs[0].contiguous(), inputs[4], *inputs[2:4])
        exact = conv_exact(*inputs, *geometry)
        assert actual.dtype == dtype
        assert actual.is_contiguous(memory_format=torch.channels_last)
        # PyTorch's convolution is rounded before the scale, as in the definition in this dtype.
        assert_as_good_as_pytorch(actual, reference.conv_bn_act(*inputs, *geometry), exact)


@each_dtype
@pytest.mark.parametrize("name", [name for name in NAMES if CONVS[name].relu])
def test_the_fused_ops_get_what_they_expect(name, dtype, played):
    conv = CONVS[name]
    inputs, geometry = conv.inputs(dtype), conv.geometry()
    inputs[2][0] = 0.5  # a scale of 0 is fine as well, but float16's refusal is asked below
    actual, call, _ = forward.carry_out(_candidate(cudnn.FUSED), *inputs, *geometry)
    residual = None if inputs[4] is None else inputs[4].contiguous()
    again = call(inputs[0].contiguous(), residual, *inputs[2:4])
    assert played == ["relu" if inputs[4] is None else "add_relu"] * 2
    assert torch.equal(actual, again)
    exact = conv_exact(*inputs, *geometry)
    assert actual.is_contiguous(memory_format=torch.channels_last)
    terms = inputs[1][0].numel() + 3
    magnitude = reference.conv_bn_act(*(None if t is None else t.double().abs() for t in inputs), *geometry[:-1], False)
    # The weight is rounded once more, times the scale, and so is the shift: half an ulp of every term; the played op
    # rounds after the convolution and after the residual.
    rounded = 1.5 * torch.finfo(dtype).eps * magnitude
    assert_within(actual, exact, sum_tolerance(exact, dtype, terms, magnitude) + rounded)


def test_float16_that_cannot_hold_the_scaled_weight_takes_our_kernel(played):
    conv = CONVS["round"]
    inputs, geometry = conv.inputs(torch.float16), conv.geometry()
    inputs[2].mul_(1e-6)
    actual, call, choice = forward.carry_out(_candidate(cudnn.FUSED), *inputs, *geometry)
    assert not played
    assert choice is None
    assert call is None, "the interpreter's launches are not prepared"
    exact = conv_exact(*inputs, *geometry)
    assert_within(actual, exact, conv_tolerance(exact, *inputs, *geometry))


@pytest.mark.usefixtures("guarded")
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_tile_that_may_be_measured(dtype):
    """On a problem with tails along every dimension, and a residual."""
    conv = CONVS["17 channels"]
    inputs, geometry = conv.inputs(dtype), conv.geometry()
    precision = "half" if dtype != torch.float32 else "ieee"
    problem = planner.Problem("sm_90", dtype, precision, *inputs[0].shape, conv.k, conv.kernel, conv.stride,
                              conv.padding, conv.dilation, conv.groups, True, True)  # fmt: skip
    exact = conv_exact(*inputs, *geometry)
    tolerance = conv_tolerance(exact, *inputs, *geometry)
    ours = [one for one in planner.candidates(problem).values() if one.tile is not None]
    assert len(ours) >= 2
    for candidate in ours:
        actual = forward.carry_out(candidate, *inputs, *geometry).y
        assert_within(actual, exact, tolerance)


def test_measured_with_the_real_kernels(played):
    """As on a GPU, but for the clock: all candidates are right, in the interpreter."""

    class Clock:
        def milliseconds(self, work, runs):
            work()
            return [1.0] * runs

    problem = planner.Problem("interpreter", torch.float16, "half", 2, 20, 6, 5, 24, (3, 3), (1, 1), (1, 1), (1, 1), 1,
                              residual=True, relu=True)  # fmt: skip
    found = measuring.measure(problem, torch.device("cpu"), Clock(), 1)
    assert not found.rejected
    assert set(found.milliseconds) == set(planner.candidates(problem)) >= {cudnn.FUSED, cudnn.POINTWISE}
