"""Convolutions forward, of inference and of training: which kernel serves one, and with which tile.

A 1x1 convolution of stride 1 is a plain matrix product (gemm.py), every other gathers what it multiplies (conv.py). For
both there is a kernel that reads through tensor descriptors (gemm_descriptor.py, conv_descriptor.py), which a tile asks
for by its name. Which serves in inference on a GPU is decided in measured.py.
"""

import functools
from typing import Any, NamedTuple, Optional

from torch import Tensor

from resnet_fast.kernels.contract import Affine, BatchNorm, Geometry, Pair, output_size
from resnet_fast.kernels.triton import descriptor, device, operands, pack, prepared, tiles
from resnet_fast.kernels.triton.conv import plan_conv
from resnet_fast.kernels.triton.conv_descriptor import plan_conv_descriptor
from resnet_fast.kernels.triton.convolution import Convolution
from resnet_fast.kernels.triton.gemm import plan_gemm
from resnet_fast.kernels.triton.gemm_descriptor import plan_gemm_descriptor
from resnet_fast.kernels.triton.plan import Plan
from resnet_fast.kernels.triton.problem import conv_problem
from resnet_fast.kernels.triton.statistics import plan_combine
from resnet_fast.kernels.triton.tail import plan_tail
from resnet_fast.kernels.triton.tuning import cudnn, planner

# --- inference --------------------------------------------------------------------------------------------------------


class Outcome(NamedTuple):
    """A result; how to get it again for other images of the same shapes, if that is known; and what served."""

    y: Any
    call: Optional[prepared.Call]
    choice: Optional[planner.Candidate]  # None: our kernel with the table's tile


def carry_out(
    choice: Optional[planner.Candidate],
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Optional[Tensor],
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    relu: bool,
) -> Outcome:
    """``reference.conv_bn_act`` by ``choice``; with None, or where it cannot hold the weight, by the table's tile."""
    geometry = Geometry(stride, padding, dilation, groups)
    if choice is not None and choice.tile is None:
        call = cudnn.prepare(choice.name, x.dtype, weight, scale, shift, geometry, relu, _pointwise)
        if call is not None:
            return Outcome(call(x, residual, scale, shift), call, choice)
        choice = None
    residual = operands.nhwc(residual)
    tile = None if choice is None else choice.tile
    target = device.architecture(x.device)
    plan = plan_conv_bn_act(x, weight, scale, shift, residual, *geometry, relu, target, tile=tile)
    return Outcome(plan.result, prepared.launches_of(plan, plan.start(), residual, scale, shift), choice)


def _pointwise(relu: bool) -> cudnn.Call:
    """``relu(y * scale + shift + residual)`` in one pass, for convolutions of one shape that are not ours."""
    kept: Optional[prepared.Call] = None

    def call(y: Tensor, residual: Optional[Tensor], scale: Tensor, shift: Tensor) -> Tensor:
        nonlocal kept
        result = None if kept is None else kept(y, residual, scale, shift)
        if result is not None:
            return result
        residual = operands.nhwc(residual)
        plan = plan_tail(y, Affine(scale, shift), residual, None, relu, device.architecture(y.device))
        plan = plan._replace(image=operands.nhwc)
        kept = prepared.launches_of(plan, plan.start(), residual, scale, shift)
        return plan.result

    return call


# --- training ---------------------------------------------------------------------------------------------------------


def plan_conv_statistics(
    x: Tensor,
    prologue: Optional[Affine],
    weight: Tensor,
    geometry: Geometry,
    norm: Optional[BatchNorm] = None,
    *,
    target: str,
) -> Plan:
    """The convolution, then rounds of combining its tiles' statistics into one."""
    conv = plan_conv_bn_act(x, weight, None, None, None, *geometry, False, target, prologue)
    (partials,), y = conv.workspaces, conv.result
    combine = plan_combine(partials, conv.launches[0].constants["BM"], y.numel() // y.shape[1], norm, target)
    return Plan((*conv.launches, *combine.launches), (y, *combine.result))


def plan_conv_affine(
    x: Tensor,
    prologue: Optional[Affine],
    weight: Tensor,
    affine: Affine,
    residual: Optional[Tensor],
    geometry: Geometry,
    relu: bool,
    target: str,
) -> Plan:
    return plan_conv_bn_act(x, weight, *affine, residual, *geometry, relu, target, prologue)


# --- both -------------------------------------------------------------------------------------------------------------


def plan_conv_bn_act(
    x: Tensor,
    weight: Tensor,
    scale: Optional[Tensor],
    shift: Optional[Tensor],
    residual: Optional[Tensor],
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    relu: bool,
    target: str,
    prologue: Optional[Affine] = None,
    tile: Optional[tiles.Tile] = None,
) -> Plan:
    """Any convolution. ``target`` is the architecture to choose the tile for, unless one is given.

    For prologue, and for a convolution without scale and shift, see ``Convolution``.
    """
    n, c, h, w = x.shape
    k, _, r, s = weight.shape
    precision = device.precision_of(x.dtype, target)
    problem = conv_problem(
        (n, c, h, w), (k, c, r, s), stride, padding, dilation, groups, precision,
        residual is not None, prologue is not None, scale is None,
    )  # fmt: skip
    tile = tile or tiles.pick(target, *problem[:7])
    if problem.kind == "stem":
        image, merge = functools.partial(pack.pixels, padding=padding), 1
        packed = pack.row_weight(weight, x.dtype, pack.pixel_width(c), tile.reduction)
    else:
        image, merge = operands.nhwc, pack.merged(groups, c // groups)
        packed = pack.weight(weight, x.dtype, groups, merge, tile.reduction)
    conv = Convolution(
        problem.kind, (h, w), image, image(x), packed, (r, s), operands.vector(scale), operands.vector(shift),
        operands.nhwc(residual), None if prologue is None else Affine(*operands.vectors(prologue)),
        operands.allocate(x, (n, k, *output_size((h, w), (r, s), stride, padding, dilation))),
        Geometry(stride, padding, dilation, groups // merge), relu, target, tile,
    )  # fmt: skip
    if problem.kind == "stem":
        return plan_conv(conv)
    refusal = descriptor.refusal(tile, target, precision, conv.x, packed, stride, conv.geometry.groups, conv.training)
    if problem.kind == "1x1":
        return plan_gemm(conv) if refusal else plan_gemm_descriptor(conv)
    return plan_conv(conv) if refusal else plan_conv_descriptor(conv)
