"""Options that several commands share."""

from pathlib import Path
from typing import Annotated, Optional

import typer

Json = Annotated[
    Optional[str], typer.Option("--json", metavar="FILE", help="Also write the result as JSON to FILE; - is stdout.")
]
Debug = Annotated[bool, typer.Option("--debug", help="Show a traceback if something goes wrong.")]
Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="A torchvision model, as resnet50, or a timm model, as timm:resnet50d.")
]
Weights = Annotated[
    Optional[str],
    typer.Option(
        metavar="FILE|NAME",
        help="A checkpoint with a state_dict (.pt, .pth, .safetensors), or the name of published weights, as DEFAULT.",
    ),
]
Classes = Annotated[Optional[int], typer.Option("--num-classes", min=1, help="Outputs of the last layer.")]
Threads = Annotated[Optional[int], typer.Option(min=1, help="CPU threads; by default one per available core.")]
FrozenBatchNorm = Annotated[
    bool, typer.Option("--frozen-bn", help="In training, batch norms keep to their running statistics.")
]
Seed = Annotated[int, typer.Option(help="Of the random weights and images.")]
Images = Annotated[
    Optional[Path],
    typer.Option(exists=True, file_okay=False, metavar="FOLDER", help="Pictures to compare the file on as well."),
]
TensorRT = Annotated[
    Optional[bool],
    typer.Option(
        "--tensorrt/--no-tensorrt",
        help="Have TensorRT-RTX parse the file and build an engine, which takes no GPU; by default where installed.",
    ),
]
