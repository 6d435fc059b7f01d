"""``resnet-fast verify``: is the accelerated model as exact as the stock one, or a file as the model behind it?"""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer
from rich.markup import escape

from resnet_fast.cli import options
from resnet_fast.cli.console import console, table, write_json

if TYPE_CHECKING:
    from resnet_fast.export import ExportResult


def verify(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...|FILE.onnx",
            help="Models, e.g. resnet18 resnet50 timm:resnet50d, or a file that export wrote.",
        ),
    ],
    layers: Annotated[bool, typer.Option("--layers", help="Also check every different convolution by itself.")] = False,
    precision: Annotated[
        options.PrecisionInPyTorch,
        typer.Option(help="Of the accelerated model; int8 is checked against the definition of its own steps."),
    ] = "float32",
    model: Annotated[
        Optional[str],
        typer.Option(metavar="MODEL", help="For a file: the model that it was made from, to compare it with."),
    ] = None,
    images: options.Images = None,
    tensorrt: options.TensorRT = None,
    weights: options.Weights = None,
    num_classes: options.Classes = None,
    batch: Annotated[int, typer.Option(metavar="N", min=1, help="Images in a call.")] = 2,
    size: options.Size = 224,
    seed: options.Seed = 0,
    json: options.Json = None,
) -> None:
    """Compare an accelerated model and the stock one with float64, as a whole and block by block.

    An error may be twice the stock model's own in float32, plus 8 eps of the largest result. Without --weights, the
    weights are random, and so are all parameters and statistics of the batch norms.

    With --precision int8 the model is quantised with the ranges of its images, and its results may be no further from
    float64 than those of the same steps in plain PyTorch, which "stock" stands for then.

    A FILE.onnx that resnet-fast export wrote goes through ONNX's checker, ONNX Runtime at batch 1, 2 and 7, and
    TensorRT-RTX where it is installed; with --model and --weights, it is compared with that model in float64, on
    --images as well.
    """
    if any(name.endswith(".onnx") for name in models):
        if len(models) > 1:
            raise typer.BadParameter(f"a file is verified by itself, not {len(models)} at once", param_hint="FILE.onnx")
        if precision != "float32":
            raise typer.BadParameter("is for a MODEL", param_hint="--precision")
        if model is None:
            _refuse("needs --model, which it belongs to", weights=weights, num_classes=num_classes, images=images)
        verify_file(
            models[0],
            model=model,
            weights=weights,
            num_classes=num_classes,
            images=images,
            tensorrt=tensorrt,
            json=json,
        )
        return

    import torch

    from resnet_fast import accelerate, explain
    from resnet_fast.bench.norms import randomise_batch_norm
    from resnet_fast.export.file_checks import VerificationError
    from resnet_fast.export.metadata import channels_of
    from resnet_fast.int8.checking import check_int8
    from resnet_fast.verify import Check, check_layers, check_model

    _refuse("is for a FILE.onnx", model=model, images=images, tensorrt=tensorrt)
    if layers and precision == "int8":
        raise typer.BadParameter("is for float32", param_hint="--layers")
    if weights is not None and len(models) > 1:
        raise typer.BadParameter(f"fits one model, not {len(models)}", param_hint="--weights")
    out = console()
    results: dict[str, list[Check]] = {}
    for name in models:
        stock = options.build(name, weights=weights, num_classes=num_classes, seed=seed)
        if weights is None:
            randomise_batch_norm(stock, seed)
        shape = (batch, channels_of(stock) or 3, size, size)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        shown = escape(name)
        with out.status(f"checking {shown}"):
            fast = accelerate(stock, inplace=False)
            if precision == "int8":
                checks = [check_int8(stock, noise)]
            else:
                checks = list(check_model(stock, fast, noise))
            if layers:
                checks += check_layers(stock, noise)
        if all(row.status == "stock" for row in explain(fast).rows):
            out.print(
                f"[yellow]nothing is fused in {shown}, so there is nothing to compare; see resnet-fast explain[/]"
            )
        results[name] = checks
        rows = [
            (
                check.kind,
                check.path,
                check.detail,
                *(f"{number / (check.scale or 1):.2e}" for number in (check.stock_error, check.error, check.limit)),
                "ok" if check.passed else "FAILED",
            )
            for check in checks
        ]
        numbers = (f"stock {precision}", "fused", "allowed")
        title = f"{name}, {batch}x{size}x{size}: largest error against float64, relative to the largest result"
        out.print(table(title, ("what", "where", "", *numbers, ""), rows, numbers))
    every = [check for checks in results.values() for check in checks]
    failed = [check for check in every if not check.passed]
    data = {name: [{**asdict(check), "passed": check.passed} for check in checks] for name, checks in results.items()}
    write_json({"seed": seed, "precision": precision, "shape": list(shape), "passed": not failed, "models": data}, json)
    if failed:
        raise VerificationError(
            f"{len(failed)} of {len(every)} checks failed, the first at {failed[0].path or 'model'}"
        )
    out.print(f"[green]all {len(every)} checks passed[/] (seed {seed})")


