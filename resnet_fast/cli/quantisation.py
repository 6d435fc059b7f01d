"""What ``resnet-fast export --precision int8`` reads and says beside what it says of every file."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Optional

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from resnet_fast.cli.console import table
from resnet_fast.export.quantise import Quantisation
from resnet_fast.finetune.qat import load_ranges


@contextmanager
def stages(console: Console, title: str) -> Iterator[Callable[[str, int, Optional[int]], None]]:
    """A spinner, and a bar for each stage that the yielded function is told of."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bars:
        bars.add_task(title, total=None)
        tasks: dict[str, TaskID] = {}

        def tell(stage: str, done: int, total: Optional[int]) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield tell


def read_ranges(file: Optional[Path], weights: Optional[str]) -> Optional[dict[str, float]]:
    """``{"layer1.0.conv1.input": 3.2, ...}`` from the JSON ``file``, else from the checkpoint that ``weights`` names.

    Quantisation-aware training leaves them there, under ``ranges``. None if there are none.
    """
    if file is None:
        return load_ranges(weights) or None if weights is not None and Path(weights).is_file() else None
    try:
        ranges = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise typer.BadParameter(f"{str(file)!r} is no JSON: {error}", param_hint="--ranges") from error
    if not isinstance(ranges, dict) or not all(isinstance(amax, (int, float)) for amax in ranges.values()):
        raise typer.BadParameter(f"{str(file)!r} holds no object of names and numbers", param_hint="--ranges")
    return ranges


def show_quantisation(console: Console, quantisation: Quantisation) -> None:
    """Errors and accuracy of an int8 file, its layers if they were measured, and those that fell back."""
    judgement = quantisation.judgement
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
        console.print(f"not in int8: {', '.join(quantisation.fall_back)}")
