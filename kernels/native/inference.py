"""CPU: kernels of our own in C++, compiled for AVX2, AVX-512 and anything else; bfloat16 where AVX-512 multiplies it.

The weight is multiplied by the scale in float64 and laid out for the algorithm that the planner picks, once, until a
source tensor changes. What a call needs beside its tensors is kept with the weight: at batch 1, the Python around a
kernel is a part of its time that shows.
"""

from collections.abc import Collection
from ctypes import Array, c_void_p
from types import ModuleType
from typing import Any, NamedTuple, Optional, Union

import torch
import torch.nn.functional as F

from resnet_fast.kernels import contract, onednn
from resnet_fast.kernels.contract import Case, Pair, nhwc
from resnet_fast.kernels.native import abi, library, planner
from resnet_fast.kernels.native.abi import ALGORITHMS, NOWHERE, Op, Ref, Shape
from resnet_fast.kernels.packing import PackCache
from resnet_fast.kernels.reference import inference as reference

LARGEST = 2**28
"""Sizes beyond it are refused: they go to the kernels as 32-bit numbers, which add a few of them up."""

_CALLS_KEPT = 64  # per weight: detectors see many sizes

_DTYPES = {torch.float32: abi.FLOAT32, torch.bfloat16: abi.BFLOAT16}

_packs = PackCache()
_one_op = Op * 1
_three_buffers = c_void_p * 3


def supports(case: Case) -> Optional[str]:
    """None if this implementation covers the case, else the reason why not."""
    reason = refusal(case, _DTYPES) or library.unavailable()
    return reason or (_bfloat16_refusal() if case.dtype == torch.bfloat16 else None)


def refusal(case: Case, dtypes: Collection[torch.dtype]) -> Optional[str]:
    """Why no native kernel of these dtypes takes the case, if the library is there at all; None if one may."""
    if case.device != "cpu":
        return f"runs on cpu, not on {case.device}"
    if case.dtype not in dtypes:
        return f"no {case.dtype}"
    _, _, _, c, k, kernel, stride, padding, dilation, *_ = case
    if max(c, k, *kernel, *stride, *padding, *dilation) > LARGEST:
        return f"no channels or geometry beyond {LARGEST}"
    return None


def _bfloat16_refusal() -> Optional[str]:
    if library.variant() != "avx512_bf16":
        return "no bfloat16 with the instruction set in use"
    return "oneDNN uses this CPU's matrix units (AMX) for bfloat16" if torch.cpu._is_amx_tile_supported() else None


class _Call(NamedTuple):
    """A convolution of one weight, ready to run on any image of one shape."""

    program: "Array[Op]"
    height: int
    width: int
    operands: tuple[torch.Tensor, torch.Tensor]  # that the program points to: they live as long as it does


class _Weights:
    """What is made of a weight, a scale and a shift."""

    def __init__(self, shift: torch.Tensor) -> None:
        self.shift = torch.empty(shift.shape, dtype=torch.float32, device="cpu").copy_(shift.detach())
        self.packed: dict[tuple[str, int, torch.dtype], torch.Tensor] = {}  # by algorithm, groups, dtype of x
        self.calls: dict[tuple, Union[_Call, ModuleType]] = {}


def conv_bn_act(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    residual: Optional[torch.Tensor],
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    relu: bool,
) -> torch.Tensor:
    """See ``reference.conv_bn_act``."""
    call = _find(x, weight, scale, shift, residual, (stride, padding, dilation, groups), relu, False)
    if isinstance(call, _Call):
        return _run(call, x, weight, residual)
    arguments = (x, weight, scale, shift, residual, stride, padding, dilation, groups, relu)
    if call is not onednn:
        return call.conv_bn_act(*arguments)
    geometry = (stride, padding, dilation, groups)
    return library.run_other(
        lambda: onednn.conv_bn_act(*arguments),
        lambda: conv_shape(x.shape, weight.shape, *geometry, relu, False, _DTYPES[x.dtype]),
        planner.ONEDNN,
    )


