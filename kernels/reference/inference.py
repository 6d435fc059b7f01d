"""The definition of every fused op, in plain PyTorch.

The other implementations (``triton``, ``onednn``) are checked against these functions in float64. They also run
whatever no other implementation covers, on any device that PyTorch knows.

Shapes are those of ``torch.nn.functional.conv2d``: ``x [N, C, H, W]``, ``weight [K, C/groups, R, S]``,
``scale [K]``, ``shift [K]``, ``residual [N, K, P, Q]``. ``weight`` has the dtype of ``x`` or is wider (float32 beside
a half-precision ``x``, as under autocast); ``scale`` and ``shift`` are at least float32. The result has the dtype of
``x`` and lies in ``torch.channels_last``.
"""

from typing import Optional

import torch
import torch.nn.functional as F

from resnet_fast.kernels.contract import Case, Pair, nhwc


def supports(case: Case) -> Optional[str]:
    """None: the definition covers every case."""
    return None


def conv_bn_act(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    residual: Optional[torch.Tensor],
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    relu: bool,
) -> torch.Tensor:
    """``relu(conv2d(x, weight) * scale + shift + residual)``, every step after the convolution in ``scale.dtype``."""
    y = F.conv2d(x, weight.to(x.dtype), None, stride, padding, dilation, groups)
    y = y.to(scale.dtype) * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)
    if residual is not None:
        y = y + residual
    if relu:
        y = F.relu(y)
    return nhwc(y.to(x.dtype))


def conv_chain(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    residual: torch.Tensor,
    next_weight: torch.Tensor,
    next_scale: torch.Tensor,
    next_shift: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The end of a bottleneck and the beginning of the next, two 1x1 convolutions: ``(out, z)``.

    ``out = relu(conv2d(x, weight) * scale + shift + residual)``, rounded to the dtype of x, is the first bottleneck's
    result ``[N, K, H, W]``. ``z = relu(conv2d(out, next_weight) * next_scale + next_shift)`` ``[N, L, H, W]``, with
    next_weight ``[L, K, 1, 1]``, is the second one's after its first convolution.
    """
    pointwise = ((1, 1), (0, 0), (1, 1), 1, True)
    out = conv_bn_act(x, weight, scale, shift, residual, *pointwise)
    return out, conv_bn_act(out, next_weight, next_scale, next_shift, None, *pointwise)


def stem(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """7x7 stride-2 convolution, batch norm, ReLU, 3x3 stride-2 max-pool: ``[N, C, H, W] -> [N, K, H/4, W/4]``."""
    y = conv_bn_act(x, weight, scale, shift, None, (2, 2), (3, 3), (1, 1), 1, True)
    return F.max_pool2d(y, 3, 2, 1)


def global_avg_pool(x: torch.Tensor) -> torch.Tensor:
    """Mean over H and W: ``[N, C, H, W] -> [N, C, 1, 1]``."""
    return nhwc(F.adaptive_avg_pool2d(x, 1))


def head(x: torch.Tensor, weight: torch.Tensor, bias: Optional[torch.Tensor]) -> torch.Tensor:
    """Mean over H and W, rounded to the dtype of x, then a fully connected layer: ``[N, C, H, W] -> [N, K]``.

    ``weight [K, C]``; ``bias [K]``, which like the weight has the dtype of ``x`` or is wider.
    """
    pooled = F.adaptive_avg_pool2d(x, 1).flatten(1)
    return F.linear(pooled, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
