"""Symmetric int8: the scale that stands for a range, and weights with a scale for each output channel."""

import numpy as np
import torch
from torch import Tensor


def scale_of(amax: float) -> float:
    """Return the scale, a float32, of numbers up to ``amax`` as -127 to 127; 1 for a tensor of zeros."""
    # A scale that is no normal number has a reciprocal that is infinite, or too inexact.
    return float(np.float32(max(amax / 127, float(np.finfo(np.float32).tiny)))) if amax else 1.0


def quantised_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight ``[K, ...]`` as int8 from -127 to 127, and its scales ``[K]`` float32, by each channel's largest number.

    The numbers must be finite.
    """
    exact = weight.detach().double()
    scales = torch.tensor([scale_of(amax) for amax in exact.abs().flatten(1).amax(1).tolist()], device=weight.device)
    steps = scales.double().view(-1, *[1] * (exact.dim() - 1))
    return (exact / steps).round_().clamp_(-127, 127).to(torch.int8), scales
