"""The fused ops, ``torch.ops.resnet_fast.*``: importing this registers them."""

from resnet_fast.ops import inference, quantised, residual_block
from resnet_fast.ops.dispatch import IMPLEMENTATIONS, QUANTISED, TRAINING, chained, implementation_for

__all__ = [
    "IMPLEMENTATIONS",
    "QUANTISED",
    "TRAINING",
    "chained",
    "implementation_for",
    "inference",
    "quantised",
    "residual_block",
]
