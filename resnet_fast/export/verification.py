"""An ONNX file against the PyTorch model that it was made from, in ONNX Runtime on the CPU."""

import copy
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Union

import numpy as np
import torch
from torch import nn

from resnet_fast.export.optional import require

BATCHES = (1, 2, 7)
"""One image, the batch that was traced, and a batch that no constant in the graph can happen to match."""


class VerificationError(RuntimeError):
    """A result is further from float64 than single precision explains."""


@dataclass(frozen=True)
class Comparison:
    """Largest absolute differences from float64, over all outputs.

    Attributes:
        errors: of ONNX Runtime, by batch size.
        torch_error: of PyTorch in float32, over the same images.
        limit: what ``errors`` may be.
    """

    errors: dict[int, float]
    torch_error: float
    limit: float


def error_limit(stock_error: float, reference: torch.Tensor, eps: float = 2.0**-23) -> float:
    """The largest error allowed beside ``stock_error``, PyTorch's own in the same precision; both against float64.

    Twice, because another order of summation and a folded batch norm round elsewhere, not more often, and the largest
    of many rounding errors varies by less than that between two such orders. The floor, 8 eps of the largest result,
    is for outputs so few that PyTorch's largest error may be small by luck: a result that went through a dozen
    roundings lies within it, and no mistake in the arithmetic does.
    """
    return 2 * stock_error + 8 * eps * reference.abs().max().item()


def session(path: Union[str, os.PathLike], threads: int = 0) -> Any:
    """An ONNX Runtime session on the CPU.

    Raises:
        FileNotFoundError: there is no file ``path``.
        ValueError: ONNX Runtime cannot read it as a model.
        MissingPackageError: ONNX Runtime is not installed.
    """
    runtime = require("onnxruntime", "running an ONNX file")
    if not os.path.isfile(path):
        raise FileNotFoundError(f"path is {str(path)!r}, expected an ONNX file")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads or torch.get_num_threads()
    options.log_severity_level = 3
    try:
        return runtime.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exception classes have no common base but this
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"path is {str(path)!r}, which ONNX Runtime {runtime.__version__} cannot load: {reason}"
        ) from error


def compare(
    path: Union[str, os.PathLike],
    model: nn.Module,
    input_size: Sequence[int],
    batches: Sequence[int] = BATCHES,
) -> Comparison:
    """Run ``path`` and ``model`` (float32, CPU, eval mode, not changed) on normal noise from a fixed seed.

    Args:
        input_size: ``(channels, height, width)``.
        batches: batch sizes to run; the images of all are different.

    Raises:
        VerificationError: the file's results differ in shape or by more than ``error_limit`` allows.
    """
    runtime = session(path)
    name = runtime.get_inputs()[0].name
    generator = torch.Generator().manual_seed(0)
    images = [torch.randn(batch, *input_size, generator=generator) for batch in batches]
    precise = copy.deepcopy(model).double()
    with torch.inference_mode():
        references = [precise(batch.double()) for batch in images]
        torch_error = max(
            _distance(model(batch), reference) for batch, reference in zip(images, references, strict=True)
        )
    limit = error_limit(torch_error, torch.cat(references))
    errors = {}
    for batch, reference in zip(images, references, strict=True):
        (result,) = runtime.run(None, {name: np.ascontiguousarray(batch.numpy())})
        if result.shape != tuple(reference.shape):
            raise VerificationError(
                f"ONNX Runtime gives shape {list(result.shape)} at batch {len(batch)}, expected {list(reference.shape)}"
            )
        errors[len(batch)] = _distance(torch.from_numpy(result), reference)
        if not errors[len(batch)] <= limit:  # a NaN fails as well
            raise VerificationError(
                f"ONNX Runtime is {errors[len(batch)]:.3g} from float64 PyTorch at batch {len(batch)}, expected at "
                f"most {limit:.3g} (float32 PyTorch: {torch_error:.3g})"
            )
    return Comparison(errors, torch_error, limit)


def _distance(result: torch.Tensor, reference: torch.Tensor) -> float:
    return (result.double() - reference).abs().max().item()