def stem(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """See ``reference.stem``."""
    call = _find(x, weight, scale, shift, None, ((2, 2), (3, 3), (1, 1), 1), True, True)
    return _run(call, x, weight, None) if isinstance(call, _Call) else call.stem(x, weight, scale, shift)


def global_avg_pool(x: torch.Tensor) -> torch.Tensor:
    """See ``reference.global_avg_pool``."""
    n, c, h, w = x.shape
    if max(n, h, w) > LARGEST:
        return reference.global_avg_pool(x)
    x = nhwc(x)
    y = _empty((n, c, 1, 1), x.dtype)
    shape = Shape(_DTYPES[x.dtype], n, h, w, c, 1, 1, c, h, w, 1, 1, 0, 0, 1, 1, 1, 0, 0)
    op = Op(abi.AVG_POOL, 0, shape, 0, None, None, Ref(0, 0, 0), NOWHERE, Ref(1, 0, 0))
    buffers = _three_buffers(x.data_ptr(), y.data_ptr())
    library.run(_one_op(op), 1, buffers, torch.get_num_threads())
    return y


def head(x: torch.Tensor, weight: torch.Tensor, bias: Optional[torch.Tensor]) -> torch.Tensor:
    """See ``reference.head``. PyTorch's own matrix product is as fast as any here."""
    pooled = global_avg_pool(x).flatten(1)
    return F.linear(pooled, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def _empty(shape: tuple[int, int, int, int], dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="cpu", memory_format=torch.channels_last)


def _find(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    residual: Optional[torch.Tensor],
    geometry: tuple[Pair, Pair, Pair, int],
    relu: bool,
    pool: bool,
) -> Union[_Call, ModuleType]:
    """What runs the convolution, its max-pool too if ``pool``: kernels of ours, or the implementation that does."""
    threads = torch.get_num_threads()
    weights = _packs.get((weight,), None, lambda: _Weights(shift), (scale, shift))
    key = (x.dtype, x.shape, geometry, relu, pool, residual is None, threads, planner.version)
    try:
        return weights.calls[key]
    except KeyError:
        call = _prepare(weights, x, weight, scale, residual is not None, geometry, relu, pool, threads)
    if len(weights.calls) >= _CALLS_KEPT:
        weights.calls.clear()
    weights.calls[key] = call
    return call


def _prepare(
    weights: _Weights,
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    residual: bool,
    geometry: tuple[Pair, Pair, Pair, int],
    relu: bool,
    pool: bool,
    threads: int,
) -> Union[_Call, ModuleType]:
    if weight.numel() == 0 or max(x.shape) > LARGEST:
        return reference
    shape = conv_shape(x.shape, weight.shape, *geometry, relu, pool, _DTYPES[x.dtype])
    algorithm, groups = planner.choose(shape, threads), geometry[3]
    if algorithm == planner.ONEDNN:
        case = Case("conv_bn_act", "cpu", x.dtype, shape.c, shape.k, (shape.r, shape.s), *geometry)
        if onednn.supports(case) is None:
            return onednn
        algorithm = "gemm"
    kind = (algorithm, groups, x.dtype)
    packed = weights.packed.get(kind)
    if packed is None:
        packed = library.pack(shape, algorithm, weight.detach(), scale.detach(), threads=threads)
        packed = weights.packed.setdefault(kind, packed)
    op = Op(abi.CONV, ALGORITHMS.index(algorithm), shape, 0, packed.data_ptr(), weights.shift.data_ptr())
    op.x, op.y, op.residual = Ref(0, 0, 0), Ref(1, 0, 0), Ref(2, 0, 0) if residual else NOWHERE
    return _Call(_one_op(op), *output_size(shape), (packed, weights.shift))


def _run(call: _Call, x: torch.Tensor, weight: torch.Tensor, residual: Optional[torch.Tensor]) -> torch.Tensor:
    # Strides of dimensions of one element may be anything, also in a tensor that calls itself contiguous; no pixel
    # is reached through them, and the kernels compute addresses from sizes.
    x = nhwc(x)
    y = _empty((x.shape[0], weight.shape[0], call.height, call.width), x.dtype)
    if residual is None:
        buffers = _three_buffers(x.data_ptr(), y.data_ptr())
    else:
        residual = nhwc(residual)
        buffers = _three_buffers(x.data_ptr(), y.data_ptr(), residual.data_ptr())
    library.run(call.program, 1, buffers, torch.get_num_threads())
    return y


def conv_shape(
    x: Any,
    weight: Any,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    relu: bool,
    pool: bool,
    dtype: int = abi.FLOAT32,
) -> Shape:
    """The kernels' description of a convolution, from the shapes of its image and weight."""
    (n, c, h, w), (k, _, r, s) = x, weight
    p, q = contract.output_size((h, w), (r, s), stride, padding, dilation)
    return Shape(dtype, n, h, w, c, p, q, k, r, s, *stride, *padding, *dilation, groups, relu, pool)


def output_size(shape: Shape) -> Pair:
    """Height and width of a convolution's result, after its max-pool if it has one."""
    return ((shape.p - 1) // 2 + 1, (shape.q - 1) // 2 + 1) if shape.pool else (shape.p, shape.q)
