"""``resnet-fast demo``: train, accelerate, compare, measure, export, replay, report."""

from pathlib import Path
from typing import Annotated, Optional

import typer

from resnet_fast.cli import options
from resnet_fast.cli.console import console, table, write_json


def demo(
    out: Annotated[Path, typer.Option("--out", help="Folder of the report.")] = Path("runs/demo"),
    model: Annotated[str, typer.Option("--model", help="What runs on the photographs.")] = "resnet50",
    size: Annotated[int, typer.Option(min=32, help="Height and width of the photographs.")] = 224,
    epochs: Annotated[int, typer.Option(min=1, help="Epochs of training on the digits.")] = 4,
    providers: Annotated[Optional[str], typer.Option("--providers", help="Peers to time; see bench.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of timing; see bench.")] = 5,
    seconds: Annotated[float, typer.Option(min=0.0, help="Length of a provider's turn.")] = 0.5,
    threads: options.Threads = None,
    seed: options.Seed = 0,
    json: options.Json = None,
) -> None:
    """Train a ResNet-18 on digits, accelerate it, check and time it, replay it as ONNX; then a ResNet-50 on photos.

    Takes a few minutes and downloads nothing. Writes OUT/report.html and OUT/report.json, and exits with 3 if a
    check fails.
    """
    from resnet_fast.utils.optional import require

    for module in ("onnxruntime", "sklearn", "skimage", "matplotlib", "jinja2"):
        require(module, "the demo")

    import functools
    import time

    import torch

    from resnet_fast.bench import measure
    from resnet_fast.bench.machine import describe, load
    from resnet_fast.bench.norms import freeze_batch_norm
    from resnet_fast.bench.providers import provider_names
    from resnet_fast.cli.bench import measurements_table
    from resnet_fast.cli.demo.digits import learn_digits
    from resnet_fast.cli.demo.photographs import photographs
    from resnet_fast.cli.demo.report import write_report
    from resnet_fast.cli.demo.study import Study, learnt, study
    from resnet_fast.cli.options import build
    from resnet_fast.export import VerificationError
    from resnet_fast.utils.cpuinfo import available_cores

    try:
        names = provider_names(providers)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--providers") from None
    start = time.perf_counter()
    threads = threads or available_cores()
    torch.set_num_threads(threads)
    busy = load()
    terminal = console()
    terminal.print(f"seed {seed}, {threads} threads, report in {out}/", markup=False)
    big = build(model, seed=seed)
    measured = functools.partial(measure, providers=names, threads=threads, rounds=rounds, seconds=seconds)

    def show(found: Study) -> None:
        rows = [(each.name, each.found, each.expected, "ok" if each.passed else "FAILED") for each in found.checks]
        terminal.print(table(found.title, ("check", "found", "expected", ""), rows))
        title = f"{found.title}: time of a call, batch {found.bench_batch}"
        terminal.print(measurements_table(title, found.measurements, found.bench_batch))

    with terminal.status("training on the digits") as status:
        digits = learn_digits(out / "digits", epochs, seed)
        on_digits = study(
            "ResNet-18 on digits",
            digits.network,
            digits.images,
            onnx=out / "digits.onnx",
            classes=digits.classes,
            measured=measured,
            bench_batch=64,
            progress=status.update,
        )
        on_digits.checks.insert(0, learnt(digits.training["best_accuracy"]))
        show(on_digits)

        pictures = photographs(size)
        freeze_batch_norm(big, pictures.images)
        on_photographs = study(
            f"{model} on photographs",
            big,
            pictures.images,
            onnx=out / f"{model.removeprefix('timm:')}.onnx",
            measured=measured,
            bench_batch=1,
            progress=status.update,
        )
        show(on_photographs)

    content = {
        "seed": seed,
        "threads": threads,
        "seconds": round(time.perf_counter() - start, 1),
        "load_before": busy,
        "machine": describe(),
    }
    report = write_report(out, content, digits, pictures, on_digits, on_photographs)
    write_json(report, json)
    verdict = f"{report['checks_passed']} of {report['checks']} checks passed"
    terminal.print(f"{verdict} in {report['seconds']:.0f} s; report: {out / 'report.html'}", markup=False)
    if not report["passed"]:
        raise VerificationError(f"{verdict}; {out / 'report.html'} shows which did not")
