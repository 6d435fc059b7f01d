"""Every distinct convolution of ResNet-50, with its batch norm, residual and ReLU, by all who can compute it.

Each by itself, on the same images and weights, in inference:

    ours            the op, by what the planner chooses for it, which is named
    eager           PyTorch's modules one after the other, in channels_last
    cudnn fused     cuDNN's convolution with its fused epilogue (MIOpen's on AMD), where a ReLU comes last
    torch.compile   the same modules, max-autotune on a GPU, frozen, so that the batch norm is folded

torch.compile goes without CUDA graphs here: the timer hides what the host does, and a graph would copy the image first.
It compiles for many seconds a layer, so the layers come in the order of their arithmetic, the most first.
"""

import copy
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

RUNS = 20  # timed ones of each

_FLUSHED = 1 << 30  # bytes: while a GPU writes them, 0.1 ms at 10 TB/s, the host starts four eager kernels

_MODES = {"cuda": "max-autotune-no-cudagraphs"}
_WARM_UP_RUNS = 3

Work = Callable[[Tensor, Optional[Tensor]], Tensor]
"""Of an image and a residual."""


class Layer(nn.Module):
    """``relu(bn(conv(x)) + residual)``, as PyTorch has it."""

    def __init__(self, conv: nn.Conv2d, bn: nn.BatchNorm2d, relu: bool) -> None:
        super().__init__()
        self.conv, self.bn, self.relu = conv, bn, relu

    def forward(self, x: Tensor, residual: Optional[Tensor] = None) -> Tensor:
        y = self.bn(self.conv(x))
        if residual is not None:
            y += residual
        return F.relu(y, inplace=True) if self.relu else y


class Place(NamedTuple):
    """A layer of a model, and its image ``[C, H, W]``."""

    layer: Layer
    image: tuple[int, int, int]
    residual: bool

    def name(self) -> str:
        conv, (c, h, w) = self.layer.conv, self.image
        kernel = f"{conv.kernel_size[0]}x{conv.kernel_size[1]}/{conv.stride[0]}"
        tail = (" +residual" if self.residual else "") + (" +relu" if self.layer.relu else "")
        return f"{kernel} {c}->{conv.out_channels} {h}x{w}{tail}"


def compare(
    model: nn.Module, size: int, batches: tuple[int, ...], dtype: torch.dtype, device: str, most: Optional[int] = None
) -> Iterator[dict[str, Any]]:
    """First ``{"planned": names}``, then for each of these how long everybody takes, in milliseconds, and their errors.

    Errors are relative to the largest result, against float64, of the first image. Who cannot compute a layer is in
    ``rejected``, with the reason.

    Args:
        model: a torchvision ResNet in eval mode; it is moved and cast.
        size: height and width of its images.
        most: layers, at most.
    """
    layers = distinct(model, size)[:most]
    calls = [(place, batch) for batch in batches for place in layers]
    yield {"planned": [_title(*call) for call in calls]}
    layout: Any = {"memory_format": torch.channels_last}
    model.to(device, dtype, **layout)
    for place, batch in calls:
        with torch.no_grad():  # freezing wants this, not inference_mode
            found = _measured(place, batch, dtype, device)
        yield {"layer": _title(place, batch), "dtype": str(dtype).removeprefix("torch."), **found}


