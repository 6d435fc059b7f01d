"""A PyTorch classifier as a checked ONNX file."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Optional, Union

import onnx
import onnx_ir as ir
import torch
from torch import fx, nn

from resnet_fast.export.compare import compare
from resnet_fast.export.file_checks import VerificationError
from resnet_fast.export.folding import stock_copy
from resnet_fast.export.graph_edits import attach_input, attach_outputs, tidy
from resnet_fast.export.metadata import Metadata, gather
from resnet_fast.export.precision import (
    INT8,
    IO,
    PRECISIONS,
    Precision,
    batch_shapes,
    example_input,
    explained,
    folded,
    precision_of,
    quiet,
    rounded,
)
from resnet_fast.export.preprocessing import Preprocess, attach_preprocessing
from resnet_fast.export.quantise import Images, Method, Progress, Target, check_choices, open_images, quantise
from resnet_fast.export.runner import find_pictures
from resnet_fast.export.verify import ExportResult, compared, engine_of, inspect
from resnet_fast.utils.errors import first_line
from resnet_fast.utils.files import replacing
from resnet_fast.utils.names import IoDtype, PrecisionName
from resnet_fast.utils.optional import require


def export_onnx(
    model: nn.Module,
    path: Union[str, os.PathLike],
    *,
    precision: PrecisionName = "fp32",
    io_dtype: Optional[IoDtype] = None,
    preprocess: Union[bool, Literal["normalise"], Preprocess] = False,
    softmax: bool = False,
    top_k: Optional[int] = None,
    dynamic_batch: bool = True,
    opset: Optional[int] = None,
    input_size: Optional[Sequence[int]] = None,
    classes: Optional[Sequence[str]] = None,
    mean: Optional[Sequence[float]] = None,
    std: Optional[Sequence[float]] = None,
    weights: Any = None,
    verify: bool = True,
    images: Union[str, os.PathLike, None] = None,
    tensorrt: Optional[bool] = None,
    calibration: Optional[Images] = None,
    calibration_method: Method = "mse",
    ranges: Optional[Mapping[str, float]] = None,
    target: Target = "tensorrt",
    validation: Optional[Images] = None,
    max_accuracy_drop: Optional[float] = None,
    sensitivity: bool = False,
    progress: Optional[Progress] = None,
) -> ExportResult:
    """Write ``model``, a classifier from torchvision, timm or this package, as an ONNX file of standard operators.

    The file has one input ``input`` ``[batch, channels, height, width]`` and one output ``logits``
    ``[batch, classes]``; batch norms are folded into the convolutions in float64, and what results is rounded once to
    the precision. The model itself is not changed: a copy in eval mode with stock blocks is exported. The file takes
    its place only after the ONNX checker and, with ``verify``, a comparison with float64 PyTorch at batch 1, 2 and 7
    have passed, and TensorRT-RTX has built an engine of it. ``verify_onnx`` repeats all that.

    Args:
        model: any device; float32 parameters; accelerated or not, in eval or training mode; pruned; in DataParallel or
            compiled, which is taken off; but not scripted.
        path: the file to write; its folder must exist. An existing file is replaced.
        precision: "fp32", "fp16" or "bf16": of the weights and of all arithmetic but preprocessing and softmax. "int8":
            convolutions and the last layer in 8 bits, with QuantizeLinear and DequantizeLinear, the rest in float32.
        io_dtype: "fp32" (the default) or "fp16": what the file takes, unless it takes pictures, and gives.
        preprocess: have the graph take pictures of bytes, an input ``image`` uint8
            ``[batch, height, width, channels]``: True for any size, resized, cropped and normalised as ``weights`` or a
            timm model's configuration says, else as torchvision's presets are; "normalise" for pictures of the
            network's size; or a ``Preprocess``.
        softmax: give ``probabilities`` in place of ``logits``.
        top_k: also give the largest ``scores`` ``[batch, top_k]`` and their ``classes`` (int64).
        dynamic_batch: leave the batch size open; otherwise it is 1.
        opset: ONNX opset of the file: 18 or higher, for bf16 22 or higher; by default the lowest.
        input_size: ``(channels, height, width)``; by default what ``weights`` or a timm model's configuration says,
            else 224 x 224 with the first convolution's channels.
        classes: names of the classes, kept in the file's metadata.
        mean, std: per channel, for images in [0, 1], kept in the file's metadata. Nothing in the graph normalises
            unless ``preprocess`` is set.
        weights: a torchvision weights enum member, or a checkpoint of ``resnet-fast finetune`` (its path), to take
            ``input_size``, ``classes``, ``mean``, ``std`` and how to resize from.
        verify: run the file in ONNX Runtime and compare, and ask TensorRT-RTX.
        images: a folder of pictures, with subfolders or not, to compare on as well.
        tensorrt: have TensorRT-RTX parse the file and build an engine, which takes no GPU; by default where it is
            installed, but for an int8 file made for a CPU.
        calibration, calibration_method, ranges, target, validation, max_accuracy_drop, sensitivity, progress: of an
            int8 file, see ``quantise``. It needs ``calibration`` or ``ranges``.

    Raises:
        TypeError: ``model`` is not a module, or does not map one tensor to one tensor of shape ``[batch, classes]``.
        ValueError: an argument has a value that cannot be exported, or a weight is too large for ``precision``; the
            message names it.
        OSError: ``path`` cannot be written, or there are no ``images``.
        MissingPackageError: ``verify`` is set and ONNX Runtime is not installed, or TensorRT-RTX is asked for and is
            not.
        RuntimeError: PyTorch could not trace the model, or the ONNX file is invalid.
        VerificationError: the file computes something else than the model, or TensorRT refuses it.
    """
    stock = stock_copy(model)
    kind = precision_of(precision)
    opset = _checked_opset(opset, kind)
    if io_dtype is None:
        io_dtype = "fp32"
    if io_dtype not in IO:
        raise ValueError(f"io_dtype is {io_dtype!r}, expected one of {', '.join(IO)}")
    if verify:
        require("onnxruntime", "verifying an export (leave out with verify=False)")
    elif images is not None or tensorrt:
        raise ValueError(f"verify is False, expected True with images {images!r} or tensorrt {tensorrt!r}")
    if (calibration is not None or ranges is not None) and precision != INT8:
        raise ValueError(f"precision is {precision!r}, expected 'int8' with calibration or ranges")
    if precision == INT8:
        check_choices(target, calibration_method, max_accuracy_drop=max_accuracy_drop)
        if calibration is None and (target == "cpu" or not ranges):
            also = "" if target == "cpu" else ", or ranges"
            raise ValueError(f"precision is 'int8' and calibration is None, expected images to measure ranges on{also}")
    files = () if images is None else find_pictures(images)
    metadata = gather(model, input_size, classes, mean, std, weights)
    metadata = dataclasses.replace(
        metadata,
        precision=precision,
        io_dtype=io_dtype,
        preprocess=_preprocess(preprocess, metadata),
        target=target if precision == INT8 else None,
    )

    with replacing(path) as temporary:
        count = check_output(stock, metadata, top_k)
        # What is wrong with images is said before the work.
        if calibration is not None:
            calibration = open_images(calibration, "calibration", metadata, count)
        if validation is not None and precision == INT8:
            validation = open_images(validation, "validation", metadata, count)
        network, program = to_graph(stock, metadata, kind, opset, dynamic_batch)
        quantisation = None
        if precision == INT8:
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
            program, quantisation = quantised.model, quantised.report
        attach_outputs(program, PRECISIONS[io_dtype].onnx, softmax, top_k)
        attach_input(program, ir.DataType.FLOAT if metadata.preprocess else PRECISIONS[io_dtype].onnx)
        if metadata.preprocess:
            attach_preprocessing(program, metadata.preprocess)
        metadata.write(program)
        ir.save(program, temporary)
        result, _, batches = inspect(temporary, opset)
        if verify:
            try:
                result = compared(result, compare(temporary, stock, network, batches, files))
                result = dataclasses.replace(result, engine=engine_of(temporary, metadata, tensorrt))
            except (ValueError, VerificationError) as error:
                raise type(error)(str(error).replace(str(temporary), str(path))) from error
    return dataclasses.replace(result, path=Path(path), quantisation=quantisation)


def _checked_opset(opset: Optional[int], precision: Precision) -> int:
    lowest, newest = precision.lowest_opset, onnx.defs.onnx_opset_version()
    if opset is None:
        return lowest
    if not isinstance(opset, int) or isinstance(opset, bool) or opset < lowest:
        raise ValueError(f"opset is {opset!r}, expected an integer of at least {lowest} for {precision.name}")
    if opset > newest:
        raise ValueError(f"opset is {opset}, expected at most {newest}, the newest in this onnx")
    return opset


def _preprocess(wanted: Union[bool, str, Preprocess], metadata: Metadata) -> Optional[Preprocess]:
    if wanted is False:
        return None
    if wanted is True or wanted == "normalise":
        return metadata.preprocessing(resize=wanted is True)
    if not isinstance(wanted, Preprocess):
        raise ValueError(f"preprocess is {wanted!r}, expected False, True, 'normalise' or a Preprocess")
    if (len(wanted.mean), *wanted.crop) != metadata.input_size:
        raise ValueError(
            f"preprocess gives {(len(wanted.mean), *wanted.crop)}, expected input_size {metadata.input_size}"
        )
    return wanted


def check_output(stock: nn.Module, metadata: Metadata, top_k: Optional[int] = None) -> int:
    """How many classes the model has.

    Raises:
        ValueError: ``metadata`` or ``top_k`` does not fit the model.
        TypeError: it is no classifier.
    """
    try:
        with torch.inference_mode():
            logits = stock(torch.zeros(1, *metadata.input_size))
    except Exception as error:  # whatever a forward raises
        raise ValueError(
            f"input_size is {metadata.input_size}, of which {type(stock).__name__} computes nothing: "
            f"{first_line(error)}"
        ) from error
    if not isinstance(logits, torch.Tensor) or logits.dim() != 2:
        found = f"shape {list(logits.shape)}" if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise TypeError(f"model gives {found}, expected one tensor of shape [batch, classes]")
    count = logits.shape[1]
    if metadata.classes is not None and len(metadata.classes) != count:
        raise ValueError(f"classes has {len(metadata.classes)} names, expected {count}, one per output")
    if top_k is not None and (not isinstance(top_k, int) or isinstance(top_k, bool) or not 1 <= top_k <= count):
        raise ValueError(f"top_k is {top_k!r}, expected an integer from 1 to {count}, the number of classes")
    return count


def to_graph(
    stock: nn.Module, metadata: Metadata, precision: Precision, opset: int, dynamic_batch: bool = True
) -> tuple[fx.GraphModule, ir.Model]:
    """The network of ``stock`` with its batch norms folded, in float64, and as an ONNX graph in ``precision``.

    Raises:
        RuntimeError: PyTorch could not trace the model.
        ValueError: a weight is too large for ``precision``.
    """
    network = folded(stock, metadata.input_size, dynamic_batch)
    program = _convert(rounded(network, precision), stock, metadata, precision, dynamic_batch, opset)
    tidy(program)
    return network, program


def _convert(
    network: fx.GraphModule,
    stock: nn.Module,
    metadata: Metadata,
    precision: Precision,
    dynamic_batch: bool,
    opset: int,
) -> ir.Model:
    with quiet(), explained(stock):
        program = torch.onnx.export(
            network,
            (example_input(metadata.input_size, dynamic_batch).to(precision.dtype),),
            dynamo=True,
            opset_version=opset,
            dynamic_shapes=batch_shapes(dynamic_batch),
            input_names=["input"],
            output_names=["logits"],
            verbose=False,
        )
    assert program is not None
    return program.model
