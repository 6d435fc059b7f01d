"""``conv_chain``, from tensors to its launch; as in forward.py."""

from typing import Optional

import torch

from resnet_fast.kernels.reference import inference as reference
from resnet_fast.kernels.triton import forward, pack, tiles
from resnet_fast.kernels.triton.chain import chain_kernel
from resnet_fast.kernels.triton.forward import Plan


def conv_chain(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    residual: torch.Tensor,
    next_weight: torch.Tensor,
    next_scale: torch.Tensor,
    next_shift: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``reference.conv_chain``."""
    args = (x, weight, scale, shift, residual, next_weight, next_scale, next_shift)
    if any(tensor.numel() == 0 for tensor in args):
        return reference.conv_chain(*args)
    plan = plan_chain(*args, forward.architecture(x.device))
    assert plan.workspace is not None
    return plan.run(), plan.workspace


def plan_chain(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    residual: torch.Tensor,
    next_weight: torch.Tensor,
    next_scale: torch.Tensor,
    next_shift: torch.Tensor,
    target: str,
    tile: Optional[tiles.ChainTile] = None,
) -> Plan:
    """Both convolutions; the second one's result is the plan's ``workspace``. ``target`` is the architecture to choose
    the tile for, unless one is given.

    Raises:
        ValueError: the architecture has no tile for so many channels (see ``support.supports``).
    """
    n, c, h, w = x.shape
    k, last, rows = weight.shape[0], next_weight.shape[0], n * h * w
    precision = forward.precision_of(x.dtype, target)
    tile = tile or tiles.pick_chain(target, precision, c, last)
    if tile is None:
        raise ValueError(f"no tile of {target} for {precision} takes {c} channels in and {last} out")
    y, z = forward.allocate(x, (n, k, h, w)), forward.allocate(x, (n, last, h, w))
    x, residual = forward.nhwc(x), forward.nhwc(residual)
    scale, shift, next_scale, next_shift = map(forward.vector, (scale, shift, next_scale, next_shift))
    constants = tile.constants(c, last)
    packed = pack.weight(weight, x.dtype, 1, 1, constants["BK"])
    next_packed = pack.weight(next_weight, x.dtype, 1, 1, tile.columns)
    return Plan(
        chain_kernel,
        (forward.ceil_div(rows, tile.rows),),
        (x, packed, scale, shift, residual, y, next_packed, next_scale, next_shift, z, rows),
        {
            "C": c,
            "K": k,
            "L": last,
            "PRECISION": "tf32" if precision == "tf32" else "ieee",
            "INDEX64": forward.index64(x, y),
            **constants,
        },
        y,
        z,
    )
