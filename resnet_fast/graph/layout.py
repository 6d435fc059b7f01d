"""Layout in memory: ``torch.channels_last`` inside a program, results as the input came."""

from typing import Any, Optional

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map

from resnet_fast.graph.conditions import STATE, Accelerated
from resnet_fast.kernels.contract import nhwc

# What reads the strides of its input, or makes a view that keeps them: given a channels_last tensor, it (or a ``view``
# further on) would fail or see another layout.
_LAYOUT_FUNCTIONS = {
    *("view", "view_as", "as_strided", "stride", "is_contiguous", "data_ptr", "storage", "untyped_storage", "numpy"),
    *("getitem", "chunk", "split", "tensor_split", "narrow", "select", "unbind", "expand", "unfold", "diagonal"),
    *("permute", "transpose", "swapaxes", "movedim", "squeeze", "unsqueeze"),
}
_DRAWING_LAYERS = (nn.Dropout, nn.AlphaDropout, nn.RReLU)
_DRAWING_FUNCTIONS = {
    *("dropout", "alpha_dropout", "rrelu", "bernoulli", "bernoulli_", "normal_", "uniform_", "random_"),
    *("exponential_", "cauchy_", "log_normal_", "geometric_"),
}
_LAYOUT_SAFE_PACKAGES = {"resnet_fast", "torch", "torchvision", "timm", "_operator", "builtins", "math"}


def channels_last(x: Any) -> Any:
    """A 4-dimensional tensor in channels_last, anything else as it is."""
    return nhwc(x) if isinstance(x, Tensor) and x.dim() == 4 else x


def laid_out_like(value: Any, given: Any) -> Any:
    """``value`` (a tensor or a structure of them) in the layout that ``given``, the program's input, came in."""
    if not isinstance(given, Tensor) or given.dim() != 4:
        return value
    if given.is_contiguous(memory_format=torch.channels_last) and not given.is_contiguous():
        return value

    def restored(leaf: Any) -> Any:
        moved = isinstance(leaf, Tensor) and leaf.dim() == 4 and leaf.is_contiguous(memory_format=torch.channels_last)
        return leaf.contiguous() if moved else leaf

    return tree_map(restored, value)


def reads_layout(module: nn.Module, node: fx.Node, training: Optional[bool] = None) -> bool:
    """Whether a node may depend on how its input lies in memory, in a mode of ``module`` or in either.

    Code that is not known is taken to.
    """
    if node.op == "call_method":
        return node.target in _LAYOUT_FUNCTIONS
    named = node.op == "call_function" and getattr(node.target, "__name__", "") in _LAYOUT_FUNCTIONS
    return named or unknown_code(module, node, training)


def draws(module: nn.Module, node: fx.Node, training: bool) -> bool:
    """Whether a node draws random numbers, in the order in which its input lies in memory, in a mode of ``module``."""
    if node.op == "call_module":
        child = module.get_submodule(str(node.target))
        graphs = [program.graph for program in _programs(child, training) if program.graph is not None]
        return training and (
            any(isinstance(one, _DRAWING_LAYERS) for one in child.modules())
            or any(draws(child, one, training) for graph in graphs for one in graph.nodes)
        )
    name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")
    switches = (*node.args[2:3], node.kwargs.get("training"), node.kwargs.get("train"))
    return name in _DRAWING_FUNCTIONS and not ("dropout" in name and False in switches)


def _programs(child: nn.Module, training: Optional[bool]) -> list[Any]:
    """Those that an accelerated child has for a mode, or for both."""
    state = child.__dict__.get(STATE)
    programs = [] if state is None else [state.eval, state.training]
    return [program for program in programs if training is None or program.training is training]


def unknown_code(module: nn.Module, node: fx.Node, training: Optional[bool] = None) -> bool:
    """Whether a node calls what may do anything with its input: also where stock code stands in for a program."""
    if node.op == "call_function":
        return _is_unknown(getattr(node.target, "__module__", None) or type(node.target).__module__)
    if node.op == "call_module":
        child = module.get_submodule(str(node.target))
        if "core" in node.meta:  # see cores.py
            return False
        stock = not isinstance(child, Accelerated) or any(one.function is None for one in _programs(child, training))
        return stock and _is_unknown(type(child).__module__)
    return False


def _is_unknown(name: str) -> bool:
    return name.split(".")[0] not in _LAYOUT_SAFE_PACKAGES
