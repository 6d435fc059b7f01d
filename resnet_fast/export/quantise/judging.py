"""How far a quantised network is from the float32 one, as a whole and by layer, and which layers to leave out."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Optional

import numpy as np
import onnx_ir as ir
from torch import Tensor

from resnet_fast.export.quantise.calibration import Progress, batch_size, session
from resnet_fast.export.quantise.images import Source


@dataclass(frozen=True)
class Judgement:
    """A quantised network beside the float32 one, on the same images.

    Attributes:
        images: how many.
        logit_error: root mean square of the logits' difference, over that of the float32 logits.
        agreement: share of the images whose first class is the same in both.
        float_accuracy, accuracy: shares whose first class is the label, float32 and quantised; None without labels.
        drop: points of top-1 accuracy lost; without labels, images in a hundred whose first class has changed.
    """

    images: int
    logit_error: float
    agreement: float
    float_accuracy: Optional[float]
    accuracy: Optional[float]
    drop: float


def judge(reference: Any, quantised: Any, source: Source, size: int) -> Judgement:
    """Run two ONNX Runtime sessions on the images of ``source``, ``size`` at a time."""
    images = same = right = float_right = 0
    difference = scale = 0.0
    labelled = True
    for batch, labels in source.batches(size):
        expected, found = (_run(runner, batch) for runner in (reference, quantised))
        difference += float(((found - expected) ** 2).sum())
        scale += float((expected**2).sum())
        first, expected_first = found.argmax(1), expected.argmax(1)
        same += int((first == expected_first).sum())
        if labels is None:
            labelled = False
        else:
            right += int((first == labels.numpy()).sum())
            float_right += int((expected_first == labels.numpy()).sum())
        images += len(batch)
    return Judgement(
        images,
        (difference / scale) ** 0.5 if scale else float(difference > 0),
        same / images,
        float_right / images if labelled else None,
        right / images if labelled else None,
        100 * ((float_right - right) if labelled else (images - same)) / images,
    )


def _run(runner: Any, batch: Tensor) -> np.ndarray:
    (result,) = runner.run(None, {runner.get_inputs()[0].name: batch.numpy()})
    return result.astype(np.float64)


@dataclass(frozen=True)
class Variants:
    """Makes quantised copies of a network.

    Attributes:
        model: the network in float32.
        whole: a copy with all layers quantised but those of the given paths.
        alone: a copy with only the layer of the given path quantised.
        paths: of the layers.
    """

    model: ir.Model
    whole: Callable[[Collection[str]], ir.Model]
    alone: Callable[[str], ir.Model]
    paths: Sequence[str]


def layer_errors(variants: Variants, images: Tensor, progress: Progress) -> dict[str, float]:
    """``Judgement.logit_error`` on ``images [N, C, H, W]`` with each layer quantised alone, by path."""
    batches = images.split(batch_size(variants.model, ()))
    expected = _logits(session(variants.model), batches)
    scale = np.linalg.norm(expected) or 1
    errors = {}
    for count, path in enumerate(variants.paths):
        progress("quantising one layer at a time", count, len(variants.paths))
        found = _logits(session(variants.alone(path)), batches)
        errors[path] = float(np.linalg.norm(found - expected) / scale)
    progress("quantising one layer at a time", len(variants.paths), len(variants.paths))
    return errors


def _logits(runner: Any, batches: Sequence[Tensor]) -> np.ndarray:
    return np.concatenate([_run(runner, batch) for batch in batches])


def choose_fall_back(
    variants: Variants, errors: dict[str, float], source: Source, allowed: float, progress: Progress
) -> tuple[list[str], Judgement]:
    """The fewest layers, of those with the largest ``errors``, to leave out for a drop of at most ``allowed``.

    The number is found by bisection, as if each further layer left out made the drop no larger; that the result keeps
    to ``allowed`` was measured in any case.

    Raises:
        ValueError: the drop is larger even without a single quantised layer.
    """
    reference, size = session(variants.model), batch_size(variants.model, ())
    order = sorted(errors, key=lambda path: errors[path], reverse=True)

    def attempt(count: int) -> Judgement:
        return judge(reference, session(variants.whole(order[:count])), source, size)

    few, many = 0, len(order)
    best = attempt(many)
    if best.drop > allowed:
        raise ValueError(
            f"max_accuracy_drop is {allowed}, but the drop is {best.drop:.3g} even without a quantised layer "
            f"({best.images} images)"
        )
    steps = max(len(order).bit_length(), 1)
    tried = 0
    while many - few > 1:
        progress("looking for layers to leave out", min(tried, steps - 1), steps)
        middle = (few + many) // 2
        judgement = attempt(middle)
        if judgement.drop <= allowed:
            many, best = middle, judgement
        else:
            few = middle
        tried += 1
    progress("looking for layers to leave out", steps, steps)
    return order[:many], best


def held(images: Tensor, labels: Optional[Tensor]) -> Source:
    """Images in memory, as a ``Source``."""
    known = [None] * len(images) if labels is None else labels.tolist()
    return Source(lambda: iter(list(zip(images, known, strict=True))), len(images))
