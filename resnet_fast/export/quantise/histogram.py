"""Where to clip a tensor that becomes 8 bits, from counts of its absolute values."""

from collections.abc import Callable

import numpy as np
import torch

METHODS = ("max", "percentile", "entropy", "mse")

_BINS = 4096
_PART = 2**22  # torch.histc counts in float32, exactly up to 2**24
_CANDIDATES = 256  # clipping points that entropy and mse try


class Histogram:
    """Counts of the absolute values of one tensor, and its extremes.

    The bins are of one width, from 0. When a value lies beyond the last, each two neighbours become one, as often as
    needed: so the memory never grows, nothing that was counted moves out of its place, and at least half of the bins
    are in use.

    Attributes:
        counts: ``[4096]``, float64, which hold integers.
        limit: the end of the last bin; 0 until a value other than 0 was seen.
        lowest, highest: of all values, and of 0, which must stay what it is.
    """

    def __init__(self) -> None:
        self.counts = np.zeros(_BINS)
        self.limit = self.lowest = self.highest = 0.0

    @property
    def amax(self) -> float:
        return max(-self.lowest, self.highest)

    def add(self, values: np.ndarray) -> None:
        """Count ``values``, float32 of any shape.

        Raises:
            ValueError: a value is not finite.
        """
        flat = torch.from_numpy(values).flatten()
        if not flat.numel():
            return
        low, high = (extreme.item() for extreme in torch.aminmax(flat))
        if not np.isfinite([low, high]).all():
            raise ValueError("a value is not finite")
        self.lowest, self.highest = min(self.lowest, low), max(self.highest, high)
        if self.amax == 0:
            self.counts[0] += flat.numel()
            return
        self.limit = self.limit or self.amax
        while self.amax > self.limit:
            self.counts = np.concatenate([self.counts.reshape(-1, 2).sum(1), np.zeros(_BINS // 2)])
            self.limit *= 2
        for part in flat.abs().split(_PART):
            self.counts += torch.histc(part, _BINS, 0, self.limit).double().numpy()


def clip_at(histogram: Histogram, method: str, step: Callable[[float], float], percentile: float = 99.99) -> float:
    """The absolute value at which to clip; 0 for a tensor that is 0 throughout.

    Args:
        histogram: of the tensor.
        method: "max": clip nothing. "percentile": what ``percentile`` percent of all values do not exceed.
            "mse": what makes the mean squared error of clipping and rounding smallest. "entropy": what makes the
            Kullback-Leibler divergence of the rounded distribution from the clipped one smallest (S. Migacz, 8-bit
            inference with TensorRT, GTC 2017).
        step: from a clipping point to the distance of two numbers in 8 bits.
        percentile: for the method of that name.
    """
    amax = histogram.amax
    if method == "max" or amax == 0:
        return amax
    choose = {"percentile": _percentile, "mse": _smallest_error, "entropy": _smallest_divergence}[method]
    return min(choose(histogram, step, percentile), amax)


def _percentile(histogram: Histogram, step: Callable[[float], float], percentile: float) -> float:
    shares = np.cumsum(histogram.counts) / histogram.counts.sum()
    # A sum may end a rounding error below 1.
    index = min(int(np.searchsorted(shares, percentile / 100)), _BINS - 1)
    return (index + 1) * histogram.limit / _BINS


def _smallest_error(histogram: Histogram, step: Callable[[float], float], percentile: float) -> float:
    centres = (np.arange(_BINS) + 0.5) * histogram.limit / _BINS
    weights = histogram.counts / histogram.counts.sum()
    points = np.arange(1, _CANDIDATES + 1) * histogram.amax / _CANDIDATES

    def error(point: float) -> float:
        rounded = np.minimum(np.rint(centres / step(point)) * step(point), point)
        return float((weights * (rounded - centres) ** 2).sum())

    return float(min(points, key=error))


def _smallest_divergence(histogram: Histogram, step: Callable[[float], float], percentile: float) -> float:
    width = histogram.limit / _BINS
    counts = histogram.counts.copy()
    # Zeros, most of what a ReLU writes, are exact in 8 bits wherever one clips, but would outweigh all else.
    counts[0] = counts[1]
    used = int(np.ceil(histogram.amax / width))
    best, clip = np.inf, histogram.amax
    for bins in np.unique(np.linspace(0, used, _CANDIDATES + 1).astype(int))[1:]:
        levels = round(bins * width / step(bins * width)) + 1
        if bins < levels:
            continue
        clipped = counts[:bins].copy()
        clipped[-1] += counts[bins:].sum()
        if not clipped.sum():
            continue
        starts = np.arange(levels) * bins // levels
        filled = counts[:bins] > 0
        sizes = np.add.reduceat(filled, starts, dtype=np.int64)
        means = np.add.reduceat(counts[:bins], starts) / np.maximum(sizes, 1)
        rounded = np.where(filled, np.repeat(means, np.diff(np.append(starts, bins))), 0)
        divergence = _divergence(clipped, rounded)
        if divergence < best:
            best, clip = divergence, bins * width
    return clip


def _divergence(counts: np.ndarray, others: np.ndarray) -> float:
    """Kullback-Leibler, in nats; a bin that ``others`` lack counts as if they had a ten-thousandth of an item there."""
    present = counts > 0
    shares = counts[present] / counts.sum()
    other_shares = np.maximum(others[present], 1e-4) / max(others.sum(), 1e-4)
    return float((shares * np.log(shares / other_shares)).sum())
