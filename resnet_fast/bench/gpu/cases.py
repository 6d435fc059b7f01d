"""What is checked: calls of every fused op, with shapes that fit its kernels and shapes that do not, and whole blocks.

A case makes its inputs in float32 on the CPU, from a seed of its own, so that every dtype and device gets the same
numbers. It has two ways to compute the same: with the op, and by the definition in PyTorch, in any precision.
"""

import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor, nn
from torchvision.models import resnet

from resnet_fast import accelerate
from resnet_fast.kernels.contract import Geometry
from resnet_fast.kernels.reference import inference as reference
from resnet_fast.ops.checks import conv_output

DTYPES = ("float32", "tf32", "float16", "bfloat16")


class Case(NamedTuple):
    """ours, definition: from inputs in one dtype to a list of results."""

    name: str
    inputs: tuple[Any, ...]
    ours: Callable[..., list[Tensor]]
    definition: Callable[..., list[Tensor]]
    training: bool = False

    def cast(self, dtype: torch.dtype, device: str) -> tuple[Any, ...]:
        """Images and weights in ``dtype``; vectors of channels in float32, beside float64 in float64."""
        wide = torch.promote_types(dtype, torch.float32)

        def one(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            if value.dim() == 4:
                return value.to(device, dtype).contiguous(memory_format=torch.channels_last)
            return value.to(device, dtype if value.dim() > 1 else wide)

        return tuple(map(one, self.inputs))


# name, x, channels out, kernel, stride, padding, dilation, groups, residual, relu
_CONVS: list[tuple[str, tuple[int, ...], int, tuple[int, int], int, Any, int, int, bool, bool]] = [
    ("3x3 of stage 1", (2, 64, 56, 56), 64, (3, 3), 1, 1, 1, 1, True, True),
    ("3x3 of stage 3, batch 1", (1, 256, 14, 14), 256, (3, 3), 1, 1, 1, 1, False, True),
    ("3x3 of stage 4, batch 1", (1, 512, 7, 7), 512, (3, 3), 1, 1, 1, 1, True, True),
    ("3x3 of stride 2", (2, 128, 56, 56), 128, (3, 3), 2, 1, 1, 1, False, True),
    ("1x1 expand", (2, 64, 56, 56), 256, (1, 1), 1, 0, 1, 1, True, True),
    ("1x1 reduce", (3, 1024, 14, 14), 256, (1, 1), 1, 0, 1, 1, False, True),
    ("1x1 expand, stage 4", (2, 512, 7, 7), 2048, (1, 1), 1, 0, 1, 1, True, True),
    ("1x1 shortcut of stride 2", (2, 256, 56, 56), 512, (1, 1), 2, 0, 1, 1, False, False),
    ("ResNeXt's 32 groups", (2, 128, 28, 28), 128, (3, 3), 1, 1, 1, 32, False, True),
    ("dilation 2", (1, 64, 30, 30), 64, (3, 3), 1, 2, 2, 1, True, True),
    ("odd channels", (2, 17, 13, 11), 33, (3, 3), 1, 1, 1, 1, True, True),
    ("5x3, asymmetric padding", (1, 40, 9, 8), 24, (5, 3), 1, (2, 0), 1, 1, False, False),
    ("grey 7x7", (1, 1, 33, 31), 64, (7, 7), 2, 3, 1, 1, False, True),
    ("depthwise", (1, 72, 15, 9), 72, (3, 3), 2, 1, 1, 72, False, True),
]


def cases(quick: bool = False) -> Iterator[Case]:
    """Make all cases; with ``quick`` the small ones, for a CPU."""
    for name, x, k, kernel, stride, padding, dilation, groups, residual, relu in _CONVS:
        if not quick or x[1] < 128:
            yield _conv(name, x, k, kernel, stride, padding, dilation, groups, residual, relu)
    for h, w in ((64, 64), (45, 37)) if quick else ((224, 224), (65, 47)):
        yield _op("stem", f"stem of {h}x{w}", *_weights(f"stem {h}x{w}", (2, 3, h, w), (64, 3, 7, 7)))
    for pooled in ((2, 512, 7, 7), (1, 2048, 7, 7), (2, 33, 5, 9)):
        yield _op("global_avg_pool", f"average of {list(pooled)}", _normal(f"average {pooled}", *pooled))
    for n, c, k in ((2, 512, 1000), (40, 2048, 1000), (3, 33, 10)):
        head = (_normal(f"head {c}", k, c) / c**0.5, _normal(f"head {k}", k))
        yield _op("head", f"{c} to {k}, batch {n}", _normal(f"head {n}", n, c, 7, 7), *head)
    for c, size in ((64, 56), (128, 28), (256, 14), (64, 7)):
        if quick and size > 14:
            continue
        first = _weights(f"chain {c}", (2, c, size, size), (4 * c, c, 1, 1))
        _, *second = _weights(f"chain {c} next", (), (c, 4 * c, 1, 1))
        yield _op("conv_chain", f"{c} {size}x{size}", *first, _normal("chain", 2, 4 * c, size, size), *second)
    for name, block, shape in _blocks(quick):
        yield _training(name, block, shape)


def _conv(
    name: str,
    x: tuple[int, ...],
    k: int,
    kernel: tuple[int, int],
    stride: int,
    padding: Any,
    dilation: int,
    groups: int,
    residual: bool,
    relu: bool,
) -> Case:
    image, weight, scale, shift = _weights(name, x, (k, x[1] // groups, *kernel))
    pads = padding if isinstance(padding, tuple) else (padding, padding)
    geometry = Geometry((stride, stride), pads, (dilation, dilation), groups)
    added: Optional[Tensor] = None
    if residual:
        added = _normal(f"{name} residual", *conv_output(image.shape, weight.shape, geometry))
    return _op("conv_bn_act", name, image, weight, scale, shift, added, *geometry, relu)


def _op(op: str, name: str, *inputs: Any) -> Case:
    """An op and the function of ``reference`` of the same name."""

    def ours(*args: Any) -> list[Tensor]:
        return _listed(getattr(torch.ops.resnet_fast, op)(*args))

    def definition(*args: Any) -> list[Tensor]:
        return _listed(getattr(reference, op)(*args))

    return Case(f"{op}: {name}", inputs, ours, definition)


def _listed(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def _blocks(quick: bool) -> Iterator[tuple[str, Callable[[], nn.Module], tuple[int, ...]]]:
    small = 14 if quick else 28

    def shortcut(c: int, k: int, stride: int) -> nn.Module:
        return nn.Sequential(resnet.conv1x1(c, k, stride), nn.BatchNorm2d(k))

    yield "BasicBlock", lambda: resnet.BasicBlock(64, 64), (4, 64, small, small)
    yield "BasicBlock of stride 2", lambda: resnet.BasicBlock(64, 128, 2, shortcut(64, 128, 2)), (4, 64, small, small)
    yield "Bottleneck", lambda: resnet.Bottleneck(256, 64), (4, 256, small, small)
    yield (
        "Bottleneck of stride 2",
        lambda: resnet.Bottleneck(256, 128, 2, shortcut(256, 512, 2)),
        (4, 256, small, small),
    )
    yield "Bottleneck of 7x7", lambda: resnet.Bottleneck(512, 128), (3, 512, 7, 7)


def _training(name: str, make: Callable[[], nn.Module], shape: tuple[int, ...]) -> Case:
    """A block's step in training mode: its result, the gradients, the running statistics.

    Batch norms shift by six deviations, up and down in turn, so that rounding flips no ReLU: one flip is no error, and
    changes gradients by more than an error would.
    """

    def block(dtype: torch.dtype, device: str) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_seed(name))
            made = make()
        for norm in made.modules():
            if isinstance(norm, nn.BatchNorm2d):
                with torch.no_grad():
                    norm.weight.uniform_(0.5, 1.5, generator=_generator(name))
                    norm.bias.copy_(6 * norm.weight)
                    norm.bias[1::2].neg_()
        # As autocast has it: parameters and statistics stay wide.
        layout: Any = {"memory_format": torch.channels_last}
        return made.to(device, torch.promote_types(dtype, torch.float32), **layout).train()

    def step(model: nn.Module, x: Tensor, grad: Tensor) -> list[Tensor]:
        x = x.detach().requires_grad_()
        with torch.autocast(x.device.type, x.dtype, enabled=x.dtype in (torch.float16, torch.bfloat16)):
            out = model(x)
        out.backward(grad.to(out.dtype))
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        statistics = [b for b in model.buffers() if b.is_floating_point()]
        assert x.grad is not None
        return [out.detach(), x.grad, *gradients, *statistics]

    def ours(x: Tensor, grad: Tensor) -> list[Tensor]:
        return step(accelerate(block(x.dtype, x.device.type)), x, grad)

    def definition(x: Tensor, grad: Tensor) -> list[Tensor]:
        return step(block(x.dtype, x.device.type), x, grad)

    x = _normal(name, *shape)
    with torch.no_grad():
        grad = _normal(f"{name} gradient", *make()(x).shape)
    return Case(f"training: {name}", (x, grad), ours, definition, training=True)


def _weights(name: str, x: tuple[int, ...], weight: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Image, weight, scale and shift such that results are of the order of 1."""
    k, *rest = weight
    fan_in = rest[0] * rest[1] * rest[2]
    scale = torch.rand(k, generator=_generator(f"{name} scale")) + 0.5
    return (
        _normal(name, *x),
        _normal(f"{name} weight", *weight) / fan_in**0.5,
        scale,
        _normal(f"{name} shift", k),
    )


def _normal(name: str, *shape: int) -> Tensor:
    return torch.randn(shape, generator=_generator(name))


def _generator(name: str) -> torch.Generator:
    return torch.Generator().manual_seed(_seed(name))


def _seed(name: str) -> int:
    return zlib.crc32(name.encode())
