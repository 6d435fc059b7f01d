"""CPU: the ops on 8-bit numbers, by the kernels that whole programs of int8 are made of.

The result's step is folded into scale and shift, in float64. Beside that rounding and the sums' own to float32, every
number is the definition's; and it is the same, bit by bit, on every instruction set.
"""

from ctypes import c_void_p
from typing import Optional

import torch
from torch import Tensor

from resnet_fast.kernels.contract import Case, Pair, nhwc
from resnet_fast.kernels.native import abi, library, planner
from resnet_fast.kernels.native.abi import ALGORITHMS, NOWHERE, Op, Ref, Shape
from resnet_fast.kernels.native.inference import LARGEST, conv_shape, refusal
from resnet_fast.kernels.packing import PackCache
from resnet_fast.kernels.reference import quantised as reference

_packs = PackCache()
_one_op = Op * 1
_three_buffers = c_void_p * 3


def supports(case: Case) -> Optional[str]:
    """None if this implementation covers the case, else the reason why not."""
    return refusal(case, [torch.int8]) or library.unavailable()


def conv_quantised(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Optional[Tensor],
    residual_scale: float,
    out_scale: float,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    relu: bool,
    out_dtype: torch.dtype,
) -> Tensor:
    """See ``reference.conv_quantised``. A residual in real numbers is left to it."""
    geometry = (stride, padding, dilation, groups)
    if max(x.shape) > LARGEST or (residual is not None and residual.dtype != torch.int8):
        return reference.conv_quantised(
            x, weight, scale, shift, residual, residual_scale, out_scale, *geometry, relu, out_dtype
        )
    shape, threads = conv_shape(x.shape, weight.shape, *geometry, relu, False, abi.INT8), torch.get_num_threads()
    algorithm = planner.choose_native(shape, threads)
    packed = _packs.get(
        (weight,),
        (algorithm, groups, library.variant()),
        lambda: library.pack(shape, algorithm, weight.detach(), threads=threads),
    )
    quantised = out_dtype == torch.int8
    step = out_scale if quantised else 1.0
    by, offset = ((v.double() / step).float().contiguous() for v in (scale.detach(), shift.detach()))
    y = torch.empty(
        (x.shape[0], weight.shape[0], shape.p, shape.q),
        dtype=torch.int8 if quantised else torch.float32,
        device="cpu",
        memory_format=torch.channels_last,
    )
    op = Op(abi.CONV, ALGORITHMS.index(algorithm), shape, abi.INT8 if quantised else abi.FLOAT32)
    op.packed, op.shift, op.scale, op.factor = (
        packed.data_ptr(),
        offset.data_ptr(),
        by.data_ptr(),
        residual_scale / step,
    )
    _run(op, nhwc(x), y, None if residual is None else nhwc(residual))
    return y if quantised else y.to(out_dtype)


def quantise(x: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """See ``reference.quantise``."""
    y = torch.empty(x.shape, dtype=dtype, device="cpu", memory_format=torch.channels_last)
    return _converted(abi.QUANTISE, nhwc(x.float()), 1 / scale, y)


def dequantise(x: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """See ``reference.dequantise``."""
    y = torch.empty(x.shape, dtype=torch.float32, device="cpu", memory_format=torch.channels_last)
    return _converted(abi.DEQUANTISE, nhwc(x), scale, y).to(dtype)


def _converted(kind: int, x: Tensor, factor: float, y: Tensor) -> Tensor:
    n, c, h, w = x.shape
    op = Op(kind, 0, Shape(abi.FLOAT32 if kind == abi.QUANTISE else abi.INT8, n, h, w, c))
    op.factor = factor
    _run(op, x, y, None)
    return y


def _run(op: Op, x: Tensor, y: Tensor, residual: Optional[Tensor]) -> None:
    op.x, op.y = Ref(0, 0, 0), Ref(1, 0, 0)
    op.residual = NOWHERE if residual is None else Ref(2, 0, 0)
    buffers = _three_buffers(x.data_ptr(), y.data_ptr(), None if residual is None else residual.data_ptr())
    library.run(_one_op(op), 1, buffers, torch.get_num_threads())
