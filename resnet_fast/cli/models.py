"""Models by name, with random, published or the user's own weights."""

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Optional

import torch
import torchvision
import typer
from torch import Tensor, nn

from resnet_fast.export.optional import require

_TIMM = "timm:"


def build(name: str, *, weights: Optional[str] = None, num_classes: Optional[int] = None, seed: int = 0) -> nn.Module:
    """The stock model ``name`` in eval mode.

    Args:
        name: a torchvision classification model, or ``timm:`` and a timm model.
        weights: a checkpoint file, or the name of published weights (downloaded); None for random ones.
        num_classes: of the last layer; by default what the weights or the builder say.
        seed: of the random initialisation.

    Raises:
        typer.BadParameter: no such model or weights; the message has the closest names.
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
            raise typer.BadParameter(
                f"{weights!r} is no file; for timm models the only name is DEFAULT", param_hint="--weights"
            )
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
        raise typer.BadParameter(
            f"{weights!r} is neither a file nor weights of {name}: {expected}", param_hint="--weights"
        )
    return known[member]


def _check_name(name: str, known: Iterable[str]) -> None:
    names = sorted(set(known))
    if name in names:
        return
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(close)}?" if close else "torchvision.models.list_models() has the names"
    raise typer.BadParameter(f"no model is called {name!r}: {hint}", param_hint="MODEL")


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


def norms_of(model: nn.Module) -> list[Any]:
    """Its batch norms."""
    return [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


def settle_relus(model: nn.Module) -> None:
    """Shift what batch norms give, by six deviations up and down in turn, so that rounding flips no ReLU after them.

    Else gradients could not be compared: one flip is no error and changes them by more than an error would. Every
    other channel of the residual stream is then zero, the others are above it, in all blocks the same.
    """
    with torch.no_grad():
        for norm in norms_of(model):
            if norm.affine:
                norm.bias.copy_(6 * norm.weight)
                norm.bias[1::2].neg_()


def freeze_batch_norm(model: nn.Module, images: Tensor) -> None:
    """Have every batch norm keep to its running statistics, now those of ``images``, in training mode too."""
    norms = norms_of(model)
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.train().momentum = 1.0
    with torch.no_grad():
        model(images)
    for norm, momentum in zip(norms, momenta):
        norm.eval().momentum = momentum


def randomise_batch_norm(model: nn.Module, seed: int) -> None:
    """Give every batch norm statistics and parameters that no special case fits (fresh ones are 0 and 1).

    The scales stay below 1, so that the residual stream of a deep network does not overflow.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(like: Tensor, low: float, high: float) -> Tensor:
        return torch.rand(like.shape, generator=generator) * (high - low) + low

    with torch.no_grad():
        for norm in norms_of(model):
            if norm.running_mean is not None:
                norm.running_mean.copy_(uniform(norm.running_mean, -0.5, 0.5))
                norm.running_var.copy_(uniform(norm.running_var, 0.5, 2.0))
                if norm.affine:
                    norm.weight.copy_(uniform(norm.weight, 0.25, 0.75))
                    norm.bias.copy_(uniform(norm.bias, -0.25, 0.25))
