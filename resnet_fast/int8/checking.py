"""A quantised model against the definition of its own steps, and both against float64."""

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from resnet_fast import network
from resnet_fast.int8.quantising import quantize
from resnet_fast.layer_precisions import layer_precisions
from resnet_fast.utils.tolerance import error_limit
from resnet_fast.verify import Check

_FLIPS = 1.05
"""How much further from float64 a result may be than the definition's. Integers add up to the same, so the two differ
where a number that float32 was rounded to lies in the middle between two steps, if at all."""


def check_int8(stock: nn.Module, images: Tensor) -> Check:
    """Quantise a copy of ``stock`` with the ranges of ``images``, and compare its results on them.

    Args:
        stock: a classifier in eval mode, float32, on the CPU.
        images: ``[N, C, H, W]``.

    Returns:
        A check of kind "int8", whose ``stock_error`` is that of the definition.
    """
    int8 = quantize(stock, images)
    with torch.inference_mode():
        reference = copy.deepcopy(stock).double()(images.double())
        result = int8(images)
        last = network.last_plan(int8)
        with _by_definition():
            definition = int8(images)
    layers = layer_precisions(int8)
    count = sum(layer.precision == "int8" for layer in layers)
    native = isinstance(last, network.Plan) and last.native
    served = "the native kernels" if native else "the definition"
    stock_error, error = ((one.double() - reference).abs().max().item() for one in (definition, result))
    limit = max(_FLIPS * stock_error, error_limit(0.0, reference))
    detail = f"{count} of {len(layers)} layers in int8, by {served}"
    return Check("int8", "", detail, reference.abs().max().item(), stock_error, error, limit)


@contextmanager
def _by_definition() -> Iterator[None]:
    """Within it, the steps are calls of ops, and the definition computes them."""
    name = "RESNET_FAST_IMPLEMENTATION"
    before = os.environ.get(name)
    os.environ[name] = "reference"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
