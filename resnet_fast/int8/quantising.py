"""``quantize(model, images)``: from a model in float32 to one that runs in int8, in PyTorch."""

import copy
import logging
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, Literal, Optional, TypeVar, Union, get_args

import numpy as np
import torch
from torch import Tensor, nn

from resnet_fast.accelerated import accelerate
from resnet_fast.export.folding import stock_copy, unwrapped
from resnet_fast.export.metadata import Metadata, gather
from resnet_fast.export.precision import INT8, precision_of
from resnet_fast.export.quantise import Images, Method, Progress, Quantisation, check_choices, open_images
from resnet_fast.export.quantise import quantise as quantise_graph
from resnet_fast.export.quantise.judging import Judgement
from resnet_fast.export.quantise.pipeline import LayerReport
from resnet_fast.export.to_onnx import check_output, to_graph
from resnet_fast.graph import ranges as kept
from resnet_fast.graph.ranges import Ranges
from resnet_fast.layer_precisions import layer_precisions
from resnet_fast.utils.modules import check_module

logger = logging.getLogger(__name__)

M = TypeVar("M", bound=nn.Module)

Dtype = Literal["int8"]
"""What ``quantize`` knows: fp8 has kernels for GPUs alone, and no calibration."""


def quantize(
    model: M,
    calibration: Optional[Images] = None,
    *,
    dtype: Dtype = "int8",
    ranges: Union[Mapping[str, float], Quantisation, None] = None,
    calibration_method: Method = "mse",
    validation: Optional[Images] = None,
    max_accuracy_drop: Optional[float] = None,
    sensitivity: bool = False,
    input_size: Optional[Sequence[int]] = None,
    mean: Optional[Sequence[float]] = None,
    std: Optional[Sequence[float]] = None,
    weights: Any = None,
    progress: Optional[Progress] = None,
    inplace: bool = False,
) -> M:
    """Return an accelerated model that runs in int8 wherever the accelerated one is fused.

    It has the same modules, parameters, buffers and state_dict keys, is in eval mode, and its parameters are frozen.
    Images stay float32 at its input and output. The ranges, and which layers are left out, are what
    ``export_onnx(precision="int8")`` finds with the same arguments. In training mode, under autocast, with hooks, or
    where a gradient is wanted, it runs as the accelerated float32 model does; ``explain(model)`` says which layers run
    in int8, with which ranges, why the others do not, and what the last call ran as. After a change of its weights they
    are quantised again; the ranges stay.

    Args:
        model: a classifier from torchvision, timm, this package or your own, float32, in eval mode.
        calibration: images to measure the ranges on: a folder, a file of tensors, a tensor ``[N, C, H, W]``, a data set
            or a DataLoader; some hundred will do.
        dtype: "int8".
        ranges: in place of calibration, or for some tensors before it: largest magnitudes by name, as
            ``finetune --qat`` and ``quantisation_of(model).largest`` give them, or the report of an export for TensorRT
            or of another quantised model, whose left out layers are left out again.
        calibration_method: "mse", "entropy", "percentile" or "max": where a range ends.
        validation: images to judge by, best with labels; by default the first 128 of ``calibration``.
        max_accuracy_drop: points of top-1 accuracy that may be lost; the most sensitive layers stay in float32 until
            that holds.
        sensitivity: measure the error of each layer by itself, for the report.
        input_size: ``(channels, height, width)`` of the images, by default what a tensor or a data set has, else what
            ``weights`` or a timm model's configuration says, else 224 x 224. The model takes others as well.
        mean, std: per channel, for pictures of bytes.
        weights: a torchvision weights enum member, or a checkpoint of ``resnet-fast finetune``, to take ``input_size``,
            ``mean`` and ``std`` from.
        progress: called as things go on.
        inplace: change ``model`` itself; otherwise it stays as it is. A wrapper, as DataParallel's, is taken off.

    Raises:
        TypeError: ``model`` is not a module, or no classifier; or images are none.
        ValueError: an argument has a value that cannot be; the message names it. The model is unchanged.
        FileNotFoundError: there are no images where ``calibration`` or ``validation`` points.
        RuntimeError: PyTorch could not trace the model.
        MissingPackageError: ONNX Runtime, which calibration runs in, is not installed.
    """
    check_module(model)
    plain: Any = unwrapped(model)
    _check(plain, calibration, dtype, ranges)
    check_choices("tensorrt", calibration_method, max_accuracy_drop=max_accuracy_drop)
    report = ranges if isinstance(ranges, Quantisation) else None
    stock = stock_copy(plain)
    metadata = gather(plain, input_size or _size_of(calibration), None, mean, std, weights)
    count = check_output(stock, metadata)
    if calibration is not None:
        calibration = open_images(calibration, "calibration", metadata, count)
    if validation is not None:
        validation = open_images(validation, "validation", metadata, count)
    precision = precision_of(INT8)
    _, graph = to_graph(stock, metadata, precision, precision.lowest_opset)
    found = quantise_graph(
        graph,
        metadata,
        calibration=calibration,
        calibration_method=calibration_method,
        ranges=report.largest if report is not None else ranges,  # type: ignore[arg-type]
        validation=validation,
        max_accuracy_drop=max_accuracy_drop,
        sensitivity=sensitivity,
        progress=progress,
        fall_back="fp32",
        left_out=() if report is None else report.fall_back,
    ).report
    layers = tuple(_fitted(layer, plain, found) for layer in found.layers)
    quantised = plain if inplace else copy.deepcopy(plain)
    apply(quantised, replace(found, target="pytorch", layers=layers))
    _try(quantised, metadata)
    return quantised


