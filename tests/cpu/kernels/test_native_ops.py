"""What only the native implementation of the ops could get wrong."""

import gc

import pytest
import torch

from resnet_fast import ops
from resnet_fast.kernels.contract import Case
from resnet_fast.kernels.native import inference as native
from resnet_fast.kernels.native import library

pytestmark = pytest.mark.skipif(library.unavailable() is not None, reason=str(library.unavailable()))


def test_a_call_keeps_what_its_program_points_to(monkeypatch):
    """The packs of inference tensors are kept by nobody else, and freed memory is soon somebody else's."""
    with torch.inference_mode():
        x, weight = torch.randn(1, 64, 8, 8), torch.randn(256, 64, 1, 1)
        scale, shift = torch.rand(256), torch.randn(256)
        run, written = library.run, []

        def overwriting(*args):
            gc.collect()
            # As large as the pack and the shift: the allocator hands out again what it got back last.
            written.extend(torch.full((256 * 64 * 4,), 255, dtype=torch.uint8) for _ in range(8))
            written.extend(torch.full((256,), torch.nan) for _ in range(8))
            run(*args)

        monkeypatch.setattr(library, "run", overwriting)
        y = native.conv_bn_act(x, weight, scale, shift, None, (1, 1), (0, 0), (1, 1), 1, True)
    expected = (torch.nn.functional.conv2d(x, weight) * scale.view(-1, 1, 1) + shift.view(-1, 1, 1)).relu()
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)


def test_bfloat16_goes_to_whoever_multiplies_it():
    case = Case("conv_bn_act", "cpu", torch.bfloat16, 64, 64, (3, 3), (1, 1), (1, 1))
    reason = native.supports(case)
    if library.variant() == "avx512_bf16" and not torch.cpu._is_amx_tile_supported():
        assert reason is None
        assert ops.implementation_for(case) == "native"
    else:
        assert "bfloat16" in reason
        assert ops.implementation_for(case) != "native"
