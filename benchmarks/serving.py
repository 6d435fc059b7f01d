"""A served model beside the same one called in a process: images a second at the same batch size, in turn.

``python -m benchmarks.serving --model resnet18 --batch 16 --json RESULT.json``, with nothing else running and
``make server`` done; README.md says what is measured and how.
"""

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import torch

from resnet_fast.bench import Bench, prepare
from resnet_fast.bench.machine import describe, load
from resnet_fast.bench.norms import randomise_batch_norm
from resnet_fast.cli.console import console, table, write_json
from resnet_fast.models.named import build
from resnet_fast.serving import Server, write_repository
from resnet_fast.serving.load import Target, load_test
from resnet_fast.utils.cpuinfo import available_cores

IN_PROCESS = "in a process, without a server"


@dataclass(frozen=True)
class Way:
    """How the server is asked: ``requests`` of ``batch`` images under way at a time."""

    title: str
    grpc: bool
    shared_memory: bool
    batch: int
    requests: int


def ways(batch: int) -> list[Way]:
    """Two requests at a time, so that one is passed on while the model computes the other."""
    return [
        Way("HTTP", False, False, batch, 2),
        Way("HTTP, images in shared memory", False, True, batch, 2),
        Way("gRPC", True, False, batch, 2),
        Way("gRPC, images in shared memory", True, True, batch, 2),
        Way("HTTP, an image a request", False, False, 1, 2 * batch),
    ]


def main(arguments: Optional[Sequence[str]] = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--batch", type=int, default=16, help="images a call")
    parser.add_argument("--size", type=int, default=224, help="height and width of the images")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each measurement in a round")
    parser.add_argument("--threads", type=int, default=available_cores(), help="of the model, in both")
    parser.add_argument("--port", type=int, default=18000, help="the first of three")
    parser.add_argument("--json", metavar="FILE")
    given = parser.parse_args(arguments)

    out = console()
    busy = load()
    if busy is not None and busy > 0.5:
        out.print(f"[yellow]this machine is busy (load {busy}): the numbers below say nothing[/]")
    rates = measure(given, out)
    base = statistics.median(rates[IN_PROCESS])
    results = {
        title: {
            "images_per_second": statistics.median(rounds),
            "ratio": statistics.median(rounds) / base,
            "rounds": rounds,
        }
        for title, rounds in rates.items()
    }
    numbers = ("images/s", "of the one in a process")
    rows = [(title, f"{one['images_per_second']:.1f}", f"{one['ratio']:.1%}") for title, one in results.items()]
    title = f"{given.model}, batch {given.batch}, {given.size}x{given.size}, {given.threads} threads"
    out.print(table(title, ("", *numbers), rows, numbers))
    setting = {name: getattr(given, name) for name in ("model", "batch", "size", "rounds", "seconds", "threads")}
    write_json(
        {"machine": describe(), **setting, "load_before": busy, "load_after": load(), "ways": results}, given.json
    )


def measure(given: argparse.Namespace, out: Any) -> dict[str, list[float]]:
    """Images a second in each round, by title."""
    stock = build(given.model, seed=0)
    randomise_batch_norm(stock, 0)
    images = torch.randn(given.batch, 3, given.size, given.size, generator=torch.Generator().manual_seed(0))
    known = ways(given.batch)
    rates: dict[str, list[float]] = {IN_PROCESS: [], **{way.title: [] for way in known}}
    with tempfile.TemporaryDirectory(prefix="resnet-fast-bench-") as name, out.status("preparing") as status:
        folder = Path(name)
        prepare(folder, stock, images, onnx=False)
        write_repository(
            stock,
            folder / "models",
            name="served",
            architecture=given.model,
            max_batch=given.batch,
            threads=given.threads,
            input_size=tuple(images.shape[1:]),
            verify=False,
        )
        ports = {f"{kind}_port": given.port + index for index, kind in enumerate(("http", "grpc", "metrics"))}
        with (
            Bench(["ours"], given.threads) as bench,
            Server(folder / "models", models=["served"], log=folder / "server.log", **ports) as server,
        ):
            server.wait()
            targets = {False: Target(server.http, "served"), True: Target(f"grpc://{server.grpc}", "served")}
            for index in range(given.rounds):
                for way in [None, *known] if index % 2 == 0 else [*reversed(known), None]:
                    status.update(f"round {index + 1} of {given.rounds}: {way.title if way else IN_PROCESS}")
                    if way is None:
                        (result,) = bench.measure(folder, rounds=1, seconds=given.seconds)
                        if result.median_ms is None:
                            raise RuntimeError(f"{result.status}: {result.reason}")
                        rates[IN_PROCESS].append(given.batch / result.median_ms * 1e3)
                        continue
                    level = load_test(
                        targets[way.grpc],
                        way.requests,
                        batch=way.batch,
                        seconds=given.seconds,
                        shared_memory=way.shared_memory,
                    )
                    if level.failed:
                        raise RuntimeError(f"{way.title}: {level.failed} requests failed: {level.reason}")
                    rates[way.title].append(level.images_per_second)
    return rates


if __name__ == "__main__":
    main()
