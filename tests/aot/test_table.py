"""A kernel that is added as CONTRIBUTING.md says is compiled and checked with the others."""

import pytest
import torch

from tests.aot.checks import faults
from tests.aot.layers import image, items
from tests.toy_kernel import plan_double


@pytest.mark.parametrize("architecture", ["sm_90", "gfx942"])
def test_a_toy_kernel_passes_the_gate(compiler, architecture):
    plan = plan_double(image(8, 64, 56, 56, torch.float16), architecture)
    found = compiler.results(items("double", architecture, "fp16", plan))
    assert [made is not None for _, made in found] == [True]
    assert not faults(found)
