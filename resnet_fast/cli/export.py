"""``resnet-fast export``: a checkpoint as a checked ONNX file."""

from pathlib import Path
from typing import Annotated, Any, Optional, get_args

import typer

from resnet_fast.cli import options
from resnet_fast.cli.output import console, write_json


def export(
    model: options.Model,
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="The ONNX file to write.")],
    weights: options.Weights = None,
    num_classes: options.Classes = None,
    opset: Annotated[int, typer.Option(help="ONNX opset, 18 or higher.")] = 18,
    size: Annotated[Optional[int], typer.Option(min=1, help="Height and width of the images.")] = None,
    static_batch: Annotated[bool, typer.Option("--static-batch", help="Fix the batch size to 1.")] = False,
    classes: Annotated[
        Optional[Path],
        typer.Option(exists=True, dir_okay=False, metavar="FILE", help="Class names, one a line, for the metadata."),
    ] = None,
    mean: Annotated[Optional[str], typer.Option(help="Per channel, as 0.485,0.456,0.406, for the metadata.")] = None,
    std: Annotated[Optional[str], typer.Option(help="Per channel, as 0.229,0.224,0.225, for the metadata.")] = None,
    verify: Annotated[bool, typer.Option(help="Run the file in ONNX Runtime and compare with float64 PyTorch.")] = True,
    precision: Annotated[str, typer.Option(help="fp32 or int8.")] = "fp32",
    calibration: Annotated[
        Optional[Path],
        typer.Option(exists=True, metavar="PATH", help="int8: a folder of images, or .npy, .npz, .pt with images."),
    ] = None,
    calibration_method: Annotated[str, typer.Option(help="int8: max, percentile, entropy or mse.")] = "mse",
    ranges: Annotated[
        Optional[Path],
        typer.Option(
            exists=True, dir_okay=False, metavar="FILE", help="int8: JSON of ranges, in place of calibration."
        ),
    ] = None,
    target: Annotated[str, typer.Option(help="int8: tensorrt, or cpu for ONNX Runtime's CPU kernels.")] = "tensorrt",
    validation: Annotated[
        Optional[Path],
        typer.Option(exists=True, metavar="PATH", help="int8: images to judge by, best with labels (class folders)."),
    ] = None,
    max_accuracy_drop: Annotated[
        Optional[float],
        typer.Option(
            help="int8: points of top-1 that may be lost; the most sensitive layers fall back until it holds."
        ),
    ] = None,
    sensitivity: Annotated[
        bool, typer.Option("--sensitivity", help="int8: the error of each layer by itself.")
    ] = False,
    json: options.Json = None,
    debug: options.Debug = False,
) -> None:
    """Write a model as an ONNX file of standard operators, checked against PyTorch before it takes its place."""
    from dataclasses import asdict

    from resnet_fast.cli.models import build, published_weights
    from resnet_fast.cli.quantisation import read_ranges, show_quantisation, stages
    from resnet_fast.export.metadata import channels_of
    from resnet_fast.export.quantise import Method, Target
    from resnet_fast.export.to_onnx import LOWEST_OPSET, export_onnx

    if opset < LOWEST_OPSET:
        raise typer.BadParameter(f"{opset} is below {LOWEST_OPSET}, the lowest", param_hint="--opset")
    names = None if classes is None else classes.read_text(encoding="utf-8").split("\n")
    while names and not names[-1].strip():
        names.pop()

    stock = build(model, weights=weights, num_classes=num_classes)
    out = console()
    with stages(out, f"exporting {model}") as progress:
        result = export_onnx(
            stock,
            output,
            dynamic_batch=not static_batch,
            opset=opset,
            input_size=None if size is None else (channels_of(stock) or 3, size, size),
            classes=names,
            weights=published_weights(model, weights),
            verify=verify,
            mean=_numbers(mean, "--mean"),
            std=_numbers(std, "--std"),
            precision=precision,
            calibration=calibration,
            calibration_method=_choice(calibration_method, Method, "--calibration-method"),
            ranges=None if ranges is None else read_ranges(ranges),
            target=_choice(target, Target, "--target"),
            validation=validation,
            max_accuracy_drop=max_accuracy_drop,
            sensitivity=sensitivity,
            progress=progress,
        )
    counts = ", ".join(f"{count} {name}" for name, count in result.op_counts.items())
    out.print(f"[bold]{result.path}[/]: {result.size / 1e6:.1f} MB, opset {result.opset}, {counts}")
    if result.quantisation is not None:
        show_quantisation(out, result.quantisation, result.int8_errors)
    elif result.tolerance is None:
        out.print("[yellow]not verified[/]")
    else:
        errors = ", ".join(f"{error:.2g} at batch {batch}" for batch, error in result.max_errors.items())
        out.print(
            f"ONNX Runtime against float64 PyTorch: {errors}; allowed {result.tolerance:.2g} "
            f"(float32 PyTorch itself: {result.torch_error:.2g})"
        )
    write_json({"model": model, **asdict(result), "path": str(result.path)}, json)


def _choice(text: str, choices: Any, option: str) -> Any:
    if text not in get_args(choices):
        raise typer.BadParameter(f"{text!r}, expected {', '.join(get_args(choices))}", param_hint=option)
    return text


def _numbers(text: Optional[str], option: str) -> Optional[list[float]]:
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"{text!r}, expected numbers with commas between them", param_hint=option) from None
