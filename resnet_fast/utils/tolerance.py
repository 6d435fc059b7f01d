"""How far a result may be from float64."""

from torch import Tensor


def error_limit(stock_error: float, reference: Tensor, eps: float = 2.0**-23) -> float:
    """The largest error allowed beside ``stock_error``, PyTorch's own in the same precision; both against float64.

    Twice, because another order of summation and a folded batch norm round elsewhere, not more often, and the largest
    of many rounding errors varies by less than that between two such orders. The floor, 8 eps of the largest result,
    is for outputs so few that PyTorch's largest error may be small by luck: a result that went through a dozen
    roundings lies within it, and no mistake in the arithmetic does.
    """
    return 2 * stock_error + 8 * eps * reference.abs().max().item()
