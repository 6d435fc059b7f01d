"""quantise: from an exported graph in float32 to one in 8 bits, and what is known of it."""

import json
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal, Optional, get_args

import onnx_ir as ir

from resnet_fast.export.graph_edits import copied
from resnet_fast.export.metadata import Metadata
from resnet_fast.export.quantise.calibration import FEW, Observed, Progress, batch_size, observe, session
from resnet_fast.export.quantise.cpu import Range, needs_reduced_range, quantise_for_cpu
from resnet_fast.export.quantise.histogram import METHODS, Histogram, clip_at
from resnet_fast.export.quantise.images import Images, Source, open_images
from resnet_fast.export.quantise.judging import Judgement, Variants, choose_fall_back, held, judge, layer_errors
from resnet_fast.export.quantise.layers import Layer, find_layers
from resnet_fast.export.quantise.placement import place
from resnet_fast.utils.names import Method, Target

TARGETS = get_args(Target)


@dataclass(frozen=True)
class LayerReport:
    """A layer of a quantised file.

    Attributes:
        path: of its module in the PyTorch model.
        precision: "int8", or what it fell back to, "fp16" or "fp32".
        ranges: lowest and highest number that its tensors in 8 bits stand for: "input", and "residual" where it ends
            in a residual Add.
        logit_error: ``Judgement.logit_error`` with only this layer quantised, on at most 128 images; None if that was
            not asked for.
        reason: why it is not in int8.
    """

    path: str
    precision: str
    ranges: dict[str, Range]
    logit_error: Optional[float]
    reason: str = ""


@dataclass(frozen=True)
class Quantisation:
    """What was done to make a file of 8 bits, and how far it is from the network in float32.

    Attributes:
        target: "tensorrt" or "cpu"; "pytorch" of a model that ``resnet_fast.quantize`` gave.
        method: of calibration; None if all ranges were given.
        images: how many the calibration saw.
        skipped: picture files of the calibration that could not be read.
        reduce_range: whether weights have 7 bits.
        judgement: of the whole; None if there were no images to judge by.
        judged_by: "validation" or "calibration": whose images these were; None without.
        layers: in the order of the network.
    """

    target: str
    method: Optional[str]
    images: int
    reduce_range: bool
    judgement: Optional[Judgement]
    judged_by: Optional[str]
    layers: tuple[LayerReport, ...]
    skipped: tuple[str, ...] = ()

    @property
    def fall_back(self) -> tuple[str, ...]:
        """Paths of the layers that are not in 8 bits."""
        return tuple(layer.path for layer in self.layers if layer.precision != "int8")

    @property
    def largest(self) -> dict[str, float]:
        """The largest magnitude of each range by its name, ``layer1.0.conv1.input``: what ``quantise`` takes."""
        return {f"{layer.path}.{name}": high for layer in self.layers for name, (_, high) in layer.ranges.items()}


@dataclass(frozen=True)
class Quantised:
    """The graph in 8 bits, and its report."""

    model: ir.Model
    report: Quantisation