def _refuse(reason: str, **given: object) -> None:
    for name, value in given.items():
        if value is not None:
            raise typer.BadParameter(reason, param_hint=f"--{name.replace('_', '-')}")


# --- a file -----------------------------------------------------------------------------------------------------------


def verify_file(
    path: str,
    *,
    model: Optional[str],
    weights: Optional[str],
    num_classes: Optional[int],
    images: Optional[Path],
    tensorrt: Optional[bool],
    json: Optional[str],
) -> None:
    """Verify the file and say what was found; ``model`` is the name of what it was made from."""
    from resnet_fast.export import verify_onnx

    stock = None if model is None else options.build(model, weights=weights, num_classes=num_classes)
    out = console()
    with out.status(f"verifying {escape(str(path))}"):
        result = verify_onnx(path, stock, images=images, tensorrt=tensorrt)
    for line in described(result):
        out.print(line)
    write_json(as_json(result), json)


def described(result: "ExportResult") -> list[str]:
    """Lines for people, in rich's markup."""
    counts = ", ".join(f"{count} {name}" for name, count in result.op_counts.items())
    size = f"{result.size / 1e6:.1f} MB"
    lines = [f"[bold]{escape(str(result.path))}[/]: {result.precision}, {size}, opset {result.opset}, {counts}"]
    if result.method is None:
        lines.append("[yellow]not verified[/]")
    elif result.tolerance is None:
        lines.append(
            f"{result.method}: finite; an image alone and in a batch differ by {result.batch_error:.2g}. "
            "[yellow]Not compared with a model[/]: --model NAME --weights FILE"
        )
    else:
        errors = ", ".join(f"{error:.2g} at batch {batch}" for batch, error in result.max_errors.items())
        lines.append(
            f"{result.method}, against float64 PyTorch: {errors}; allowed {result.tolerance:.2g} "
            f"({'fp32' if result.precision == 'int8' else result.precision} PyTorch itself: {result.torch_error:.2g})"
        )
    if result.images:
        lines.append(
            f"{result.images} pictures: {result.image_error:.2g} from float64 PyTorch, the same best class in "
            f"{result.top1_agreement:.2%}"
        )
    if result.engine is not None:
        engine = result.engine
        lines.append(
            f"TensorRT-RTX {engine.version}: parsed, and an engine of {engine.size / 1e6:.1f} MB built; it has "
            f"{engine.kernels} kernels, {engine.fused} of {engine.convolutions} convolutions with their ReLU inside"
            + (f", {engine.int8_convolutions} in int8" if engine.int8_convolutions else "")
        )
    return lines


def as_json(result: "ExportResult") -> dict[str, Any]:
    """Without the engine's list of layers, but with what was counted of them."""
    data = {**asdict(result), "path": str(result.path)}
    if (engine := result.engine) is not None:
        del data["engine"]["layers"]
        data["engine"] |= {
            name: getattr(engine, name)
            for name in ("kernels", "convolutions", "int8_convolutions", "fused", "fused_add")
        }
    return data
