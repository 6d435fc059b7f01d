"""Kernels on 8-bit numbers, executed: the interpreter's tests on what Triton compiled.

sm_80 multiplies integers alone. sm_89 has its instructions, and one for fp8.

Of fp8 on sm_90, a sum leaves the tensor cores after every step. Triton reads it there before it has waited for the
product, which the ISA leaves undefined. ptxas sees that, and puts a wait behind every product; so does this file.
"""

import re

import pytest

from resnet_fast.kernels.triton import device
from tests.interpreter import test_triton_quantised as quantised
from tests.interpreter.cases import CONVS
from tests.interpreter.test_triton_quantised import (
    test_a_residual_block_from_end_to_end,
    test_any_strides,
    test_conv,
    test_dequantise,
    test_every_residual_and_result,
    test_nan_has_no_int8,
    test_nan_in_fp8,
    test_offsets_of_64_bits,
    test_quantise,
    test_saturates_at_both_ends,
    test_sums_of_int8_are_exact,
    test_sums_of_int8_beyond_24_bits,
    test_ties_go_to_the_even_number,
)
from tests.ptx import launching
from tests.ptx.parse import PtxError

__all__ = [
    "test_a_residual_block_from_end_to_end",
    "test_any_strides",
    "test_conv",
    "test_dequantise",
    "test_every_residual_and_result",
    "test_nan_has_no_int8",
    "test_nan_in_fp8",
    "test_offsets_of_64_bits",
    "test_quantise",
    "test_saturates_at_both_ends",
    "test_sums_of_int8_are_exact",
    "test_sums_of_int8_beyond_24_bits",
    "test_ties_go_to_the_even_number",
]

ARCHITECTURES = ("sm_80", "sm_89", "sm_90")


@pytest.fixture(autouse=True)
def _covered(monkeypatch, request, architecture):
    """As on a GPU, where there is such a product."""
    dtype = request.node.callspec.params.get("dtype")
    if device.no_fp8(architecture) and (dtype == quantised.FP8 or "fp8" in request.node.name):
        pytest.skip(f"{architecture} does not multiply fp8")
    monkeypatch.setattr(device, "refusal", lambda *_: None)
    if architecture == "sm_90" and "fp8" in request.node.name and "too_early" not in request.node.name:
        code = launching.code
        monkeypatch.setattr(launching, "code", lambda text: code(_waited_for(text)))


def _waited_for(text: str) -> str:
    """With each product in a group of its own, and a wait behind it, as ptxas has it."""
    after = "wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;"
    return re.sub(r"^(\s*wgmma\.mma_async[^;]*;)", rf"\1\n{after}", text, flags=re.MULTILINE)


def test_sums_of_fp8_are_read_too_early(architecture):
    """Known, of Triton 3.9: if it is gone, so may be what ``_covered`` does about it."""
    conv = CONVS["round"]
    if architecture != "sm_90":
        quantised.check(quantised.inputs(conv, quantised.FP8), conv)
        return
    with pytest.raises(PtxError, match="belongs to a product that was not waited for"):
        quantised.check(quantised.inputs(conv, quantised.FP8), conv)
