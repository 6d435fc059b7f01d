"""The steps of a plan as calls of PyTorch's and our ops: on a GPU, and to check the native library by."""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_fast.graph import batch_norm
from resnet_fast.kernels import packing
from resnet_fast.kernels.contract import Case
from resnet_fast.kernels.native import abi
from resnet_fast.network.precision import quantise_weights, requantised
from resnet_fast.network.schedule import last_reads
from resnet_fast.network.steps import Step, Storage, sources
from resnet_fast.ops.dispatch import QUANTISED, implementation_for

_packs = packing.PackCache()


def refusal(shape: abi.Shape, device: torch.device) -> str:
    """Why a convolution in int8 has no kernel on a GPU, or ''. The definition, which serves a CPU, would take long."""
    served = _served(shape, device)
    return f"no kernel for it in 8 bits on {device}" if served == "reference" and device.type != "cpu" else ""


def _served(shape: abi.Shape, device: torch.device) -> str:
    case = Case(
        *("conv_quantised", device.type, torch.int8, shape.c, shape.k, (shape.r, shape.s)),
        *(*_geometry(shape), device.index),
    )
    return implementation_for(case, QUANTISED)


def _geometry(s: abi.Shape) -> tuple:
    return (s.stride_h, s.stride_w), (s.pad_h, s.pad_w), (s.dilation_h, s.dilation_w), s.groups


class TorchProgram:
    """Calls the steps, one after another, each with a tensor of its own as its result."""

    def __init__(self, steps: list[Step], results: list[Storage], device: torch.device) -> None:
        """Raises ``NotPlanned``."""
        self._results = results
        last = last_reads(steps)
        kept = {*results, *(step.y for step in steps if step.y in results)}
        self._calls = []
        for i, step in enumerate(steps):
            over = {value for value in (step.x, step.residual) if value is not None and last[value] == i} - kept
            self._calls.append((step, _call(step), over))
            if step.weights is not None:
                step.algorithm = _served(step.shape, device) if step.in_int8 else "float32"

    def run(self, given: Storage, x: Tensor) -> list[Tensor]:
        """The results, each one-dimensional, of the numbers of ``x`` in their order in memory."""
        if packing.holders is not None:
            packing.holders.append(self)  # whoever keeps addresses, as a CUDA graph does, keeps the packs
        values = {given: x}
        with torch.no_grad():
            for step, call, over in self._calls:
                residual = None if step.residual is None else values[step.residual]
                values[step.y] = call(values[step.x], residual)
                for value in over:
                    del values[value]
        return [values[result] for result in self._results]


def _call(step: Step) -> Any:
    if step.kind == abi.CONV:
        operands = _int8_operands(step) if step.in_int8 else _float_operands(step)
        return functools.partial(_convolution, step, *operands)
    other: Any = _OTHERS[step.kind]
    return functools.partial(other, step)


def _int8_operands(step: Step) -> tuple[Any, ...]:
    assert step.weights is not None
    norm = step.weights.norm
    key = (step.shape.r, step.weights.bias is None, norm and batch_norm.settings_of(norm))
    made = _packs.get(sources(step.weights), key, lambda: quantise_weights(step))
    return made.weight, *requantised(step, made)


def _float_operands(step: Step) -> tuple[Any, ...]:
    assert step.weights is not None
    weight, bias, norm = step.weights
    if norm is None:
        scale = torch.ones(weight.shape[0], device=weight.device)
        shift = torch.zeros_like(scale) if bias is None else bias.detach()
    else:
        scale, shift = (one.detach() for one in batch_norm.fold_batch_norm(norm, bias))
    return weight.detach().reshape(weight.shape[0], -1, step.shape.r, step.shape.s), scale, shift


def _convolution(step: Step, weight: Tensor, scale: Tensor, shift: Tensor, x: Tensor, residual: Any) -> Tensor:
    s = step.shape
    x = _image(x, s.n, s.h, s.w, s.c)
    residual = None if residual is None else _image(residual, s.n, s.p, s.q, s.k)
    if not step.in_int8:
        y = torch.ops.resnet_fast.conv_bn_act(x, weight, scale, shift, residual, *_geometry(s), bool(s.relu))
    else:
        dtype = torch.float32 if step.y.scale is None else torch.int8
        y = torch.ops.resnet_fast.conv_quantised(
            x, weight, scale, shift, residual, step.factor, 1.0, *_geometry(s), bool(s.relu), dtype
        )
    return _flat(_pooled(y, 3, 2, 1) if s.pool else y)


def _max_pool(step: Step, x: Tensor, _: None) -> Tensor:
    s = step.shape
    window = (s.r, s.s), (s.stride_h, s.stride_w), (s.pad_h, s.pad_w)
    return _flat(_pooled(_image(x, s.n, s.h, s.w, s.c), *window, _ceil_mode(s)))


def _pooled(x: Tensor, kernel: Any, stride: Any, padding: Any, ceil_mode: bool = False) -> Tensor:
    """PyTorch pools no int8; float32 holds them all."""
    return F.max_pool2d(x.float(), kernel, stride, padding, ceil_mode=ceil_mode).to(x.dtype)


def _avg_pool(step: Step, x: Tensor, _: None) -> Tensor:
    s = step.shape
    window = (s.r, s.s), (s.stride_h, s.stride_w), (s.pad_h, s.pad_w)
    return _flat(F.avg_pool2d(_image(x, s.n, s.h, s.w, s.c), *window, _ceil_mode(s), count_include_pad=False))


def _ceil_mode(s: abi.Shape) -> bool:
    floor = (s.h + 2 * s.pad_h - s.r) // s.stride_h + 1, (s.w + 2 * s.pad_w - s.s) // s.stride_w + 1
    return floor != (s.p, s.q)


def _add(step: Step, x: Tensor, residual: Any) -> Tensor:
    y = x if residual is None else x + residual
    return F.relu(y) if step.shape.relu else y


def _to_nhwc(step: Step, x: Tensor, _: None) -> Tensor:
    s = step.shape
    return x.view(s.n, s.c, s.h, s.w).permute(0, 2, 3, 1).reshape(-1)


def _to_nchw(step: Step, x: Tensor, _: None) -> Tensor:
    s = step.shape
    return x.view(s.n, s.h, s.w, s.c).permute(0, 3, 1, 2).reshape(-1)


def _quantise(step: Step, x: Tensor, _: None) -> Tensor:
    return torch.ops.resnet_fast.quantise(x.view(step.shape.n, -1, 1, 1), step.y.scale, torch.int8).view(-1)


def _dequantise(step: Step, x: Tensor, _: None) -> Tensor:
    return torch.ops.resnet_fast.dequantise(x.view(step.shape.n, -1, 1, 1), step.x.scale, torch.float32).view(-1)


_OTHERS = {
    abi.MAX_POOL: _max_pool,
    abi.AVG_POOL: _avg_pool,
    abi.ADD: _add,
    abi.TO_NHWC: _to_nhwc,
    abi.TO_NCHW: _to_nchw,
    abi.QUANTISE: _quantise,
    abi.DEQUANTISE: _dequantise,
}


def _image(x: Tensor, n: int, h: int, w: int, c: int) -> Tensor:
    return x.view(n, h, w, c).permute(0, 3, 1, 2)


def _flat(y: Tensor) -> Tensor:
    return y.permute(0, 2, 3, 1).reshape(-1)
