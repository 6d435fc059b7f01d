"""Every launch of the backward pass of the ResNets, planned on the meta device, for large and small batches.

Each primitive is planned with everything that it can be asked to do besides (residual, gate, prologue): that needs the
most registers.
"""

from collections.abc import Iterator

import torch

from resnet_fast.kernels.reference.training import Affine, Gate, Geometry
from resnet_fast.kernels.triton import training_backward as training
from tests.aot.layers import DTYPES, Launch, Layer, float32_precision, image, model_layers

BATCHES = (8, 128)


def backward_launches(architecture: str, precision: str) -> Iterator[Launch]:
    for name, steps in _steps(architecture, precision):
        for plan in steps.plans:
            yield Launch(name, architecture, precision, plan)


def _steps(architecture: str, precision: str) -> Iterator[tuple[str, training.Steps]]:
    dtype = DTYPES[precision]
    with float32_precision(precision):
        for layer in model_layers():
            for batch in BATCHES:
                if layer.groups == 1:
                    yield from _conv(layer, batch, dtype, architecture)
        for channels, size in ((64, 56), (2048, 7)):
            y = image(BATCHES[-1], channels, size, size, dtype)
            v = _vector(channels)
            name = f"{channels} {size}x{size}"
            yield f"tail {name}", training.plan_tail_backward(y, y, y, v, y, v, architecture)
            yield f"batch norm {name}", training.plan_bn_backward(y, y, v, v, v, v, True, architecture)
        y, pooled, v = image(BATCHES[-1], 64, 112, 112, dtype), image(BATCHES[-1], 64, 56, 56, dtype), _vector(64)
        yield "max-pool", training.plan_tail_pool_backward(pooled, y, Affine(v, v), v, architecture)


def _conv(layer: Layer, batch: int, dtype: torch.dtype, architecture: str) -> Iterator[tuple[str, training.Steps]]:
    geometry = Geometry(layer.stride, layer.padding)
    name = f"{layer.name()} batch {batch}"
    x = image(batch, layer.c, layer.h, layer.w, dtype)
    y = image(batch, layer.k, layer.h // layer.stride[0], layer.w // layer.stride[1], dtype)
    weight = torch.empty(layer.k, layer.c, *layer.kernel, device="meta")
    v = _vector(layer.c)
    affine, gate = Affine(v, v), Gate(Affine(v, v), v)
    if layer.c == 3:
        yield f"wgrad {name}", training.plan_wgrad(y, x, None, weight.shape, geometry, architecture)
        return
    yield f"wgrad {name}", training.plan_wgrad(y, x, affine, weight.shape, geometry, architecture)
    yield f"dgrad {name}", training.plan_dgrad(y, weight, geometry, x, gate, x, architecture)
    if layer.kernel == (1, 1) and layer.k > layer.c:
        q = torch.empty(layer.c, layer.c, device="meta")
        steps = training.plan_dgrad_expand(
            y, weight.flatten(1), q, v, layer.stride, x, affine, gate, x, architecture
        )  # fmt: skip
        yield f"dgrad_expand {name}", steps


def _vector(channels: int) -> torch.Tensor:
    return torch.empty(channels, device="meta")
