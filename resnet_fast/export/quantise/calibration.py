"""What values the tensors of a network take: a pass over images in ONNX Runtime that keeps counts, not tensors."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Optional

import onnx_ir as ir
import torch
from torch import Tensor

from resnet_fast.export.graph_edits import copied
from resnet_fast.export.quantise.histogram import Histogram
from resnet_fast.export.quantise.images import Source
from resnet_fast.export.runner import open_session

Progress = Callable[[str, int, Optional[int]], None]
"""Called with what is being done, how much of it is done, and how much there is, if known."""

_BUDGET = 2**27  # bytes of activations at a time
_LARGEST_BATCH = 16
FEW = 128
"""Images that are kept to judge by, where nothing else was given: 77 MB at 224 x 224."""


@dataclass(frozen=True)
class Observed:
    """What a pass over the calibration images showed.

    Attributes:
        histograms: by the name of a value.
        images: how many there were.
        kept: the first of them, ``[128 or less, C, H, W]``, and their labels, if they have any.
        skipped: picture files that could not be read.
    """

    histograms: dict[str, Histogram]
    images: int
    kept: tuple[Tensor, Optional[Tensor]]
    skipped: tuple[str, ...] = ()


def session(model: ir.Model) -> Any:
    """An ONNX Runtime session of ``model`` on the CPU.

    Raises:
        MissingPackageError: ONNX Runtime is not installed.
    """
    return open_session(ir.to_proto(model).SerializeToString(), "the graph to quantise, which")


def observe(model: ir.Model, names: Iterable[str], source: Source, progress: Progress) -> Observed:
    """Run the images of ``source`` through ``model`` and count what its values ``names`` are.

    The memory is that of a batch's activations, about 0.2 GB, or of one image's, if these are more; of the images kept;
    and of 32 KB for each value, however many images there are.

    Raises:
        ValueError: a value that is not finite, or an image that does not fit.
    """
    names = sorted(set(names))
    (images,) = model.graph.inputs
    watched = [name for name in names if name != images.name]
    runner = session(_watching(model, watched))
    histograms = {name: Histogram() for name in names}
    kept: list[tuple[Tensor, Optional[Tensor]]] = []
    count = 0
    progress("calibrating", 0, source.total)
    for batch, labels in source.batches(batch_size(model, watched)):
        if count < FEW:
            kept.append((batch, labels))
        count += len(batch)
        found = dict(zip(watched, runner.run(watched, {images.name: batch.numpy()}), strict=True))
        for name, histogram in histograms.items():
            try:
                histogram.add(found.pop(name, None) if name in found else batch.numpy())
            except ValueError as error:
                raise ValueError(f"the model gives {name} values that are not finite for the calibration") from error
        progress("calibrating", count, source.total)
    return Observed(histograms, count, _joined(kept), tuple(source.skipped))


def _watching(model: ir.Model, names: Sequence[str]) -> ir.Model:
    copy = copied(model)
    values = {value.name: value for node in copy.graph for value in node.outputs}
    outputs = {value.name for value in copy.graph.outputs}
    copy.graph.outputs.extend(values[name] for name in names if name not in outputs)
    return copy


def batch_size(model: ir.Model, names: Sequence[str]) -> int:
    """Return how many images at a time keep the values ``names`` within the budget."""
    values = {value.name: value for node in model.graph for value in node.outputs}
    (images,) = model.graph.inputs
    if images.shape is not None and images.shape[0] == 1:
        return 1  # the graph takes no more
    size = 0
    for name in names:
        extents = [extent for extent in values[name].shape or () if isinstance(extent, int)]
        size += 4 * int(torch.tensor(extents).prod()) if extents else 0
    return max(1, min(_LARGEST_BATCH, _BUDGET // max(size, 1)))


def _joined(parts: list[tuple[Tensor, Optional[Tensor]]]) -> tuple[Tensor, Optional[Tensor]]:
    labels = [part for _, part in parts if part is not None]
    images = torch.cat([part for part, _ in parts])[:FEW]
    return images, torch.cat(labels)[:FEW] if len(labels) == len(parts) else None
