"""``resnet-fast export``: a checkpoint as a checked ONNX file."""

from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any, Optional, get_args

import typer

from resnet_fast.cli import options, repository
from resnet_fast.cli.console import console, write_json


def export(
    model: options.Model,
    output: Annotated[Optional[Path], typer.Argument(metavar="OUTPUT", help="The ONNX file to write.")] = None,
    weights: options.Weights = None,
    num_classes: options.Classes = None,
    precision: Annotated[
        str, typer.Option(metavar="fp32|fp16|bf16|int8", help="Of the weights and the arithmetic.")
    ] = "fp32",
    io_dtype: Annotated[
        str, typer.Option(metavar="fp32|fp16", help="What the file takes, unless it takes pictures, and gives.")
    ] = "fp32",
    preprocess: Annotated[
        Optional[str],
        typer.Option(
            metavar="resize|normalise",
            help="Have the file take uint8 pictures [batch, height, width, channels]: of any size, which it resizes, "
            "crops and normalises, or of the network's size.",
        ),
    ] = None,
    softmax: Annotated[bool, typer.Option("--softmax", help="Give probabilities in place of logits.")] = False,
    top_k: Annotated[Optional[int], typer.Option(min=1, help="Also give the N best scores and their classes.")] = None,
    opset: Annotated[
        Optional[int], typer.Option(help="ONNX opset: 18 or higher, for bf16 22 or higher; by default the lowest.")
    ] = None,
    size: Annotated[Optional[int], typer.Option(min=1, help="Height and width of the images.")] = None,
    static_batch: Annotated[bool, typer.Option("--static-batch", help="Fix the batch size to 1.")] = False,
    classes: Annotated[
        Optional[Path],
        typer.Option(exists=True, dir_okay=False, metavar="FILE", help="Class names, one a line, for the metadata."),
    ] = None,
    mean: Annotated[Optional[str], typer.Option(help="Per channel, as 0.485,0.456,0.406, of images in [0, 1].")] = None,
    std: Annotated[Optional[str], typer.Option(help="Per channel, as 0.229,0.224,0.225, of images in [0, 1].")] = None,
    verify: Annotated[bool, typer.Option(help="Run the file and compare with float64 PyTorch.")] = True,
    images: options.Images = None,
    tensorrt: options.TensorRT = None,
    calibration: Annotated[
        Optional[Path],
        typer.Option(exists=True, metavar="PATH", help="int8: a folder of images, or .npy, .npz, .pt with images."),
    ] = None,
    calibration_method: Annotated[
        str, typer.Option(metavar="max|percentile|entropy|mse", help="int8: where to clip.")
    ] = "mse",
    ranges: Annotated[
        Optional[Path],
        typer.Option(
            exists=True, dir_okay=False, metavar="FILE", help="int8: JSON of ranges; by default a --qat checkpoint's."
        ),
    ] = None,
    target: Annotated[
        str, typer.Option(metavar="tensorrt|cpu", help="int8: what will run it; cpu is ONNX Runtime's kernels.")
    ] = "tensorrt",
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
    sensitivity: Annotated[bool, typer.Option("--sensitivity", help="int8: the error of each layer alone.")] = False,
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
    from resnet_fast.cli.models import build, published_weights
    from resnet_fast.cli.quantisation import read_ranges, show_quantisation, stages
    from resnet_fast.cli.verify_file import as_json, described
    from resnet_fast.export import export_onnx
    from resnet_fast.export.metadata import channels_of
    from resnet_fast.export.precision import IO, PRECISIONS
    from resnet_fast.export.quantise import Method, Target
    from resnet_fast.finetune.checkpoint import classes_in

    if (output is None) == (triton_repository is None):
        raise typer.BadParameter("give OUTPUT or --triton-repository, one of them", param_hint="OUTPUT")
    if static_batch and triton_repository is not None:
        raise typer.BadParameter("does not fit --triton-repository", param_hint="--static-batch")
    _check_name(precision, PRECISIONS, "--precision")
    _check_name(io_dtype, IO, "--io-dtype")
    _check_name(calibration_method, get_args(Method), "--calibration-method")
    _check_name(target, get_args(Target), "--target")
    if preprocess is not None:
        _check_name(preprocess, ("resize", "normalise"), "--preprocess")
    lowest = PRECISIONS[precision].lowest_opset
    if opset is not None and opset < lowest:
        raise typer.BadParameter(f"{opset} is below {lowest}, the lowest for {precision}", param_hint="--opset")
    means, deviations = _numbers(mean, "--mean"), _numbers(std, "--std")
    names = None if classes is None else classes.read_text(encoding="utf-8").split("\n")
    while names and not names[-1].strip():
        names.pop()

    if names is None and weights is not None and Path(weights).is_file():
        names = classes_in(Path(weights)) or None
    stock = build(model, weights=weights, num_classes=num_classes or (len(names) if names else None))
    known_ranges = read_ranges(ranges, weights) if precision == "int8" or ranges is not None else None
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
            "weights": published_weights(model, weights),
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
            written = repository.write(
                stock, model, triton_repository, name, max_batch, queue_delay, instances, overwrite, arguments
            )
            result = written.export
        else:
            assert output is not None
            written, result = None, export_onnx(stock, output, **arguments)
    for line in described(result):
        out.print(line)
    if result.quantisation is not None:
        show_quantisation(out, result.quantisation)
    served: dict[str, Any] = {}
    if written is not None:
        out.print(f"[bold]{written.folder}[/]: {' and '.join(written.models)}; {written.readme} says how to go on")
        served = {"repository": str(written.folder), "models": written.models, "runtime": written.runtime}
    write_json({"model": model, **as_json(result), **served}, json)


def _check_name(name: str, known: Collection[str], option: str) -> None:
    if name not in known:
        raise typer.BadParameter(f"{name!r} is none of {', '.join(known)}", param_hint=option)


def _numbers(text: Optional[str], option: str) -> Optional[list[float]]:
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"{text!r}, expected numbers with commas between them", param_hint=option) from None
