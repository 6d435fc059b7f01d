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
    epochs: Annotated[int, typer.Option(min=1, help="Of training on the digits.")] = 4,
    providers: Annotated[Optional[str], typer.Option("--providers", help="Peers to time; see bench.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of timing; see bench.")] = 5,
    seconds: Annotated[float, typer.Option(min=0.0, help="Length of a provider's turn.")] = 0.5,
    threads: options.Threads = None,
    seed: options.Seed = 0,
    json: options.Json = None,
    debug: options.Debug = False,
) -> None:
    """Train a small ResNet on digits, accelerate it, check and time it, replay it as ONNX; then a ResNet-50 on photos.

    Takes a few minutes and downloads nothing. Writes OUT/report.html and OUT/report.json, and exits with 3 if a
    check fails.
    """
    from resnet_fast.utils.optional import require

    for module in ("onnxruntime", "sklearn", "skimage", "matplotlib", "jinja2"):
        require(module, "the demo")

    import time

    import torch

    from resnet_fast.bench.machine import available_cores, describe, load
    from resnet_fast.bench.providers import provider_names
    from resnet_fast.cli.demo.data import CLASSES, digits, photographs
    from resnet_fast.cli.demo.report import write_report
    from resnet_fast.cli.demo.study import BenchSettings, study
    from resnet_fast.cli.demo.training import accuracy_of, calibrate, digits_network, train
    from resnet_fast.cli.models import build
    from resnet_fast.export import VerificationError

    try:
        names = provider_names(providers)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--providers") from None
    start = time.perf_counter()
    threads = threads or available_cores()
    torch.set_num_threads(threads)
    busy = load()
    terminal = console()
    terminal.print(f"seed {seed}, {threads} threads, report in {out}/")
    out.mkdir(parents=True, exist_ok=True)
    bench = BenchSettings(names, threads, rounds, seconds)

    with terminal.status("training on the digits") as status:
        data = digits(seed)
        network, history = train(digits_network(seed), data, epochs, seed, progress=status.update)
        terminal.print(f"trained in {history.seconds:.0f} s: {history.accuracy[-1]:.1%} of the test digits are right")
        on_digits = study(
            "ResNet on digits",
            network,
            data.test_images,
            onnx=out / "digits.onnx",
            classes=CLASSES,
            bench=bench,
            bench_batch=64,
            progress=status.update,
        )
        on_digits.checks.insert(0, accuracy_of(history))
        terminal.print(table(on_digits.title, *on_digits.summary()))

        pictures = photographs(size)
        big = calibrate(build(model, seed=seed), pictures.images)
        on_photographs = study(
            f"{model} on photographs",
            big,
            pictures.images,
            onnx=out / f"{model.removeprefix('timm:')}.onnx",
            bench=bench,
            bench_batch=1,
            progress=status.update,
        )
        terminal.print(table(on_photographs.title, *on_photographs.summary()))

    content = {
        "seed": seed,
        "threads": threads,
        "seconds": round(time.perf_counter() - start, 1),
        "load_before": busy,
        "machine": describe(),
        "training": history.as_dict(),
    }
    report = write_report(out, content, data, pictures, on_digits, on_photographs)
    write_json(report, json)
    verdict = f"{report['checks_passed']} of {report['checks']} checks passed"
    terminal.print(f"{verdict} in {report['seconds']:.0f} s; report: {out / 'report.html'}")
    if not report["passed"]:
        raise VerificationError(f"{verdict}; {out / 'report.html'} shows which did not")
