"""``resnet-fast export --triton-repository``: its options, and what it does instead of writing one ONNX file."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

if TYPE_CHECKING:
    from torch import nn

    from resnet_fast.serving import Repository

_PANEL = "NVIDIA Triton Inference Server"

Folder = Annotated[
    Optional[Path],
    typer.Option(metavar="DIR", help="The model repository to write to, new or existing.", rich_help_panel=_PANEL),
]
Name = Annotated[Optional[str], typer.Option(help="Of the model there; by default MODEL's.", rich_help_panel=_PANEL)]
MaxBatch = Annotated[int, typer.Option(min=1, help="Most images in a batch.", rich_help_panel=_PANEL)]
QueueDelay = Annotated[
    int, typer.Option(min=0, help="Microseconds that a request waits for others.", rich_help_panel=_PANEL)
]
Instances = Annotated[int, typer.Option(min=1, help="On each GPU, or on the CPU.", rich_help_panel=_PANEL)]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a model of that name.", rich_help_panel=_PANEL)]


def write(
    stock: "nn.Module",
    model: str,
    folder: Path,
    name: Optional[str],
    max_batch: int,
    queue_delay: int,
    instances: int,
    overwrite: bool,
    export: dict[str, Any],
) -> "Repository":
    """Write ``stock``, which is called ``model`` on the command line, with ``export`` for ``export_onnx``."""
    from resnet_fast.serving import write_repository

    try:
        return write_repository(
            stock,
            folder,
            name=name or model.rpartition(":")[2],
            architecture=model,
            max_batch=max_batch,
            queue_delay=queue_delay,
            instances=instances,
            overwrite=overwrite,
            **export,
        )
    except FileExistsError as error:
        raise FileExistsError(str(error).replace("overwrite=True", "--overwrite")) from error
