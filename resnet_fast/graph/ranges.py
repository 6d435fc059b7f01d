"""What a quantised model keeps in its modules: the ranges of a layer's images, and what is known of the whole.

All are plain values, in the modules' ``__dict__``: copies and pickles have them, state_dicts have not.
"""

from typing import Any, NamedTuple, Optional

from torch import nn

from resnet_fast.graph.conditions import Accelerated

_LAYER = "_resnet_fast_ranges"
_MODEL = "_resnet_fast_int8"


class Ranges(NamedTuple):
    """Largest magnitudes: of the image that a layer reads, and of the other operand of the addition it ends in."""

    input: float
    residual: Optional[float] = None


def ranges_of(layer: nn.Module) -> Optional[Ranges]:
    """The ranges of a layer that is to run in int8."""
    kept = layer.__dict__.get(_LAYER)
    return None if kept is None else Ranges(*kept)


def is_quantised(module: nn.Module) -> bool:
    """Whether the module is an accelerated one with layers that are to run in int8, or a whole quantised model."""
    return _MODEL in module.__dict__


def description(model: nn.Module) -> Optional[dict[str, Any]]:
    """What ``quantise`` was told of the whole model; None of a part of one, and of others."""
    return model.__dict__.get(_MODEL) or None


def quantise(model: nn.Module, layers: dict[str, Ranges], about: dict[str, Any]) -> None:
    """Keep the ranges of an accelerated model's layers, by path, and ``about``, which is no empty dict, with it."""
    forget(model)
    for path, found in layers.items():
        model.get_submodule(path).__dict__[_LAYER] = tuple(found)
    for module in model.modules():
        if isinstance(module, Accelerated) and any(_LAYER in part.__dict__ for part in module.modules()):
            module.__dict__[_MODEL] = {}
    model.__dict__[_MODEL] = about


def forget(model: nn.Module) -> None:
    """Let all layers run in float again."""
    for module in model.modules():
        for name in (_LAYER, _MODEL):
            module.__dict__.pop(name, None)
