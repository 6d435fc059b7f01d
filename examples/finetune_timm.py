"""A timm model with timm's parts, as its train.py puts them together: optimiser, schedule, smoothed labels, EMA."""

import timm
import torch
from timm.loss import LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3

import resnet_fast
from common import batches, steps_wanted, watch


def main(steps: int) -> None:
    torch.manual_seed(0)
    # pretrained=True where there is a network to fetch weights from.
    model = timm.create_model("resnet18", pretrained=False, num_classes=10)
    resnet_fast.accelerate(model)  # the one line
    model = model.to(memory_format=torch.channels_last).train()

    optimiser = create_optimizer_v2(model, opt="sgd", lr=0.05, momentum=0.9, weight_decay=1e-4)
    schedule = CosineLRScheduler(optimiser, t_initial=steps, warmup_t=2, warmup_lr_init=0.01, t_in_epochs=False)
    criterion = LabelSmoothingCrossEntropy(0.1)
    average = ModelEmaV3(model, decay=0.9)

    with watch() as losses:
        for step, (images, labels) in enumerate(batches(steps)):
            optimiser.zero_grad()
            loss = criterion(model(images.to(memory_format=torch.channels_last)), labels)
            loss.backward()
            optimiser.step()
            schedule.step_update(step)
            average.update(model, step=step)
            losses.append(loss.item())


if __name__ == "__main__":
    main(steps_wanted(default=20))
