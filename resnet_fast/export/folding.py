"""The plain PyTorch model behind an export, and its batch norms folded into the convolutions before them, in float64.

Folding works on the graph that ``torch.export`` makes, not on the modules: it shows which batch norm follows which
convolution in any model, whatever its blocks are called, and a convolution whose result is used twice is seen as such.
"""

import copy
from typing import Any, Optional

import torch
from torch import Tensor, fx, nn
from torchvision.ops import FrozenBatchNorm2d

from resnet_fast.accelerated import restore

_CONVOLUTIONS = (torch.ops.aten.conv2d.default, torch.ops.aten.conv2d.padding)
_BATCH_NORM = torch.ops.aten.batch_norm.default
_LARGEST_FILE = 2**31 - 1  # bytes: the limit of a protobuf message


def stock_copy(model: nn.Module) -> nn.Module:
    """A copy on the CPU, in eval mode, whose forward is plain PyTorch.

    Raises:
        TypeError: ``model`` is not a module.
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
    graph_module.graph.eliminate_dead_code()
    graph_module.delete_all_unused_submodules()
    graph_module.recompile()
    return folded


def _foldable(norm: fx.Node) -> bool:
    conv, *tensors, training = norm.args[:6]
    if training or not isinstance(conv, fx.Node) or conv.target not in _CONVOLUTIONS or len(conv.users) > 1:
        return False
    mean, variance = tensors[2:]
    weight, bias = conv.args[1], _argument(conv, 2)
    known = (weight, mean, variance, *(tensor for tensor in (bias, *tensors[:2]) if tensor is not None))
    return all(isinstance(tensor, fx.Node) and tensor.op == "get_attr" for tensor in known)


def _argument(node: fx.Node, index: int) -> Any:
    return node.args[index] if len(node.args) > index else None


def _fold(graph_module: fx.GraphModule, norm: fx.Node, dtype: Optional[torch.dtype]) -> None:
    conv = norm.args[0]
    assert isinstance(conv, fx.Node)
    weight = _value(graph_module, conv.args[1])
    bias = _value(graph_module, _argument(conv, 2))
    gamma, beta, mean, variance = (_value(graph_module, argument) for argument in norm.args[1:5])
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

    owner = _owner(graph_module, conv)
    dtype = dtype or weight.dtype
    with graph_module.graph.inserting_before(conv):
        conv.update_arg(1, _constant(graph_module, f"{owner}.weight", new_weight.to(dtype)))
        bias_node = _constant(graph_module, f"{owner}.bias", shift.to(dtype))
    conv.args = (*conv.args[:2], bias_node, *conv.args[3:])
    norm.replace_all_uses_with(conv)
    graph_module.graph.erase_node(norm)


def _value(graph_module: fx.GraphModule, node: Any) -> Optional[Tensor]:
    if node is None:
        return None
    owner, _, name = str(node.target).rpartition(".")
    return getattr(graph_module.get_submodule(owner), name).detach()


def _owner(graph_module: fx.GraphModule, conv: fx.Node) -> str:
    """Name the module for the folded tensors: the convolution's own, or a new one if other nodes share its weight."""
    weight = conv.args[1]
    assert isinstance(weight, fx.Node)
    readers = [
        user
        for node in graph_module.graph.nodes
        if node.op == "get_attr" and node.target == weight.target
        for user in node.users
    ]
    owner = str(weight.target).rpartition(".")[0]
    if readers == [conv] and owner:
        return owner
    owner = f"folded.{conv.name}"
    graph_module.add_submodule(owner, nn.Module())
    return owner


def _constant(graph_module: fx.GraphModule, target: str, value: Tensor) -> fx.Node:
    owner, _, name = target.rpartition(".")
    module = graph_module.get_submodule(owner)
    setattr(module, name, nn.Parameter(value, requires_grad=False))
    return graph_module.graph.get_attr(target)
