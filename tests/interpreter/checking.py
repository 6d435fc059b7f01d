"""When a result is right: two tolerances, both with a reason."""

from typing import Optional

import torch

from resnet_fast.kernels.reference import inference as reference

_FLOAT32 = torch.finfo(torch.float32).eps


def double(tensor: Optional[torch.Tensor]) -> Optional[torch.Tensor]:
    return None if tensor is None else tensor.double()


def conv_exact(x, weight, scale, shift, residual, *geometry) -> torch.Tensor:
    """The definition, in float64, on the very inputs of the call (a wider weight is rounded to x's dtype first)."""
    weight = weight.to(x.dtype)
    return reference.conv_bn_act(*map(double, (x, weight, scale, shift, residual)), *geometry)


def conv_tolerance(exact, x, weight, scale, shift, residual, *geometry) -> torch.Tensor:
    """How far each element of a right result may be from ``exact``: a sum over taps and channels, and three terms."""
    *geometry, _ = geometry
    terms = weight[0].numel() + 3
    magnitude = reference.conv_bn_act(
        *(None if t is None else t.double().abs() for t in (x, weight.to(x.dtype), scale, shift, residual)),
        *geometry,
        False,
    )
    return sum_tolerance(exact, x.dtype, terms, magnitude)


def sum_tolerance(exact: torch.Tensor, dtype: torch.dtype, terms: int, magnitude: torch.Tensor) -> torch.Tensor:
    """How far a sum in float32 may be from ``exact``, once it is rounded to ``dtype``.

    The result is rounded once to its dtype: half an ulp, eps / 2 of its value. Before, n ``terms`` are summed in
    float32. Each addition errs by up to eps32 / 2 of a partial sum, and no partial sum exceeds the sum of the terms'
    magnitudes, ``magnitude``. Rounding errors of mixed sign add up like a random walk, to sqrt(n) of one (Higham and
    Mary, 2019, whose bound holds with a constant of about 2 at these sizes).
    """
    return rounding(exact, dtype) + 2 * (_FLOAT32 / 2) * terms**0.5 * magnitude


def rounding(exact: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Half an ulp of ``exact``, at least half the smallest subnormal. (1.001: of the float32 value, not of exact.)"""
    info = torch.finfo(dtype)
    return 1.001 * info.eps / 2 * exact.abs().clamp(min=info.tiny)


def assert_within(actual: torch.Tensor, exact: torch.Tensor, tolerance: torch.Tensor) -> None:
    """Each element within its tolerance; NaN and infinities exactly where ``exact`` has them in the result's dtype."""
    expected = exact.to(actual.dtype)
    finite = expected.isfinite()
    assert actual.shape == exact.shape
    assert torch.equal(actual.isnan(), expected.isnan()), "NaN in other places"
    infinite = expected.isinf()
    assert torch.equal(actual[infinite], expected[infinite]), "infinities in other places"
    excess = (actual.double() - exact).abs()[finite] / tolerance[finite]
    assert excess.numel() == 0 or excess.max() <= 1, f"{excess.max():.3g} times the tolerance"


def assert_as_good_as_pytorch(
    actual: torch.Tensor, pytorch: torch.Tensor, exact: torch.Tensor, roundings: int = 1
) -> None:
    """The largest error is at most twice that of PyTorch's own operators in the same dtype.

    PyTorch's may happen to be tiny on a tiny tensor; a few ``roundings`` of the largest value are always allowed.
    """
    scale = exact.abs().max()
    ours, theirs = ((one.double() - exact).abs().max() / scale for one in (actual, pytorch))
    allowed = max(2 * float(theirs), roundings * torch.finfo(actual.dtype).eps)
    assert ours <= allowed, f"relative error {ours:.2e}, PyTorch's is {theirs:.2e}"
