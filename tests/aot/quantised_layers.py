"""The 8-bit launches of ResNet-18, ResNet-50 and ResNeXt-50 at 224x224, planned on the meta device.

As in layers.py, whose layers these are.
"""

from collections.abc import Iterator

import torch

from resnet_fast.kernels.triton.conv_quantised import plan_conv_quantised
from resnet_fast.kernels.triton.quantise import plan_dequantise, plan_quantise
from resnet_fast.kernels.triton.table import EIGHT_BIT_CHANNELS
from tests.aot.layers import BATCHES, DTYPES, REAL, Item, image, items, model_layers


def quantised_launches(architecture: str, precision: str) -> Iterator[Item]:
    """All layers but the first, all batches; a residual and a result in 8 bits, or both in float16; and the passes."""
    dtype = DTYPES[precision]
    for layer in model_layers():
        if layer.c % EIGHT_BIT_CHANNELS:
            continue  # the first one stays in half precision
        for batch in BATCHES:
            for out_dtype in (dtype, torch.float16) if layer.residual else (dtype,):
                weight = torch.empty(layer.k, layer.c // layer.groups, *layer.kernel, dtype=dtype, device="meta")
                vector = torch.empty(layer.k, device="meta")
                size = layer.h // layer.stride[0], layer.w // layer.stride[1]
                residual = image(batch, layer.k, *size, out_dtype) if layer.residual else None
                plan = plan_conv_quantised(
                    image(batch, layer.c, layer.h, layer.w, dtype), weight, vector, vector, residual, 0.02, 0.03,
                    layer.stride, layer.padding, (1, 1), layer.groups, layer.relu, out_dtype, architecture,
                )  # fmt: skip
                name = f"{layer.name()} batch {batch} to {out_dtype}"
                yield from items(name, architecture, precision, plan)
    for real in dict.fromkeys(DTYPES[name] for name in REAL):
        x = image(BATCHES[-1], 64, 56, 56, real)
        plan = plan_quantise(x, 0.02, dtype, architecture)
        yield from items(f"quantise {real} 64 56x56 batch {BATCHES[-1]}", architecture, precision, plan)
        plan = plan_dequantise(x.to(dtype), 0.02, real, architecture)
        yield from items(f"dequantise to {real} 64 56x56 batch {BATCHES[-1]}", architecture, precision, plan)
