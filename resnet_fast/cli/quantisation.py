"""The options of 8 bits that ``export`` and ``quantize`` share, and what they print."""

import json as json_format
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from resnet_fast.cli.console import table
from resnet_fast.utils.names import Method

if TYPE_CHECKING:
    from rich.console import Console

    from resnet_fast.export.quantise import Quantisation

PANEL = "8 bits"

Calibration = Annotated[
    Optional[Path],
    typer.Option(
        exists=True,
        metavar="PATH",
        help="What to take the ranges from: a folder of images, or .npy, .npz or .pt with images.",
        rich_help_panel=PANEL,
    ),
]
CalibrationMethod = Annotated[Method, typer.Option(help="How to choose where a range ends.", rich_help_panel=PANEL)]
Ranges = Annotated[
    Optional[Path],
    typer.Option(
        exists=True,
        dir_okay=False,
        metavar="FILE",
        help="A JSON file of ranges in place of calibration; by default those in the checkpoint of --qat.",
        rich_help_panel=PANEL,
    ),
]
Validation = Annotated[
    Optional[Path],
    typer.Option(
        exists=True,
        metavar="PATH",
        help="Images to judge by, best with labels (folders named after classes).",
        rich_help_panel=PANEL,
    ),
]
MaxAccuracyDrop = Annotated[
    Optional[float],
    typer.Option(
        metavar="POINTS",
        help="How much top-1 accuracy may be lost; the most sensitive layers stay in float32 until it holds.",
        rich_help_panel=PANEL,
    ),
]
Sensitivity = Annotated[
    bool, typer.Option("--sensitivity", help="Measure the error of each layer alone.", rich_help_panel=PANEL)
]


def read_ranges(file: Optional[Path], checkpoint: Optional[Path]) -> Optional[dict[str, float]]:
    """``{"layer1.0.conv1.input": 3.2, ...}`` from the JSON ``file``, else from ``checkpoint``.

    Quantisation-aware training leaves them there, under ``ranges``. None if there are none.
    """
    if file is None:
        from resnet_fast.finetune.qat import load_ranges

        return load_ranges(checkpoint) or None if checkpoint is not None else None
    try:
        ranges = json_format.loads(file.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise typer.BadParameter(f"{str(file)!r} is not JSON: {error}", param_hint="--ranges") from error
    if not isinstance(ranges, dict) or not all(isinstance(amax, (int, float)) for amax in ranges.values()):
        raise typer.BadParameter(f"{str(file)!r} does not hold an object of names and numbers", param_hint="--ranges")
    return ranges


def show(console: "Console", quantisation: "Quantisation") -> None:
    """Errors and accuracy in int8, the layers if they were measured, and those that fell back."""
    judgement = quantisation.judgement
    if quantisation.skipped:
        console.print(f"{len(quantisation.skipped)} pictures of the calibration could not be read")
    if judgement is not None:
        console.print(
            f"int8 for {quantisation.target}, on {judgement.images} images of the {quantisation.judged_by}: "
            f"logits {judgement.logit_error:.3g} of their size from float32, "
            f"the same first class in {100 * judgement.agreement:.2f} %"
        )
        if judgement.accuracy is not None and judgement.float_accuracy is not None:
            console.print(
                f"top-1 {100 * judgement.accuracy:.2f} %, in float32 {100 * judgement.float_accuracy:.2f} %: "
                f"{judgement.drop:.2f} points lost"
            )
    if quantisation.reduce_range:
        console.print("weights have 7 bits, because this processor has no VNNI")
    rows = [
        (layer.path, layer.precision, f"{layer.logit_error:.2e}")
        for layer in sorted(quantisation.layers, key=lambda layer: -(layer.logit_error or 0))
        if layer.logit_error is not None
    ]
    if rows:
        title = "relative error of the logits with one layer in int8, largest first"
        console.print(table(title, ("layer", "precision", "error"), rows, ("error",)))
    if quantisation.fall_back:
        console.print(f"not in int8: {', '.join(quantisation.fall_back)}", markup=False)
