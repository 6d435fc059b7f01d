"""How much a block in training asks of its host: launches of ours, and dispatches of ATen's.

On a GPU a step of training waits for its host where the kernels are short: each launch and each dispatch takes some
microseconds. What is counted is every dispatch below the op, allocations and views as well. Kernels are planned and not
started, so nothing here takes a GPU, or compiles.
"""

from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import JITFunction

from resnet_fast.kernels.contract import Geometry
from resnet_fast.kernels.triton import device, table
from resnet_fast.ops import block_backward, block_forward
from resnet_fast.ops.block import Block, Layer
from resnet_fast.ops.block_backward import Wanted

HOST_READS = ("aten._local_scalar_dense", "aten.item", "aten.nonzero")


class Dispatches(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(function))
        if self.names[-1].startswith(HOST_READS):
            assert args[0].dtype == torch.bool and args[0].dim() == 0, (
                "reads a tensor of a GPU"
            )  # a CPU flag of forward
        return function(*args, **(kwargs or {}))


def layer(k: int, c: int, kernel: int) -> Layer:
    geometry = Geometry((1, 1), (kernel // 2, kernel // 2))
    return Layer(torch.randn(k, c, kernel, kernel), torch.rand(k), torch.randn(k), 1e-5, geometry, True)


BLOCKS = {
    "basic": (layer(64, 64, 3), layer(64, 64, 3)),
    "bottleneck": (layer(64, 256, 1), layer(64, 64, 3), layer(256, 64, 1)),
}

# (launches, dispatches) of the forward pass and of the backward pass
COUNTS = {"basic": ((5, 21), (9, 28)), "bottleneck": ((8, 40), (13, 82))}


@pytest.mark.parametrize("name", BLOCKS)
def test_what_a_block_asks_of_its_host(name):
    """After an optimiser's step, so that packs of the weights are made anew."""
    layers = BLOCKS[name]
    block = Block(layers, identity=True, projection=False, relu=True, pool=False, process_group="")
    wanted = Wanted(True, False, (True,) * len(layers), (True,) * len(layers))
    x = torch.randn(8, layers[0].weight.shape[1], 14, 14).half().contiguous(memory_format=torch.channels_last)
    started: list[str] = []

    def start(kernel: Any, *arguments: Any, **options: Any) -> None:
        started.append(kernel.__name__)

    def counted(work: Any) -> tuple[Any, tuple[int, int]]:
        started.clear()
        with Dispatches() as seen:
            result = work()
        return result, (len(started), len(seen.names))

    with (
        torch.no_grad(),
        mock.patch.object(device, "architecture", return_value="sm_90"),
        mock.patch.object(JITFunction, "run", start),
        mock.patch.object(block_forward, "cancelled", return_value=False),
    ):
        for _ in range(2):
            for one in layers:
                one.weight.mul_(1.0)
            result, forward = counted(lambda: block_forward.forward(block, x, None, lambda case: table))
            given = torch.zeros_like(x), x, None, result.out, result.saved, wanted, lambda case: table
            _, backward = counted(partial(block_backward.backward, block, *given))
    for found, most in zip((forward, backward), COUNTS[name]):
        assert found <= most and found[1] <= most[1], (forward, backward)
