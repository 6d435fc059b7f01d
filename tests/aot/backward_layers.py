"""Every launch of the backward pass of the ResNets, planned on the meta device, for large and small batches.

Each primitive is planned with everything that it can be asked to do besides (residual, gate, prologue): that needs the
most registers.
"""

from collections.abc import Iterator

import torch

from resnet_fast.kernels.contract import Affine, Gate, Geometry
from resnet_fast.kernels.triton.dgrad import plan_dgrad, plan_dgrad_expand
from resnet_fast.kernels.triton.expand import plan_expand_backward
from resnet_fast.kernels.triton.plan import Plan
from resnet_fast.kernels.triton.tail_backward import (
    plan_bn_backward,
    plan_tail_backward,
    plan_tail_pool_backward,
)
from resnet_fast.kernels.triton.wgrad import plan_wgrad
from resnet_fast.utils import compat
from tests.aot.layers import DTYPES, Item, Layer, image, items, model_layers

BATCHES = (8, 128)


def backward_launches(architecture: str, precision: str) -> Iterator[Item]:
    for name, plan in _plans(architecture, precision):
        yield from items(name, architecture, precision, plan)


def _plans(architecture: str, precision: str) -> Iterator[tuple[str, Plan]]:
    dtype = DTYPES[precision]
    with compat.float32_in_tf32(precision == "tf32"):
        for layer in model_layers():
            for batch in BATCHES:
                if layer.groups == 1:
                    yield from _conv(layer, batch, dtype, architecture)
        for channels, size in ((64, 56), (2048, 7)):
            y = image(BATCHES[-1], channels, size, size, dtype)
            v, vectors = _vector(channels), torch.empty(4, channels, device="meta")
            name = f"{channels} {size}x{size}"
            yield f"tail {name}", plan_tail_backward(y, y, y, v, y, v, architecture)
            yield f"batch norm {name}", plan_bn_backward(y, y, vectors, v, v, y[:, 0].numel(), True, architecture)
        y, pooled, v = image(BATCHES[-1], 64, 112, 112, dtype), image(BATCHES[-1], 64, 56, 56, dtype), _vector(64)
        yield "max-pool", plan_tail_pool_backward(pooled, y, Affine(v, v), v, architecture)


def _conv(layer: Layer, batch: int, dtype: torch.dtype, architecture: str) -> Iterator[tuple[str, Plan]]:
    geometry = Geometry(layer.stride, layer.padding)
    name = f"{layer.name()} batch {batch}"
    x = image(batch, layer.c, layer.h, layer.w, dtype)
    y = image(batch, layer.k, layer.h // layer.stride[0], layer.w // layer.stride[1], dtype)
    weight = torch.empty(layer.k, layer.c, *layer.kernel, device="meta")
    v = _vector(layer.c)
    affine, gate = Affine(v, v), Gate(Affine(v, v), v)
    if layer.c == 3:
        yield f"wgrad {name}", plan_wgrad(y, x, None, weight, geometry, architecture)
        return
    yield f"wgrad {name}", plan_wgrad(y, x, affine, weight, geometry, architecture)
    yield f"dgrad {name}", plan_dgrad(y, weight, geometry, x, gate, x, architecture)
    if layer.kernel == (1, 1) and layer.k > layer.c:
        q = torch.empty(layer.c, layer.c, device="meta")
        plan = plan_dgrad_expand(
            y, weight.flatten(1), q, v, layer.stride, x, affine, gate, x, architecture
        )  # fmt: skip
        yield f"dgrad_expand {name}", plan
        matrix, vectors = torch.empty(layer.k, layer.c, device="meta"), torch.empty(4, layer.k, device="meta")
        plan = plan_expand_backward(matrix, matrix, matrix, v, vectors, _vector(layer.k), batch)
        yield f"expand_backward {name}", plan


def _vector(channels: int) -> torch.Tensor:
    return torch.empty(channels, device="meta")
