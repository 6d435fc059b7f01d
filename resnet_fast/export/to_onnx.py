"""A PyTorch classifier as a checked ONNX file."""

import contextlib
import copy
import logging
import os
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional, Union

import onnx
import onnx_ir as ir
import torch
from torch import nn

from resnet_fast.accelerate import restore
from resnet_fast.export.files import replacing
from resnet_fast.export.folding import fold_batch_norm, thaw
from resnet_fast.export.graph import tidy
from resnet_fast.export.metadata import Metadata, gather
from resnet_fast.export.optional import require
from resnet_fast.export.quantise import Images, Method, Progress, Quantisation, Target, check_quantised, quantise
from resnet_fast.export.verification import BATCHES, compare

LOWEST_OPSET = 18
"""What torch.onnx writes whenever less is asked for, with no more than a line in the log."""

_LARGEST_FILE = 2**31 - 1  # bytes: the limit of a protobuf message


@dataclass(frozen=True)
class ExportResult:
    """What ``export_onnx`` wrote.

    Attributes:
        path: the file.
        opset: its opset, read from the file.
        size: its size in bytes.
        op_counts: how often each operator occurs.
        input_size: ``(channels, height, width)``.
        max_errors: largest absolute difference of ONNX Runtime from float64 PyTorch by batch size; empty if not run.
        torch_error: the same of float32 PyTorch; None if not run.
        tolerance: what ``max_errors`` had to stay below; None if not run.
        quantisation: how an int8 file was made; None for other files.
        int8_errors: of an int8 file's logits against float64 PyTorch by batch size, root mean square over root mean
            square; empty if not run.
    """

    path: Path
    opset: int
    size: int
    op_counts: dict[str, int]
    input_size: tuple[int, int, int]
    max_errors: dict[int, float]
    torch_error: Optional[float]
    tolerance: Optional[float]
    quantisation: Optional[Quantisation] = None
    int8_errors: dict[int, float] = field(default_factory=dict)


def export_onnx(
    model: nn.Module,
    path: Union[str, os.PathLike],
    *,
    precision: str = "fp32",
    dynamic_batch: bool = True,
    opset: int = LOWEST_OPSET,
    input_size: Optional[Sequence[int]] = None,
    classes: Optional[Sequence[str]] = None,
    mean: Optional[Sequence[float]] = None,
    std: Optional[Sequence[float]] = None,
    weights: Any = None,
    verify: bool = True,
    calibration: Optional[Images] = None,
    calibration_method: Method = "mse",
    ranges: Optional[Mapping[str, float]] = None,
    target: Target = "tensorrt",
    validation: Optional[Images] = None,
    max_accuracy_drop: Optional[float] = None,
    sensitivity: bool = False,
    progress: Optional[Progress] = None,
) -> ExportResult:
    """Write ``model``, a classifier from torchvision, timm or this package, as a float32 ONNX file of standard ops.

    The file has one input ``input`` ``[batch, channels, height, width]`` and one output ``logits``
    ``[batch, classes]``, both float32; batch norms are folded into the convolutions in float64. The model itself is
    not changed: a copy in eval mode with stock blocks is exported. The file takes its place only after the ONNX
    checker and, with ``verify``, a comparison with float64 PyTorch at batch 1, 2 and 7 have passed.

    Args:
        model: any device; float32 parameters; accelerated or not, in eval or training mode.
        path: the file to write; its folder must exist. An existing file is replaced.
        dynamic_batch: leave the batch size open; otherwise it is 1.
        opset: ONNX opset of the file, 18 or higher.
        input_size: ``(channels, height, width)``; by default what ``weights`` or a timm model's configuration says,
            else 224 x 224 with the first convolution's channels.
        classes: names of the classes, kept in the file's metadata.
        mean, std: per channel, for images in [0, 1], kept in the file's metadata; nothing in the graph normalises.
        weights: a torchvision weights enum member to take ``input_size``, ``classes``, ``mean``, ``std`` from.
        verify: run the file in ONNX Runtime and compare.
        calibration, calibration_method, ranges, target, validation, max_accuracy_drop, sensitivity, progress: of an
            int8 file, see ``quantise``; without ``ranges`` it needs ``calibration``.

    Raises:
        TypeError: ``model`` is no module, or does not map one tensor to one tensor of shape ``[batch, classes]``.
        ValueError: an argument has a value that cannot be exported; the message names it.
        OSError: ``path`` cannot be written.
        MissingPackageError: ``verify`` is set and ONNX Runtime is not installed.
        RuntimeError: PyTorch could not trace the model, or the ONNX file is invalid.
        VerificationError: the file computes something else than the model.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {type(model).__name__}, expected a torch.nn.Module")
    if precision not in ("fp32", "int8"):
        raise ValueError(f"precision is {precision!r}, expected fp32 or int8")
    if not isinstance(opset, int) or isinstance(opset, bool) or opset < LOWEST_OPSET:
        raise ValueError(f"opset is {opset!r}, expected an integer of at least {LOWEST_OPSET}")
    if opset > onnx.defs.onnx_opset_version():
        raise ValueError(
            f"opset is {opset}, expected at most {onnx.defs.onnx_opset_version()}, the newest in this onnx"
        )
    if verify:
        require("onnxruntime", "verifying an export (leave out with verify=False)")
    metadata = gather(model, input_size, classes, mean, std, weights)

    with replacing(path) as temporary:
        stock = _stock_copy(model)
        batches = BATCHES if dynamic_batch else (1,)
        _check_output(stock, metadata)
        program = _convert(stock, metadata, dynamic_batch, opset)
        tidy(program)
        quantised = None
        if precision == "int8":
            quantised = quantise(
                program,
                metadata,
                calibration=calibration,
                calibration_method=calibration_method,
                ranges=ranges,
                target=target,
                validation=validation,
                max_accuracy_drop=max_accuracy_drop,
                sensitivity=sensitivity,
                progress=progress,
            )
            program = quantised.model
        metadata.write(program)
        ir.save(program, temporary)
        op_counts = _check_file(temporary, opset)
        try:
            comparison, int8_errors = None, {}
            if verify and quantised is not None:
                int8_errors = check_quantised(temporary, stock, quantised.examples, batches)
            elif verify:
                comparison = compare(temporary, stock, metadata.input_size, batches)
        except ValueError as error:
            reason = str(error).replace(str(temporary), str(path))
            raise ValueError(f"opset is {opset}, and the file cannot be verified: {reason}") from error
        size = temporary.stat().st_size
    return ExportResult(
        Path(path),
        opset,
        size,
        op_counts,
        metadata.input_size,
        comparison.errors if comparison else {},
        comparison.torch_error if comparison else None,
        comparison.limit if comparison else None,
        None if quantised is None else quantised.report,
        int8_errors,
    )


def _stock_copy(model: nn.Module) -> nn.Module:
    """A copy on the CPU, in eval mode, whose forward is plain PyTorch."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            raise ValueError(f"model has {name} in {tensor.dtype}, expected torch.float32: call model.float() first")
        if tensor.is_meta:
            raise ValueError(f"model has {name} on the meta device, expected values")
    size = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    if size > _LARGEST_FILE:
        raise ValueError(
            f"model has {size / 1e9:.1f} GB of weights, expected less than 2.1 GB, the limit of one ONNX file; "
            "weights in a file beside it are not supported"
        )
    stock = restore(copy.deepcopy(model)).cpu().eval().requires_grad_(False)
    thaw(stock)
    return stock