def quantise(
    model: ir.Model,
    metadata: Metadata,
    *,
    calibration: Optional[Images] = None,
    calibration_method: Method = "mse",
    percentile: float = 99.99,
    ranges: Optional[Mapping[str, float]] = None,
    target: Target = "tensorrt",
    validation: Optional[Images] = None,
    max_accuracy_drop: Optional[float] = None,
    sensitivity: bool = False,
    progress: Optional[Progress] = None,
    fall_back: Literal["fp16", "fp32"] = "fp16",
    left_out: Collection[str] = (),
) -> Quantised:
    """A copy of ``model`` in 8 bits.

    Args:
        model: an exported classifier in float32, batch norms folded, from normalised images to logits.
        metadata: of the same model.
        calibration: images from which the ranges of the tensors are measured; see ``open_images``.
        calibration_method: see ``histogram.clip_at``.
        percentile: for the method of that name.
        ranges: largest absolute values by name, ``layer1.0.conv1.input`` or ``layer1.0.conv2.residual``, that go before
            what calibration says. With all of them, the target "tensorrt" needs no calibration.
        target: "tensorrt": signed, symmetric, a residual block's Add in float32. "cpu": what ONNX Runtime's CPU kernels
            are fastest with. Weights then have 7 bits if this machine's processor lacks VNNI, for it would overflow.
        validation: images to judge the result by, best with labels; by default the first 128 of ``calibration``. Gone
            through several times.
        max_accuracy_drop: points of top-1 accuracy that may be lost on ``validation`` if its images have labels, else
            how many images in a hundred may get another first class. Layers that are most sensitive fall back until
            that holds.
        sensitivity: measure the error of each layer by itself, even where nothing has to fall back.
        progress: called as things go on.
        fall_back: what a layer that is not in 8 bits computes in; for the target "cpu" it is float32 in any case.
        left_out: paths of layers that fall back from the start, for the target "tensorrt".

    Raises:
        ValueError: an argument has a value that cannot be; the message names it.
        TypeError: ``calibration`` or ``validation`` is something else than images.
        FileNotFoundError: ``calibration`` or ``validation`` is a path where there are no images.
        MissingPackageError: ONNX Runtime is not installed, and calibration or the target needs it.
    """
    check_choices(target, calibration_method, percentile, max_accuracy_drop)
    layers = find_layers(model.graph)
    if not layers:
        raise ValueError("the model has no convolution and no fully connected layer to quantise")
    ranges = _checked_ranges(ranges or {}, layers)
    kept = [layer for layer in layers if layer.path not in left_out]
    tell = progress or (lambda stage, done, total: None)
    outputs = _outputs(model)
    observed = None
    if calibration is not None:
        source = open_images(calibration, "calibration", metadata, outputs)
        observed = observe(model, _watched(model, kept, target), source, tell)
    judges, judged_by = _judges(validation, observed, metadata, outputs)
    if judges is None and (max_accuracy_drop is not None or sensitivity):
        wanted = "sensitivity" if max_accuracy_drop is None else "max_accuracy_drop"
        raise ValueError(f"calibration and validation are None, expected images, which {wanted} is measured with")

    reduce_range = target == "cpu" and needs_reduced_range()
    histograms = {} if observed is None else observed.histograms
    clip = partial(clip_at, method=calibration_method, percentile=percentile)
    if target == "cpu":
        fall_back = "fp32"
        limits = _limits(histograms, kept, ranges, clip)
        variants = _for_cpu(model, kept, limits, reduce_range)
    else:
        limits = _symmetric_limits(histograms, kept, ranges, clip)
        variants = _for_tensorrt(model, kept, limits, fall_back == "fp16")

    whole, judgement = variants.whole(()), None
    fallen: list[str] = []
    errors: dict[str, float] = {}
    if judges is not None:
        tell("comparing with float32", 0, 1)
        judgement = judge(session(model), session(whole), judges, batch_size(model, ()))
        tell("comparing with float32", 1, 1)
        missed = max_accuracy_drop is not None and judgement.drop > max_accuracy_drop
        if missed or sensitivity:
            few = next(judges.batches(FEW))[0] if observed is None else observed.kept[0]
            errors = layer_errors(variants, few, tell)
        if missed:
            assert max_accuracy_drop is not None
            fallen, judgement = choose_fall_back(variants, errors, judges, max_accuracy_drop, tell)
            whole = variants.whole(fallen)
    reasons = dict.fromkeys(left_out, "was to be left out")
    reasons |= dict.fromkeys(fallen, f"was left out to keep max_accuracy_drop at {max_accuracy_drop}")
    report = Quantisation(
        target,
        None if observed is None else calibration_method,
        0 if observed is None else observed.images,
        reduce_range,
        judgement,
        judged_by,
        tuple(_report(layer, limits, reasons, errors.get(layer.path), target, fall_back) for layer in layers),
        () if observed is None else observed.skipped,
    )
    whole.metadata_props["quantisation"] = json.dumps(
        {
            "target": target,
            "calibration_method": report.method,
            "calibration_images": report.images,
            "reduce_range": reduce_range,
            "fall_back": list(report.fall_back),
        }
    )
    return Quantised(whole, report)


def check_choices(
    target: str, method: str, percentile: float = 99.99, max_accuracy_drop: Optional[float] = None
) -> None:
    """Raises ValueError for what ``quantise`` would refuse of these."""
    for name, value, known in (("target", target, TARGETS), ("calibration_method", method, METHODS)):
        if value not in known:
            raise ValueError(f"{name} is {value!r}, expected {', '.join(known)}")
    if not 0 < percentile <= 100:
        raise ValueError(f"percentile is {percentile}, expected more than 0 and at most 100")
    if max_accuracy_drop is not None and not 0 <= max_accuracy_drop <= 100:
        raise ValueError(f"max_accuracy_drop is {max_accuracy_drop}, expected 0 to 100 points")


def _checked_ranges(ranges: Mapping[str, float], layers: list[Layer]) -> dict[str, float]:
    known = {name for layer in layers for name in layer.range_names}
    for name, amax in ranges.items():
        if name not in known:
            raise ValueError(f"ranges has {name!r}, expected names of this model, as {sorted(known)[0]!r}")
        if not (math.isfinite(amax) and amax >= 0):
            raise ValueError(f"ranges has {amax} for {name!r}, expected a finite number, 0 or more")
    return {name: float(amax) for name, amax in ranges.items()}


