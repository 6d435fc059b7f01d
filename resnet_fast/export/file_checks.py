"""An ONNX file by itself: what can be asked of it without the model that it was made from."""

import math
import os
from collections.abc import Sequence
from typing import Union

import numpy as np
import onnx
import torch

from resnet_fast.export.compare import VerificationError, check_best, check_shape, is_softmax
from resnet_fast.export.precision import PRECISIONS, precision_of
from resnet_fast.export.reading import metadata_of
from resnet_fast.export.runner import Runner
from resnet_fast.export.samples import noise


def check_batches(path: Union[str, os.PathLike], batches: Sequence[int]) -> tuple[str, float]:
    """Run a file of ``export_onnx`` without a model to compare with: how it was run, and the largest difference.

    The difference is that between an image in the largest batch and the same image in a smaller one. Other kernels may
    run there, so that each of the layers rounds its result another way (``eps`` of the precision), and the K terms that
    make it (float32's). Such errors add up as in a random walk, and the largest of many is some standard deviations:
    ten times, as for a single convolution.

    Raises:
        ValueError: the file is none of ``export_onnx``.
        VerificationError: shapes or top-k are wrong, a result is not finite, or an image depends on others.
    """
    model = onnx.load(path)
    metadata = metadata_of(model)
    precision = precision_of(metadata.precision)
    runner = Runner(path, precision)
    (sample,) = noise(metadata, (max(batches),))
    whole = runner(sample.fed)
    values = next(iter(whole.values())).astype(np.float64)
    logits = np.log(np.maximum(values, np.finfo(np.float32).tiny)) / 2 if is_softmax(runner) else values
    terms = _terms(model)
    eps = max(precision.eps, PRECISIONS[metadata.io_dtype].eps)
    relative = 10 * math.sqrt(len(terms) * eps**2 + sum(terms) * torch.finfo(torch.float32).eps ** 2)
    limit = relative * np.abs(logits).max()
    largest = 0.0
    for batch in batches:
        given = runner(sample.fed[:batch])
        found = next(iter(given.values()))
        check_shape(found, torch.from_numpy(values[:batch]))
        check_best(given)
        if not np.isfinite(found).all():
            raise VerificationError(f"{runner.method} gives results that are not finite at batch {batch}")
        largest = max(largest, np.abs(found - values[:batch]).max().item())
        if largest > limit:
            raise VerificationError(
                f"an image's result differs by {largest:.3g} between batch {batch} and {max(batches)}, expected at "
                f"most {limit:.3g}"
            )
    return runner.method, largest


def _terms(model: onnx.ModelProto) -> list[int]:
    """How many products each convolution and matrix product with constant weights adds up."""
    sizes = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    dequantised = [node for node in model.graph.node if node.op_type == "DequantizeLinear" and node.input[0] in sizes]
    sizes.update({node.output[0]: sizes[node.input[0]] for node in dequantised})
    layers = [node for node in model.graph.node if node.op_type in ("Conv", "Gemm") and node.input[1] in sizes]
    return [math.prod(sizes[node.input[1]][1:]) for node in layers]
