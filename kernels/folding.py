"""A batch norm's scale and shift folded into a convolution's weight and bias, in the precision of its images."""

from typing import Optional

import torch

# A channel whose largest weight lies in this range keeps the precision of float16 for all weights that matter
# (its smallest normal number is 6.1e-5); running variances far from 1 can push the product outside.
_FLOAT16_SAFE = (2.0**-7, 2.0**15)


def fold(
    weight: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, dtype: torch.dtype
) -> Optional[tuple[torch.Tensor, torch.Tensor]]:
    """``weight * scale`` in channels_last and ``shift``, multiplied in the scale's own precision and cast to ``dtype``.

    None where float16 cannot hold them. weight [K, C/groups, R, S]; scale, shift [K].
    """
    folded = weight.to(scale.dtype) * scale.view(-1, 1, 1, 1)
    if dtype == torch.float16:
        largest = folded.abs().amax((1, 2, 3))
        if ((largest > 0) & ((largest < _FLOAT16_SAFE[0]) | (largest > _FLOAT16_SAFE[1]))).any():
            return None
        if shift.abs().max() > torch.finfo(torch.float16).max:
            return None
    return folded.to(dtype).contiguous(memory_format=torch.channels_last), shift.to(dtype).contiguous()
