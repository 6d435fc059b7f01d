"""Kernels of training, executed: the interpreter's tests on what Triton compiled."""

import torch

from tests.interpreter.cases import CONVS
from tests.interpreter.test_triton_training_backward import (
    test_bn_backward,
    test_dgrad,
    test_dgrad_expand,
    test_dgrad_expand_of_nan_and_of_zero_matrices,
    test_dgrad_expand_shapes,
    test_dgrad_gates,
    test_repeats_are_bit_equal,
    test_tail_backward,
    test_tail_pool_backward,
    test_wgrad,
    test_wgrad_prologue,
)
from tests.interpreter.test_triton_training_forward import (
    affine,
    check_conv_statistics,
    test_conv_affine,
    test_conv_statistics,
    test_gram,
    test_gram_gives_the_statistics_of_the_convolution,
    test_nan_and_inf_in_a_raw_image,
    test_nan_and_inf_in_gram,
    test_statistics_of_a_large_mean,
    test_tail,
    test_tail_pool,
)
from tests.ptx import launching

__all__ = [
    "test_bn_backward",
    "test_conv_affine",
    "test_conv_statistics",
    "test_dgrad",
    "test_dgrad_expand",
    "test_dgrad_expand_of_nan_and_of_zero_matrices",
    "test_dgrad_expand_shapes",
    "test_dgrad_gates",
    "test_gram",
    "test_gram_gives_the_statistics_of_the_convolution",
    "test_nan_and_inf_in_a_raw_image",
    "test_nan_and_inf_in_gram",
    "test_repeats_are_bit_equal",
    "test_statistics_of_a_large_mean",
    "test_tail",
    "test_tail_backward",
    "test_tail_pool",
    "test_tail_pool_backward",
    "test_wgrad",
    "test_wgrad_prologue",
]


def test_lanes_that_round_the_same_sum_differently():
    """Known, and in the last places only: a product was fused with the first addition of a sum over lanes."""
    conv = CONVS["1x1 with padding"]
    x, weight, *_ = conv.inputs(torch.float16)
    launching.disagreements.clear()
    check_conv_statistics(x, affine(conv.c), weight, conv)
    assert {one.name for one in launching.disagreements} == {"st"}
