"""``resnet-fast bench``: this package and its peers side by side."""

from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer
from rich.markup import escape

from resnet_fast.cli import options
from resnet_fast.cli.console import console, table, warn_if_busy, write_json

if TYPE_CHECKING:
    from rich.table import Table

    from resnet_fast.bench import Measurement

NUMBERS = ("median ms", "best ms", "images/s", "ratio", "error", "load s", "peak MiB")
SAVED = ("saved MiB", "of eager's")
CLASSES = 1000  # ImageNet's, which every model here has


def bench(
    models: Annotated[
        Optional[list[str]],
        typer.Argument(metavar="MODEL", help="Torchvision models, e.g. resnet50, or timm models, e.g. timm:resnet50d."),
    ] = None,
    model: Annotated[
        Optional[list[str]], typer.Option("--model", metavar="MODEL", help="One more MODEL; repeatable.")
    ] = None,
    batch: Annotated[
        Optional[list[int]], typer.Option("--batch", metavar="N", min=1, help="Images in a call; repeatable.")
    ] = None,
    size: options.Size = 224,
    training: Annotated[
        bool, typer.Option("--training", help="Time a training step: forward, backward, SGD with momentum.")
    ] = False,
    frozen_bn: options.FrozenBatchNorm = False,
    precision: Annotated[
        options.PrecisionInPyTorch,
        typer.Option(help="What is timed: models in float32, or in int8, with ours in float32 beside them."),
    ] = "float32",
    provider: Annotated[
        Optional[str],
        typer.Option(
            "--providers", metavar="NAMES", help="Time only these, with commas between them: ours,onnxruntime."
        ),
    ] = None,
    rounds: Annotated[int, typer.Option(metavar="N", min=1, help="How often each provider has its turn.")] = 5,
    seconds: Annotated[float, typer.Option(metavar="N", min=0.0, help="The length of a provider's turn.")] = 1.0,
    threads: options.Threads = None,
    seed: options.Seed = 0,
    json: options.Json = None,
) -> None:
    """Time this package and its peers on the same model, each in a process of its own, in alternating rounds.

    By default resnet18 and resnet50 at batch 1, with random weights and batch norm statistics. Every result is
    compared with float64 PyTorch before it is timed. The ratio is a peer's median time divided by ours, with
    --precision int8 by ours in int8, whose ranges are those of the images that are timed.

    With --training, by default at batch 16, the table also has what the forward pass keeps for the backward pass,
    without parameters and buffers.
    """
    if frozen_bn and not training:
        raise typer.BadParameter("is for --training alone", param_hint="--frozen-bn")
    if training and precision != "float32":
        raise typer.BadParameter("does not fit --training", param_hint="--precision")
    import torch

    from resnet_fast.bench import measure
    from resnet_fast.bench.machine import describe, load
    from resnet_fast.bench.norms import freeze_batch_norm, randomise_batch_norm, settle_relus
    from resnet_fast.bench.providers import INT8, NAMES, TRAINING, provider_names
    from resnet_fast.bench.traffic import blocks, compare
    from resnet_fast.export import VerificationError
    from resnet_fast.export.metadata import channels_of
    from resnet_fast.utils.cpuinfo import available_cores

    try:
        names = provider_names(provider, TRAINING if training else INT8 if precision == "int8" else NAMES)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--providers") from None
    cores = available_cores()
    threads = threads or cores
    out = console()
    busy = warn_if_busy(out)
    workloads: list[dict[str, Any]] = []
    for name in [*(models or []), *(model or [])] or ["resnet18", "resnet50"]:
        stock = options.build(name, seed=seed)
        randomise_batch_norm(stock, seed)
        if training:
            settle_relus(stock.train())
        for images_a_call in batch or [16 if training else 1]:
            shape = (images_a_call, channels_of(stock) or 3, size, size)
            generator = torch.Generator().manual_seed(seed)
            images, labels = torch.randn(shape, generator=generator), None
            if training:
                labels = torch.randint(CLASSES, (images_a_call,), generator=generator)
            if frozen_bn:
                freeze_batch_norm(stock, images)
            with out.status(escape(name)) as status:
                results = measure(
                    stock,
                    images,
                    labels,
                    providers=names,
                    threads=threads,
                    rounds=rounds,
                    seconds=seconds,
                    progress=lambda text, status=status, name=name: status.update(escape(f"{name}: {text}")),  # type: ignore[misc]
                )
            kind = f"{', training' if training else ''}{', frozen batch norm' if frozen_bn else ''}"
            title = f"{name}{kind}, batch {images_a_call}, {size}x{size}, {precision}, {threads} threads"
            out.print(measurements_table(title, results, images_a_call))
            setting = {"model": name, "batch": images_a_call, "size": size, "dtype": precision, "threads": threads}
            setting |= {"training": training, "frozen_bn": frozen_bn}
            if training:
                counted = compare(stock, shape, images.dtype)
                moved = {name: sum(blocks(moves).values()) for name, moves in counted.items()}
                sizes = " and ".join(f"{name} {size / 1e9:.2f} GB" for name, size in moved.items())
                out.print(f"the blocks' forward pass reads and writes, counted: {sizes}")
                setting["traffic_bytes"] = moved
            workloads.append({**setting, "providers": as_dicts(results)})
    run = {"rounds": rounds, "seconds": seconds, "seed": seed, "load_before": busy, "load_after": load()}
    write_json({"machine": describe(), **run, "workloads": workloads}, json)
    # All are in the table and the JSON; the exit code tells whether they can be taken at face value.
    entries = [entry for workload in workloads for entry in workload["providers"]]
    for entry in entries:
        if entry["status"] == "inaccurate":
            raise VerificationError(f"{entry['title']}: {entry['reason']}")
    for entry in entries:
        if entry["status"] == "failed":
            raise RuntimeError(f"{entry['title']} failed: {entry['reason']}")


