"""CPU: oneDNN convolutions with scale, shift, residual and ReLU fused, through the ops that Inductor uses.

The weight is multiplied by the scale in its own precision, cast to the dtype of ``x`` and laid out in oneDNN's blocked
format once, then kept until a source tensor changes.
"""

from typing import Optional

import torch
import torch.nn.functional as F

from resnet_fast.kernels.case import Case
from resnet_fast.kernels.packing import PackCache

Pair = tuple[int, int]

_packs = PackCache()


def supports(case: Case) -> Optional[str]:
    """None if this implementation covers the case, else the reason why not."""
    if case.device != "cpu":
        return f"runs on cpu, not on {case.device}"
    if not torch.backends.mkldnn.is_available() or not torch.backends.mkldnn.enabled:
        return "this PyTorch has no oneDNN, or it is switched off"
    if case.op == "global_avg_pool":
        return None if case.dtype in (torch.float32, torch.bfloat16, torch.float16) else f"no {case.dtype}"
    if case.dtype == torch.float32:
        return None
    if case.dtype == torch.bfloat16:
        return None if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "this CPU has no bfloat16 instructions"
    if case.dtype == torch.float16:
        return None if torch.ops.mkldnn._is_mkldnn_fp16_supported() else "this CPU has no float16 instructions"
    return f"no {case.dtype}"


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
    """See ``reference.conv_bn_act``."""

    def pack() -> tuple[torch.Tensor, torch.Tensor]:
        folded = (weight.detach().to(scale.dtype) * scale.detach().view(-1, 1, 1, 1)).to(x.dtype)
        blocked = torch._C._nn.mkldnn_reorder_conv2d_weight(
            folded.contiguous(memory_format=torch.channels_last).to_mkldnn(), padding, stride, dilation, groups, x.shape
        )
        return blocked, shift.detach().to(x.dtype)

    key = (x.dtype, x.shape, stride, padding, dilation)
    folded, bias = _packs.get((weight, scale, shift), key, pack)
    x = x.contiguous(memory_format=torch.channels_last)
    if residual is None:
        activation = "relu" if relu else "none"
        return torch.ops.mkldnn._convolution_pointwise(
            x, folded, bias, padding, stride, dilation, groups, activation, [], ""
        )
    residual = residual.contiguous(memory_format=torch.channels_last)
    activation = "relu" if relu else None
    return torch.ops.mkldnn._convolution_pointwise.binary(
        x, residual, folded, bias, padding, stride, dilation, groups, "add", None, activation, [], None
    )


def stem(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """See ``reference.stem``."""
    return F.max_pool2d(conv_bn_act(x, weight, scale, shift, None, (2, 2), (3, 3), (1, 1), 1, True), 3, 2, 1)


def global_avg_pool(x: torch.Tensor) -> torch.Tensor:
    """See ``reference.global_avg_pool``."""
    return F.adaptive_avg_pool2d(x.contiguous(memory_format=torch.channels_last), 1)
