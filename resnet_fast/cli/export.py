"""``resnet-fast export``: a checkpoint as a checked ONNX file."""

from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from resnet_fast.cli import options, repository
from resnet_fast.cli.output import console, write_json


def export(
    model: options.Model,
    output: Annotated[Optional[Path], typer.Argument(metavar="OUTPUT", help="The ONNX file to write.")] = None,
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
    triton_repository: repository.Folder = None,
    name: repository.Name = None,
    max_batch: repository.MaxBatch = 16,
    queue_delay: repository.QueueDelay = 1000,
    instances: repository.Instances = 1,
    overwrite: repository.Overwrite = False,
    json: options.Json = None,
    debug: options.Debug = False,
) -> None:
    """Write a model as an ONNX file of standard operators, checked against PyTorch before it takes its place.

    With --triton-repository it goes, as two models, into a repository for NVIDIA Triton Inference Server instead.
    """
    from dataclasses import asdict

    from resnet_fast.cli.models import build, published_weights
    from resnet_fast.export.metadata import channels_of
    from resnet_fast.export.to_onnx import LOWEST_OPSET, export_onnx
    from resnet_fast.finetune.checkpoint import classes_in

    if (output is None) == (triton_repository is None):
        raise typer.BadParameter("give OUTPUT or --triton-repository, one of them", param_hint="OUTPUT")
    if static_batch and triton_repository is not None:
        raise typer.BadParameter("does not fit --triton-repository", param_hint="--static-batch")
    if opset < LOWEST_OPSET:
        raise typer.BadParameter(f"{opset} is below {LOWEST_OPSET}, the lowest", param_hint="--opset")
    given = {"mean": _numbers(mean, "--mean"), "std": _numbers(std, "--std")}
    names = None if classes is None else classes.read_text(encoding="utf-8").split("\n")
    while names and not names[-1].strip():
        names.pop()

    if names is None and weights is not None and Path(weights).is_file():
        names = classes_in(Path(weights)) or None
    stock = build(model, weights=weights, num_classes=num_classes or (len(names) if names else None))
    arguments: dict[str, Any] = {
        "dynamic_batch": not static_batch,
        "opset": opset,
        "input_size": None if size is None else (channels_of(stock) or 3, size, size),
        "classes": names,
        "weights": published_weights(model, weights),
        "verify": verify,
        **given,
    }
    out = console()
    if triton_repository is not None:
        with out.status(f"exporting {model}"):
            written = repository.write(
                stock, model, triton_repository, name, max_batch, queue_delay, instances, overwrite, arguments
            )
        out.print(f"[bold]{written.folder}[/]: {' and '.join(written.models)}; {written.readme} says how to go on")
        write_json(
            {"model": model, "repository": str(written.folder), "models": written.models, "runtime": written.runtime},
            json,
        )
        return
    assert output is not None
    with out.status(f"exporting {model}"):
        result = export_onnx(stock, output, **arguments)
    counts = ", ".join(f"{count} {name}" for name, count in result.op_counts.items())
    out.print(f"[bold]{result.path}[/]: {result.size / 1e6:.1f} MB, opset {result.opset}, {counts}")
    if result.tolerance is None:
        out.print("[yellow]not verified[/]")
    else:
        errors = ", ".join(f"{error:.2g} at batch {batch}" for batch, error in result.max_errors.items())
        out.print(
            f"ONNX Runtime against float64 PyTorch: {errors}; allowed {result.tolerance:.2g} "
            f"(float32 PyTorch itself: {result.torch_error:.2g})"
        )
    write_json({"model": model, **asdict(result), "path": str(result.path)}, json)


def _numbers(text: Optional[str], option: str) -> Optional[list[float]]:
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"{text!r}, expected numbers with commas between them", param_hint=option) from None
