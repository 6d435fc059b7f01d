"""``resnet-fast quantize``: a model that runs in int8 in PyTorch, as a file of its weights and ranges."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Optional

import typer
from rich.markup import escape

from resnet_fast.cli import options, quantisation
from resnet_fast.cli.console import console, stages, write_json

SUFFIXES = (".safetensors", ".pt", ".pth")


def quantize(
    model: options.Model,
    output: Annotated[
        Path, typer.Argument(metavar="OUTPUT", help="The file to write: its name ends in .safetensors, .pt or .pth.")
    ],
    weights: options.Weights = None,
    num_classes: options.Classes = None,
    size: Annotated[
        Optional[int],
        typer.Option(metavar="PIXELS", min=1, help="Height and width of the images; by default the model's."),
    ] = None,
    mean: options.Mean = None,
    std: options.Std = None,
    calibration: quantisation.Calibration = None,
    calibration_method: quantisation.CalibrationMethod = "mse",
    ranges: quantisation.Ranges = None,
    validation: quantisation.Validation = None,
    max_accuracy_drop: quantisation.MaxAccuracyDrop = None,
    sensitivity: quantisation.Sensitivity = False,
    json: options.Json = None,
) -> None:
    """Find the int8 ranges of a model, and write them with its weights to a file for PyTorch.

    resnet_fast.load_quantized(model, OUTPUT) gives the model that runs in int8. For other runtimes there is
    resnet-fast export --precision int8, which finds the same ranges.
    """
    if output.suffix not in SUFFIXES:
        raise typer.BadParameter(f"{str(output)!r}, expected a name that ends in {', '.join(SUFFIXES)}")
    from resnet_fast import quantisation_of, quantize, save_quantized
    from resnet_fast.export.metadata import channels_of

    file = next((path for path in (Path(model), Path(weights or "")) if path.is_file()), None)
    stock = options.build(model, weights=weights, num_classes=num_classes).eval()
    if Path(model).is_file():
        model = options.model_in(Path(model))
    out = console()
    with stages(out, f"quantising {model}") as progress:
        int8 = quantize(
            stock,
            calibration,
            ranges=quantisation.read_ranges(ranges, file),
            calibration_method=calibration_method,
            validation=validation,
            max_accuracy_drop=max_accuracy_drop,
            sensitivity=sensitivity,
            input_size=None if size is None else (channels_of(stock) or 3, size, size),
            mean=options.numbers(mean, "--mean"),
            std=options.numbers(std, "--std"),
            weights=file or options.published_weights(model, weights),
            progress=progress,
        )
        save_quantized(int8, output)
    report = quantisation_of(int8)
    count = len(report.layers) - len(report.fall_back)
    out.print(f"[bold]{escape(str(output))}[/]: {count} of {len(report.layers)} layers in int8")
    quantisation.show(out, report)
    write_json({"model": model, "path": str(output), "quantisation": asdict(report)}, json)
