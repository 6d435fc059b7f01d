"""The plain PyTorch model that stands behind what is exported."""

import copy

import torch
from torch import nn

from resnet_fast.accelerated import restore
from resnet_fast.export.folding import thaw

_LARGEST_FILE = 2**31 - 1  # bytes: the limit of a protobuf message


def stock_copy(model: nn.Module) -> nn.Module:
    """A copy on the CPU, in eval mode, whose forward is plain PyTorch.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: a weight is not in float32 or has no values, or they do not fit into one ONNX file.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {type(model).__name__}, expected a torch.nn.Module")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            raise ValueError(f"model has {name} in {tensor.dtype}, expected torch.float32: call model.float() first")
        if tensor.is_meta:
            raise ValueError(f"model has {name} on the meta device, expected values")
    size = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    if size > _LARGEST_FILE:
        raise ValueError(
            f"model has {size / 1e9:.1f} GB of weights, expected less than 2.1 GB, the limit of one ONNX file; "
            "weights in a file beside it are not supported"
        )
    stock = restore(copy.deepcopy(model)).cpu().eval().requires_grad_(False)
    thaw(stock)
    return stock
