"""The fused ops as ``torch.ops.resnet_fast.*``; importing this registers them."""

from resnet_fast.ops import inference, residual_block

__all__ = ["inference", "residual_block"]
