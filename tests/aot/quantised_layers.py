"""The 8-bit launches of ResNet-18, ResNet-50 and ResNeXt-50 at 224x224, planned on the meta device: see layers.py."""

from collections.abc import Iterable, Iterator

import torch

from resnet_fast.kernels.triton import quantised, quantised_launch
from tests.aot.layers import BATCHES, Launch, image, model_layers

DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942", "gfx950")
TARGETS = tuple((a, p) for a in ARCHITECTURES for p in DTYPES if p == "int8" or quantised.no_fp8(a) is None)


def launches(architecture: str, precision: str) -> Iterator[Launch]:
    """All layers but the first, all batches; a residual and a result in 8 bits, or both in float16; and the passes."""
    dtype = DTYPES[precision]
    for layer in model_layers():
        if layer.c % quantised.CHANNELS:
            continue  # the first one stays in half precision
        for batch in BATCHES:
            for out_dtype in (dtype, torch.float16) if layer.residual else (dtype,):
                weight = torch.empty(layer.k, layer.c // layer.groups, *layer.kernel, dtype=dtype, device="meta")
                vector = torch.empty(layer.k, device="meta")
                size = layer.h // layer.stride[0], layer.w // layer.stride[1]
                residual = image(batch, layer.k, *size, out_dtype) if layer.residual else None
                plan = quantised_launch.plan_conv_quantised(
                    image(batch, layer.c, layer.h, layer.w, dtype), weight, vector, vector, residual, 0.02, 0.03,
                    layer.stride, layer.padding, (1, 1), layer.groups, layer.relu, out_dtype, architecture,
                )  # fmt: skip
                name = f"{layer.name()} batch {batch} to {out_dtype}"
                yield Launch(name, architecture, precision, plan)
    real = image(128, 64, 56, 56, torch.float16)
    plan = quantised_launch.plan_quantise(real, 0.02, dtype, architecture)
    yield Launch("quantise 64 56x56 batch 128", architecture, precision, plan)
    plan = quantised_launch.plan_dequantise(real.to(dtype), 0.02, torch.float16, architecture)
    yield Launch("dequantise 64 56x56 batch 128", architecture, precision, plan)


def representative(all_launches: Iterable[Launch]) -> list[Launch]:
    """For each tile of the table a 3x3 convolution, of the largest a 1x1 and another result as well, and the passes.

    With a residual, where there is one, and a loop that is too long to be unrolled.
    """
    chosen: dict[object, Launch] = {}
    ranks: dict[object, tuple] = {}
    for one in all_launches:
        constants = one.plan.constants
        if "BK" not in constants:
            chosen[one.name] = one
            continue
        key: tuple = (constants["BM"], constants["BN"])
        if key >= (128, 128):
            key += (constants["R"], constants["REQUANTISE"] or constants["R"] == 1)
        rank = (constants["R"], constants["REQUANTISE"], constants["HAS_RESIDUAL"], constants["C"])
        if rank >= ranks.get(key, ()):
            chosen[key], ranks[key] = one, rank
    return list(chosen.values())
