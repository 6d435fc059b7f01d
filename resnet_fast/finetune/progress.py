"""What a run says while it goes on: lines in the log, and how far a bar is to go."""

import logging
import shlex
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, Optional

import torch
from torch import nn

from resnet_fast.finetune.arguments import Settings
from resnet_fast.finetune.data import Data
from resnet_fast.finetune.distributed import Processes

logger = logging.getLogger(__name__)

Bar = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is."""

_SILENCE = 10.0  # seconds without a line after which one is due, however few batches have passed
_SMALL = 64  # pixels


class Progress:
    """Of one run.

    Args:
        batches: in an epoch, of this process.
        bar: is told of every batch.
    """

    def __init__(self, settings: Settings, processes: Processes, batches: int, bar: Optional[Bar]) -> None:
        self._settings, self._processes, self._batches = settings, processes, batches
        self._bar = bar if bar is not None and processes.first else lambda *_: None

    def begin(self, model: nn.Module, data: Data, size: int, folder: Path, epoch: int) -> None:
        """Say what is about to happen, before anything takes long; ``epoch`` are complete."""
        self.started = self._last_line = time.perf_counter()
        self._resumed_from = epoch
        settings = self._settings
        start = f"from {settings.weights}" if settings.weights is not None else "from scratch"
        device, world = self._processes.device, self._processes.world
        where = f"{device}, {torch.get_num_threads()} threads" if device.type == "cpu" else str(device)
        logger.info(
            "%s %s, %dx%d; %d images to learn from and %d to validate on, %d classes; on %s; into %s/",
            *(settings.model, f"after epoch {epoch}" if epoch else start, size, size),
            *(len(data.train), len(data.validation), len(data.classes)),
            *(where if world == 1 else f"{world} processes, {where} each", folder),
        )
        left = size // _stride_of_stem(model)
        if size <= _SMALL and left < size // 2:
            logger.info(
                "images of %dx%d are small for this model, made for 224x224: its first layers leave %dx%d of them; "
                "a larger --image-size, e.g. %d, takes longer and can be worth it",
                *(size, size, left, left, 2 * size),
            )

    def due(self, done: int) -> bool:
        """Whether a line is, after ``done`` batches of the epoch."""
        if done == self._batches:  # the epoch's own follows
            return False
        return done % self._settings.log_interval == 0 or time.perf_counter() - self._last_line > _SILENCE

    def learning(self, epoch: int, done: int) -> None:
        self._bar(f"learning: epoch {epoch + 1}/{self._settings.epochs}", done, self._batches)

    def validating(self, epoch: int, done: int, batches: int) -> None:
        self._bar(f"validating: epoch {epoch + 1}/{self._settings.epochs}", done, batches)

    def batch(self, epoch: int, done: int, loss: float, rate: float, pace: float) -> None:
        self._last_line = time.perf_counter()
        logger.info(
            "epoch %d/%d  batch %d/%d  loss %.4f  lr %.2e  %.0f img/s  ETA %s",
            *(epoch + 1, self._settings.epochs, done, self._batches, loss, rate, pace),
            self._left(epoch + done / self._batches),
        )

    def epoch(self, epoch: int, metrics: Mapping[str, Any]) -> None:
        """``epoch`` are complete."""
        self._last_line = time.perf_counter()
        forms = dict.fromkeys(("train_loss", "val_loss", "ema_loss"), ".4f")
        forms |= dict.fromkeys(("val_accuracy", "ema_accuracy"), ".2%")
        forms |= {name: "d" for name in ("train_skipped", "val_skipped") if metrics[name]}
        shown = [f"{name.replace('_', ' ')} {metrics[name]:{form}}" for name, form in forms.items() if name in metrics]
        logger.info(
            "epoch %d/%d  %s  %.0f img/s  %.1f s  ETA %s",
            *(epoch, self._settings.epochs, "  ".join(shown)),
            *(metrics["images_per_second"], metrics["seconds"], self._left(epoch)),
        )

    def interrupted(self, saved: Optional[str], epoch: int) -> None:
        """How to go on from the checkpoint ``saved``, after ``epoch``."""
        if not self._processes.first:
            return
        if saved is None:
            logger.warning("interrupted in the first epoch: there is no checkpoint yet")
        else:
            logger.warning("interrupted; --resume %s goes on after epoch %d", shlex.quote(saved), epoch)

    def _left(self, done: float) -> str:
        """The time to the end at the pace so far, when ``done`` epochs are."""
        rest = (self._settings.epochs - done) / (done - self._resumed_from)
        return str(timedelta(seconds=round((time.perf_counter() - self.started) * rest)))


def _stride_of_stem(model: nn.Module) -> int:
    """By how much the first convolution and the first pooling reduce an image."""
    stride = 1
    for kind in (nn.Conv2d, nn.MaxPool2d):
        first = next((module for module in model.modules() if isinstance(module, kind)), None)
        steps = 1 if first is None else first.stride
        stride *= steps[0] if isinstance(steps, tuple) else int(steps)
    return stride
