"""Kernels of inference, executed: the interpreter's tests on what Triton compiled."""

import pytest
import torch

from tests.interpreter import test_triton_chain as chain
from tests.interpreter.test_triton_ops import (
    test_accumulates_in_float32,
    test_any_strides,
    test_conv,
    test_global_avg_pool_sums_beyond_float16_and_keeps_nan,
    test_huge_and_tiny_scales,
    test_nan_and_inf_in_the_image,
    test_offsets_of_64_bits,
    test_stem,
)
from tests.interpreter.test_triton_small_maps import head_launches, test_head, test_nan_and_inf_in_the_head

__all__ = [
    "head_launches",
    "test_accumulates_in_float32",
    "test_any_strides",
    "test_conv",
    "test_global_avg_pool_sums_beyond_float16_and_keeps_nan",
    "test_head",
    "test_huge_and_tiny_scales",
    "test_nan_and_inf_in_the_head",
    "test_nan_and_inf_in_the_image",
    "test_offsets_of_64_bits",
    "test_stem",
]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("name", chain.CHAINS)
def test_chain(name, dtype):
    """Of float32 there are tiles for TF32 alone: test_tf32.py."""
    chain.check(chain.CHAINS[name].inputs(dtype))