def _outputs(model: ir.Model) -> int:
    (logits,) = model.graph.outputs
    assert logits.shape is not None
    count = logits.shape[-1]
    assert isinstance(count, int)
    return count


def _watched(model: ir.Model, layers: list[Layer], target: str) -> list[str]:
    """The values whose ranges the target needs."""
    if target == "tensorrt":
        return [value for layer in layers for value in layer.range_names.values()]
    outputs = [str(value.name) for node in model.graph for value in node.outputs if value.dtype == ir.DataType.FLOAT]
    return [*(str(value.name) for value in model.graph.inputs), *outputs]


def _judges(
    validation: Optional[Images], observed: Optional[Observed], metadata: Metadata, outputs: int
) -> tuple[Optional[Source], Optional[str]]:
    if validation is not None:
        source = open_images(validation, "validation", metadata, outputs)
        if not source.again:
            raise TypeError("validation is an iterator, expected what can be gone through more than once, as a list")
        return source, "validation"
    if observed is not None:
        return held(*observed.kept), "calibration"
    return None, None


def _symmetric_limits(
    histograms: Mapping[str, Histogram], layers: list[Layer], ranges: Mapping[str, float], clip: Callable[..., float]
) -> dict[str, Range]:
    """Return the limits for TensorRT by the names of ranges."""
    clips = {name: clip(histogram, step=lambda point: point / 127) for name, histogram in histograms.items()}
    found = {}
    for layer in layers:
        for name, value in layer.range_names.items():
            amax = ranges.get(name, clips.get(value))
            if amax is None:
                raise ValueError(f"ranges has no {name!r} and calibration is None, expected one of them")
            found[name] = (-amax, amax)
    return found


def _limits(
    histograms: Mapping[str, Histogram], layers: list[Layer], ranges: Mapping[str, float], clip: Callable[..., float]
) -> dict[str, Range]:
    """Return the limits for a CPU by the names of values; of several given ranges for one value, the largest counts."""
    if not histograms:
        raise ValueError(
            "calibration is None, expected images: the target 'cpu' has tensors in 8 bits that ranges does not name"
        )
    given: dict[str, float] = {}
    for layer in layers:
        for name, value in layer.range_names.items():
            if name in ranges:
                given[value] = max(given.get(value, 0), ranges[name])
    found = {}
    for value, histogram in histograms.items():
        low, high = histogram.lowest, histogram.highest

        def step(point: float, low: float = low, high: float = high) -> float:
            return (min(high, point) - max(low, -point)) / 255

        amax = given.get(value, clip(histogram, step=step))
        found[value] = (max(low, -amax), min(high, amax))
    return found


def _for_tensorrt(model: ir.Model, layers: list[Layer], limits: Mapping[str, Range], halve: bool) -> Variants:
    amax = {name: high for name, (_, high) in limits.items()}
    by_path = {layer.path: layer for layer in layers}

    def whole(left_out: Collection[str]) -> ir.Model:
        copy = copied(model)
        placed = layers if halve else [layer for layer in layers if layer.path not in left_out]
        place(copy, placed, amax, left_out if halve else ())
        return copy

    def alone(path: str) -> ir.Model:
        copy = copied(model)
        place(copy, [by_path[path]], amax)
        return copy

    return Variants(model, whole, alone, list(by_path))


def _for_cpu(model: ir.Model, layers: list[Layer], limits: Mapping[str, Range], reduce_range: bool) -> Variants:
    nodes = {layer.path: layer.node for layer in layers}

    def whole(left_out: Collection[str]) -> ir.Model:
        return quantise_for_cpu(model, limits, reduce_range, without=[nodes[path] for path in left_out])

    def alone(path: str) -> ir.Model:
        return quantise_for_cpu(model, limits, reduce_range, only=[nodes[path]])

    return Variants(model, whole, alone, list(nodes))


def _report(
    layer: Layer,
    limits: Mapping[str, Range],
    reasons: Mapping[str, str],
    error: Optional[float],
    target: str,
    fall_back: str,
) -> LayerReport:
    if layer.path in reasons:
        return LayerReport(layer.path, fall_back, {}, error, reasons[layer.path])
    ranges = {
        name.rpartition(".")[2]: limits[value if target == "cpu" else name] for name, value in layer.range_names.items()
    }
    return LayerReport(layer.path, "int8", ranges, error)
