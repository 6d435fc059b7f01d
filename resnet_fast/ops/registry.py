"""How an op becomes ``torch.ops.resnet_fast.NAME``: schema, kernel, fake kernel, gradients and autocast in one call."""

import functools
import operator
from collections.abc import Callable
from typing import Any, Optional

import torch

_library = torch.library.Library("resnet_fast", "DEF")
_AUTOCAST = {"cpu": torch._C.DispatchKey.AutocastCPU, "cuda": torch._C.DispatchKey.AutocastCUDA}
_AUTOCAST_KEYS = functools.reduce(operator.or_, map(torch._C.DispatchKeySet, _AUTOCAST.values()))
_IMAGES = ("x", "residual")
_PARAMETERS = ("weight", "next_weight", "weights", "bias")


def register(
    schema: str,
    kernel: Callable,
    fake: Callable,
    setup: Optional[Callable] = None,
    backward: Optional[Callable] = None,
    *,
    autocast: bool = False,
) -> None:
    """Define an op.

    Args:
        schema: as ``torch.library`` reads it, the op's name first.
        kernel: computes the op, on every device: the choice among implementations needs more than the device.
        fake: gives results of the right shape, dtype and layout without computing.
        setup, backward: as for ``torch.library.register_autograd``; without them, the op has no gradients.
        autocast: whether autocast treats it as a convolution; if not, it runs in the dtypes that it is given.
    """
    # An op with weights packs them in its first call and keeps that. In a graph of ``torch.compile`` with CUDA graphs
    # (reduce-overhead, max-autotune) it would do so in the graph's own memory, which replays overwrite.
    name = _library.define(schema, tags=(torch.Tag.cudagraph_unsafe,) if "weight" in schema else ())
    _library.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"resnet_fast::{name}", fake, lib=_library)
    if backward is not None:
        backward = _without_autocast(backward)
        torch.library.register_autograd(f"resnet_fast::{name}", backward, setup_context=setup, lib=_library)
    op = getattr(torch.ops.resnet_fast, name).default
    without = _without_autocast(op)
    for device, key in _AUTOCAST.items():
        _library.impl(name, _casting(op, without, device) if autocast else without, key.name)


def _without_autocast(function: Callable) -> Callable:
    """The function as it is outside: what an op computes in float32 inside, and in backward passes, stays float32."""

    def run(*operands: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST_KEYS):
            return function(*operands)

    return run


def _casting(op: Any, without: Callable, device: str) -> Callable:
    names = [argument.name for argument in op._schema.arguments]
    return lambda *operands: without(*(_cast(name, operand, device) for name, operand in zip(names, operands)))


def _cast(name: str, operand: Any, device: str) -> Any:
    """What autocast makes of an operand: images as a convolution's input; float32 parameters stay.

    The implementations take a float32 weight beside a half-precision image: they cast once, when they pack it.
    """
    if isinstance(operand, list):
        return [_cast(name, one, device) for one in operand]
    if name not in _IMAGES and (name not in _PARAMETERS or operand is None or operand.dtype == torch.float32):
        return operand
    if operand is None or not operand.is_floating_point() or operand.dtype == torch.float64:
        return operand
    return operand.to(torch.get_autocast_dtype(device))
