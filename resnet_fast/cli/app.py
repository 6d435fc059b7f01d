"""The commands, and what becomes of an exception: a line on stderr and an exit code."""

import functools
import inspect
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, Optional

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
    options,
    quantize,
    roofline,
    serve,
    traffic,
    tune,
    verify,
)
from resnet_fast.cli.demo import command as demo

OK, ERROR, USAGE, VERIFICATION_FAILED, MISSING, INTERRUPTED = 0, 1, 2, 3, 4, 130


class Command(typer.core.TyperCommand):
    """A command whose help has a section for each ``rich_help_panel``, and in the list of commands a whole sentence."""

    def get_short_help_str(self, limit: int = 0) -> str:
        return " ".join((self.help or "").partition("\n\n")[0].split()).partition(". ")[0].removesuffix(".") + "."

    def format_options(self, ctx: Any, formatter: Any) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is None:
                continue
            if param.param_type_name == "argument":
                sections.setdefault("Arguments", []).append((param.metavar or record[0], record[1]))
            else:
                sections.setdefault(getattr(param, "rich_help_panel", None) or "Options", []).append(record)
        for title, records in sections.items():
            with formatter.section(title):
                formatter.write_dl(records)


def _with_common_options(command: Callable[..., None]) -> Callable[..., None]:
    """The ``command`` with the options of all: what they do, their callbacks and ``run`` do."""
    signature = inspect.signature(command)
    common = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=annotation)
        for name, annotation in (("quiet", options.Quiet), ("debug", options.Debug))
        if name not in signature.parameters
    ]

    @functools.wraps(command)
    def run(**given: Any) -> None:
        command(**{name: value for name, value in given.items() if name in signature.parameters})

    own = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in signature.parameters.values()]
    run.__signature__ = signature.replace(parameters=[*own, *common])  # type: ignore[attr-defined]
    return run


app = typer.Typer(
    name="resnet-fast",
    help="ResNets with convolution, batch norm, residual add and ReLU fused: check, measure, train, export.",
    epilog="Exit codes: 0 ok, 1 error, 2 wrong usage, 3 a check failed, 4 something is missing on this machine, "
    "130 interrupted by Ctrl-C, 143 by SIGTERM.",
    rich_markup_mode=None,  # rich's tables cut the names of options at 80 columns
    no_args_is_help=True,
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
    quantize.quantize,
    serve.serve,
    loadtest.loadtest,
):
    app.command(cls=Command)(_with_common_options(command))


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
        with _terminable():
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


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends a command as Ctrl-C does, with a word where there is one to say, and without a half-written file."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are not its business
        return
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


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
    Console(stderr=True, emoji=False).print(f"[bold red]error:[/] {escape(text)}", highlight=False, soft_wrap=True)
