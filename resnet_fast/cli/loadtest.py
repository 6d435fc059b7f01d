"""``resnet-fast loadtest``: latency and throughput of a served model."""

from typing import Annotated, Optional

import typer

from resnet_fast.cli import options
from resnet_fast.cli.console import console, table, write_json


def loadtest(
    url: Annotated[
        str, typer.Argument(metavar="URL", help="The server: host:port for HTTP, grpc://host:port for gRPC.")
    ],
    model: Annotated[str, typer.Argument(metavar="MODEL", help="The name of the model on the server.")],
    concurrency: Annotated[
        Optional[list[int]],
        typer.Option("--concurrency", metavar="N", min=1, help="Requests under way at a time; repeatable."),
    ] = None,
    batch: Annotated[int, typer.Option(metavar="N", min=1, help="Images in a request.")] = 1,
    seconds: Annotated[
        float, typer.Option(metavar="N", min=0.1, help="How long to measure at each concurrency.")
    ] = 5.0,
    size: Annotated[
        int, typer.Option(metavar="PIXELS", min=1, help="Height and width of the images, where the model takes any.")
    ] = 224,
    shared_memory: Annotated[
        bool, typer.Option("--shared-memory", help="Pass images through shared memory, to a server on this machine.")
    ] = False,
    seed: options.Seed = 0,
    json: options.Json = None,
) -> None:
    """Send a model on NVIDIA Triton Inference Server random images from several clients, and time the answers.

    Each client sends its next request when the last one is answered. The clients are threads of this process, and take
    time of the machine that they run on: run them on another one to measure what the server can do.
    """
    from dataclasses import asdict

    from resnet_fast.bench.machine import describe
    from resnet_fast.serving.load import PERCENTILES, Target, levels_as_rows, load_test

    out = console()
    target = Target(url, model, size=size)
    levels = []
    for clients in concurrency or [1, 2, 4, 8]:
        with out.status(f"{clients} requests at a time"):
            levels.append(
                load_test(target, clients, batch=batch, seconds=seconds, shared_memory=shared_memory, seed=seed)
            )
    images = f"{batch} x {'x'.join(map(str, target.dims))} {target.dtype} a request"
    columns = ("requests at a time", "images/s", "mean ms", *(f"p{part} ms" for part in PERCENTILES))
    counted = ("images a call", "queue ms", "model ms", "failed")
    title = f"{model} at {url}, {images}"
    out.print(table(title, (*columns, *counted), levels_as_rows(levels), (*columns, *counted)))
    setting = {"url": url, "model": model, "shape": [batch, *target.dims], "dtype": target.dtype}
    setting |= {"shared_memory": shared_memory, "seed": seed}
    write_json({"client": describe(), **setting, "levels": [asdict(level) for level in levels]}, json)
    failed = [level for level in levels if level.failed]
    if failed:
        raise RuntimeError(
            f"{failed[0].failed} requests failed with {failed[0].concurrency} at a time: {failed[0].reason}"
        )
