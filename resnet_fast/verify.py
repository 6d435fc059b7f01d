"""An accelerated model against the stock one: whole, block by block, and layer by layer, both against float64."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from resnet_fast import explain, ops
from resnet_fast.graph import functional
from resnet_fast.kernels.contract import Case
from resnet_fast.kernels.native import inference as native
from resnet_fast.kernels.native import library, planner
from resnet_fast.utils.tolerance import error_limit

WINOGRAD = 5e-5
"""Error that Winograd's algorithm may have in float32, relative to the largest result: its transforms add and subtract
numbers many times as large as what remains (F(4x4, 3x3): Lavin and Gray 2015, section 5.2)."""

_NORMS = (nn.BatchNorm2d, FrozenBatchNorm2d)


@dataclass(frozen=True)
class Check:
    """One comparison. The errors are largest absolute differences from float64."""

    kind: str  # "model", "block" or "layer"
    path: str
    detail: str  # class of a block, geometry and implementation of a layer
    scale: float  # largest result
    stock_error: float  # of the stock forward in float32
    error: float  # of the fused one
    limit: float

    @property
    def passed(self) -> bool:
        return self.error <= self.limit  # not so for a NaN


def check_model(stock: nn.Module, fast: nn.Module, images: Tensor) -> Iterator[Check]:
    """The whole model, then every fused block on the input that it gets there.

    Args:
        stock: in eval mode, float32.
        fast: ``stock``, accelerated; another object.
        images: ``[N, C, H, W]``.
    """
    precise = copy.deepcopy(stock).double()
    rows = [row for row in explain(fast).rows if row.path and row.status != "stock"]
    inputs: dict[str, Tensor] = {}
    with torch.inference_mode():
        hooks = [_keep_input(precise.get_submodule(row.path), row.path, inputs) for row in rows]
        reference = precise(images.double())
        for hook in hooks:
            hook.remove()
        yield check_results("model", "", type(stock).__name__, reference, stock(images), fast(images))
        for row in rows:
            if row.path in inputs:
                x = inputs.pop(row.path).float()
                block = [model.get_submodule(row.path) for model in (precise, stock, fast)]
                results = (block[0](x.double()), block[1](x.clone()), block[2](x.clone()))
                yield check_results("block", row.path, row.kind, *results)


def check_layers(stock: nn.Module, images: Tensor) -> Iterator[Check]:
    """Every different convolution with its batch norm, as one op, on the input that it gets in ``stock``."""
    seen = set()
    for path, conv, bn, x in _layers(stock, images):
        rest: Any = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups, x.device.index)
        case = Case("conv_bn_act", x.device.type, x.dtype, conv.in_channels, conv.out_channels, *rest)
        if (case, x.shape) in seen:
            continue
        seen.add((case, x.shape))
        with torch.inference_mode():
            precise = [copy.deepcopy(module).double() for module in (conv, bn)]
            reference = precise[1](precise[0](x.double()))
            result = functional.conv_bn_act(x, conv, bn, relu=False)
            served = _served_by(case, x, conv)
            detail = f"{_geometry(conv, x)}: {served}"
            yield check_results("layer", path, detail, reference, bn(conv(x)), result, "winograd" in served)


def _served_by(case: Case, x: Tensor, conv: nn.Conv2d) -> str:
    """The implementation, with its algorithm if it is ours."""
    implementation = ops.implementation_for(case)
    if implementation != "native":
        return implementation
    geometry: tuple[Any, Any, Any, int] = (conv.stride, conv.padding, conv.dilation, conv.groups)
    shape = native.conv_shape(tuple(x.shape), tuple(conv.weight.shape), *geometry, False, False)
    return f"native {planner.choose(shape, torch.get_num_threads())}"


def check_results(
    kind: str, path: str, detail: str, reference: Tensor, stock: Tensor, fast: Tensor, winograd: bool = True
) -> Check:
    """One comparison, of results that are there: ``reference`` in float64, ``stock`` and ``fast`` in float32.

    ``winograd``: whether Winograd's algorithm may have served ``fast``.
    """
    stock_error, error = ((result.double() - reference).abs().max().item() for result in (stock, fast))
    scale = reference.abs().max().item()
    limit = error_limit(stock_error, reference)
    if winograd and not library.unavailable():
        limit = max(limit, WINOGRAD * scale)
    return Check(kind, path, detail, scale, stock_error, error, limit)


def _keep_input(module: nn.Module, path: str, inputs: dict[str, Tensor]) -> Any:
    def keep(_: nn.Module, args: tuple) -> None:
        inputs[path] = args[0].clone()  # what follows may write to it

    return module.register_forward_pre_hook(keep)


def _layers(model: nn.Module, images: Tensor) -> Iterator[tuple[str, nn.Conv2d, Any, Tensor]]:
    """Each convolution of ``model`` whose result goes to a batch norm, both, and the input, in order of execution."""
    model = copy.deepcopy(model)
    convolved: list[tuple[Tensor, str, nn.Conv2d, Tensor]] = []
    found: list[tuple[str, nn.Conv2d, Any, Tensor]] = []

    def after_conv(path: str) -> Any:
        return lambda conv, args, result: convolved.append((result, path, conv, args[0].clone()))

    def before_norm(bn: nn.Module, args: tuple) -> None:
        match = next((entry[1:] for entry in convolved if entry[0] is args[0]), None)
        if match is not None:
            path, conv, x = match
            found.append((path, conv, bn, x))
        convolved.clear()

    hooks = []
    for path, module in model.named_modules():
        if type(module) is nn.Conv2d and module.padding_mode == "zeros" and not isinstance(module.padding, str):
            hooks.append(module.register_forward_hook(after_conv(path)))
        elif type(module) in _NORMS:
            hooks.append(module.register_forward_pre_hook(before_norm))
    with torch.inference_mode():
        model(images)
    for hook in hooks:
        hook.remove()
    yield from found


def _geometry(conv: nn.Conv2d, x: Tensor) -> str:
    parts = [f"{conv.in_channels}x{x.shape[2]}x{x.shape[3]} -> {conv.out_channels}"]
    parts.append("x".join(map(str, conv.kernel_size)))
    for name, usual in (("stride", (1, 1)), ("dilation", (1, 1)), ("groups", 1)):
        value = getattr(conv, name)
        if value != usual:
            parts.append(f"{name} {value[0] if isinstance(value, tuple) else value}")
    return ", ".join(parts)
