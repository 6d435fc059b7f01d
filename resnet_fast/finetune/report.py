"""What a run leaves behind beside its checkpoints: metrics as CSV and JSON, and pictures of them."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from resnet_fast.finetune.checkpoint import writing
from resnet_fast.finetune.fonts import labels_and_fonts
from resnet_fast.utils.files import json_text
from resnet_fast.utils.optional import require

_INK, _OURS, _PEER, _GRID = "#1f2933", "#0b7285", "#868e96", "#e9ecef"


def write_metrics(folder: Path, history: Sequence[Mapping[str, Any]]) -> None:
    """``metrics.csv``, ``metrics.json`` and ``curves.png``, one entry an epoch."""
    with writing(folder / "metrics.csv") as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, list(history[0]))
        table.writeheader()
        table.writerows(history)
    write_json(folder / "metrics.json", list(history))
    _write_picture(folder / "curves.png", _curves(history))


def write_classes(folder: Path, classes: Sequence[str]) -> None:
    """``classes.txt``, a name a line, as ``resnet-fast export --classes`` reads it."""
    with writing(folder / "classes.txt") as temporary:
        temporary.write_text("".join(f"{name}\n" for name in classes), encoding="utf-8")


def write_confusion(folder: Path, confusion: np.ndarray, classes: Sequence[str]) -> None:
    """``confusion.csv`` and ``confusion.png``: a row for each true class, a column for each predicted one."""
    with writing(folder / "confusion.csv") as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["", *classes])
        table.writerows([name, *row] for name, row in zip(classes, confusion.tolist(), strict=True))
    _write_picture(folder / "confusion.png", _matrix(confusion, classes))


def write_json(path: Path, content: Any) -> None:
    with writing(path) as temporary:
        temporary.write_text(json_text(content), encoding="utf-8")


def _write_picture(path: Path, figure: Any) -> None:
    with writing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def _figure(width: float, height: float, columns: int = 1) -> tuple[Any, Any]:
    figure = require("matplotlib.figure", "the curves").Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(1, columns)


def _curves(history: Sequence[Mapping[str, Any]]) -> Any:
    figure, (losses, accuracies) = _figure(9, 3.2, columns=2)
    epochs = [entry["epoch"] for entry in history]
    lines = [
        (losses, "train_loss", "training", _PEER, 1),
        (losses, "val_loss", "validation", _OURS, 1),
        (losses, "ema_loss", "validation, average of the weights", "#e8590c", 1),
        (accuracies, "val_accuracy", "validation", _OURS, 100),
        (accuracies, "ema_accuracy", "validation, average of the weights", "#e8590c", 100),
    ]
    for axes, key, label, colour, scale in lines:
        if key in history[0]:
            values = [scale * entry[key] for entry in history]
            axes.plot(epochs, values, color=colour, label=label, marker="o" if len(epochs) < 20 else None)
    for axes, name in ((losses, "loss"), (accuracies, "accuracy, %")):
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(axis="y", color=_GRID)
        axes.set_xlabel("epoch", color=_INK)
        axes.set_ylabel(name, color=_INK)
        axes.legend(frameon=False)
    return figure


def _matrix(confusion: np.ndarray, classes: Sequence[str]) -> Any:
    side = min(3 + 0.3 * len(classes), 20)
    figure, axes = _figure(side + 0.6, side)
    shares = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    image = axes.imshow(shares, cmap="GnBu", vmin=0, vmax=1)
    figure.colorbar(image, ax=axes, label="share of the true class", shrink=0.8)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    if len(classes) <= 50:  # more could not be read
        labels, fonts = labels_and_fonts(classes)
        positions = range(len(classes))
        plain = {"parse_math": False, "usetex": False, "fontfamily": fonts}  # a name is no formula
        axes.set_xticks(positions, labels, rotation=90, **plain)
        axes.set_yticks(positions, labels, **plain)
        if labels != list(classes):
            axes.set_ylabel("true (numbers are lines of classes.txt, from 0)")
    if len(classes) <= 20:
        for (row, column), count in np.ndenumerate(confusion):
            if count:
                colour = "white" if shares[row, column] > 0.6 else _INK
                axes.text(column, row, str(count), ha="center", va="center", color=colour, fontsize=8)
    return figure
