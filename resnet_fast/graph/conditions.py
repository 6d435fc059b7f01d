"""What may be fused: asked of modules when a program is made, and again at every call."""

from collections.abc import Callable, Sequence
from typing import Any, Optional

import torch
from torch import Tensor, fx, nn
from torchvision.ops import FrozenBatchNorm2d

from resnet_fast.graph.sync_batch_norm import CpuSyncBatchNorm

Path = tuple[str, ...]

STATE = "_resnet_fast_state"
"""The attribute of an accelerated module, out of state_dicts and pickles, in which its ``State`` is kept."""

SYNCHRONISED = (nn.SyncBatchNorm, CpuSyncBatchNorm)
NORMS = (nn.BatchNorm2d, *SYNCHRONISED, FrozenBatchNorm2d)
BATCH_STATISTICS = "normalises by batch statistics (training mode)"
DROPS_OUT = "drops out (training mode)"


class _StockForward:
    """The forward that a class was derived from, as it is now: it may have been patched since."""

    def __get__(self, module: Optional[nn.Module], cls: Any) -> Callable:
        return cls.stock_class.forward


class Accelerated:
    """Mark of the classes whose forward runs a program; see ``accelerated.py``."""

    stock_class: type  # the class that the forward was derived from
    stock_forward = _StockForward()

    def __init_subclass__(cls, **keywords: Any) -> None:
        """A class made from a user's own is none of those that its bases ask to be told of."""


def customised(module: nn.Module) -> str:
    """How this instance differs from its class, or ''."""
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return "has hooks"
    if "forward" in module.__dict__:
        return "has a forward of its own set on the instance"
    return "" if torch.compiler.is_compiling() or not patched(type(module)) else "has a forward patched into its class"


_LIBRARY = (FrozenBatchNorm2d, *(cls for cls in vars(nn).values() if isinstance(cls, type)))
_FORWARDS: dict[type, Optional[Callable]] = {
    cls: cls.forward if cls.forward.__module__.startswith(("torch.", "torchvision.")) else None
    for cls in _LIBRARY
    if issubclass(cls, nn.Module)
}


def patched(cls: type) -> bool:
    """Whether somebody put another forward into one of PyTorch's own classes, as explainers of models do to ReLU's."""
    return cls in _FORWARDS and cls.forward is not _FORWARDS[cls]  # type: ignore[attr-defined]


def conv_refusal(conv: nn.Module) -> str:
    return own_conv_refusal(conv) if type(conv) is nn.Conv2d else f"is a {type(conv).__name__}, not nn.Conv2d"


def own_conv_refusal(conv: Any) -> str:
    """Of one that may be a part of its module."""
    if conv.padding_mode != "zeros":
        return f"pads with {conv.padding_mode!r}, not zeros"
    return "pads more on one side than on the other" if padding_of(conv) is None else customised(conv)


