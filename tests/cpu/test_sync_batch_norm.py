"""``SyncBatchNorm`` over two processes with different shares of a batch: as batch norm over the whole of it.

PyTorch's own runs on GPUs only, so there is no stock forward to compare with.
"""

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from tests.cpu.residual_blocks import SHAPES, Block, Layer, Shape, assert_close

BLOCKS = {
    **{name: SHAPES[name] for name in ("basic, projection", "bottleneck, expand twice", "bias", "deep stem")},
    "one value each": Shape((2, 4, 1, 1), (Layer(6, 1), Layer(4, 1)), identity=True),
    "shortcut alone": Shape((2, 4, 5, 6), (Layer(6, 3), Layer(9, 3)), Layer(9, 1)),
}


def _data(name: str) -> tuple[Block, torch.Tensor, torch.Tensor]:
    shape = BLOCKS[name]
    n = 2 if name == "one value each" else 5  # the second process has one image, the first the rest
    x = torch.randn(n, *shape.x[1:], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    block = shape.block().double()
    out = copy.deepcopy(block)(x)
    return block, x, torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def _synchronised(block: Block) -> Block:
    return nn.SyncBatchNorm.convert_sync_batchnorm(block)


def _process(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.set_num_threads(1)
    for name in BLOCKS:
        block, x, grad = _data(name)
        share = slice(0, len(x) - 1) if rank == 0 else slice(len(x) - 1, None)
        block, given = _synchronised(block), x[share].requires_grad_()
        out = block.fused(given)
        out.backward(grad[share])
        found = {"out": out.detach(), "d x": given.grad}
        gradients = {f"d {name}": p.grad for name, p in block.named_parameters()}
        torch.save((found, gradients, dict(block.named_buffers())), f"{folder}/{name}-{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What both processes found."""
    folder = tmp_path_factory.mktemp("processes")
    mp.spawn(_process, (str(folder),), nprocs=2)
    return folder


@pytest.mark.skipif(not dist.is_available(), reason="PyTorch was built without distributed")
@pytest.mark.parametrize("name", BLOCKS)
def test_two_processes(folder, name):
    block, x, grad = _data(name)
    x.requires_grad_()
    out = block(x)
    out.backward(grad)
    (first, d_first, buffers), (second, d_second, others) = (
        torch.load(folder / f"{name}-{rank}.pt") for rank in (0, 1)
    )
    whole = {key: torch.cat([first[key], second[key]]) for key in first}
    assert_close(whole, {"out": out.detach(), "d x": x.grad}, 1e-12)
    summed = {key: d_first[key] + d_second[key] for key in d_first}
    assert_close(summed, {f"d {key}": p.grad for key, p in block.named_parameters()}, 1e-12)
    for key, buffer in block.named_buffers():
        assert torch.equal(buffers[key], others[key]), f"{key} differs between the processes"
        torch.testing.assert_close(buffers[key], buffer, rtol=1e-12, atol=1e-13)