def _check_output(stock: nn.Module, metadata: Metadata) -> None:
    with torch.inference_mode():
        logits = stock(torch.zeros(1, *metadata.input_size))
    if not isinstance(logits, torch.Tensor) or logits.dim() != 2:
        found = f"shape {list(logits.shape)}" if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise TypeError(f"model gives {found}, expected one tensor of shape [batch, classes]")
    if metadata.classes is not None and len(metadata.classes) != logits.shape[1]:
        raise ValueError(f"classes has {len(metadata.classes)} names, expected {logits.shape[1]}, one per output")


def _convert(stock: nn.Module, metadata: Metadata, dynamic_batch: bool, opset: int) -> ir.Model:
    # torch.export takes a dimension of size 1 for a constant, whatever dynamic_shapes says.
    example = (torch.zeros(2 if dynamic_batch else 1, *metadata.input_size),)
    shapes = ({0: torch.export.Dim("batch")},) if dynamic_batch else None
    with _quiet():
        try:
            traced = torch.export.export(stock, example, dynamic_shapes=shapes).module(check_guards=False)
            fold_batch_norm(traced)
            for module in traced.modules():
                module.training = False  # a traced module has no eval()
            program = torch.onnx.export(
                traced,
                example,
                dynamo=True,
                opset_version=opset,
                dynamic_shapes=shapes,
                input_names=["input"],
                output_names=["logits"],
                verbose=False,
            )
        except Exception as error:
            reason = str(error).strip().splitlines()[0]
            raise RuntimeError(f"PyTorch could not export {type(stock).__name__} to ONNX: {reason}") from error
    assert program is not None
    return program.model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's remarks: a failure is an exception, and what it converted to is checked afterwards."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _check_file(path: Path, opset: int) -> dict[str, int]:
    """Count the operators of the file at ``path``, after checking it; an opset other than ``opset`` is an error."""
    try:
        onnx.checker.check_model(path, full_check=True)
    except onnx.checker.ValidationError as error:
        raise RuntimeError(f"the exported graph is not valid ONNX: {str(error).strip().splitlines()[0]}") from error
    model = onnx.load(path)
    # torch.onnx falls back to another opset when it cannot convert, and says so only in the log.
    found = {item.domain: item.version for item in model.opset_import}
    if found.get("") != opset:
        raise RuntimeError(f"opset is {opset}, but PyTorch could write this model only in opset {found.get('')}")
    return dict(sorted(Counter(node.op_type for node in model.graph.node).items()))
