"""Options that several commands share, and models by their names on the command line."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Optional

import typer

from resnet_fast.cli.console import set_quiet

if TYPE_CHECKING:
    from torch import nn


def _writable(target: Optional[str]) -> Optional[str]:
    """The file for ``--json``, asked before the work begins whether it can be written."""
    if target is None or target == "-":
        return target
    folder = Path(target).absolute().parent
    if not folder.is_dir():
        raise typer.BadParameter(f"the folder {str(folder)!r} does not exist")
    if Path(target).is_dir():
        raise typer.BadParameter(f"{target!r} is a folder, expected the name of a file")
    if not os.access(folder, os.W_OK):
        raise typer.BadParameter(f"the folder {str(folder)!r} is not writable")
    return target


Json = Annotated[
    Optional[str],
    typer.Option(
        "--json", metavar="FILE", callback=_writable, help="Also write the result as JSON to FILE; - is stdout."
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", callback=set_quiet, help="Print nothing but errors.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show a traceback if something goes wrong.")]
MODEL_HELP = "A torchvision model, e.g. resnet50, or a timm model, e.g. timm:resnet50d."
Model = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)]
Weights = Annotated[
    Optional[str],
    typer.Option(
        metavar="FILE|NAME",
        help="A checkpoint with a state_dict (.pt, .pth, .safetensors), or published weights by name, e.g. DEFAULT.",
    ),
]
Classes = Annotated[
    Optional[int],
    typer.Option("--num-classes", metavar="N", min=1, help="How many classes the last layer tells apart."),
]
Size = Annotated[int, typer.Option(metavar="PIXELS", min=1, help="Height and width of the images.")]
Threads = Annotated[
    Optional[int], typer.Option(metavar="N", min=1, help="CPU threads; by default one for each available core.")
]
PrecisionInPyTorch = Literal["float32", "int8"]
FrozenBatchNorm = Annotated[
    bool, typer.Option("--frozen-bn", help="In training, batch norms keep to their running statistics.")
]
INPUTS = "What the file takes and gives"
Mean = Annotated[
    Optional[str],
    typer.Option(
        metavar="NUMBERS",
        help="The mean of each channel, of images in [0, 1], e.g. 0.485,0.456,0.406.",
        rich_help_panel=INPUTS,
    ),
]
Std = Annotated[
    Optional[str],
    typer.Option(
        metavar="NUMBERS",
        help="The standard deviation of each channel, e.g. 0.229,0.224,0.225.",
        rich_help_panel=INPUTS,
    ),
]
Seed = Annotated[int, typer.Option(metavar="N", help="The seed of random weights and images.")]
Images = Annotated[
    Optional[Path],
    typer.Option(exists=True, file_okay=False, metavar="FOLDER", help="Also compare the file on these pictures."),
]
TensorRT = Annotated[
    Optional[bool],
    typer.Option(
        "--tensorrt/--no-tensorrt",
        help="Have TensorRT-RTX parse the file and build an engine, which takes no GPU; by default where it is "
        "installed.",
    ),
]


def numbers(text: Optional[str], option: str) -> Optional[list[float]]:
    """The numbers in the ``text`` of an option, which has commas between them."""
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"{text!r}, expected numbers with commas between them", param_hint=option) from None


# --- models by name: a name that nothing has is a mistake on the command line -----------------------------------------

_PARAMETERS = {"name": "MODEL", "weights": "--weights"}


def build(name: str, *, weights: Optional[str] = None, num_classes: Optional[int] = None, seed: int = 0) -> "nn.Module":
    """The stock model ``name``; see ``resnet_fast.models.named.build``."""
    from resnet_fast.models import named

    with _bad_parameters():
        return named.build(name, weights=weights, num_classes=num_classes, seed=seed)


def model_in(file: Path) -> str:
    """The name of the model in a checkpoint; see ``resnet_fast.models.named.model_in``."""
    from resnet_fast.models import named

    with _bad_parameters():
        return named.model_in(file)


def published_weights(name: str, weights: Optional[str]) -> Any:
    """Torchvision's weights of that name; see ``resnet_fast.models.named.published_weights``."""
    from resnet_fast.models import named

    with _bad_parameters():
        return named.published_weights(name, weights)


@contextmanager
def _bad_parameters() -> Iterator[None]:
    from resnet_fast.models.named import UnknownNameError

    try:
        yield
    except UnknownNameError as error:
        raise typer.BadParameter(str(error), param_hint=_PARAMETERS[error.argument]) from None
