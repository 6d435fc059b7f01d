"""``resnet-fast export``: a checkpoint as a checked ONNX file, or as models for NVIDIA Triton Inference Server."""

from pathlib import Path
from typing import Annotated, Any, Literal, Optional

import typer
from rich.markup import escape

from resnet_fast.cli import options, quantisation
from resnet_fast.cli.console import console, stages, write_json
from resnet_fast.utils.names import IoDtype, PrecisionName, Target

_SERVER = "NVIDIA Triton Inference Server"


def export(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help=f"{options.MODEL_HELP} Or best.pt of resnet-fast finetune, which knows model, classes, size and "
            "normalisation.",
        ),
    ],
    output: Annotated[Optional[Path], typer.Argument(metavar="OUTPUT", help="The ONNX file to write.")] = None,
    weights: options.Weights = None,
    num_classes: options.Classes = None,
    precision: Annotated[PrecisionName, typer.Option(help="The type of the weights and the arithmetic.")] = "fp32",
    opset: Annotated[
        Optional[int],
        typer.Option(
            metavar="N", help="The ONNX opset: 18 or higher, for bf16 22 or higher; by default the lowest of these."
        ),
    ] = None,
    io_dtype: Annotated[
        IoDtype,
        typer.Option(
            help="The type of what the file takes, unless it takes pictures, and gives.", rich_help_panel=options.INPUTS
        ),
    ] = "fp32",
    preprocess: Annotated[
        Optional[Literal["resize", "normalise"]],
        typer.Option(
            help="Have the file take uint8 pictures [batch, height, width, channels]: of any size, which it resizes, "
            "crops and normalises, or of the network's size, which it normalises.",
            rich_help_panel=options.INPUTS,
        ),
    ] = None,
    size: Annotated[
        Optional[int],
        typer.Option(
            metavar="PIXELS",
            min=1,
            help="Height and width of the images; by default the model's.",
            rich_help_panel=options.INPUTS,
        ),
    ] = None,
    static_batch: Annotated[
        bool, typer.Option("--static-batch", help="Fix the batch size to 1.", rich_help_panel=options.INPUTS)
    ] = False,
    mean: options.Mean = None,
    std: options.Std = None,
    softmax: Annotated[
        bool, typer.Option("--softmax", help="Give probabilities in place of logits.", rich_help_panel=options.INPUTS)
    ] = False,
    top_k: Annotated[
        Optional[int],
        typer.Option(
            metavar="N", min=1, help="Also give the N best scores and their classes.", rich_help_panel=options.INPUTS
        ),
    ] = None,
    classes: Annotated[
        Optional[Path],
        typer.Option(
            exists=True,
            dir_okay=False,
            metavar="FILE",
            help="The names of the classes, one a line, for the metadata.",
            rich_help_panel=options.INPUTS,
        ),
    ] = None,
    verify: Annotated[bool, typer.Option(help="Run the file and compare it with float64 PyTorch.")] = True,
    images: options.Images = None,
    tensorrt: options.TensorRT = None,
    calibration: quantisation.Calibration = None,
    calibration_method: quantisation.CalibrationMethod = "mse",
    ranges: quantisation.Ranges = None,
    target: Annotated[
        Target,
        typer.Option(
            help="What will run the file; cpu stands for ONNX Runtime's kernels.", rich_help_panel=quantisation.PANEL
        ),
    ] = "tensorrt",
    validation: quantisation.Validation = None,
    max_accuracy_drop: quantisation.MaxAccuracyDrop = None,
    sensitivity: quantisation.Sensitivity = False,
    triton_repository: Annotated[
        Optional[Path],
        typer.Option(
            metavar="FOLDER", help="The model repository to write to, new or existing.", rich_help_panel=_SERVER
        ),
    ] = None,
    name: Annotated[
        Optional[str],
        typer.Option(metavar="NAME", help="The model's name there; by default MODEL's.", rich_help_panel=_SERVER),
    ] = None,
    max_batch: Annotated[
        int, typer.Option(metavar="N", min=1, help="The most images in a batch.", rich_help_panel=_SERVER)
    ] = 16,
    queue_delay: Annotated[
        int,
        typer.Option(metavar="N", min=0, help="Microseconds that a request waits for others.", rich_help_panel=_SERVER),
    ] = 1000,
    instances: Annotated[
        int,
        typer.Option(
            metavar="N", min=1, help="Copies of the model on each GPU, or on the CPU.", rich_help_panel=_SERVER
        ),
    ] = 1,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a model of that name.", rich_help_panel=_SERVER)
    ] = False,
    json: options.Json = None,
) -> None:
    """Write a model as an ONNX file of standard operators, checked against PyTorch before it takes its place.

    With --triton-repository it goes, as two models, into a repository for NVIDIA Triton Inference Server instead.
    """
    from resnet_fast.cli.verify import as_json, described
    from resnet_fast.export import export_onnx
    from resnet_fast.export.metadata import channels_of
    from resnet_fast.export.precision import PRECISIONS
    from resnet_fast.serving import write_repository

    if (output is None) == (triton_repository is None):
        raise typer.BadParameter("give OUTPUT or --triton-repository, and not both", param_hint="OUTPUT")
    if static_batch and triton_repository is not None:
        raise typer.BadParameter("does not fit --triton-repository", param_hint="--static-batch")
    lowest = PRECISIONS[precision].lowest_opset
    if opset is not None and opset < lowest:
        raise typer.BadParameter(f"{opset} is below {lowest}, the lowest for {precision}", param_hint="--opset")
    means, deviations = options.numbers(mean, "--mean"), options.numbers(std, "--std")
    names = None if classes is None else _read_names(classes)
    file = next((path for path in (Path(model), Path(weights or "")) if path.is_file()), None)
    stock = options.build(model, weights=weights, num_classes=num_classes or (len(names) if names else None))
    if Path(model).is_file():
        model = options.model_in(Path(model))
    known_ranges = quantisation.read_ranges(ranges, file) if precision == "int8" or ranges is not None else None
    out = console()
    with stages(out, f"exporting {model}") as progress:
        arguments: dict[str, Any] = {
            "precision": precision,
            "io_dtype": io_dtype,
            "preprocess": "normalise" if preprocess == "normalise" else preprocess is not None,
            "softmax": softmax,
            "top_k": top_k,
            "dynamic_batch": not static_batch,
            "opset": opset,
            "input_size": None if size is None else (channels_of(stock) or 3, size, size),
            "classes": names,
            "weights": file or options.published_weights(model, weights),
            "mean": means,
            "std": deviations,
            "verify": verify,
            "images": images,
            "tensorrt": tensorrt,
            "calibration": calibration,
            "calibration_method": calibration_method,
            "ranges": known_ranges,
            "target": target,
            "validation": validation,
            "max_accuracy_drop": max_accuracy_drop,
            "sensitivity": sensitivity,
            "progress": progress,
        }
        if triton_repository is not None:
            try:
                written = write_repository(
                    stock,
                    triton_repository,
                    name=name or model.rpartition(":")[2],
                    architecture=model,
                    max_batch=max_batch,
                    queue_delay=queue_delay,
                    instances=instances,
                    overwrite=overwrite,
                    **arguments,
                )
            except FileExistsError as error:
                raise FileExistsError(str(error).replace("overwrite=True", "--overwrite")) from error
            result = written.export
        else:
            assert output is not None
            written, result = None, export_onnx(stock, output, **arguments)
    for line in described(result):
        out.print(line)
    if result.quantisation is not None:
        quantisation.show(out, result.quantisation)
    served: dict[str, Any] = {}
    if written is not None:
        folder, readme = (escape(str(path)) for path in (written.folder, written.readme))
        out.print(f"[bold]{folder}[/]: {' and '.join(written.models)}; {readme} says how to go on")
        served = {"repository": str(written.folder), "models": written.models, "runtime": written.runtime}
    write_json({"model": model, **as_json(result), **served}, json)


def _read_names(file: Path) -> list[str]:
    """A name a line, as people's editors write it."""
    try:
        names = file.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        problem = f"{str(file)!r} is no text in UTF-8: {error.reason} at byte {error.start}"
        raise typer.BadParameter(problem, param_hint="--classes") from error
    while names and not names[-1].strip():
        names.pop()
    if not names:
        raise typer.BadParameter(f"{str(file)!r} is empty, expected a name a line", param_hint="--classes")
    return names
