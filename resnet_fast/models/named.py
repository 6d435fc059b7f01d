"""Models by name, with random, published or the user's own weights."""

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Optional

import torch
import torchvision
from torch import Tensor, nn

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
        name: a torchvision classification model, or ``timm:`` and a timm model.
        weights: a checkpoint file, or the name of published weights (downloaded); None for random ones.
        num_classes: of the last layer; by default what the weights or the builder say.
        seed: of the random initialisation.

    Raises:
        UnknownNameError: no such model or weights; the message has the closest names.
        RuntimeError: the checkpoint does not fit the model, or holds more than tensors.
        MissingPackageError: timm or safetensors is needed and not installed.
    """
    kwargs: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
    file = Path(weights) if weights is not None and Path(weights).is_file() else None
    torch.manual_seed(seed)
    if name.startswith(_TIMM):
        timm = require("timm", f"the model {name}")
        _check_name(name, [_TIMM + known for known in (*timm.list_models(), *timm.list_pretrained())])
        if weights is not None and file is None and weights != "DEFAULT":
            raise UnknownNameError("weights", f"{weights!r} is no file; for timm models the only name is DEFAULT")
        published = weights is not None and file is None
        model = timm.create_model(name.removeprefix(_TIMM), pretrained=published, **kwargs)
    else:
        _check_name(name, torchvision.models.list_models(torchvision.models))
        model = torchvision.models.get_model(name, weights=published_weights(name, weights), **kwargs)
    if file is not None:
        model.load_state_dict(read_checkpoint(file))
    return model.eval()


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


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """The state_dict in a checkpoint, read as data: code in it is never run.

    Understood are a plain state_dict, the checkpoints of torchvision's and timm's training scripts (the state_dict
    under ``model`` or ``state_dict``), the prefix ``module.`` of DistributedDataParallel, and safetensors.

    Raises:
        RuntimeError: the file is no checkpoint, or holds other objects than tensors and plain containers.
        MissingPackageError: it is a safetensors file and the package is not installed.
    """
    if path.suffix == ".safetensors":
        load = require("safetensors.torch", "reading a .safetensors file").load_file
    else:
        load = _load_tensors
    try:
        content = load(path)
    except OSError:
        raise
    except Exception as error:  # a file of another kind can raise anything
        raise RuntimeError(
            f"{str(path)!r} is not loaded: it is no checkpoint, or holds Python objects other than tensors, whose "
            "loading could run code; expected a safetensors file or what torch.save(model.state_dict(), path) writes"
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise RuntimeError(f"{str(path)!r} holds no state_dict, expected names and tensors")
    if content and all(key.startswith("module.") for key in content):
        content = {key.removeprefix("module."): value for key, value in content.items()}
    return content


def _load_tensors(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)
