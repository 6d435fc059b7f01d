"""Models by name, with random, published or the user's own weights."""

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Optional

import torch
import torchvision
from torch import nn

from resnet_fast.models.checkpoint import finetuned, load_checkpoint, read_checkpoint
from resnet_fast.utils.errors import first_line
from resnet_fast.utils.optional import require

_TIMM = "timm:"


class UnknownNameError(ValueError):
    """Nothing has the name that was given for ``argument``, "name" or "weights"."""

    def __init__(self, argument: str, problem: str) -> None:
        super().__init__(problem)
        self.argument = argument


def build(name: str, *, weights: Optional[str] = None, num_classes: Optional[int] = None, seed: int = 0) -> nn.Module:
    """The stock model ``name`` in eval mode.

    Args:
        name: a torchvision classification model, or ``timm:`` and a timm model, or a checkpoint of ``resnet-fast
            finetune``, which knows its model and its classes.
        weights: a checkpoint file, or the name of published weights (downloaded); None for random ones.
        num_classes: of the last layer; by default what the weights or the builder say.
        seed: of the random initialisation.

    Raises:
        UnknownNameError: no such model or weights; the message has the closest names.
        RuntimeError: the checkpoint does not fit the model, or holds more than tensors.
        MissingPackageError: timm or safetensors is needed and not installed.
    """
    file = Path(weights) if weights is not None and Path(weights).is_file() else None
    if Path(name).is_file():
        if weights is not None:
            raise UnknownNameError("weights", f"{weights!r} is not needed: {name!r} has weights")
        file = Path(name)
        name = model_in(file)
    written = None if file is None else finetuned(file)
    if num_classes is None and written is not None:
        num_classes = len(written.classes)
    kwargs: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
    torch.manual_seed(seed)
    if name.startswith(_TIMM):
        timm = require("timm", f"the model {name}")
        _check_name(name, [_TIMM + known for known in (*timm.list_models(), *timm.list_pretrained())])
        if weights is not None and file is None and weights != "DEFAULT":
            raise UnknownNameError("weights", f"{weights!r} is no file; for timm models the only name is DEFAULT")
        published = weights is not None and file is None
        try:
            model = timm.create_model(name.removeprefix(_TIMM), pretrained=published, **kwargs)
        except Exception as error:
            if not published:
                raise
            raise RuntimeError(
                f"the weights of {name} cannot be downloaded: {first_line(error)}; a file of them can be given in "
                "place of DEFAULT"
            ) from error
    else:
        _check_name(name, torchvision.models.list_models(torchvision.models))
        named_weights = published_weights(name, weights)
        with downloading(named_weights):
            model = torchvision.models.get_model(name, weights=named_weights, **kwargs)
    if file is not None:
        load_checkpoint(model, read_checkpoint(file), name, file)
    return model.eval()


@contextmanager
def downloading(weights: Any) -> Iterator[None]:
    """Have a download of torchvision's ``weights`` that fails end in one line, with what to do about it."""
    try:
        yield
    except OSError as error:  # urllib's are OSErrors
        if weights is None:
            raise
        folder = Path(torch.hub.get_dir(), "checkpoints")
        raise RuntimeError(
            f"{weights.url} cannot be downloaded: {getattr(error, 'reason', None) or error}; "
            f"put that file into {str(folder)!r}"
        ) from error


def model_in(file: Path) -> str:
    """The name of the model in a checkpoint of ``resnet-fast finetune``; UnknownNameError if it does not say."""
    written = finetuned(file)
    if written is None or written.model is None:
        problem = f"{str(file)!r} does not say which model it is of; expected its name, and the file as weights"
        raise UnknownNameError("name", problem)
    return written.model


def published_weights(name: str, weights: Optional[str]) -> Any:
    """The torchvision weights of model ``name`` called ``weights``; None for a file, a timm model or no weights."""
    if weights is None or Path(weights).is_file() or name.startswith(_TIMM):
        return None
    known = torchvision.models.get_model_weights(name)
    member = weights.rpartition(".")[2]
    if member not in known.__members__ or weights not in (member, f"{known.__name__}.{member}"):
        expected = ", ".join(known.__members__)
        raise UnknownNameError("weights", f"{weights!r} is neither a file nor weights of {name}: {expected}")
    return known[member]


def _check_name(name: str, known: Iterable[str]) -> None:
    names = sorted(set(known))
    if name in names:
        return
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(close)}?" if close else "torchvision.models.list_models() has the names"
    raise UnknownNameError("name", f"no model is called {name!r}: {hint}")
