"""Where one bottleneck of ResNet-50 meets the next, a chain of two 1x1 convolutions, planned on the meta device.

As in layers.py: in every stage that has a tile for it.
"""

from collections.abc import Iterator

import torch

from resnet_fast.kernels.triton import tiles
from resnet_fast.kernels.triton.chain import plan_conv_chain
from resnet_fast.kernels.triton.plan import Plan
from resnet_fast.utils import compat
from tests.aot.layers import BATCHES, DTYPES, Item, image, items

STAGES = ((64, 56), (128, 28), (256, 14), (512, 7))  # channels of the narrow side, height and width


def chain_launches(architecture: str, precision: str) -> Iterator[Item]:
    for width, size in covered(architecture, precision):
        for batch in BATCHES:
            name = f"1x1 {width}->{4 * width}->{width} {size}x{size} batch {batch}"
            yield from items(name, architecture, precision, plan(architecture, precision, width, size, batch))


def covered(architecture: str, precision: str) -> list[tuple[int, int]]:
    """The stages with a tile."""
    name = "half" if precision in ("fp16", "bf16") else precision
    return [stage for stage in STAGES if tiles.pick_chain(architecture, name, stage[0], stage[0])]


def plan(architecture: str, precision: str, width: int, size: int, batch: int = BATCHES[-1]) -> Plan:
    dtype = DTYPES[precision]
    with compat.float32_in_tf32(precision == "tf32"):
        x, residual = (image(batch, channels, size, size, dtype) for channels in (width, 4 * width))
        weight, next_weight = (
            torch.empty(*shape, 1, 1, dtype=dtype, device="meta") for shape in ((4 * width, width), (width, 4 * width))
        )
        wide, slim = (torch.empty(channels, device="meta") for channels in (4 * width, width))
        return plan_conv_chain(x, weight, wide, wide, residual, next_weight, slim, slim, architecture)
