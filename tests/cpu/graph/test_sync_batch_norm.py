"""``SyncBatchNorm`` over two processes with different shares of a batch: as batch norm over the whole of it.

PyTorch's own runs on GPUs only, so there is no stock forward to compare with; ``CpuSyncBatchNorm`` has one.
"""

import copy
import itertools
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torchvision
from torch import nn

import resnet_fast
from resnet_fast.finetune.sync_batch_norm import synchronise
from resnet_fast.graph.conditions import Accelerated
from resnet_fast.graph.program import Program
from resnet_fast.graph.state import state_of
from tests.cpu.ops.residual_blocks import SHAPES, Block, Layer, Shape, assert_close

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


KINDS = {
    "SyncBatchNorm": nn.SyncBatchNorm.convert_sync_batchnorm,
    "CpuSyncBatchNorm": lambda block: synchronise(block, torch.device("cpu")),
}
RUNS = [*((kind, "fused") for kind in KINDS), ("CpuSyncBatchNorm", "forward")]


def _process(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.set_num_threads(1)
    for (kind, method), name in itertools.product(RUNS, BLOCKS):
        block, x, grad = _data(name)
        share = slice(0, len(x) - 1) if rank == 0 else slice(len(x) - 1, None)
        block, given = KINDS[kind](block), x[share].requires_grad_()
        out = getattr(block, method)(given)
        out.backward(grad[share])
        found = {"out": out.detach(), "d x": given.grad}
        gradients = {f"d {key}": p.grad for key, p in block.named_parameters()}
        torch.save((found, gradients, dict(block.named_buffers())), f"{folder}/{kind}-{method}-{name}-{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What both processes found."""
    folder = tmp_path_factory.mktemp("processes")
    mp.spawn(_process, (str(folder),), nprocs=2)
    return folder


@pytest.mark.skipif(not dist.is_available(), reason="PyTorch was built without distributed")
@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize(("kind", "method"), RUNS)
def test_two_processes(folder, kind, method, name):
    block, x, grad = _data(name)
    x.requires_grad_()
    out = block(x)
    out.backward(grad)
    (first, d_first, buffers), (second, d_second, others) = (
        torch.load(folder / f"{kind}-{method}-{name}-{rank}.pt") for rank in (0, 1)
    )
    whole = {key: torch.cat([first[key], second[key]]) for key in first}
    assert_close(whole, {"out": out.detach(), "d x": x.grad}, 1e-12)
    summed = {key: d_first[key] + d_second[key] for key in d_first}
    assert_close(summed, {f"d {key}": p.grad for key, p in block.named_parameters()}, 1e-12)
    for key, buffer in block.named_buffers():
        assert torch.equal(buffers[key], others[key]), f"{key} differs between the processes"
        torch.testing.assert_close(buffers[key], buffer, rtol=1e-12, atol=1e-13)


def _programs(module: Accelerated) -> tuple[Program, Program]:
    """For eval mode and for training mode."""
    state = state_of(module)
    return state.eval, state.training


def test_a_model_with_the_norm_for_cpus_runs_fused():
    """As ``resnet-fast finetune --sync-bn`` makes it on CPUs: whole blocks in training, the same steps in eval."""
    model = resnet_fast.accelerate(synchronise(torchvision.models.resnet18(), torch.device("cpu")))
    plain = resnet_fast.accelerate(torchvision.models.resnet18())
    for ours, stock in zip(model.modules(), plain.modules(), strict=True):
        assert isinstance(ours, Accelerated) == isinstance(stock, Accelerated)
        if isinstance(ours, Accelerated):
            for program, expected in zip(_programs(ours), _programs(stock), strict=True):
                assert list(map(str, program.ops)) == list(map(str, expected.ops))
                assert program.refusal(ours) == expected.refusal(stock)
    block = model.layer2[0]
    assert _programs(block)[1].refusal(block) == ""
    assert _programs(block)[0].refusal(block.eval()) == ""
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        plain.load_state_dict(model.state_dict())
        torch.testing.assert_close(model.eval()(x), plain.eval()(x))