def distinct(model: nn.Module, size: int) -> list[Place]:
    """The convolutions of a torchvision ResNet that differ in more than their weights, most arithmetic first."""
    names = {module: name for name, module in model.named_modules()}
    modules = dict(model.named_modules())
    found: dict[str, Place] = {}
    products: dict[str, int] = {}

    def note(conv: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> None:
        assert isinstance(conv, nn.Conv2d)
        block, _, leaf = names[conv].rpartition(".")
        shortcut = leaf == "0"
        bn = modules[f"{block}.1" if shortcut else names[conv].replace("conv", "bn")]
        assert isinstance(bn, nn.BatchNorm2d)
        last = not shortcut and bool(block) and not hasattr(modules[block], f"conv{int(leaf[-1]) + 1}")
        c, h, w = args[0].shape[1:]
        place = Place(Layer(conv, bn, not shortcut), (c, h, w), last)
        found.setdefault(place.name(), place)
        products[place.name()] = products.get(place.name(), 0) + y[0].numel() * conv.weight[0].numel()

    hooks = [conv.register_forward_hook(note) for conv in names if isinstance(conv, nn.Conv2d)]
    try:
        with torch.no_grad():
            model(torch.zeros(1, 3, size, size))
    finally:
        for hook in hooks:
            hook.remove()
    return sorted(found.values(), key=lambda place: -products[place.name()])


def _title(place: Place, batch: int) -> str:
    return f"{place.name()}, batch {batch}"


def _measured(place: Place, batch: int, dtype: torch.dtype, device: str) -> dict[str, Any]:
    from resnet_fast.kernels.triton.tuning import planner

    layer, generator = place.layer.eval(), torch.Generator().manual_seed(0)

    def image(*shape: int) -> Tensor:
        there = torch.randn(shape, generator=generator).to(device, dtype)
        return there.contiguous(memory_format=torch.channels_last)

    x = image(batch, *place.image)
    residual = image(*layer.conv(x).shape) if place.residual else None
    exact = _exact(layer, x, residual)
    timer = _timer(x.device)
    result: dict[str, Any] = {"milliseconds": {}, "errors": {}, "rejected": {}}
    for name, make in _competitors(layer, x, residual).items():
        try:
            work = make()
            y = work(x, residual)[:1].double()
            result["errors"][name] = float((y - exact).abs().max() / exact.abs().max())
            times = timer.milliseconds(lambda work=work: work(x, residual), RUNS)
            result["milliseconds"][name] = statistics.median(times)
        except Exception as error:  # a compiler's, a library's, out of memory
            result["rejected"][name] = f"{type(error).__name__}: {error}".splitlines()[0]
    return {**result, "served": planner.served(layer.conv.weight)}


def _competitors(layer: Layer, x: Tensor, residual: Optional[Tensor]) -> dict[str, Callable[[], Work]]:
    from resnet_fast.graph import batch_norm, functional
    from resnet_fast.kernels.triton.tuning import cudnn

    conv, bn = layer.conv, layer.bn

    def ours() -> Work:
        return lambda x, residual: functional.conv_bn_act(x, conv, bn, residual, layer.relu)

    def fused() -> Work:
        geometry = functional.geometry_of(conv)
        scale, shift = batch_norm.fold_batch_norm(bn, conv.bias)
        unused: Any = None  # what follows a convolution that is not fused
        call = cudnn.prepare(cudnn.FUSED, x.dtype, conv.weight, scale, shift, geometry, True, unused)
        if call is None:
            raise ValueError(f"{x.dtype} does not hold the scaled weight")
        return lambda x, residual: call(x, residual, scale, shift)

    found: dict[str, Callable[[], Work]] = {"ours": ours, "eager": lambda: layer}
    if x.is_cuda and layer.relu:
        found[cudnn.FUSED] = fused
    return {**found, "torch.compile": lambda: _compiled(layer, x, residual)}


def _compiled(layer: Layer, x: Tensor, residual: Optional[Tensor]) -> Work:
    """Compiled for these inputs. Dynamo would give up after some layers: they share the code of one ``forward``."""
    import torch._inductor.config

    torch._dynamo.reset()
    work = torch.compile(layer, mode=_MODES.get(x.device.type), fullgraph=True)
    with torch._inductor.config.patch(freezing=True):
        work(x, residual)
    return work


def _exact(layer: Layer, x: Tensor, residual: Optional[Tensor]) -> Tensor:
    """The result of the first image, in float64."""
    return copy.deepcopy(layer).double()(x[:1].double(), None if residual is None else residual[:1].double())


def _timer(device: torch.device) -> Any:
    """A ``measuring.Timer``: the planner's own on a GPU."""
    if device.type == "cuda":
        from resnet_fast.kernels.triton.tuning import measuring

        return measuring.Events(device, _FLUSHED)
    return _Clock()


class _Clock:
    """Times work on the CPU, where caches are as the run before left them."""

    def milliseconds(self, work: Callable[[], Any], runs: int) -> list[float]:
        for _ in range(_WARM_UP_RUNS):
            work()
        times = []
        for _ in range(runs):
            start = time.perf_counter()
            work()
            times.append(1e3 * (time.perf_counter() - start))
        return times
