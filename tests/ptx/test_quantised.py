"""Kernels on 8-bit integers, executed: the interpreter's tests on what Triton compiled.

Of sm_80 alone, which does not multiply fp8: the machine does not know sm_90's products of 8 bits.
"""

import pytest

from resnet_fast.kernels.triton import device
from tests.interpreter import test_triton_quantised as quantised

ARCHITECTURES = ("sm_80",)


@pytest.fixture(autouse=True)
def _covered(monkeypatch):
    """As on a GPU."""
    monkeypatch.setattr(device, "refusal", lambda *_: None)


@pytest.mark.parametrize("name", quantised.QUANTISED)
def test_conv(name):
    quantised.test_conv(name, quantised.INT8, None)


@pytest.mark.parametrize("name", ["round", "1x1", "7x7/2", "32 groups of 4, ResNeXt"])
def test_sums_are_exact(name):
    quantised.test_sums_of_int8_are_exact(name)
