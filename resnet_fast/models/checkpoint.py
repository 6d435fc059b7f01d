"""Checkpoints, ours and other people's, read as data: code in them is never run."""

import argparse
import contextlib
import pathlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch
import torchvision
from torch import Tensor, nn

from resnet_fast.utils.optional import require

_STATES = ("state_dict", "model", "model_state_dict", "net", "network", "state_dict_ema", "model_ema")
"""Keys that training scripts keep the state_dict under."""

_PREFIXES = ("module.", "_orig_mod.", "model.", "net.")
"""What DistributedDataParallel, AveragedModel, torch.compile, Lightning and modules around a model put before names."""

_FEW = 8  # names that do not fit, which are shown one by one


@dataclass(frozen=True)
class Finetuned:
    """What a checkpoint of ``resnet-fast finetune`` says beside its weights; others may say the first of it.

    Attributes:
        classes: their names, in the order of the outputs.
        model: as the command line names it.
        size: height and width of the images that it reads.
        mean, std: per channel, of images in [0, 1].
        resize: of the shorter side before the crop to ``size``.
    """

    classes: tuple[str, ...]
    model: Optional[str] = None
    size: Optional[int] = None
    mean: Optional[tuple[float, ...]] = None
    std: Optional[tuple[float, ...]] = None
    resize: Optional[int] = None


def finetuned(path: Path) -> Optional[Finetuned]:
    """What is known of a checkpoint; None if it names no classes, or cannot be read."""
    try:
        content = _load_tensors(path, mmap=True)
        classes = tuple(content["classes"])
        if not all(isinstance(name, str) for name in classes):
            return None
        model, said = content.get("settings", {}).get("model"), content.get("preprocessing", {})
        mean, std = (tuple(said[name]) if name in said else None for name in ("mean", "std"))
        return Finetuned(classes, model, said.get("size"), mean, std, said.get("resize"))
    except Exception:  # whether it can be loaded at all is the business of the one who loads it
        return None


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """The state_dict in a checkpoint, with the names that the model itself has.

    Understood are a plain state_dict, the checkpoints of this package's, torchvision's, timm's, Lightning's and most
    other training scripts, what a wrapper puts before the names (DistributedDataParallel, AveragedModel,
    torch.compile), and safetensors.

    Raises:
        RuntimeError: the file is no checkpoint, or holds other objects than tensors and plain values.
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
    while isinstance(content, dict):
        inner = next((content[key] for key in _STATES if isinstance(content.get(key), dict)), None)
        if inner is None:
            break
        content = inner
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise RuntimeError(f"{str(path)!r} holds no state_dict, expected names and tensors")
    return _unwrapped(content)


def _unwrapped(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """``state`` without the prefixes that all names have, and without an average's count of its updates."""
    state = {name: tensor for name, tensor in state.items() if name != "n_averaged"}
    while state:
        prefix = next((one for one in _PREFIXES if all(name.startswith(one) for name in state)), None)
        if prefix is None:
            break
        state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return state


def _load_tensors(path: Path, mmap: bool = False) -> Any:
    with torch.serialization.safe_globals(list(_plain_values())):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)


def _plain_values() -> Iterator[Any]:
    """What training scripts keep beside the weights and what cannot do harm: options, paths, NumPy's numbers."""
    yield from (argparse.Namespace, pathlib.PurePosixPath, pathlib.PosixPath)
    yield np.dtype
    yield from {type(np.dtype(kind)) for kind in ("float16", "float32", "float64", "int32", "int64", "bool")}
    scalar = type(np.float64(0)).__reduce__(np.float64(0))[0]  # numpy._core.multiarray.scalar, or numpy.core's
    for place in ("numpy._core.multiarray.scalar", "numpy.core.multiarray.scalar"):
        yield scalar, place


# --- into a model -----------------------------------------------------------------------------------------------------


def load_checkpoint(model: nn.Module, state: Mapping[str, Tensor], name: str, file: Path) -> None:
    """Load ``state``, read from ``file``, into ``model``, which is called ``name``.

    Raises:
        RuntimeError: it does not fit; the message says what it is, if that is known, else which names differ.
    """
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        problem = _problem(model, state, name, file)
        if problem is None:
            raise
        raise RuntimeError(f"{str(file)!r} does not fit {name}: {problem}") from error


def _problem(model: nn.Module, state: Mapping[str, Tensor], name: str, file: Path) -> Optional[str]:
    """One line; None if there are so few differences that PyTorch's own words are better."""
    outputs = last_layer_outputs(model, state)
    own = model.state_dict()
    differing = [key for key in own if key in state and own[key].shape != state[key].shape]
    if outputs is not None and _shapes(own, model).items() == _shapes(state, model).items():
        return f"its last layer has {outputs} classes, that of the model {last_layer_outputs(model, own)}"
    written = finetuned(file)
    other = (written and written.model) or _recognised(state)
    if other is not None and other != name:
        return f"this is a {other}"
    missing, unknown = own.keys() - state.keys(), state.keys() - own.keys()
    if len(missing) + len(unknown) + len(differing) <= _FEW:
        return None
    kinds = (
        (len(missing), "missing", min(missing, default="")),
        (len(unknown), "unknown to it", min(unknown, default="")),
        (len(differing), "of another shape", min(differing, default="")),
    )
    return "tensors are " + ", ".join(f"{kind}: {count}, e.g. {first!r}" for count, kind, first in kinds if count)


def _recognised(state: Mapping[str, Tensor]) -> Optional[str]:
    """The name of torchvision's ResNet that has these tensors, whatever its classes."""
    for name in torchvision.models.list_models(torchvision.models, include="*resne*"):
        with torch.device("meta"):
            model = torchvision.models.get_model(name)
        if _shapes(model.state_dict(), model) == _shapes(state, model):
            return name
    return None


def _shapes(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, torch.Size]:
    """Shapes by name, without the last layer's, which depend on the classes."""
    head = f"{last_layer(model)}."
    return {name: tensor.shape for name, tensor in state.items() if not name.startswith(head)}


def last_layer(model: nn.Module) -> str:
    """The name of the last linear layer in ``model``; "" if there is none."""
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return names[-1] if names else ""


def last_layer_outputs(model: nn.Module, state: Mapping[str, Tensor]) -> Optional[int]:
    """How many classes the last layer of ``model`` has in ``state``; None if it is not there."""
    with contextlib.suppress(KeyError):
        return len(state[f"{last_layer(model)}.weight"])
    return None
