"""``resnet-fast finetune``: train a model on one's own images."""

import inspect
import logging
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from resnet_fast.cli import options
from resnet_fast.cli.console import console, quiet, stages, table, write_json
from resnet_fast.finetune.arguments import SettingError, Settings

if TYPE_CHECKING:
    from torch import nn

    from resnet_fast.finetune import Data
    from resnet_fast.finetune.distributed import Processes

Source = Annotated[
    str,
    typer.Argument(
        metavar="DATA",
        help="A folder with train/ and val/ and a folder of images for each class below; one with such folders alone; "
        "one of CIFAR-10 or CIFAR-100 in the python format; or digits, which are built in.",
    ),
]


def finetune(context: typer.Context, data: Source, json: options.Json = None, **_: Any) -> None:
    """Train a model on your images, from published weights, from a checkpoint, or from scratch.

    Writes last.pt and best.pt after each epoch, metrics.csv, metrics.json and curves.png, and at the end results.json
    and the confusion matrix. For several processes: torchrun --nproc-per-node N -m resnet_fast.finetune DATA ...
    """
    import torch

    from resnet_fast.finetune import checkpoint, open_data, train
    from resnet_fast.finetune.distributed import processes
    from resnet_fast.finetune.output_folder import claimed

    given = {field.name: context.params[field.name] for field in fields(Settings) if _is_given(context, field.name)}
    try:
        settings = _with_model(Settings(**given), given)
        if settings.resume is not None:
            settings = Settings(**checkpoint.load(Path(settings.resume))["settings"]).resumed(given)
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        with processes(settings.device) as here, logged(here):
            images = open_data(data, settings)
            model = _model(settings, images)
            with claimed(settings) if here.first else nullcontext(Path()) as folder, _bar(here) as bar:
                result = train(model, images, settings, folder, here, bar)
    except SettingError as error:
        raise typer.BadParameter(error.problem, param_hint=error.option) from None
    if here.first:
        _print_summary(result, folder)
        write_json(result, json)


def _add_settings_to_signature() -> None:
    """The fields of ``Settings`` as options of the command, so that each is written once."""
    signature = inspect.signature(finetune)
    own = [parameter for parameter in signature.parameters.values() if parameter.kind is not parameter.VAR_KEYWORD]
    settings = [
        inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=field.type)
        for field in fields(Settings)
    ]
    parameters = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own]
    finetune.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[*parameters[:2], *settings, *parameters[2:]]
    )


_add_settings_to_signature()


def _is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _with_model(settings: Settings, given: dict[str, Any]) -> Settings:
    """``settings`` with the model that the weights are of, if they say so and nobody else does."""
    from resnet_fast.models.checkpoint import finetuned

    written = None if settings.weights is None or "model" in given else finetuned(Path(settings.weights))
    return settings if written is None or written.model is None else replace(settings, model=written.model)


def _model(settings: Settings, data: "Data") -> "nn.Module":
    """The model with the weights that it starts from, and a last layer for the classes of ``data``."""
    from resnet_fast.cli.options import build, published_weights
    from resnet_fast.finetune.folders import check_classes
    from resnet_fast.finetune.weights import head_fits, with_own_head
    from resnet_fast.models.checkpoint import finetuned, load_checkpoint, read_checkpoint
    from resnet_fast.models.named import downloading

    name, weights, classes = settings.model, settings.weights, len(data.classes)
    if settings.qat and weights is None:
        raise SettingError("qat", "is for a trained model, so --weights is needed too")
    if weights is None or settings.resume is not None:
        return build(name, num_classes=classes, seed=settings.seed)
    file = Path(weights)
    published = None if file.is_file() else published_weights(name, weights)
    if not file.is_file() and published is None:
        return build(name, weights=weights, num_classes=classes, seed=settings.seed)  # timm makes the last layer anew
    model = build(name, num_classes=classes, seed=settings.seed)
    if published is not None:
        with downloading(published):
            state = published.get_state_dict(progress=sys.stderr.isatty(), check_hash=True)
        new_head = settings.new_head or not head_fits(model, state)
        model.load_state_dict(with_own_head(model, state) if new_head else state)
        return model
    state = read_checkpoint(file)
    written = finetuned(file)
    if not settings.new_head and written is not None:
        whose = f"the checkpoint {weights} (--new-head starts the last layer anew)"
        check_classes(data.classes, written.classes, "DATA", whose)
    if not settings.new_head and not head_fits(model, state):
        raise ValueError(
            f"the last layer in {weights} is not for the {classes} classes of DATA; --new-head starts it anew"
        )
    load_checkpoint(model, with_own_head(model, state) if settings.new_head else state, name, file)
    return model


class _Stderr(logging.StreamHandler):
    """To what stderr is at the time: rich puts something else there, which keeps a bar below the lines."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


@contextmanager
def _bar(here: "Processes") -> Iterator[Any]:
    """What shows how far the run is, on a terminal."""
    if not here.first:
        yield None
        return
    with stages(console(), "training") as bar:
        yield bar


@contextmanager
def logged(here: "Processes") -> Iterator[None]:
    """Progress on stderr, from the first process; warnings from all."""
    logger = logging.getLogger("resnet_fast.finetune")
    handler = _Stderr()
    handler.setFormatter(logging.Formatter("%(message)s" if here.world == 1 else f"[{here.rank}] %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO if here.first and not quiet() else logging.WARNING)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def _print_summary(result: dict[str, Any], folder: Path) -> None:
    out = console()
    accuracies = [(name, f"{accuracy:.1%}") for name, accuracy in result["per_class_accuracy"].items()]
    out.print(table("accuracy by class", ("class", "accuracy"), accuracies, ("accuracy",)))
    out.print(
        f"[green]{result['best_accuracy']:.2%} of the validation images are right[/] after epoch "
        f"{result['best_epoch']} of {result['epochs']}, {result['seconds']:.0f} s; "
        f"everything is in {escape(str(folder))}/"
    )
    command = ["resnet-fast", "export", str(folder / "best.pt"), str(folder / "model.onnx")]
    command += ["--precision", "int8"] if result["settings"]["qat"] else []
    out.print(f"next: {shlex.join(command)}", markup=False, soft_wrap=True)