def as_dicts(results: "list[Measurement]") -> list[dict[str, Any]]:
    """The measurements for JSON, with each one's ratio to ours, and of what it keeps for backward to eager's."""
    by_name = {result.provider: result for result in results}
    eager = by_name.get("channels_last")
    entries = []
    for result in results:
        saved_ratio = None
        if eager is not None and eager.saved_bytes and result.saved_bytes:
            saved_ratio = result.saved_bytes / eager.saved_bytes
        ours = by_name.get("ours_int8") or by_name.get("ours")
        entries.append({**result.as_dict(ours), "saved_ratio": saved_ratio})
    return entries


def measurements_table(title: str, results: "list[Measurement]", batch: int) -> "Table":
    """A table of the measurements, fastest first."""
    entries = sorted(as_dicts(results), key=lambda entry: entry["median_ms"] or float("inf"))
    numbers = (*NUMBERS, *SAVED) if any(entry["saved_bytes"] for entry in entries) else NUMBERS
    rows = [
        (
            entry["title"],
            *(
                _number(value, form)
                for value, form in (
                    (entry["median_ms"], ".2f"),
                    (entry["min_ms"], ".2f"),
                    (batch / entry["median_ms"] * 1e3 if entry["median_ms"] else None, ".1f"),
                    (entry["ratio"], ".2f"),
                    (entry["error"], ".1e"),
                    (entry["load_s"], ".1f"),
                    (entry["peak_mib"], ".0f"),
                    (entry["saved_bytes"] and entry["saved_bytes"] / 2**20, ".0f"),
                    (entry["saved_ratio"], ".1%"),
                )[: len(numbers)]
            ),
            "" if entry["status"] == "ok" else f"{entry['status']}: {entry['reason']}",
        )
        for entry in entries
    ]
    return table(title, ("", *numbers, ""), rows, numbers)


def _number(value: Optional[float], form: str) -> str:
    return "" if value is None else format(value, form)
