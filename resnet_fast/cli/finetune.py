"""``resnet-fast finetune``: train a model on one's own images."""

import inspect
import itertools
import logging
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from resnet_fast.cli import options
from resnet_fast.cli.console import console, quiet, table, write_json
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

    given = {field.name: context.params[field.name] for field in fields(Settings) if _is_given(context, field.name)}
    try:
        settings = Settings(**given)
        if settings.resume is not None:
            settings = Settings(**checkpoint.load(Path(settings.resume))["settings"]).resumed(given)
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        with processes(settings.device) as here, logged(here), _terminable():
            images = open_data(data, settings)
            model = _model(settings, images)
            folder = _output(settings) if here.first else Path()
            result = train(model, images, settings, folder, here)
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


def _model(settings: Settings, data: "Data") -> "nn.Module":
    """The model with the weights that it starts from, and a last layer for the classes of ``data``."""
    from resnet_fast.cli.options import build, published_weights
    from resnet_fast.finetune.checkpoint import classes_in
    from resnet_fast.finetune.data import check_classes
    from resnet_fast.finetune.weights import head_fits, load_weights
    from resnet_fast.models.named import read_checkpoint

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
        state = published.get_state_dict(progress=sys.stderr.isatty(), check_hash=True)
        load_weights(model, state, new_head=settings.new_head or not head_fits(model, state))
        return model
    state = read_checkpoint(file)
    known = classes_in(file)
    if not settings.new_head and known:
        check_classes(data.classes, known, "DATA", f"the checkpoint {weights} (--new-head starts the last layer anew)")
    if not settings.new_head and not head_fits(model, state):
        raise ValueError(
            f"the last layer in {weights} is not for the {classes} classes of DATA; --new-head starts it anew"
        )
    load_weights(model, state, new_head=settings.new_head)
    return model


def _output(settings: Settings) -> Path:
    """The folder to write to, made if it does not exist."""
    from resnet_fast.finetune.checkpoint import LAST, remove_unfinished

    if settings.output is not None:
        folder = Path(settings.output)
        resumed = settings.resume is not None and folder.samefile(Path(settings.resume).parent)
        if (folder / LAST).exists() and not settings.overwrite and not resumed:
            raise SettingError(
                "output", f"has a checkpoint, {folder / LAST}: --resume goes on, --overwrite starts anew"
            )
    elif settings.resume is not None:
        folder = Path(settings.resume).parent
    else:
        names = itertools.chain(["finetune"], (f"finetune-{number}" for number in itertools.count(2)))
        folder = next(folder for name in names if not (folder := Path("runs", name)).exists())
    folder.mkdir(parents=True, exist_ok=True)
    remove_unfinished(folder)
    return folder


@contextmanager
def logged(here: "Processes") -> Iterator[None]:
    """Progress on stderr, from the first process; warnings from all."""
    logger = logging.getLogger("resnet_fast.finetune")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s" if here.world == 1 else f"[{here.rank}] %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO if here.first and not quiet() else logging.WARNING)
    try:
        yield
    finally:
        logger.removeHandler(handler)


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends the run as Ctrl-C does, with a word and without a half-written file."""
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _print_summary(result: dict[str, Any], folder: Path) -> None:
    out = console()
    accuracies = [(name, f"{accuracy:.1%}") for name, accuracy in result["per_class_accuracy"].items()]
    out.print(table("accuracy by class", ("class", "accuracy"), accuracies, ("accuracy",)))
    out.print(
        f"[green]{result['best_accuracy']:.2%} of the validation images are right[/] after epoch "
        f"{result['best_epoch']} of {result['epochs']}, {result['seconds']:.0f} s; everything is in {folder}/"
    )
    size, classes = result["preprocessing"]["size"], result["classes"]
    out.print(
        f"next: resnet-fast export {result['model']} {folder / 'model.onnx'} --weights {folder / 'best.pt'} "
        f"--num-classes {classes} --size {size} --classes {folder / 'classes.txt'}"
        f"{' --precision int8' if result['settings']['qat'] else ''}",
        soft_wrap=True,
    )
