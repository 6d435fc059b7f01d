"""The training loop: epochs of training and validation, a checkpoint after each."""

import contextlib
import itertools
import logging
import math
import os
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from resnet_fast.accelerated import accelerate
from resnet_fast.finetune import checkpoint, qat, recipe, report, transforms
from resnet_fast.finetune.arguments import SettingError, Settings
from resnet_fast.finetune.data import Data
from resnet_fast.finetune.distributed import Processes
from resnet_fast.finetune.folders import check_classes
from resnet_fast.finetune.freezing import Frozen
from resnet_fast.finetune.loading import Batch, Loader, seed_of
from resnet_fast.finetune.progress import Bar, Progress
from resnet_fast.finetune.sync_batch_norm import synchronise
from resnet_fast.utils.optional import require

logger = logging.getLogger(__name__)

_AMP = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Score:
    """How well a model does on the validation images: mean loss, and how often each class is taken for each."""

    loss: float
    confusion: Tensor  # [classes, classes] int64: true, predicted
    skipped: int

    @property
    def accuracy(self) -> float:
        return int(self.confusion.trace()) / int(self.confusion.sum())


def train(
    model: nn.Module,
    data: Data,
    settings: Settings,
    folder: Path,
    processes: Optional[Processes] = None,
    bar: Optional[Bar] = None,
) -> dict[str, Any]:
    """Train ``model`` on ``data`` and leave checkpoints, metrics and pictures in ``folder``.

    ``last.pt`` holds what resuming needs, ``best.pt`` the weights of the best epoch. Both are written after each epoch.

    Args:
        model: takes ``[N, 3, H, W]``, gives ``[N, len(data.classes)]``. Changed in place, and accelerated; with
            ``settings.qat`` prepared too, which ``qat.remove_qat`` undoes.
        settings: ``resume`` is followed; ``model`` and ``weights``, which tell how ``model`` came about, are not.
        processes: those of torchrun; by default this one alone.
        bar: is told of every batch: what is being done, how much of it is done, how much there is.

    Returns:
        Plain values: the accuracies, for all and for each class, and what they belong to.

    Raises:
        ValueError: settings that do not go together, or a checkpoint of other data.
        RuntimeError: the loss is no number any more, or no image can be read.
        OSError: a file cannot be written; the checkpoint before is unchanged.
        MissingPackageError: matplotlib is not installed.
    """
    require("matplotlib", "the curves of the fine-tuning")
    with _determinism(settings.deterministic), warnings.catch_warnings():
        # The scaler of fp16 leaves out the first steps, which PyTorch takes for a mistake.
        warnings.filterwarnings("ignore", "Detected call of .lr_scheduler.step")
        return Run(model, data, settings, folder, processes or Processes(torch.device("cpu")), bar).all_epochs()


@contextlib.contextmanager
def _determinism(wanted: bool) -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it, cuBLAS refuses
    torch.use_deterministic_algorithms(wanted or before[0])
    torch.backends.cudnn.benchmark = not wanted
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]


