"""What can be asked of an ONNX file without the model that it was made from."""

import math
import os
from collections import Counter
from collections.abc import Sequence
from typing import Optional, Union

import numpy as np
import onnx
import torch
from torch import Tensor

from resnet_fast.export.metadata import Metadata
from resnet_fast.export.precision import PRECISIONS, precision_of
from resnet_fast.export.runner import Runner, noise


class VerificationError(RuntimeError):
    """A result is further from float64 than the precision explains."""


def check_file(path: Union[str, os.PathLike], opset: Optional[int] = None) -> tuple[onnx.ModelProto, dict[str, int]]:
    """The file at ``path`` and how often each operator occurs in it, after ONNX's checker has seen it.

    Raises:
        FileNotFoundError: there is no file ``path``.
        RuntimeError: it is not valid ONNX, or not in ``opset``, if that is given.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"path is {str(path)!r}, expected an ONNX file")
    try:
        onnx.checker.check_model(path, full_check=True)
        model = onnx.load(path)
    except Exception as error:  # protobuf, the checker and shape inference have nothing in common
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise RuntimeError(f"path is {str(path)!r}, which is not valid ONNX: {reason}") from error
    # torch.onnx falls back to another opset when it cannot convert, and says so only in the log.
    found = opset_of(model)
    if opset is not None and found != opset:
        raise RuntimeError(f"opset is {opset}, but PyTorch could write this model only in opset {found}")
    return model, dict(sorted(Counter(node.op_type for node in model.graph.node).items()))


def opset_of(model: onnx.ModelProto) -> int:
    """Return the opset of the standard operators; 0 if the file uses none."""
    return {item.domain: item.version for item in model.opset_import}.get("", 0)


def metadata_of(model: onnx.ModelProto) -> Metadata:
    """Return what ``export_onnx`` wrote into the file; ValueError if it wrote none of it."""
    return Metadata.read({entry.key: entry.value for entry in model.metadata_props})


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
    """Count the products that each convolution and matrix product with constant weights adds up."""
    sizes = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    dequantised = [node for node in model.graph.node if node.op_type == "DequantizeLinear" and node.input[0] in sizes]
    sizes.update({node.output[0]: sizes[node.input[0]] for node in dequantised})
    layers = [node for node in model.graph.node if node.op_type in ("Conv", "Gemm") and node.input[1] in sizes]
    return [math.prod(sizes[node.input[1]][1:]) for node in layers]


def is_softmax(runner: Runner) -> bool:
    return runner.outputs[0] == "probabilities"


def check_shape(found: np.ndarray, reference: Tensor) -> None:
    if found.shape != tuple(reference.shape):
        raise VerificationError(
            f"ONNX Runtime gives shape {list(found.shape)} at batch {len(reference)}, expected {list(reference.shape)}"
        )


def check_best(given: dict[str, np.ndarray]) -> None:
    """``scores`` and ``classes``, where the file gives them, are the first output's largest values and their places."""
    if "scores" not in given:
        return
    values, scores, classes = given.values()
    expected = -np.sort(-values, axis=1)[:, : scores.shape[1]]
    found = np.take_along_axis(values, classes, axis=1)
    if not (np.array_equal(scores, expected) and np.array_equal(found, expected)):
        raise VerificationError(
            f"scores and classes are not the {scores.shape[1]} largest values at batch {len(values)} and their places"
        )
