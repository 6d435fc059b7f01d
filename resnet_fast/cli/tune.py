"""``resnet-fast tune``: measure which algorithm is fastest for each convolution of a model on this machine."""

from typing import Annotated, Any

import typer

from resnet_fast.cli import options
from resnet_fast.cli.console import console, table, write_json

DTYPES = ("float32", "float16", "bfloat16")
DEVICES = ("auto", "cpu", "cuda")


def tune(
    model: options.Model,
    batch: Annotated[int, typer.Option(min=1, help="Images a call.")] = 1,
    size: Annotated[int, typer.Option(min=1, help="Height and width of the images.")] = 224,
    dtype: Annotated[
        str, typer.Option(help=f"Of images and weights: {', '.join(DTYPES)}; float32 on a CPU.")
    ] = "float32",
    device: Annotated[str, typer.Option(help=f"{', '.join(DEVICES)}; auto is the GPU if there is one.")] = "auto",
    calls: Annotated[int, typer.Option(min=1, help="Timed ones with each algorithm.")] = 7,
    threads: options.Threads = None,
    seed: options.Seed = 0,
    json: options.Json = None,
    debug: options.Debug = False,
) -> None:
    """Measure which algorithm is fastest for each convolution, and keep the choices for this user and machine.

    They hold for images of this size and batch in every model with such a layer. Nothing else should run meanwhile.
    """
    for name, value, known in (("--dtype", dtype, DTYPES), ("--device", device, DEVICES)):
        if value not in known:
            raise typer.BadParameter(f"{value!r} is none of {', '.join(known)}", param_hint=name)
    import torch

    from resnet_fast import accelerate
    from resnet_fast import tune as measure
    from resnet_fast.bench.machine import available_cores, describe
    from resnet_fast.bench.norms import randomise_batch_norm
    from resnet_fast.cli.models import build
    from resnet_fast.export.metadata import channels_of
    from resnet_fast.kernels.native import choices
    from resnet_fast.kernels.triton.tuning import planner
    from resnet_fast.utils.devices import gpu_missing, require_gpu

    if device == "cuda":
        require_gpu("--device cuda")
    elif device == "auto":
        device = "cpu" if gpu_missing() else "cuda"
    if device == "cpu" and dtype != "float32":
        raise typer.BadParameter(f"{dtype} has no choices to measure on a CPU, expected float32", param_hint="--dtype")
    if device == "cpu":
        torch.set_num_threads(threads or available_cores())
    stock = build(model, seed=seed)
    randomise_batch_norm(stock, seed)
    precision = getattr(torch, dtype)
    fast = accelerate(stock).to(device, precision)
    shape = (batch, channels_of(fast) or 3, size, size)
    images = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, precision)
    out = console()
    with out.status(f"measuring {model}"):
        tuning = measure(fast, images, calls)
    rows = [
        (choice.shape, choice.algorithm, ", ".join(f"{name} {ms:.3f}" for name, ms in _sorted(choice.milliseconds)))
        for choice in tuning.choices
    ]
    rejected = [(c.shape, name, reason) for c in tuning.choices for name, reason in c.rejected.items()]
    title = f"{model}, {batch}x{size}x{size}, {dtype}, {device}"
    out.print(table(title, ("convolution", "fastest", "median ms, by algorithm"), rows))
    if rejected:
        out.print(table("rejected", ("convolution", "algorithm", "why"), rejected))
    path = str(choices.path() if device == "cpu" else planner.choices.path())
    out.print(f"kept in {path}", soft_wrap=True)
    setting: dict[str, Any] = {"model": model, "batch": batch, "size": size, "dtype": dtype, "device": device}
    found = [
        {"convolution": c.shape, "fastest": c.algorithm, "milliseconds": c.milliseconds, "rejected": c.rejected}
        for c in tuning.choices
    ]
    write_json({"machine": describe(), **setting, "seed": seed, "choices": found}, json)


def _sorted(milliseconds: dict[str, float]) -> list[tuple[str, float]]:
    return sorted(milliseconds.items(), key=lambda item: item[1])
