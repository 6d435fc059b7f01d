"""``resnet-fast verify``: is the accelerated model as exact as the stock one, or a file as the model behind it?"""

from typing import Annotated, Optional

import typer

from resnet_fast.cli import options
from resnet_fast.cli.console import console, table, write_json


def verify(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...|FILE.onnx", help="Models, as resnet18 resnet50 timm:resnet50d, or a file of export."
        ),
    ],
    layers: Annotated[bool, typer.Option("--layers", help="Also check every different convolution by itself.")] = False,
    model: Annotated[
        Optional[str],
        typer.Option(metavar="MODEL", help="For a file: the model that it was made from, to compare with."),
    ] = None,
    images: options.Images = None,
    tensorrt: options.TensorRT = None,
    weights: options.Weights = None,
    num_classes: options.Classes = None,
    batch: Annotated[int, typer.Option(min=1, help="Images.")] = 2,
    size: Annotated[int, typer.Option(min=1, help="Height and width of the images.")] = 224,
    seed: options.Seed = 0,
    json: options.Json = None,
    debug: options.Debug = False,
) -> None:
    """Compare an accelerated model with the stock one, both against float64: whole, and block by block.

    An error may be twice what stock float32 has itself, plus 8 eps of the largest result. Without --weights, the
    weights are random, and so are all parameters and statistics of the batch norms.

    A FILE.onnx of resnet-fast export goes through ONNX's checker, ONNX Runtime at batch 1, 2 and 7, and TensorRT-RTX
    where it is installed; with --model and --weights, it is compared with that model in float64, on --images as well.
    """
    if any(name.endswith(".onnx") for name in models):
        from resnet_fast.cli.verify_file import verify_file

        if len(models) > 1:
            raise typer.BadParameter(f"a file is verified by itself, not {len(models)} at once", param_hint="FILE.onnx")
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

    from dataclasses import asdict

    import torch

    from resnet_fast import accelerate, explain
    from resnet_fast.bench.norms import randomise_batch_norm
    from resnet_fast.cli.models import build
    from resnet_fast.export.file_checks import VerificationError
    from resnet_fast.export.metadata import channels_of
    from resnet_fast.verify import Check, check_layers, check_model

    _refuse("is for a FILE.onnx", model=model, images=images, tensorrt=tensorrt)
    if weights is not None and len(models) > 1:
        raise typer.BadParameter(f"fits one model, not {len(models)}", param_hint="--weights")
    out = console()
    results: dict[str, list[Check]] = {}
    for name in models:
        stock = build(name, weights=weights, num_classes=num_classes, seed=seed)
        if weights is None:
            randomise_batch_norm(stock, seed)
        shape = (batch, channels_of(stock) or 3, size, size)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        with out.status(f"checking {name}"):
            fast = accelerate(stock, inplace=False)
            checks = list(check_model(stock, fast, noise))
            if layers:
                checks += check_layers(stock, noise)
        if all(row.status == "stock" for row in explain(fast).rows):
            out.print(f"[yellow]nothing is fused in {name}, so there is nothing to compare; see resnet-fast explain[/]")
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
        numbers = ("stock float32", "fused", "allowed")
        title = f"{name}, {batch}x{size}x{size}: largest error against float64, relative to the largest result"
        out.print(table(title, ("what", "where", "", *numbers, ""), rows, numbers))
    every = [check for checks in results.values() for check in checks]
    failed = [check for check in every if not check.passed]
    data = {name: [{**asdict(check), "passed": check.passed} for check in checks] for name, checks in results.items()}
    write_json({"seed": seed, "shape": list(shape), "passed": not failed, "models": data}, json)
    if failed:
        raise VerificationError(
            f"{len(failed)} of {len(every)} checks failed, the first at {failed[0].path or 'model'}"
        )
    out.print(f"[green]all {len(every)} checks passed[/] (seed {seed})")


def _refuse(reason: str, **given: object) -> None:
    for name, value in given.items():
        if value is not None:
            raise typer.BadParameter(reason, param_hint=f"--{name.replace('_', '-')}")
