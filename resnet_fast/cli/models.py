"""named.py for commands: a name that nothing has is a mistake on the command line."""

import contextlib
from collections.abc import Iterator
from typing import Any, Optional

import typer
from torch import nn

from resnet_fast import named

_PARAMETERS = {"name": "MODEL", "weights": "--weights"}


def build(name: str, *, weights: Optional[str] = None, num_classes: Optional[int] = None, seed: int = 0) -> nn.Module:
    """See ``named.build``."""
    with _bad_parameters():
        return named.build(name, weights=weights, num_classes=num_classes, seed=seed)


def published_weights(name: str, weights: Optional[str]) -> Any:
    """See ``named.published_weights``."""
    with _bad_parameters():
        return named.published_weights(name, weights)


@contextlib.contextmanager
def _bad_parameters() -> Iterator[None]:
    try:
        yield
    except named.UnknownNameError as error:
        raise typer.BadParameter(str(error), param_hint=_PARAMETERS[error.argument]) from None
