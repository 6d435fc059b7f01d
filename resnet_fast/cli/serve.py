"""``resnet-fast serve``: NVIDIA Triton Inference Server on a model repository, on this machine."""

from pathlib import Path
from typing import Annotated, Optional

import typer
from rich.markup import escape

from resnet_fast.cli import options
from resnet_fast.cli.console import console, quiet, write_json


def serve(
    repository: Annotated[
        Path, typer.Argument(exists=True, file_okay=False, metavar="REPOSITORY", help="The folder of the models.")
    ],
    model: Annotated[
        Optional[list[str]],
        typer.Option(
            "--model", metavar="NAME", help="Load this model; repeatable. By default all whose backend the server has."
        ),
    ] = None,
    address: Annotated[
        str, typer.Option(metavar="IP", help="The network interface to listen at; 0.0.0.0 is all.")
    ] = "127.0.0.1",
    http_port: Annotated[int, typer.Option(metavar="N", min=1, max=65535, help="The port for HTTP.")] = 8000,
    grpc_port: Annotated[int, typer.Option(metavar="N", min=1, max=65535, help="The port for gRPC.")] = 8001,
    metrics_port: Annotated[int, typer.Option(metavar="N", min=1, max=65535, help="The port for metrics.")] = 8002,
    argument: Annotated[
        Optional[list[str]],
        typer.Option(
            "--argument",
            metavar="TEXT",
            help="One more argument for the server itself, e.g. --argument=--log-verbose=1; repeatable.",
        ),
    ] = None,
    json: options.Json = None,
) -> None:
    """Start NVIDIA's server on models that resnet-fast export --triton-repository wrote; Ctrl-C stops it.

    The server is the one that make server installed, or the one on PATH. Its log goes to stdout and stderr, with
    --quiet its errors alone. With --json, addresses and models are written when the server is ready.
    """
    import signal

    from resnet_fast.serving.server import Server, installation, servable

    out = console()
    for name in servable(repository, installation())[1]:
        if not model:
            out.print(f"[yellow]{escape(name)} is left out: this server lacks its backend[/]")

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    # The log of the server goes on until it has ended, so a second signal while it stops is the server's own matter.
    before = signal.signal(signal.SIGTERM, stop)
    try:
        with Server(
            repository,
            models=model,
            address=address,
            http_port=http_port,
            grpc_port=grpc_port,
            metrics_port=metrics_port,
            arguments=[*(("--log-info=0", "--log-warning=0") if quiet() else ()), *(argument or ())],
        ) as server:
            server.wait(seconds=float("inf"))
            out.print(
                f"[bold]ready[/]: {escape(', '.join(server.models))} at http://{server.http} and grpc://{server.grpc}"
            )
            addresses = {"http": server.http, "grpc": server.grpc, "metrics": server.metrics}
            write_json({"repository": str(repository), "models": server.models, **addresses}, json)
            try:
                code = server.process.wait()
            except KeyboardInterrupt:
                out.print("stopping")
                return
    except KeyboardInterrupt:  # before it was ready
        return
    finally:
        signal.signal(signal.SIGTERM, before)
    raise RuntimeError(f"the server ended with code {code}")
