"""Whole residual blocks in training, forward and backward: what an executed kernel left, the next one reads."""

import pytest
import torch

from resnet_fast.kernels.triton import device
from tests.cpu.ops.residual_blocks import SHAPES, assert_as_precise, over_seeds, results, usual
from tests.ptx import launching

each_half = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])


@each_half
@pytest.mark.parametrize("name", ["basic", "basic, projection", "bottleneck, expand", "bottleneck, expand twice"])
def test_forward_and_backward(name, dtype, monkeypatch):
    """The result, every gradient and every running statistic err at most twice as much as PyTorch's."""
    monkeypatch.setenv("RESNET_FAST_IMPLEMENTATION", "triton")
    monkeypatch.setattr(device, "refusal", lambda *_: None)  # as on a GPU
    executed, execute = [], launching.execute_launch

    def noting(launch):
        executed.append(launch.kernel.__name__)
        execute(launch)

    monkeypatch.setattr(launching, "execute_launch", noting)

    def run(fused: bool, precision=None):
        def one(seed: int):
            block, images = SHAPES[name].block(seed=seed), SHAPES[name].images(seed)
            return results(block.to(dtype), [x.to(dtype) for x in images], fused, precision)

        return over_seeds(one, 3)

    fused = run(True)
    assert {"dgrad", "wgrad", "tail_backward"} <= {one.removesuffix("_kernel") for one in executed}
    assert_as_precise(fused, run(False), run(False, torch.float64), torch.finfo(dtype).eps, usual)
