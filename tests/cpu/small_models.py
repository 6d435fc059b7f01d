"""Small models for the tests, with batch-norm statistics and affine parameters that are far from the identity."""

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torchvision.models import resnet

import resnet_fast

SEED = 20261124


def randomise_norms(model: nn.Module, seed: int = SEED) -> nn.Module:
    """Random running statistics and affine parameters for every batch norm, so that leaving one out shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if getattr(module, "running_mean", None) is None:
                continue
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
            if module.weight is not None:
                module.weight.uniform_(0.5, 1.5, generator=generator)
                module.bias.normal_(0, 0.1, generator=generator)
    return model


def small_resnet(block: type = resnet.BasicBlock, seed: int = SEED, **kwargs: Any) -> nn.Module:
    """torchvision's ResNet with one block a stage: every kind of block, in a second of test time."""
    return built(_small, block, seed=seed, **kwargs)


def short_resnet(block: type = resnet.BasicBlock, **kwargs: Any) -> nn.Module:
    """For training in float64: the stem and three blocks, with identity and with strided projection."""
    return built(_short, block, **kwargs)


def _small(block: type, **kwargs: Any) -> nn.Module:
    return randomise_norms(resnet.ResNet(block, [1, 1, 1, 1], num_classes=7, **kwargs)).eval()


def _short(block: type, **kwargs: Any) -> nn.Module:
    model = resnet.ResNet(block, [2, 1, 1, 1], num_classes=7, **kwargs)
    model.layer3 = model.layer4 = nn.Identity()
    model.fc = nn.Linear(128 * block.expansion, 7)
    return randomise_norms(model).double().train()


def built(make: Callable[..., nn.Module], *args: Any, seed: int = SEED, **kwargs: Any) -> nn.Module:
    """What ``make(*args, **kwargs)`` gives after ``seed``, of which it is a copy: most tests are shorter than drawing
    millions of weights. The random state that it leaves is the same in any case."""
    model = copy.deepcopy(_kept(make, seed, *args, **kwargs))
    torch.manual_seed(seed)
    return model


@functools.lru_cache(8)
def _kept(make: Callable[..., nn.Module], seed: int, *args: Any, **kwargs: Any) -> nn.Module:
    torch.manual_seed(seed)
    return make(*args, **kwargs)


def images(*shape: int, seed: int = SEED) -> Tensor:
    return torch.randn(*(shape or (2, 3, 64, 64)), generator=torch.Generator().manual_seed(seed))


def accelerated(model: nn.Module) -> nn.Module:
    """An accelerated copy that is known to run fused: a test that compares a model with itself protects nothing."""
    fast = resnet_fast.accelerate(model, inplace=False)
    assert any(row.status != "stock" for row in resnet_fast.explain(fast).rows)
    return fast


def fused_calls(run: Callable[[], Any]) -> list[str]:
    """The fused ops that ``run()`` calls, in order."""
    from torch.utils._python_dispatch import TorchDispatchMode

    calls = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.namespace == "resnet_fast":
                calls.append(func._opname)
            return func(*args, **(kwargs or {}))

    with Recorder():
        run()
    return calls


def relative_error(result: Any, expected: Any) -> float:
    """Largest error over all tensors of a structure, each relative to its own largest value."""
    results, expecteds = tree_leaves(result), tree_leaves(expected)
    assert len(results) == len(expecteds)
    worst = 0.0
    for one, other in zip(results, expecteds):
        if not isinstance(other, Tensor):
            assert one == other
            continue
        assert one.shape == other.shape
        assert one.dtype == other.dtype
        if other.numel():
            scale = other.abs().max().double().clamp_min(1e-30)
            worst = max(worst, ((one.double() - other.double()).abs().max() / scale).item())
    return worst


def errors_against_float64(stock: nn.Module, fast: nn.Module, x: Any) -> tuple[float, float]:
    """(error of the stock model, error of the accelerated one), both against the stock model in float64.

    The stock model runs in channels_last: oneDNN's kernels for that layout add up in another order than those for NCHW,
    with up to four times their rounding error, and the fused ops use the former.
    """
    precise = copy.deepcopy(stock).double()(x.double())
    plain = copy.deepcopy(stock).to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
    widened = [[leaf.double() for leaf in tree_leaves(result)] for result in (plain, fast(x))]
    return relative_error(widened[0], tree_leaves(precise)), relative_error(widened[1], tree_leaves(precise))
