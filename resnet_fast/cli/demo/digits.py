"""A ResNet-18 learns scikit-learn's handwritten digits, as ``resnet-fast finetune digits`` does."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from resnet_fast.cli.finetune import logged
from resnet_fast.finetune import Settings, open_data, train
from resnet_fast.finetune.checkpoint import BEST
from resnet_fast.finetune.distributed import Processes
from resnet_fast.finetune.output_folder import claimed
from resnet_fast.finetune.transforms import for_evaluation
from resnet_fast.models.named import build

MODEL = "resnet18"


@dataclass(frozen=True)
class LearntDigits:
    """What came of it.

    Attributes:
        network: the stock model with the weights of the best epoch, in eval mode.
        classes: their names.
        images: of the test, ``[N, 3, 32, 32]``, float32, as the network takes them.
        pictures: the same to look at, uint8.
        labels: ``[N]``, int64.
        training: what ``finetune.train`` returns, and ``history``, its metrics, an entry an epoch.
    """

    network: nn.Module
    classes: tuple[str, ...]
    images: Tensor
    pictures: Tensor
    labels: Tensor
    training: dict[str, Any]


def learn_digits(folder: Path, epochs: int, seed: int) -> LearntDigits:
    """Train on the CPU, on as many threads as PyTorch is set to; ``folder`` gets what ``finetune`` leaves behind."""
    # No processes that load images: these are in memory, and a core is better spent on training.
    settings = Settings(
        model=MODEL, epochs=epochs, seed=seed, workers=0, device="cpu", output=str(folder), overwrite=True
    )
    data = open_data("digits", settings)
    here = Processes(torch.device("cpu"))
    with logged(here), claimed(settings):
        result = train(build(MODEL, num_classes=len(data.classes), seed=seed), data, settings, folder, here)
    test = data.validation
    pictures = torch.stack([test.load(index) for index in range(len(test))])
    history = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    return LearntDigits(
        network=build(MODEL, weights=str(folder / BEST), num_classes=len(data.classes)),
        classes=data.classes,
        images=for_evaluation(data.kind, settings)(pictures),
        pictures=pictures,
        labels=torch.tensor([test.label(index) for index in range(len(test))]),
        training={**result, "history": history},
    )
