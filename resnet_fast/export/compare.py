"""An ONNX file against the PyTorch model that it was made from, in ONNX Runtime on the CPU."""

import copy
import functools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Optional, Union

import onnx
import torch
from torch import Tensor, fx, nn

from resnet_fast.export.file_checks import VerificationError, check_best, check_shape, is_softmax, metadata_of
from resnet_fast.export.precision import INT8, PRECISIONS, Precision, precision_of, rounded
from resnet_fast.export.runner import Runner, Sample, noise, pictures
from resnet_fast.utils.tolerance import error_limit

INT8_LIMIT = 0.5
"""Of the largest result. Rounding to 8 bits gives far less (0.01 to 0.05 in a trained network, up to 0.2 in a deep one
that was never trained), and a file that computes nothing but zeros gives 1. What int8 costs is measured on images of
the user (``quantise``); on noise, no closer limit would hold for every network."""


@dataclass(frozen=True)
class Comparison:
    """Largest absolute differences from float64, over all values of the first output.

    Attributes:
        method: how the file was run.
        errors: of the file, by batch size, on noise.
        torch_error: of PyTorch in the file's precision, over the same images.
        limit: what ``errors`` may be.
        images: how many pictures were compared as well.
        image_error: of the file on those pictures; None without any.
        image_limit: what ``image_error`` may be.
        top1_agreement: the share of the pictures whose largest output is the same as in float64; None without any.
    """

    method: str
    errors: dict[int, float]
    torch_error: float
    limit: float
    images: int = 0
    image_error: Optional[float] = None
    image_limit: Optional[float] = None
    top1_agreement: Optional[float] = None


def compare(
    path: Union[str, os.PathLike],
    stock: nn.Module,
    network: fx.GraphModule,
    batches: Sequence[int],
    images: Sequence[Path] = (),
) -> Comparison:
    """Run a file of ``export_onnx`` and the model that it was made from on noise from a fixed seed, and on pictures.

    In float16 or bfloat16, an error of some percent is nothing unusual, and a mistake could hide in it. So for these
    the folded network is held against the model in float64 first, and then the file's graph, run in float32, against
    the network with its weights rounded: both leave no room for a mistake.

    Args:
        stock: the model, float32, on the CPU, in eval mode; not changed.
        network: the same from ``folded``, in float64; not changed.
        batches: batch sizes to run.
        images: picture files.

    Raises:
        ValueError: the file is none of ``export_onnx``, or a picture cannot be read.
        VerificationError: results differ in shape or by more than ``error_limit`` allows, or are not finite.
    """
    metadata = metadata_of(onnx.load(path, load_external_data=False))
    precision = precision_of(metadata.precision)
    samples = noise(metadata, batches)
    precise = copy.deepcopy(stock).double()
    peer: nn.Module = stock
    with torch.inference_mode():
        if precision.dtype is not torch.float32:
            peer = rounded(network, precision)
            _check_folding(network, stock, precise, samples)
            _check_arithmetic(Runner(path, precision, exact=True), peer, samples)
        run = _Run(Runner(path, precision), precise, peer, precision, PRECISIONS[metadata.io_dtype])
        errors, torch_error, limit = run.judge(run.results(samples))
        method = run.runner.method
        if not images:
            return Comparison(method, errors, torch_error, limit)
        results = list(run.results(pictures(metadata, images)))
        if not results:
            raise ValueError(f"images has {len(images)} pictures, none of which can be read")
        image_errors, _, image_limit = run.judge(results)
    agreeing = sum((one.found.argmax(1) == one.reference.argmax(1)).sum().item() for one in results)
    count = sum(len(one.found) for one in results)
    return Comparison(
        method, errors, torch_error, limit, count, max(image_errors.values()), image_limit, agreeing / count
    )


@dataclass(frozen=True)
class _Result:
    """The results of one batch, ``[N, classes]``: the file's, float64's and PyTorch's in the file's precision."""

    found: Tensor
    reference: Tensor
    peer: Tensor


