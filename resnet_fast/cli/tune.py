"""``resnet-fast tune``: measure which algorithm is fastest for each convolution of a model on this machine."""

from typing import Annotated, Any, Literal

import typer
from rich.markup import escape

from resnet_fast.cli import options
from resnet_fast.cli.console import console, table, warn_if_busy, write_json
from resnet_fast.utils.names import Dtype


def tune(
    model: options.Model,
    batch: Annotated[int, typer.Option(metavar="N", min=1, help="Images in a call.")] = 1,
    size: options.Size = 224,
    dtype: Annotated[Dtype, typer.Option(help="The type of images and weights; on a CPU float32 alone.")] = "float32",
    device: Annotated[
        Literal["auto", "cpu", "cuda"], typer.Option(help="Where to measure; auto is the GPU if there is one.")
    ] = "auto",
    calls: Annotated[int, typer.Option(metavar="N", min=1, help="How often each algorithm is timed.")] = 7,
    threads: options.Threads = None,
    seed: options.Seed = 0,
    json: options.Json = None,
) -> None:
    """Measure which algorithm is fastest for each convolution, and keep the choices for this user and machine.

    The choices hold for images of this size and batch in every model with such a layer. Nothing else should run
    meanwhile.
    """
    import torch

    from resnet_fast import accelerate
    from resnet_fast import tune as measure
    from resnet_fast.bench.machine import describe
    from resnet_fast.bench.norms import randomise_batch_norm
    from resnet_fast.export.metadata import channels_of
    from resnet_fast.kernels.native import planner as cpu_planner
    from resnet_fast.kernels.triton.tuning import planner as gpu_planner
    from resnet_fast.utils.cpuinfo import available_cores
    from resnet_fast.utils.devices import gpu_missing, require_gpu

    if device == "cuda":
        require_gpu("--device cuda")
    elif device == "auto":
        device = "cpu" if gpu_missing() else "cuda"
    if device == "cpu" and dtype != "float32":
        raise typer.BadParameter(f"{dtype} has no choices to measure on a CPU, expected float32", param_hint="--dtype")
    if device == "cpu":
        torch.set_num_threads(threads or available_cores())
    stock = options.build(model, seed=seed)
    randomise_batch_norm(stock, seed)
    precision = getattr(torch, dtype)
    fast = accelerate(stock).to(device, precision)
    shape = (batch, channels_of(fast) or 3, size, size)
    images = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, precision)
    out = console()
    warn_if_busy(out)
    with out.status(f"measuring {escape(model)}"):
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
    path = str((cpu_planner if device == "cpu" else gpu_planner).choices.path())
    out.print(f"kept in {path}", markup=False, soft_wrap=True)
    setting: dict[str, Any] = {"model": model, "batch": batch, "size": size, "dtype": dtype, "device": device}
    found = [
        {"convolution": c.shape, "fastest": c.algorithm, "milliseconds": c.milliseconds, "rejected": c.rejected}
        for c in tuning.choices
    ]
    write_json({"machine": describe(), **setting, "seed": seed, "choices": found}, json)


def _sorted(milliseconds: dict[str, float]) -> list[tuple[str, float]]:
    return sorted(milliseconds.items(), key=lambda item: item[1])
