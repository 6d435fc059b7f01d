"""The recipe of torchvision's references/classification/train.py, by which its V2 weights were trained, in short.

Synchronised batch norm, DDP, mixed precision with a gradient scaler, smoothed labels, mixup, a moving average. Run it
by itself, or in several processes: ``torchrun --nproc-per-node 2 examples/finetune_torchvision_reference.py``.
"""

import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision.models import resnet18
from torchvision.ops._utils import split_normalization_params
from torchvision.transforms import v2

import resnet_fast
from common import batches, steps_wanted, watch


def main(steps: int) -> None:
    torch.manual_seed(0)
    distributed = "RANK" in os.environ  # set by torchrun
    if distributed:
        dist.init_process_group("gloo")
    rank, world = (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)

    model = resnet18(num_classes=10, zero_init_residual=True)
    resnet_fast.accelerate(model)  # the one line
    norms, others = split_normalization_params(model)
    optimiser = torch.optim.SGD([{"params": norms, "weight_decay": 0.0}, {"params": others}], 0.02, 0.9, nesterov=True)
    scaler = torch.amp.GradScaler("cpu")
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
    mixup = v2.MixUp(alpha=0.2, num_classes=10)
    wrapped = DistributedDataParallel(model) if distributed else model
    if (
        distributed
    ):  # after wrapping: DDP refuses models on the CPU that have it already, as PyTorch's own cannot run there
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)

    wrapped.train()
    with watch() as losses:
        for images, labels in batches(steps):
            images, labels = mixup(images, labels)
            optimiser.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = criterion(wrapped(images[rank::world]), labels[rank::world])
            scaler.scale(loss).backward()
            scaler.unscale_(optimiser)
            nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            scaler.step(optimiser)
            scaler.update()
            average.update_parameters(model)
            losses.append(loss.item())
    if distributed:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(steps_wanted(default=20))
