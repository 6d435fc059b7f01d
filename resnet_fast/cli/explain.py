"""``resnet-fast explain``: what is fused in a model, what runs it, and why the rest is not."""

import contextlib
from typing import Annotated

import typer

from resnet_fast.cli import options
from resnet_fast.cli.console import console, write_json


def explain(
    model: options.Model,
    num_classes: options.Classes = None,
    size: options.Size = 224,
    training: Annotated[bool, typer.Option("--training", help="Also tell about training mode.")] = False,
    json: options.Json = None,
) -> None:
    """Show which blocks of a model run fused, what runs them, and why the rest does not.

    The model is called once on one image, for the algorithms depend on its size.
    """
    import torch

    from resnet_fast import accelerate
    from resnet_fast import explain as explanation_of
    from resnet_fast.export.metadata import channels_of

    fast = accelerate(options.build(model, num_classes=num_classes))
    # A model that takes no such image can be explained all the same.
    with contextlib.suppress(Exception), torch.inference_mode():
        fast(torch.zeros(1, channels_of(fast) or 3, size, size))
    explanation = explanation_of(fast, training)
    console().print(str(explanation), markup=False, soft_wrap=True)
    write_json({"model": model, **explanation.as_dict()}, json)