def _check(model: nn.Module, calibration: Any, dtype: str, ranges: Any) -> None:
    if dtype not in get_args(Dtype):
        raise ValueError(f"dtype is {dtype!r}, expected {', '.join(map(repr, get_args(Dtype)))}")
    training = next((name for name, module in model.named_modules() if module.training), None)
    if training is not None:
        where = f"has {training!r}" if training else "is"
        raise ValueError(f"model {where} in training mode, expected eval mode: call model.eval() first")
    if calibration is None and not ranges:
        raise ValueError("calibration is None and ranges is None, expected images to measure ranges on, or the ranges")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point() and not tensor.is_meta and not bool(tensor.isfinite().all()):
            raise ValueError(f"model has NaN or infinity in {name}, expected finite numbers")
    if isinstance(ranges, Mapping):
        for name, amax in ranges.items():
            number = isinstance(amax, (int, float)) and not isinstance(amax, bool)
            if not (number and math.isfinite(amax) and amax > 0):
                raise ValueError(f"ranges has {amax!r} for {name!r}, expected a finite number above 0")
    elif isinstance(ranges, Quantisation):
        if ranges.target == "cpu":
            raise ValueError("ranges is the report of an export for 'cpu', expected one of symmetric ranges")
        unknown = next((path for path in ranges.fall_back if layer_at(model, path) is None), None)
        if unknown is not None:
            raise ValueError(f"ranges leaves out {unknown!r}, expected a layer of this model")
    elif ranges is not None:
        raise TypeError(f"ranges is a {type(ranges).__name__}, expected names and numbers, or a report of them")


def _size_of(images: Any) -> Optional[tuple[int, ...]]:
    """What a tensor of images has, or the first of a data set, also behind a DataLoader."""
    first = getattr(images, "dataset", images)
    sized = not isinstance(first, (str, os.PathLike, Tensor, np.ndarray)) and hasattr(first, "__len__")
    if sized and hasattr(first, "__getitem__") and len(first):
        first = first[0]
        first = first[0] if isinstance(first, (tuple, list)) and first else first
    shape = getattr(first, "shape", ())
    return tuple(shape[-3:]) if len(shape) in (3, 4) else None


# --- layers -----------------------------------------------------------------------------------------------------------


def layer_at(model: nn.Module, path: str) -> Optional[nn.Module]:
    try:
        layer = model.get_submodule(path)
    except AttributeError:
        return None
    return layer if isinstance(layer, (nn.Conv2d, nn.Linear)) else None


def _fitted(layer: LayerReport, model: nn.Module, report: Quantisation) -> LayerReport:
    """The layer in float32, with the reason, where it cannot be in int8."""
    if layer.precision != "int8":
        return layer
    dead = next((name for name, (_, high) in layer.ranges.items() if high == 0), None)
    others = {one.path for one in report.layers} - {layer.path}
    if dead is not None:
        reason = f"its {dead} was 0 on every calibration image, expected other numbers to take a range from"
    elif any(other.startswith(f"{layer.path}.") for other in others) or layer.path.rpartition(".")[0] in others:
        reason = "is called more than once, expected once"
    elif layer_at(model, layer.path) is None:
        reason = "is no Conv2d or Linear of the model by that name"
    else:
        return layer
    return replace(layer, precision="fp32", ranges={}, reason=reason)


def apply(model: nn.Module, report: Quantisation) -> None:
    """Accelerate ``model`` and give its layers the ranges of ``report``, which are known to fit."""
    model.eval().requires_grad_(False)
    layers = {
        layer.path: Ranges(*(layer.ranges[name][1] for name in ("input", "residual") if name in layer.ranges))
        for layer in report.layers
        if layer.precision == "int8"
    }
    accelerate(model)
    kept.quantise(model, layers, asdict(report))


def quantisation_of(model: nn.Module) -> Quantisation:
    """Return what was done to quantise a model: ranges, layers in float32 and why, errors.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``.
        ValueError: it is not quantised.
    """
    check_module(model)
    about = kept.description(unwrapped(model))
    if about is None:
        raise ValueError(f"model is a {type(model).__name__} that is not quantised, expected what quantize(...) gave")
    return report_of(about)


def report_of(about: Mapping[str, Any]) -> Quantisation:
    """The report that ``about`` is, as a dict.

    Raises:
        TypeError, KeyError: it is something else.
    """
    layers = tuple(
        LayerReport(**{**layer, "ranges": {name: tuple(ends) for name, ends in layer["ranges"].items()}})
        for layer in about["layers"]
    )
    judgement = about["judgement"]
    rest = {"layers": layers, "skipped": tuple(about["skipped"])}
    return Quantisation(**{**about, **rest, "judgement": None if judgement is None else Judgement(**judgement)})


def _try(model: nn.Module, metadata: Metadata) -> None:
    """Call the model once, and tell which layers are not in int8, and why."""
    parameter = next(model.parameters())
    with torch.no_grad():
        model(torch.zeros(1, *metadata.input_size, device=parameter.device))
    missed = [f"{layer.path} ({layer.reason})" for layer in layer_precisions(model) if layer.precision != "int8"]
    if missed:
        logger.warning("%d layers are not in int8: %s", len(missed), "; ".join(missed))
