"""CPU: oneDNN convolutions with scale, shift and residual fused, through the ops that Inductor uses.

The weight is multiplied by the scale in its own precision, cast to the dtype of ``x`` and laid out in oneDNN's blocked
format once, then kept until a source tensor changes. The ReLU is a pass of its own, in place: oneDNN's fused one turns
NaN into 0, and on ResNet-18 and ResNet-50 it saved nothing that could be measured.
"""

from typing import Any, Optional

import torch
import torch.nn.functional as F

from resnet_fast.kernels.contract import Case, Pair, nhwc
from resnet_fast.kernels.folding import fold
from resnet_fast.kernels.packing import PackCache
from resnet_fast.kernels.reference import inference as reference
from resnet_fast.utils import compat

_packs = PackCache()


def supports(case: Case) -> Optional[str]:
    """None if this implementation covers the case, else the reason why not."""
    if case.device != "cpu":
        return f"runs on cpu, not on {case.device}"
    if not torch.backends.mkldnn.is_available() or not torch.backends.mkldnn.enabled:
        return "this PyTorch has no oneDNN, or it is switched off"
    if not compat.has_fused_onednn():
        return "this PyTorch has no fused convolutions of oneDNN"
    if case.op == "head":
        return "no more than PyTorch's own operators"
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

    extents = [dilation[i] * (weight.shape[2 + i] - 1) + 1 for i in (0, 1)]
    if dilation != (1, 1) and any(padding[i] >= extents[i] or x.shape[2 + i] < dilation[i] for i in (0, 1)):
        # Some outputs may see no pixel through the dilated kernel: oneDNN follows a wild pointer there, in PyTorch's
        # half-precision convolution as well (2.14).
        wide = x.float().contiguous()
        wide_residual = None if residual is None else residual.float()
        y = reference.conv_bn_act(
            wide, weight.float(), scale, shift, wide_residual, stride, padding, dilation, groups, relu
        )
        return y.to(x.dtype)
    if stride[1] > 1 and x.shape[3] + 2 * padding[1] - extents[1] < stride[1]:
        # A single column of outputs: with a horizontal stride, oneDNN reads past the input, in PyTorch's convolution
        # as well (2.14). Cut to what that column sees, the image gives the same without one.
        x = F.pad(x, (padding[1], max(0, extents[1] - padding[1] - x.shape[3])))[..., : extents[1]]
        stride, padding = (stride[0], 1), (padding[0], 0)
    x = nhwc(x)
    pack = _packs.get(
        (weight,),
        (x.dtype, x.shape, stride, padding, dilation),
        lambda: _pack(x, weight, scale, shift, stride, padding, dilation, groups),
        (scale, shift),
    )
    if pack is None:
        return reference.conv_bn_act(x, weight, scale, shift, residual, stride, padding, dilation, groups, relu)
    geometry = (padding, stride, dilation, groups)
    if residual is None:
        y = torch.ops.mkldnn._convolution_pointwise(x, *pack, *geometry, "none", [], "")
    elif (residual := nhwc(residual)).is_contiguous() and not compat.onednn_adds_flat():
        y = torch.ops.mkldnn._convolution_pointwise(x, *pack, *geometry, "none", [], "").add_(residual)
    else:
        y = torch.ops.mkldnn._convolution_pointwise.binary(x, residual, *pack, *geometry, "add", None, None, [], None)
    return y.relu_() if relu else y


def _pack(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
) -> Optional[tuple[torch.Tensor, torch.Tensor]]:
    """The scaled weight in oneDNN's layout for an input like ``x``, and the bias; None where float16 cannot hold it."""
    folded = fold(weight, scale, shift, x.dtype)
    if folded is None:
        return None
    plain, bias = folded
    reorder: Any = torch._C._nn.mkldnn_reorder_conv2d_weight
    return reorder(plain.to_mkldnn(), padding, stride, dilation, groups, x.shape), bias


def stem(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """See ``reference.stem``."""
    return F.max_pool2d(conv_bn_act(x, weight, scale, shift, None, (2, 2), (3, 3), (1, 1), 1, True), 3, 2, 1)


def global_avg_pool(x: torch.Tensor) -> torch.Tensor:
    """See ``reference.global_avg_pool``."""
    return F.adaptive_avg_pool2d(nhwc(x), 1)
