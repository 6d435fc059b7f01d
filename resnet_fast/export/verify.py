"""What is in an ONNX file, and all that is asked of it before it takes its place, or at any later time."""

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Optional, Union

from torch import nn

from resnet_fast.export import tensorrt as rtx
from resnet_fast.export.compare import Comparison, compare
from resnet_fast.export.file_checks import VerificationError, check_batches, check_file, metadata_of, opset_of
from resnet_fast.export.folding import stock_copy
from resnet_fast.export.metadata import Metadata, channels_of, takes
from resnet_fast.export.precision import folded, precision_of
from resnet_fast.export.quantise import Quantisation
from resnet_fast.export.runner import find_pictures
from resnet_fast.export.tensorrt import EngineError, EngineReport
from resnet_fast.utils.optional import require

BATCHES = (1, 2, 7)
"""One image, the batch that was traced, and a batch that no constant in the graph can happen to match."""


@dataclass(frozen=True)
class ExportResult:
    """What is in an ONNX file of ``export_onnx``, and how it was verified.

    Attributes:
        path: the file.
        precision: of its weights and its arithmetic.
        opset: its opset.
        size: its size in bytes.
        op_counts: how often each operator occurs.
        input_size: ``(channels, height, width)`` of what the network reads.
        method: how it was run; None if it was not.
        max_errors: largest absolute difference of the file from float64 PyTorch by batch size; empty if there was no
            model to compare with.
        torch_error: the same of PyTorch in the file's precision; None if not compared.
        tolerance: what ``max_errors`` had to stay below; None if not compared.
        images: how many pictures were compared as well.
        image_error: as ``max_errors``, on the pictures; None without any.
        top1_agreement: the share of the pictures whose best class is the same as in float64; None without any.
        batch_error: largest difference between an image alone and the same in a batch; None if the file was compared
            with a model, which says more, or not run.
        engine: what TensorRT-RTX built of the file; None if it was not asked.
        quantisation: how an int8 file was made; None for others, and when verified later.
    """

    path: Path
    precision: str
    opset: int
    size: int
    op_counts: dict[str, int]
    input_size: tuple[int, int, int]
    method: Optional[str] = None
    max_errors: dict[int, float] = field(default_factory=dict)
    torch_error: Optional[float] = None
    tolerance: Optional[float] = None
    images: int = 0
    image_error: Optional[float] = None
    top1_agreement: Optional[float] = None
    batch_error: Optional[float] = None
    engine: Optional[EngineReport] = None
    quantisation: Optional[Quantisation] = None


def verify_onnx(
    path: Union[str, os.PathLike],
    model: Optional[nn.Module] = None,
    *,
    images: Union[str, os.PathLike, None] = None,
    tensorrt: Optional[bool] = None,
) -> ExportResult:
    """Repeat for a file of ``export_onnx`` what was asked of it before it took its place.

    ONNX's checker, its opset, ONNX Runtime at batch 1, 2 and 7, and TensorRT-RTX. Without ``model``, results must have
    the right shape, be finite and be the same for an image whatever is in the batch beside it.

    Args:
        path: the file.
        model: what it was made from, as ``export_onnx`` takes it; compared in float64.
        images: a folder of pictures, with subfolders or not, to compare on as well.
        tensorrt: have TensorRT-RTX parse it and build an engine, which takes no GPU; by default where it is installed.

    Raises:
        FileNotFoundError: there is no such file or folder, or no picture in it.
        ValueError: the file is none of ``export_onnx``, ``model`` does not fit it, or ``images`` needs a ``model``.
        MissingPackageError: ONNX Runtime is not installed, or TensorRT-RTX is asked for and is not.
        RuntimeError: the file is not valid ONNX.
        VerificationError: it computes something else than the model, or TensorRT refuses it.
    """
    require("onnxruntime", "verifying an ONNX file")
    files = () if images is None else find_pictures(images)
    if files and model is None:
        raise ValueError(f"images is {str(images)!r}, but model is None, expected what to compare the file with")
    result, metadata, batches = inspect(path)
    if model is None:
        method, batch_error = check_batches(path, batches)
        result = replace(result, method=method, batch_error=batch_error)
    else:
        stock = stock_copy(model)
        channels = channels_of(stock)
        if channels not in (None, metadata.input_size[0]) and not takes(stock, metadata.input_size):
            raise ValueError(f"model reads {channels} channels, expected {metadata.input_size[0]}, as the file does")
        network = folded(stock, metadata.input_size, len(batches) > 1)
        result = compared(result, compare(path, stock, network, batches, files))
    return replace(result, engine=engine_of(path, metadata, tensorrt))


def inspect(
    path: Union[str, os.PathLike], opset: Optional[int] = None
) -> tuple[ExportResult, Metadata, tuple[int, ...]]:
    """Read what the file says, after ONNX's checker has seen it, and the batch sizes to run it with.

    Args:
        opset: what it must be; by default any that its precision admits.
    """
    model, op_counts = check_file(path, opset)
    metadata = metadata_of(model)
    precision, found = precision_of(metadata.precision), opset_of(model)
    if found < precision.lowest_opset:
        raise RuntimeError(f"opset is {found}, expected at least {precision.lowest_opset} for {precision.name}")
    first = model.graph.input[0].type.tensor_type.shape.dim[0]
    result = ExportResult(Path(path), precision.name, found, os.path.getsize(path), op_counts, metadata.input_size)
    return result, metadata, BATCHES if first.dim_param else (first.dim_value,)


def compared(result: ExportResult, comparison: Comparison) -> ExportResult:
    return replace(
        result,
        method=comparison.method,
        max_errors=comparison.errors,
        torch_error=comparison.torch_error,
        tolerance=comparison.limit,
        images=comparison.images,
        image_error=comparison.image_error,
        top1_agreement=comparison.top1_agreement,
    )


def engine_of(path: Union[str, os.PathLike], metadata: Metadata, wanted: Optional[bool]) -> Optional[EngineReport]:
    """Have TensorRT-RTX build the file; None unless ``wanted``, or if that is None, unless it is there and may take it.

    Raises:
        VerificationError: TensorRT refuses it.
    """
    if not (rtx.available() and metadata.target != "cpu" if wanted is None else wanted):
        return None
    size = None
    if metadata.preprocess is not None and (resize := metadata.preprocess.resize) is not None:
        size = (resize, 2 * resize)
    try:
        return rtx.build(path, image_size=size)
    except EngineError as error:
        raise VerificationError(f"{error} (leave TensorRT out with tensorrt=False)") from error