class Run:
    """The state of a training run. What a checkpoint holds of it is in ``_state``; arguments as for ``train``."""

    def __init__(
        self,
        model: nn.Module,
        data: Data,
        settings: Settings,
        folder: Path,
        processes: Processes,
        bar: Optional[Bar] = None,
    ) -> None:
        self.data, self.settings, self.folder, self.processes = data, settings, folder, processes
        self.device = processes.device
        self.format = torch.channels_last if settings.channels_last else torch.contiguous_format

        augment, prepare = (make(data.kind, settings) for make in (transforms.for_training, transforms.for_evaluation))
        self.train_images = Loader(data.train, augment, settings, processes, shuffled=True)
        self.val_images = Loader(data.validation, prepare, settings, processes, shuffled=False)
        if not len(self.train_images):
            raise ValueError(f"DATA has {len(data.train)} images to learn from, expected one for each process at least")
        self.progress = Progress(settings, processes, len(self.train_images), bar)
        self.mix = transforms.mixing(settings, len(data.classes))

        model.to(self.device, memory_format=self.format)  # type: ignore[call-overload]
        if settings.sync_bn and processes.world > 1:
            model = synchronise(model, self.device)
        self.frozen = Frozen(model, settings.frozen_modules, settings.freeze_bn, settings.qat)
        self.model = model if settings.stock else accelerate(model)
        if settings.qat:
            self._prepare_qat()
        self.ema = recipe.average(self.model, settings.model_ema_decay) if settings.model_ema else None
        self.optimizer = recipe.optimizer(self.model, settings)
        steps = math.ceil(len(self.train_images) / settings.grad_accum_steps)
        self.schedule = recipe.schedule(self.optimizer, settings, steps)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=settings.amp == "fp16")
        self.epoch = 0  # complete ones
        self.history: list[dict[str, Any]] = []
        self.best: dict[str, Any] = {"epoch": 0, "accuracy": -1.0}  # and the confusion
        if settings.resume is not None:
            self._restore(checkpoint.load(Path(settings.resume)))
        self.saved_epoch = self.epoch
        self.saved = settings.resume
        self.parallel: nn.Module = self.model
        if processes.world > 1:
            self.parallel = DistributedDataParallel(
                self.model, device_ids=[self.device] if self.device.type == "cuda" else None
            )

    def _prepare_qat(self) -> None:
        try:
            qat.prepare_qat(self.model)
        except ValueError as error:
            raise SettingError("qat", f"does not go with the model: {error}") from error
        if self.settings.resume is not None:
            return  # the checkpoint has the ranges
        batches = itertools.islice(self.train_images.epoch(0), self.settings.num_calibration_batches)
        with self._autocast():
            count = qat.calibrate(self.model, (self._to_device(batch)[0] for batch in batches if len(batch.labels)))
        logger.info("%d int8 tensors have their ranges from %d batches", len(qat.ranges(self.model)), count)

    def all_epochs(self) -> dict[str, Any]:
        size = transforms.preprocessing(self.data.kind, self.settings).size
        self.progress.begin(self.model, self.data, size, self.folder, self.epoch)
        try:
            while self.epoch < self.settings.epochs:
                self._one_epoch()
        except (KeyboardInterrupt, SystemExit):
            self.progress.interrupted(self.saved, self.saved_epoch)
            raise
        result = self._result()
        if self.processes.first:
            report.write_json(self.folder / "results.json", result)  # before pictures, which more can go wrong with
            report.write_classes(self.folder, self.data.classes)
            report.write_confusion(self.folder, self.best["confusion"].numpy(), self.data.classes)
        return result

    def _one_epoch(self) -> None:
        start = time.perf_counter()
        metrics: dict[str, Any] = {"epoch": self.epoch + 1, "lr": self.optimizer.param_groups[0]["lr"]}
        metrics |= self._train(start)
        score = self._evaluate(self.model)
        metrics |= {"val_loss": score.loss, "val_accuracy": score.accuracy, "val_skipped": score.skipped}
        if self.ema is not None:
            score = self._evaluate(self.ema.module)
            metrics |= {"ema_loss": score.loss, "ema_accuracy": score.accuracy}
        metrics["seconds"] = time.perf_counter() - start
        self.epoch += 1
        self.history.append(metrics)
        if score.accuracy > self.best["accuracy"]:
            self.best = {"epoch": self.epoch, "accuracy": score.accuracy, "confusion": score.confusion}
        if self.processes.first:
            self._write()
        self.progress.epoch(self.epoch, metrics)

    def _train(self, start: float) -> dict[str, Any]:
        """One epoch over the training images; ``start`` is when it began."""
        torch.manual_seed(seed_of(self.settings.seed, self.epoch, self.processes.rank))  # mixup, dropout
        self.frozen.train()
        if self.settings.qat:
            qat.observe(self.model, self.epoch < self._observed_epochs)
        totals = torch.zeros(3, dtype=torch.float64, device=self.device)  # loss, images, skipped ones
        accumulated = self.settings.grad_accum_steps
        for index, batch in enumerate(self.train_images.epoch(self.epoch)):
            first = index - index % accumulated
            size = min(accumulated, len(self.train_images) - first)
            last = index + 1 == first + size
            totals[2] += len(batch.unreadable)
            if batch.usable:
                loss = self._backward(batch, size, last)
                totals[:2] += torch.stack([loss * len(batch.labels), loss.new_tensor(len(batch.labels))])
            elif self.processes.world > 1:
                raise RuntimeError(f"a batch has too few images that can be read; {batch.unreadable[0][0]} cannot")
            if last:
                self._step()
            self.progress.learning(self.epoch, index + 1)
            if self.progress.due(index + 1):
                loss, images, _ = totals.tolist()
                self._check(loss)
                pace = images * self.processes.world / (time.perf_counter() - start)
                rate = self.optimizer.param_groups[0]["lr"]
                self.progress.batch(self.epoch, index + 1, loss / max(images, 1), rate, pace)
        loss, images, skipped = self.processes.sum(totals).tolist()
        if not images:
            rest = len(self.data.train) - int(skipped)
            others = f", and of the other {rest} none came into a batch with enough of them" if rest else ""
            raise RuntimeError(
                f"no batch of images to learn from is usable: {int(skipped)} cannot be read{others} "
                f"(--batch-size {self.settings.batch_size})"
            )
        self._check(loss)
        pace = images / (time.perf_counter() - start)
        return {"train_loss": loss / images, "train_skipped": int(skipped), "images_per_second": pace}

    @property
    def _observed_epochs(self) -> int:
        given = self.settings.num_observer_update_epochs
        return math.ceil(self.settings.epochs / 2) if given is None else given

    def _backward(self, batch: Batch, size: int, last: bool) -> Tensor:
        """Add the gradients of a batch, one of ``size`` in a step; return its mean loss."""
        images, labels = self._to_device(batch)
        if self.mix is not None:
            images, labels = self.mix(images, labels)
        waits = isinstance(self.parallel, DistributedDataParallel) and not last
        with self.parallel.no_sync() if waits else contextlib.nullcontext():  # type: ignore[operator]
            with self._autocast():
                loss = F.cross_entropy(self.parallel(images), labels, label_smoothing=self.settings.label_smoothing)
            self.scaler.scale(loss / size).backward()
        return loss.detach().double()

    def _step(self) -> None:
        if any(parameter.grad is not None for parameter in self.model.parameters()):
            if self.settings.clip_grad_norm is not None:
                self.scaler.unscale_(self.optimizer)
                nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip_grad_norm)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad()
            if self.ema is not None:
                self.ema.update_parameters(self.model)
        self.schedule.step()

    @torch.inference_mode()
    def _evaluate(self, model: nn.Module) -> Score:
        """``model``, without the other processes' help, on this one's share of the validation images, then all."""
        self.processes.share_buffers(model)
        model.eval()
        classes = len(self.data.classes)
        confusion = torch.zeros(classes, classes, dtype=torch.int64)
        totals = torch.zeros(2, dtype=torch.float64)  # loss, skipped ones
        for index, batch in enumerate(self.val_images.epoch(0)):
            self.progress.validating(self.epoch, index, len(self.val_images))
            totals[1] += len(batch.unreadable)
            if not len(batch.labels):
                continue
            images, labels = self._to_device(batch)
            with self._autocast():
                logits = model(images)
            totals[0] += F.cross_entropy(logits.float(), labels, reduction="sum").item()
            pairs = batch.labels * classes + logits.argmax(1).cpu()
            confusion += torch.bincount(pairs, minlength=classes * classes).view(classes, classes)
        loss, skipped = self.processes.sum(totals.to(self.device)).tolist()
        confusion = self.processes.sum(confusion.to(self.device)).cpu()
        if not confusion.sum():
            raise RuntimeError(f"none of the {int(skipped)} images for validation can be read")
        return Score(loss / int(confusion.sum()), confusion, int(skipped))

    def _to_device(self, batch: Batch) -> tuple[Tensor, Tensor]:
        images = batch.images.to(self.device, memory_format=self.format, non_blocking=True)
        return images, batch.labels.to(self.device, non_blocking=True)

    def _autocast(self) -> torch.autocast:
        amp = self.settings.amp
        return torch.autocast(self.device.type, _AMP[amp] if amp else None, enabled=amp is not None)

    # --- checkpoints and results --------------------------------------------------------------------------------------

    def _state(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "epoch": self.epoch,
            "history": self.history,
            "best": self.best,
            "classes": list(self.data.classes),
            "preprocessing": asdict(transforms.preprocessing(self.data.kind, self.settings)),
            "images": len(self.data.train),
            "processes": self.processes.world,
            "settings": self.settings.as_dict(),
            **self._ranges(self.model),
            **({} if self.ema is None else self._ranges(self.ema.module, "ema_ranges")),
        }

    def _ranges(self, model: nn.Module, key: str = "ranges") -> dict[str, Any]:
        return {key: qat.ranges(model)} if self.settings.qat else {}

    def _restore(self, state: dict[str, Any]) -> None:
        check_classes(self.data.classes, state["classes"], "DATA", "the run to resume has")
        for key, now in (("images", len(self.data.train)), ("processes", self.processes.world)):
            if state[key] != now:
                raise ValueError(f"{now} {key}, but the run to resume has {state[key]}; expected the same")
        if self.settings.epochs < state["epoch"]:
            raise SettingError("epochs", f"is {self.settings.epochs}, but {state['epoch']} are done; expected more")
        self.model.load_state_dict(state["model"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        if self.settings.qat:
            qat.set_ranges(self.model, state["ranges"])
            if self.ema is not None:
                qat.set_ranges(self.ema.module, state["ema_ranges"])
        if state["settings"]["epochs"] == self.settings.epochs:
            self.optimizer.load_state_dict(state["optimizer"])
            self.schedule.load_state_dict(state["schedule"])
        else:
            recipe.go_on(self.optimizer, self.schedule, state["optimizer"], state["schedule"]["last_epoch"])
        self.scaler.load_state_dict(state["scaler"])
        self.epoch, self.history, self.best = state["epoch"], state["history"], state["best"]

    def _write(self) -> None:
        # The best first: without it, last.pt would speak of a best epoch that nobody has.
        if self.best["epoch"] == self.epoch:
            weights = self.model if self.ema is None else self.ema.module
            content = {
                "model": weights.state_dict(),
                "epoch": self.epoch,
                "accuracy": self.best["accuracy"],
                "classes": list(self.data.classes),
                "preprocessing": asdict(transforms.preprocessing(self.data.kind, self.settings)),
                "settings": self.settings.as_dict(),
                **self._ranges(weights),
            }
            checkpoint.save(self.folder / checkpoint.BEST, content)
        checkpoint.save(self.folder / checkpoint.LAST, self._state())
        self.saved, self.saved_epoch = str(self.folder / checkpoint.LAST), self.epoch
        report.write_metrics(self.folder, self.history)

    def _result(self) -> dict[str, Any]:
        confusion = self.best["confusion"]
        per_class = confusion.diagonal().double() / confusion.sum(1).clamp(min=1)
        return {
            "model": self.settings.model,
            "classes": len(self.data.classes),
            "images": {"train": len(self.data.train), "validation": len(self.data.validation)},
            "epochs": self.epoch,
            "best_epoch": self.best["epoch"],
            "best_accuracy": self.best["accuracy"],
            "last": self.history[-1],
            "per_class_accuracy": dict(zip(self.data.classes, per_class.tolist(), strict=True)),
            "seconds": round(time.perf_counter() - self.progress.started, 2),
            "preprocessing": asdict(transforms.preprocessing(self.data.kind, self.settings)),
            "settings": self.settings.as_dict(),
        }

    def _check(self, loss: float) -> None:
        if not math.isfinite(loss):
            raise RuntimeError(
                f"the loss is {loss} in epoch {self.epoch + 1}; a lower --lr or --clip-grad-norm can help"
            )
