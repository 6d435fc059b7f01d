"""models/named.py for commands: a name that nothing has is a mistake on the command line."""

import contextlib
from collections.abc import Iterator

import typer

from resnet_fast.models import named

_PARAMETERS = {"name": "MODEL", "weights": "--weights"}


@contextlib.contextmanager
def _bad_parameters() -> Iterator[None]:
    try:
        yield
    except named.UnknownNameError as error:
        raise typer.BadParameter(str(error), param_hint=_PARAMETERS[error.argument]) from None


build = _bad_parameters()(named.build)
published_weights = _bad_parameters()(named.published_weights)
