"""Hugging Face Accelerate: mixed precision, gradients of two batches added up, their norm clipped."""

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torchvision.models import resnet18

import resnet_fast
from common import batches, steps_wanted, watch


def main(steps: int) -> None:
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=2)
    model = resnet18(num_classes=10)
    resnet_fast.accelerate(model)  # the one line
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=1e-3, total_steps=steps)
    model, optimiser, data, schedule = accelerator.prepare(model, optimiser, batches(steps), schedule)

    model.train()
    with watch() as losses:
        for images, labels in data:
            with accelerator.accumulate(model):
                loss = F.cross_entropy(model(images), labels)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimiser.step()
                schedule.step()
                optimiser.zero_grad()
            losses.append(loss.item())
    accelerator.end_training()


if __name__ == "__main__":
    main(steps_wanted(default=20))
