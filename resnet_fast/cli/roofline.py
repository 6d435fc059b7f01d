"""``resnet-fast roofline``: how long a network would take on a GPU, by a model."""

from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from resnet_fast.cli import options
from resnet_fast.cli.console import console, table, write_json

if TYPE_CHECKING:
    from rich.table import Table

    from resnet_fast.bench.roofline import Cost, Roofline

DTYPES = ("float16", "bfloat16", "float32")
MODES = ("eval", "train")
CHARTS = (".svg", ".png")
_SHORT = {"back_to_back": "b2b"}


def roofline(
    gpu: Annotated[str, typer.Option(help="A GPU by its short name, as h100, a100 or mi300x.")] = "h100",
    model: Annotated[str, typer.Option(help="A model, as resnet50 or timm:resnet50d.")] = "resnet50",
    batch: Annotated[int, typer.Option(min=1, help="Images a call or step.")] = 128,
    mode: Annotated[str, typer.Option(help="eval: a forward pass. train: a forward and a backward pass.")] = "eval",
    dtype: Annotated[str, typer.Option(help=f"Of images and weights: {', '.join(DTYPES)}.")] = "float16",
    size: Annotated[int, typer.Option(min=1, help="Height and width of the images.")] = 224,
    back_to_back: Annotated[
        bool, typer.Option("--back-to-back", help="Also with each block's end fused with the next block's begin.")
    ] = False,
    compute_efficiency: Annotated[
        float, typer.Option(min=0.01, max=1.0, help="Share of the peak rate that kernels reach.")
    ] = 0.7,
    memory_efficiency: Annotated[
        float, typer.Option(min=0.01, max=1.0, help="Share of the memory's bandwidth that kernels reach.")
    ] = 0.85,
    launch: Annotated[
        float, typer.Option(min=0.0, help="Microseconds of every launch in which the GPU does nothing.")
    ] = 2.0,
    json: options.Json = None,
    plot: Annotated[
        Optional[str], typer.Option(metavar="FILE", help="Also draw it: a file that ends in .svg or .png.")
    ] = None,
    debug: options.Debug = False,
) -> None:
    """Predict a network's time and traffic on a GPU, layer by layer. A model: nothing is measured, no GPU is needed.

    Operations are counted as by `traffic`. A kernel takes as long as its arithmetic at the GPU's peak rate or its bytes
    at its memory's bandwidth, whichever is longer, each at an efficiency that is the same for all: for eager PyTorch,
    for a pipeline like torch.compile's (cuDNN, and fused pointwise passes) and for ours. The limit has efficiencies of
    1 and no launches, and of each layer reads inputs and writes results once. Caches are ignored.
    """
    import torch

    from resnet_fast.bench.roofline import Assumptions, predict
    from resnet_fast.cli.models import build
    from resnet_fast.export.metadata import channels_of
    from resnet_fast.kernels.triton.cost_model.gpus import GPUS
    from resnet_fast.utils.files import replacing
    from resnet_fast.utils.optional import require

    for option, value, known in (("--gpu", gpu, GPUS), ("--mode", mode, MODES), ("--dtype", dtype, DTYPES)):
        if value not in known:
            raise typer.BadParameter(f"{value!r}, expected one of {', '.join(known)}", param_hint=option)
    if plot is not None and not plot.endswith(CHARTS):
        raise typer.BadParameter(f"{plot!r}, expected a name that ends in {' or '.join(CHARTS)}", param_hint="--plot")
    if back_to_back and mode == "train":
        raise typer.BadParameter("is for --mode eval", param_hint="--back-to-back")
    if plot is not None:
        require("matplotlib", "--plot")
    with torch.device("meta"):  # without numbers, which nobody needs
        stock = build(model).train(mode == "train")
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