@dataclass(frozen=True)
class _Run:
    runner: Runner
    precise: nn.Module
    peer: nn.Module
    precision: Precision
    io: Precision

    def results(self, samples: Iterable[Sample]) -> Iterator[_Result]:
        for sample in samples:
            given = self.runner(sample.fed)
            head = _head_of(self.runner)
            reference = head(self.precise(sample.precise))
            peer = head(self.peer(sample.single.to(self.precision.dtype)).float()).to(self.io.dtype)
            found = next(iter(given.values()))
            check_shape(found, reference)
            check_best(given)
            yield _Result(torch.from_numpy(found).double(), reference, peer.double())

    def judge(self, results: Iterable[_Result]) -> tuple[dict[int, float], float, float]:
        """Errors of the file by batch size, PyTorch's largest, and the limit; VerificationError if one is above it."""
        every = list(results)
        name = f"{'fp32' if self.precision.name == INT8 else self.precision.name} PyTorch"
        torch_error = max(_distance(one.peer, one.reference) for one in every)
        if not math.isfinite(torch_error):
            raise VerificationError(
                f"precision is {self.precision.name!r}, in which {name} itself gives results that are not finite; "
                "expected a model whose activations stay within its range"
            )
        reference = torch.cat([one.reference for one in every])
        if self.precision.name == INT8:
            limit = INT8_LIMIT * reference.abs().max().item()
        else:
            limit = error_limit(torch_error, reference, max(self.precision.eps, self.io.eps))
        errors: dict[int, float] = {}
        for one in every:
            error = _distance(one.found, one.reference)
            _check_error(error, limit, len(one.found), self.runner.method, f" ({name}: {torch_error:.3g})")
            errors[len(one.found)] = max(error, errors.get(len(one.found), 0.0))
        return errors, torch_error, limit


def _check_folding(network: nn.Module, stock: nn.Module, precise: nn.Module, samples: Sequence[Sample]) -> None:
    """The folded network against the model, both in float64.

    What rounding may do there is what it does to the model in float32, less as float64's eps is.
    """
    single, double = (torch.finfo(dtype).eps for dtype in (torch.float32, torch.float64))
    for sample in samples:
        reference = precise(sample.precise)
        torch_error = _distance(stock(sample.single), precise(sample.single.double())) * double / single
        limit = error_limit(torch_error, reference, double)
        error = _distance(network(sample.precise), reference)
        _check_error(error, limit, len(reference), "the folded network in float64", "")


def _check_arithmetic(runner: Runner, peer: nn.Module, samples: Sequence[Sample]) -> None:
    """The file's graph in float32 against PyTorch with the same rounded weights in float64."""
    precise, single = copy.deepcopy(peer).double(), copy.deepcopy(peer).float()
    head = _head_of(runner)
    for sample in samples:
        reference = head(precise(sample.precise))
        torch_error = _distance(head(single(sample.single)), reference)
        given = runner(sample.fed)
        found = next(iter(given.values()))
        check_shape(found, reference)
        error = _distance(torch.from_numpy(found), reference)
        said = f" (float32 PyTorch with the same weights: {torch_error:.3g})"
        _check_error(error, error_limit(torch_error, reference), len(reference), runner.method, said)


def _head_of(runner: Runner) -> Callable[[Tensor], Tensor]:
    """Return what makes the file's first output of logits."""
    return functools.partial(torch.softmax, dim=1) if is_softmax(runner) else lambda logits: logits


def _check_error(error: float, limit: float, batch: int, method: str, said: str) -> None:
    if not error <= limit:  # a NaN fails as well
        raise VerificationError(
            f"{method} is {error:.3g} from float64 PyTorch at batch {batch}, expected at most {limit:.3g}{said}"
        )


def _distance(result: Tensor, reference: Tensor) -> float:
    return (result.double() - reference).abs().max().item()
