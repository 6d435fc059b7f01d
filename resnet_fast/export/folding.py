"""The plain PyTorch model behind an export, and what is constant in it computed beforehand, in float64.

Folding works on the graph that ``torch.export`` makes, not on the modules: it shows which batch norm follows which
convolution in any model, whatever its blocks are called, and a convolution whose result is used twice is seen as such.
"""

import copy
from typing import Optional

import torch
from torch import Tensor, fx, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize, prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.optim.swa_utils import AveragedModel
from torchvision.ops import FrozenBatchNorm2d

from resnet_fast.accelerated import restore
from resnet_fast.export.constants import argument, is_own_convolution, set_weights, tidy, value_of

_BATCH_NORM = torch.ops.aten.batch_norm.default
_LARGEST_FILE = 2**31 - 1  # bytes: the limit of a protobuf message


def stock_copy(model: nn.Module) -> nn.Module:
    """A copy on the CPU, in eval mode, whose forward is plain PyTorch on plain parameters.

    Raises:
        TypeError: ``model`` is not a module, or one whose code is gone.
        ValueError: a weight is not in float32 or has no values, or they do not fit into one ONNX file.
    """
    model = unwrapped(model)
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
    # Pruned or normalised weights are results of others, which deepcopy refuses to copy.
    results = [value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor)]
    copied = copy.deepcopy(model, {id(tensor): tensor.detach().clone() for tensor in results if not tensor.is_leaf})
    for parent in list(copied.modules()):
        for name, child in list(parent.named_children()):
            if (inner := unwrapped(child)) is not child:
                setattr(parent, name, inner)
    stock = restore(copied).cpu().eval().requires_grad_(False)
    for module in list(stock.modules()):
        _make_weights_plain(module)
    thaw(stock)
    return stock


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside DataParallel, DistributedDataParallel, AveragedModel and ``torch.compile``'s.

    Raises:
        TypeError: ``model`` is not a module, or a scripted one.
    """
    if isinstance(model, (nn.DataParallel, DistributedDataParallel, AveragedModel)):
        return unwrapped(model.module)
    if isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
        return unwrapped(inner)
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError("model is a scripted module, expected the torch.nn.Module that it was made of")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {type(model).__name__}, expected a torch.nn.Module")
    return model


def _make_weights_plain(module: nn.Module) -> None:
    """Put weights that are computed at each call, by a mask or a norm, in place of what they are computed from."""
    for hook in list(module._forward_pre_hooks.values()):
        if isinstance(hook, prune.BasePruningMethod):
            prune.remove(module, hook._tensor_name)
        elif isinstance(hook, WeightNorm):
            nn.utils.remove_weight_norm(module, hook.name)
        elif isinstance(hook, SpectralNorm):
            nn.utils.remove_spectral_norm(module, hook.name)
    for name in list(getattr(module, "parametrizations", ())):
        parametrize.remove_parametrizations(module, name, leave_parametrized=True)


def thaw(model: nn.Module) -> None:
    """Replace every ``FrozenBatchNorm2d`` in ``model`` by the ``BatchNorm2d`` that gives the same in eval mode."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is FrozenBatchNorm2d:
                setattr(parent, name, _thawed(child))


def _thawed(frozen: FrozenBatchNorm2d) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(frozen.weight.numel(), frozen.eps)
    norm.load_state_dict(frozen.state_dict(), strict=False)  # it counts no batches
    return norm.to(frozen.weight.device, frozen.weight.dtype).eval()


def fold_batch_norm(graph_module: fx.GraphModule, dtype: Optional[torch.dtype] = None) -> int:
    """Fold in place; return how many batch norms went. Folded tensors get ``dtype``, by default the weight's own.

    What stays: a batch norm that uses batch statistics, or whose input is no convolution with a plain weight, or is
    used elsewhere too.
    """
    folded = 0
    for node in list(graph_module.graph.nodes):
        if node.op == "call_function" and node.target is _BATCH_NORM and _foldable(node):
            _fold(graph_module, node, dtype)
            folded += 1
    tidy(graph_module)
    return folded


def _foldable(norm: fx.Node) -> bool:
    conv, *tensors, training = norm.args[:6]
    if training or not is_own_convolution(conv):
        return False
    mean, variance = tensors[2:]
    known = (mean, variance, *(tensor for tensor in tensors[:2] if tensor is not None))
    return all(isinstance(tensor, fx.Node) and tensor.op == "get_attr" for tensor in known)


def _fold(graph_module: fx.GraphModule, norm: fx.Node, dtype: Optional[torch.dtype]) -> None:
    conv = norm.args[0]
    assert isinstance(conv, fx.Node)
    weight = value_of(graph_module, conv.args[1])
    bias = value_of(graph_module, argument(conv, 2))
    gamma, beta, mean, variance = (value_of(graph_module, one) for one in norm.args[1:5])
    eps = norm.args[7]
    assert weight is not None
    assert mean is not None
    assert variance is not None
    assert isinstance(eps, float)

    scale = (variance.double() + eps).rsqrt()
    if gamma is not None:
        scale = scale * gamma.double()
    shift = ((0 if bias is None else bias.double()) - mean.double()) * scale
    if beta is not None:
        shift = shift + beta.double()
    new_weight = weight.double() * scale.view(-1, *[1] * (weight.dim() - 1))
    dtype = dtype or weight.dtype
    set_weights(graph_module, conv, new_weight.to(dtype), shift.to(dtype))
    norm.replace_all_uses_with(conv)
    graph_module.graph.erase_node(norm)