def padding_of(conv: nn.Conv2d) -> Optional[tuple[int, int]]:
    """How many zeros are on either side; None: not as many."""
    if not isinstance(conv.padding, str):
        return conv.padding  # type: ignore[return-value]
    if conv.padding == "valid":
        return 0, 0
    h, w = (d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size))
    return None if h % 2 or w % 2 else (h // 2, w // 2)


def _stem_conv_refusal(conv: nn.Module) -> str:
    return conv_refusal(conv) or ("" if is_stem_conv(conv) else "is no longer 7x7, stride 2, padding 3")


def norm_refusal(bn: nn.Module) -> str:
    if type(bn) in (nn.BatchNorm2d, *SYNCHRONISED):
        return own_norm_refusal(bn)
    if type(bn) is not FrozenBatchNorm2d:
        return f"is a {type(bn).__name__}, not BatchNorm2d or FrozenBatchNorm2d"
    return customised(bn)


def own_norm_refusal(bn: Any) -> str:
    """Of a batch norm that may be a part of its module."""
    if bn.training:
        return BATCH_STATISTICS
    if bn.running_mean is None or bn.running_var is None:
        return "normalises by batch statistics (it tracks no running ones)"
    return customised(bn)


def training_norm_refusal(bn: nn.Module) -> str:
    """Batch statistics or running ones: each call takes what the norm is set to."""
    return customised(bn) if type(bn) in NORMS else f"is a {type(bn).__name__}, not BatchNorm2d or FrozenBatchNorm2d"


def exact(*types: type) -> Callable[[nn.Module], str]:
    def refusal(module: nn.Module) -> str:
        return customised(module) if type(module) in types else f"is a {type(module).__name__}, not {types[0].__name__}"

    return refusal


def stem_pool_refusal(pool: nn.Module) -> str:
    return exact(nn.MaxPool2d)(pool) or ("" if _is_stem_pool(pool) else "is no longer 3x3, stride 2, padding 1")


def global_pool_refusal(pool: nn.Module) -> str:
    return exact(nn.AdaptiveAvgPool2d)(pool) or ("" if pool.output_size in (1, (1, 1)) else "is no longer global")


def flatten_refusal(layer: nn.Module) -> str:
    """Of an image, to ``[N, C * H * W]``."""
    flattens = isinstance(layer, nn.Flatten) and layer.start_dim == 1 and layer.end_dim in (-1, 3)
    return exact(nn.Flatten)(layer) or ("" if flattens else "no longer flattens [N, C, H, W] to [N, C * H * W]")


def head_refusals(layers: Sequence[nn.Module]) -> list[str]:
    """Of each layer between a global pool and the logits: all but the last must be dropouts, which do nothing in eval
    mode."""
    *dropouts, linear = layers
    return [*(_dropout_refusal(layer) for layer in dropouts), exact(nn.Linear)(linear)]


def _dropout_refusal(layer: nn.Module) -> str:
    return exact(nn.Dropout)(layer) or (DROPS_OUT if layer.training else "")


def _sequential_refusal(module: nn.Module) -> str:
    return customised(module) if is_sequential(module) else f"is a {type(module).__name__}, not a Sequential"


REFUSALS: dict[str, Callable[[nn.Module], str]] = {
    "conv": conv_refusal,
    "stem conv": _stem_conv_refusal,
    "own conv": own_conv_refusal,
    "norm": norm_refusal,
    "own norm": own_norm_refusal,
    "training norm": training_norm_refusal,
    "opened": customised,
    "relu": exact(nn.ReLU),
    "identity": exact(nn.Identity),
    "stem pool": stem_pool_refusal,
    "global pool": global_pool_refusal,
    "flatten": flatten_refusal,
    "sequential": _sequential_refusal,
}


IN_TRAINING = {"norm": "training norm", "own norm": "opened", "stem conv": "conv"}
"""What a part must be in training mode, where that differs: each call takes batch statistics or running ones."""


def _pair(value: Any) -> tuple[Any, Any]:
    return value if isinstance(value, tuple) else (value, value)


def is_stem_conv(conv: Any) -> bool:
    geometry = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups)
    return geometry == ((7, 7), (2, 2), (3, 3), (1, 1), 1)


def _is_stem_pool(pool: Any) -> bool:
    geometry = (_pair(pool.kernel_size), _pair(pool.stride), _pair(pool.padding), _pair(pool.dilation))
    plain = not pool.ceil_mode and not pool.return_indices
    return plain and geometry == ((3, 3), (2, 2), (1, 1), (1, 1))


def is_sequential(module: nn.Module) -> bool:
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


def child_at(module: nn.Module, path: Path) -> Optional[nn.Module]:
    for name in path:
        module = module._modules.get(name)  # type: ignore[assignment]
        if module is None:
            return None
    return module


def stock_wanted(args: tuple, kwargs: dict) -> str:
    """Why the caller needs the stock forward, whatever the program could do, or ''.

    Symbolic tracing and ``torch.jit.trace`` must see the stock children; ``torch.onnx`` plain ops; ``torch.func`` and
    forward-mode differentiation know no rule for a custom op, and jvp would silently be zero. Statistics of an empty
    batch are NaN, which batch norm does not let into its running ones.
    """
    images = [value for value in (*args, *kwargs.values()) if isinstance(value, (Tensor, fx.Proxy))]
    if not images or isinstance(images[0], fx.Proxy):
        return "symbolic tracing"
    if torch.compiler.is_compiling():
        return "torch.onnx export" if torch.onnx.is_in_onnx_export() else ""
    if torch.jit.is_tracing():
        return "torch.jit tracing"
    return transform() or ("empty batch" if images[0].numel() == 0 else "")


def transform() -> str:
    """What is under way that knows no rule for our ops, or ''."""
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "torch.func transform"
    return "forward-mode differentiation" if torch.autograd.forward_ad._current_level >= 0 else ""
