"""``resnet-fast roofline``: how long a network would take on a GPU, by a model."""

from typing import TYPE_CHECKING, Annotated, Any, Literal, Optional

import typer

from resnet_fast.cli import options
from resnet_fast.cli.console import console, table, write_json
from resnet_fast.utils.names import Dtype

if TYPE_CHECKING:
    from rich.table import Table

    from resnet_fast.bench.roofline import Cost, Roofline

CHARTS = (".svg", ".png")
_SHORT = {"back_to_back": "b2b"}


def roofline(
    model: Annotated[
        Optional[str], typer.Argument(metavar="MODEL", help=f"{options.MODEL_HELP} By default resnet50.")
    ] = None,
    model_option: Annotated[Optional[str], typer.Option("--model", metavar="MODEL", help="The same as MODEL.")] = None,
    gpu: Annotated[
        str, typer.Option(metavar="NAME", help="A GPU by its short name, e.g. h100, a100 or mi300x.")
    ] = "h100",
    batch: Annotated[int, typer.Option(metavar="N", min=1, help="Images in a call or training step.")] = 128,
    mode: Annotated[
        Literal["eval", "train"],
        typer.Option(help="Predict a forward pass, or a training step: a forward and a backward pass."),
    ] = "eval",
    dtype: Annotated[Dtype, typer.Option(help="The type of images and weights.")] = "float16",
    size: options.Size = 224,
    back_to_back: Annotated[
        bool,
        typer.Option("--back-to-back", help="Also predict the end of each block fused with the begin of the next."),
    ] = False,
    compute_efficiency: Annotated[
        float,
        typer.Option(metavar="SHARE", min=0.01, max=1.0, help="The share of the GPU's peak rate that kernels reach."),
    ] = 0.7,
    memory_efficiency: Annotated[
        float,
        typer.Option(
            metavar="SHARE", min=0.01, max=1.0, help="The share of the memory's bandwidth that kernels reach."
        ),
    ] = 0.85,
    launch: Annotated[
        float, typer.Option(metavar="US", min=0.0, help="Microseconds at every launch in which the GPU does nothing.")
    ] = 2.0,
    json: options.Json = None,
    plot: Annotated[
        Optional[str], typer.Option(metavar="FILE", help="Also draw it, to a file that ends in .svg or .png.")
    ] = None,
) -> None:
    """Predict a network's time and traffic on a GPU, layer by layer. Nothing is measured, and no GPU is needed.

    Operations are counted as the command traffic does. A kernel takes as long as its arithmetic at the GPU's peak rate
    or its bytes at its memory's bandwidth, whichever is longer, each at an efficiency that is the same for all: for
    eager PyTorch, for a pipeline like torch.compile's (cuDNN, and fused pointwise passes) and for ours. The limit has
    efficiencies of 1 and no launches, and of each layer reads inputs and writes results once. Caches are ignored.
    """
    import torch

    from resnet_fast.bench.roofline import Assumptions, predict
    from resnet_fast.export.metadata import channels_of
    from resnet_fast.kernels.triton.cost_model.gpus import GPUS
    from resnet_fast.utils.files import replacing
    from resnet_fast.utils.optional import require

    if gpu not in GPUS:
        raise typer.BadParameter(f"{gpu!r}, expected one of {', '.join(GPUS)}", param_hint="--gpu")
    if model is not None and model_option is not None:
        raise typer.BadParameter("is the same as MODEL, give one of them", param_hint="--model")
    model = model or model_option or "resnet50"
    if plot is not None and not plot.endswith(CHARTS):
        raise typer.BadParameter(f"{plot!r}, expected a name that ends in {' or '.join(CHARTS)}", param_hint="--plot")
    if back_to_back and mode == "train":
        raise typer.BadParameter("is for --mode eval alone", param_hint="--back-to-back")
    if plot is not None:
        require("matplotlib", "--plot")
    with torch.device("meta"):  # without numbers, which nobody needs
        stock = options.build(model).train(mode == "train")
    shape = (batch, channels_of(stock) or 3, size, size)
    assumptions = Assumptions(compute_efficiency, memory_efficiency, launch)
    result = predict(stock, shape, getattr(torch, dtype), GPUS[gpu], assumptions, back_to_back)
    step = "a forward and a backward pass" if mode == "train" else "inference"
    title = f"{model} on {result.gpu.name}, {step}, batch {batch}, {size}x{size}, {dtype}"
    show(result, title)
    setting = {"model": model, "mode": mode, "batch": batch, "size": size, "dtype": dtype}
    write_json({**setting, **result.as_dict()}, json)
    if plot is not None:
        from resnet_fast.bench.roofline_chart import save

        with replacing(plot) as temporary:
            save(result, title, temporary)


def show(result: "Roofline", title: str) -> None:
    """Print the layers, the totals, and what they rest on."""
    from resnet_fast.bench.roofline import NOTE, PIPELINES

    out = console()
    out.print(f"[bold yellow]{NOTE}[/]")
    out.print(_layers(result, title))
    out.print(_totals(result))
    assumed = result.assumptions
    out.print(
        f"Assumed: {result.peak / 1e12:.0f} TFLOP/s and {result.bandwidth / 1e9:.0f} GB/s (data sheet), of which "
        f"kernels reach {assumed.compute_efficiency:.0%} and {assumed.memory_efficiency:.0%};",
        f"{assumed.launch_us:g} us a launch; caches ignored. The limit: all of both, no launches, and of each layer by "
        "itself inputs read and",
        f"results written once. Bound by compute from {result.ridge:.0f} operations a byte.",
        sep="\n",
    )
    out.print(*(f"{name}: {PIPELINES[name]}" for name in result.totals), sep="\n")


def _layers(result: "Roofline", title: str) -> "Table":
    names = {name: _SHORT.get(name, name) for name in result.totals}
    columns = ("GFLOP", "FLOP/byte", "limit MB", "ours MB", "limit us", *(f"{short} us" for short in names.values()))
    rows = [
        (
            layer.name or "(input)",
            result.bound(layer),
            f"{layer.limit.flops / 1e9:.2f}",
            f"{layer.intensity:.0f}",
            *(f"{cost.bytes / 1e6:.1f}" if cost.bytes else "-" for cost in (layer.limit, layer.costs["ours"])),
            *(f"{cost.us:.1f}" if cost.bytes else "-" for cost in (layer.limit, *layer.costs.values())),
        )
        for layer in result.layers
    ]
    return table(title, ("layer", "bound", *columns), rows, columns)


def _totals(result: "Roofline") -> "Table":
    columns = ("ms", "images/s", "GB", "images MB", "blocks GB", "backward GB", "launches", "small")
    rows: list[tuple[Any, ...]] = [("limit", *_speed(result.limit, result.batch), *[""] * 5)]
    for name, total in result.totals.items():
        rows.append(
            (
                name,
                *_speed(total.cost, result.batch),
                f"{total.images / result.batch / 1e6:.1f}",
                f"{total.blocks / 1e9:.3f}",
                f"{total.blocks_backward / 1e9:.3f}" if total.blocks_backward else "",
                total.cost.launches,
                total.small_launches,
            )
        )
    title = "all layers; images' MB for each, residual blocks' GB forward and backward; small launches move no image"
    return table(title, ("", *columns), rows, columns)


def _speed(cost: "Cost", batch: int) -> tuple[str, str, str]:
    return f"{cost.us / 1e3:.2f}", f"{batch / cost.us * 1e6:.0f}", f"{cost.bytes / 1e9:.2f}"
