"""Run by torchrun in each of two processes: DDP on a share of a batch. Writes what is left to ``DIRECTORY/RANK``."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torchvision.models import resnet

import resnet_fast
from tests.cpu.small_models import fused_calls, images, short_resnet

X = images(8, 3, 32, 32).double()
LABELS = torch.arange(8) % 7
STEPS = 2
HALVES, THREE_AND_FIVE = (slice(4), slice(4, 8)), (slice(3), slice(3, 8))


def train(model: nn.Module, share: slice = slice(8), processes: int = 1, steps: int = STEPS) -> dict[str, list[Tensor]]:
    """Gradients of the last step, and what the steps leave. The loss is the whole batch's mean."""
    optimiser = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    for _ in range(steps):
        optimiser.zero_grad()
        loss = F.cross_entropy(model(X[share]), LABELS[share], reduction="sum") * processes / len(X)
        loss.backward()
        optimiser.step()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    tensors = {"gradients": gradients, "parameters": list(model.parameters()), "buffers": list(model.buffers())}
    return {name: [one.detach().clone() for one in group] for name, group in tensors.items()}


def freeze_norms(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return model


def synchronise(model: nn.Module) -> None:
    """After DDP has wrapped it: DDP takes no model on the CPU with SyncBatchNorm, since PyTorch's cannot run there."""
    nn.SyncBatchNorm.convert_sync_batchnorm(model)


def _cases(rank: int) -> Iterator[tuple[str, dict[str, Any]]]:
    for block in (resnet.BasicBlock, resnet.Bottleneck):

        def run(name: str, share: slice, stock: bool = False, sync: bool = False, frozen: bool = False, **kwargs: Any):
            model = short_resnet(block)  # noqa: B023
            model = model if stock else resnet_fast.accelerate(model)
            if frozen:
                freeze_norms(model)
            wrapped = DistributedDataParallel(model, **kwargs)
            if sync:
                synchronise(model)
            found: dict[str, Any] = {}
            calls = fused_calls(lambda: found.update(train(wrapped, share, 2)))
            found["calls"] = calls.count("residual_block"), calls.count("residual_block_backward")
            return f"{name}, {block.__name__}", found  # noqa: B023

        yield run("stock", HALVES[rank], stock=True)
        yield run("each its own", HALVES[rank])
        yield run("gradients in buckets", HALVES[rank], gradient_as_bucket_view=True, static_graph=True)
        yield run("frozen", HALVES[rank], frozen=True)
        yield run("synchronised", HALVES[rank], sync=True)
        yield run("synchronised, unequal", THREE_AND_FIVE[rank], sync=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    torch.save(dict(_cases(dist.get_rank())), Path(sys.argv[1]) / str(dist.get_rank()))
    dist.destroy_process_group()
