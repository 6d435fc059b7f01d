"""The commands, and what becomes of an exception: a line on stderr and an exit code."""

import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, Optional

import typer
from rich.console import Console
from rich.markup import escape

from resnet_fast.cli import (
    bench,
    doctor,
    explain,
    export,
    finetune,
    gpu,
    loadtest,
    roofline,
    serve,
    traffic,
    tune,
    verify,
)
from resnet_fast.cli.demo import command as demo

OK, ERROR, USAGE, VERIFICATION_FAILED, MISSING, INTERRUPTED = 0, 1, 2, 3, 4, 130

app = typer.Typer(
    name="resnet-fast",
    help="ResNets with convolution, batch norm, residual add and ReLU fused: check, measure, train, export.",
    epilog="Exit codes: 0 ok, 1 error, 2 usage, 3 verification failed, 4 something is missing on this machine.",
    rich_markup_mode="markdown",  # which joins the lines of a paragraph
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (
    demo.demo,
    doctor.doctor,
    explain.explain,
    verify.verify,
    bench.bench,
    tune.tune,
    traffic.traffic,
    roofline.roofline,
    gpu.gpu,
    finetune.finetune,
    export.export,
    serve.serve,
    loadtest.loadtest,
):
    app.command()(command)


def _version(wanted: bool) -> None:
    if wanted:
        import resnet_fast

        print(resnet_fast.__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    pass


def run(arguments: Optional[Sequence[str]] = None) -> int:
    """Run the command line and return its exit code: one of the constants above."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        app(arguments, prog_name="resnet-fast")
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else OK if stop.code is None else ERROR
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:
        if "--debug" in arguments:
            traceback.print_exc()
        else:
            _complain(error)
        return _exit_code(error)
    return OK


def _exit_code(error: Exception) -> int:
    from resnet_fast.export import MissingPackageError, VerificationError
    from resnet_fast.utils.devices import MissingDeviceError

    if isinstance(error, (MissingPackageError, MissingDeviceError)):
        return MISSING
    return VERIFICATION_FAILED if isinstance(error, VerificationError) else ERROR


def _complain(error: Exception) -> None:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    # A state_dict that does not fit is reported over several lines, each of which is needed.
    text = "\n".join(lines) if lines[0].startswith("Error(s) in loading state_dict") else lines[0]
    Console(stderr=True).print(f"[bold red]error:[/] {escape(text)}", highlight=False, soft_wrap=True)
