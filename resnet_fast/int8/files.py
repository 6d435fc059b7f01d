"""A quantised model in a file: its state_dict, float32 as ever, and its ranges beside it."""

import copy
import json
import os
from pathlib import Path
from typing import Any, Optional, TypeVar, Union

import torch
from torch import Tensor, nn

from resnet_fast.export.folding import unwrapped
from resnet_fast.export.quantise import Quantisation
from resnet_fast.graph.ranges import description
from resnet_fast.int8.quantising import apply, layer_at, quantisation_of, report_of
from resnet_fast.utils.errors import first_line
from resnet_fast.utils.files import replacing
from resnet_fast.utils.modules import check_module
from resnet_fast.utils.optional import require

M = TypeVar("M", bound=nn.Module)

_KEY = "resnet_fast_int8"
_SAFE, _TORCH = (".safetensors",), (".pt", ".pth")
_FEW = 3


def save_quantized(model: nn.Module, path: Union[str, os.PathLike]) -> None:
    """Write a quantised model's state_dict and ranges to a file, which appears whole or not at all.

    Args:
        model: what ``quantize`` or ``load_quantized`` gave.
        path: ends in .safetensors, or in .pt or .pth for a file of ``torch.save``, which holds tensors and text alone.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: it is not quantised, or ``path`` ends otherwise.
        OSError: ``path`` cannot be written.
        MissingPackageError: safetensors is not installed.
    """
    quantisation_of(model)
    path = _checked(path)
    plain = unwrapped(model)
    text = json.dumps(description(plain))
    # A file of safetensors holds no tensor twice, nor views of one.
    state = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in plain.state_dict().items()}
    with replacing(path) as temporary:
        if path.suffix in _SAFE:
            safetensors = require("safetensors.torch", "writing a .safetensors file")
            safetensors.save_file(state, str(temporary), metadata={_KEY: text})
        else:
            torch.save({"state_dict": state, _KEY: text}, temporary)


def load_quantized(model: M, path: Union[str, os.PathLike], *, inplace: bool = False) -> M:
    """Return the quantised model in a file that ``save_quantized`` wrote.

    Args:
        model: of the same architecture, whatever its weights.
        path: the file. It is read as data: no code in it is run.
        inplace: load into ``model`` itself; otherwise it stays as it is. A wrapper, as DataParallel's, is taken off.

    Raises:
        TypeError: ``model`` is not a module.
        OSError: there is no such file.
        ValueError: the file is something else, or of another model; the message says what differs. The model is
            unchanged.
        MissingPackageError: safetensors is not installed.
    """
    check_module(model)
    plain: Any = unwrapped(model)
    path = _checked(path)
    state, text = _read(path)
    report = _report(text, path)
    _check_state(plain, state, path)
    for layer in report.layers:
        if layer.precision == "int8" and layer_at(plain, layer.path) is None:
            raise ValueError(f"path is {str(path)!r}, which has ranges for {layer.path!r}, no layer of this model")
    quantised = plain if inplace else copy.deepcopy(plain)
    quantised.load_state_dict(state)
    apply(quantised, report)
    return quantised


def _checked(path: Union[str, os.PathLike]) -> Path:
    path = Path(path)
    if path.suffix not in (*_SAFE, *_TORCH):
        raise ValueError(f"path is {str(path)!r}, expected a name that ends in {', '.join((*_SAFE, *_TORCH))}")
    return path


def _read(path: Path) -> tuple[dict[str, Tensor], Optional[str]]:
    """The state_dict, and the text beside it."""
    if path.suffix in _SAFE:
        opened = require("safetensors", "reading a .safetensors file").safe_open
    try:
        if path.suffix in _SAFE:
            with opened(str(path), "pt") as file:
                state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no dict
                return state, (file.metadata() or {}).get(_KEY)
        found = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # header, zip and pickle errors have no common base but this
        raise ValueError(f"path is {str(path)!r}, which cannot be read: {first_line(error)}") from error
    if not isinstance(found, dict) or not isinstance(found.get("state_dict"), dict):
        return {}, None
    return found["state_dict"], found.get(_KEY)


def _report(text: Optional[str], path: Path) -> Quantisation:
    try:
        return report_of(json.loads(text or ""))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"path is {str(path)!r}, expected a file that save_quantized wrote") from error


def _check_state(model: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    own = model.state_dict()
    shaped = [name for name in own if name in state and own[name].shape != state[name].shape]
    kinds = (
        (sorted(own.keys() - state.keys()), "lacks"),
        (sorted(state.keys() - own.keys()), "has what this model has not:"),
        (shaped, "has of another shape"),
    )
    said = [f"{verb} {', '.join(map(repr, names[:_FEW]))}" for names, verb in kinds if names]
    if said:
        raise ValueError(
            f"path is {str(path)!r}, which {' and '.join(said)}; expected the tensors of a {type(model).__name__} as "
            "this one"
        )
