"""Residual blocks for the tests of training: made of modules, run as they are or by the op, and compared."""

import copy
import itertools
import random
from collections.abc import Callable, Sequence
from typing import NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from resnet_fast.graph import functional
from tests.cpu.ops.cases import nhwc

WINOGRAD = 5e-5
"""How far a result may be from the right one, relative to its largest value, where Winograd's algorithm may serve."""


class Block(nn.Module):
    """Convolutions and batch norms in a row: ``forward`` is what a user writes, ``fused`` the op on them."""

    def __init__(self, convs: Sequence[nn.Module], norms: Sequence[nn.Module], **options: bool) -> None:
        super().__init__()
        self.convs, self.norms = nn.ModuleList(convs), nn.ModuleList(norms)
        self.options = {"identity": False, "projection": False, "relu": True, "pool": False} | options

    def forward(self, x: Tensor, residual: Optional[Tensor] = None) -> Tensor:
        z = x
        main, projection = list(zip(self.convs, self.norms)), None
        if self.options["projection"]:
            *main, projection = main
        for i, (conv, norm) in enumerate(main):
            z = norm(conv(F.relu(z) if i else z))
        if projection is not None:
            conv, norm = projection
            z = z + norm(conv(x if residual is None else residual))
        elif self.options["identity"] or residual is not None:
            z = z + (x if residual is None else residual)
        z = F.relu(z) if self.options["relu"] else z
        return F.max_pool2d(z, 3, 2, 1) if self.options["pool"] else z

    def fused(self, x: Tensor, residual: Optional[Tensor] = None) -> Tensor:
        return functional.residual_block(x, list(self.convs), list(self.norms), residual, **self.options)


class Layer(NamedTuple):
    """A convolution, without its number of input channels."""

    channels: int
    kernel: int = 3
    stride: int = 1
    dilation: int = 1
    groups: int = 1
    bias: bool = False

    def conv(self, inputs: int) -> nn.Conv2d:
        padding = self.dilation * (self.kernel // 2)
        return nn.Conv2d(
            inputs, self.channels, self.kernel, self.stride, padding, self.dilation, self.groups, bias=self.bias
        )


class Shape(NamedTuple):
    """A block without its data."""

    x: tuple[int, int, int, int]
    layers: tuple[Layer, ...]
    shortcut: Optional[Layer] = None
    residual: Optional[tuple[int, int, int, int]] = None  # what is added, or what the shortcut reads instead of x
    identity: bool = False
    relu: bool = True
    pool: bool = False

    @property
    def winograd(self) -> bool:
        convs = [*self.layers, *filter(None, [self.shortcut])]
        return any((conv.kernel, conv.stride, conv.dilation, conv.groups) == (3, 1, 1, 1) for conv in convs)

    def block(self, norm: type = nn.BatchNorm2d, seed: int = 0, **options) -> Block:
        """With batch norms in training mode, far from the identity; some gammas are negative."""
        torch.manual_seed(seed)
        convs, channels = [], self.x[1]
        for layer in self.layers:
            convs.append(layer.conv(channels))
            channels = layer.channels
        if self.shortcut:
            convs.append(self.shortcut.conv(self.x[1] if self.residual is None else self.residual[1]))
        norms = [norm(conv.out_channels, **options) for conv in convs]
        with torch.no_grad():
            for one in norms:
                if one.running_mean is not None:
                    one.running_mean.normal_(0, 0.2)
                    one.running_var.uniform_(0.3, 1.3)
                if one.weight is not None:
                    one.weight.uniform_(0.5, 1.5).mul_(torch.randn(one.weight.shape).sign())
                    one.bias.normal_(0, 0.5)
        flags = {"identity": self.identity, "projection": self.shortcut is not None, "relu": self.relu}
        return Block(convs, norms, **flags, pool=self.pool)

    def images(self, seed: int = 0) -> tuple[Tensor, ...]:
        """x, and the residual if there is one."""
        generator = torch.Generator().manual_seed(seed)
        sizes = [self.x, *filter(None, [self.residual])]
        return tuple(nhwc(torch.randn(size, generator=generator)) for size in sizes)


SHAPES = {
    "basic": Shape((2, 8, 9, 11), (Layer(8), Layer(8)), identity=True),
    "basic, projection": Shape((2, 8, 9, 11), (Layer(12, stride=2), Layer(12)), Layer(12, 1, 2)),
    "bottleneck, expand": Shape((2, 16, 9, 7), (Layer(4, 1), Layer(4), Layer(16, 1)), identity=True),
    "bottleneck, expand twice": Shape((2, 6, 9, 11), (Layer(5, 1), Layer(5, 3, 2), Layer(20, 1)), Layer(20, 1, 2)),
    "bottleneck, raw shortcut": Shape((2, 16, 9, 11), (Layer(5, 1), Layer(5), Layer(20, 1)), Layer(20, 1)),
    "raw main, expand shortcut": Shape((2, 6, 8, 7), (Layer(20, 3), Layer(20, 3)), Layer(20, 1)),
    "too few pixels to expand": Shape((2, 6, 2, 3), (Layer(5, 1), Layer(5), Layer(20, 1)), Layer(20, 1)),
    "residual": Shape((2, 8, 5, 6), (Layer(5, 1), Layer(5), Layer(12, 1)), residual=(2, 12, 5, 6)),
    "shortcut of a residual": Shape((2, 8, 5, 6), (Layer(5, 1), Layer(12, 1)), Layer(12, 1), (2, 3, 5, 6)),
    "strided shortcut of a residual": Shape((2, 8, 5, 6), (Layer(5), Layer(12)), Layer(12, 1, 2), (2, 9, 9, 11)),
    "no shortcut": Shape((2, 8, 7, 6), (Layer(12), Layer(7))),
    "no ReLU": Shape((2, 8, 7, 6), (Layer(4, 1), Layer(8, 3)), identity=True, relu=False),
    "no ReLU, residual": Shape((2, 8, 7, 6), (Layer(9, 1),), residual=(2, 9, 7, 6), relu=False),
    "no ReLU, projection": Shape((2, 8, 7, 6), (Layer(20, 1),), Layer(20, 1), relu=False),
    "nothing but a convolution": Shape((2, 8, 7, 6), (Layer(9),), relu=False),
    "one expand layer": Shape((2, 5, 7, 6), (Layer(13, 1),)),
    "stem": Shape((2, 3, 17, 14), (Layer(10, 7, 2),), pool=True),
    "deep stem": Shape((2, 3, 17, 14), (Layer(6, 3, 2), Layer(6), Layer(10)), pool=True),
    "pool after a shortcut": Shape((2, 8, 9, 8), (Layer(8, 1), Layer(8)), identity=True, pool=True),
    "pool after an expand layer": Shape((2, 4, 9, 8), (Layer(10, 1),), pool=True),
    "dilated": Shape((2, 8, 9, 11), (Layer(8, dilation=2), Layer(8, dilation=3)), identity=True),
    "in groups": Shape((2, 12, 7, 9), (Layer(12, 1), Layer(12, 3, groups=4), Layer(24, 1)), Layer(24, 1)),
    "in groups, strided": Shape((2, 12, 7, 9), (Layer(12, 3, 2, groups=4), Layer(24, 1)), Layer(24, 1, 2)),
    "depthwise": Shape((2, 9, 7, 6), (Layer(9, 3, groups=9), Layer(9, 5, groups=9)), identity=True),
    "1x1 in groups": Shape((2, 8, 7, 6), (Layer(8, 1, groups=2), Layer(24, 1, groups=2))),
    "bias": Shape((2, 8, 7, 6), (Layer(4, 1, bias=True), Layer(4, bias=True), Layer(8, 1, bias=True)), identity=True),
    "batch 1": Shape((1, 8, 9, 8), (Layer(4, 1), Layer(4), Layer(8, 1)), identity=True),
    "1x1 images": Shape((5, 8, 1, 1), (Layer(4, 1), Layer(4), Layer(8, 1)), identity=True),
    "one row": Shape((2, 5, 1, 17), (Layer(7), Layer(5)), identity=True),
    "one channel": Shape((2, 1, 8, 9), (Layer(1), Layer(1)), identity=True),
    "17 and 33 channels": Shape((2, 17, 9, 8), (Layer(33, 1), Layer(33, 3, 2), Layer(67, 1)), Layer(67, 1, 2)),
    "vectors of channels": Shape((1, 32, 7, 8), (Layer(32, 1), Layer(32), Layer(64, 1)), Layer(64, 1)),
}


def random_shape(seed: int) -> Shape:
    """One that nobody thought of."""
    draw = random.Random(seed)
    x = (draw.randint(1, 4), draw.randint(1, 9), draw.randint(1, 9), draw.randint(1, 9))
    kernels, strides, dilations = (1, 1, 3, 5), (1, 1, 2), (1, 1, 2)
    layers = tuple(
        Layer(draw.randint(1, 20), *map(draw.choice, (kernels, strides, dilations)), bias=draw.random() < 0.3)
        for _ in range(draw.randint(1, 4))
    )
    plain = Shape(x, layers, relu=draw.random() < 0.7, pool=draw.random() < 0.15)
    out = tuple(plain._replace(pool=False).block().eval()(torch.zeros(x)).shape)
    kind = draw.choice(["none", "identity", "residual", "projection"])
    if kind == "residual":
        return plain._replace(residual=out)
    if kind == "projection":
        return plain._replace(shortcut=Layer(out[1], 1), residual=(x[0], draw.randint(1, 9), *out[2:]))
    return plain._replace(identity=kind == "identity" and out == x)


FROZEN = {"batch": (False, False), "frozen": (True, True), "odd frozen": (False, True), "even frozen": (True, False)}
"""Which layers normalise by running statistics: the first, third ...; the second, fourth ..."""


def freeze(block: Block, frozen: str) -> Block:
    for norm, still in zip(block.norms, itertools.cycle(FROZEN[frozen])):
        norm.train(not still)
    return block


def results(block: Block, images: Sequence[Tensor], fused: bool, dtype: Optional[torch.dtype] = None) -> dict:
    """By name: the output, every gradient and every buffer, after one step of a copy of the block."""
    block = copy.deepcopy(block)
    if dtype is not None:
        block, images = block.to(dtype), [image.to(dtype) for image in images]
    given = [image.detach().requires_grad_() for image in images]
    out = (block.fused if fused else block.to(memory_format=torch.channels_last))(*given)
    found = {"out": out.detach()} | gradients(out, dict(zip(("x", "residual"), given)), block)
    return found | {name: buffer for name, buffer in block.named_buffers() if buffer.is_floating_point()}


def gradients(out: Tensor, images: dict[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(7))
    sources = images | {name: p for name, p in module.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(out, list(sources.values()), grad.to(out.dtype))
    return {f"d {name}": gradient for name, gradient in zip(sources, found)}


def clear_of_zero(block: Block, images: Sequence[Tensor]) -> bool:
    """Whether rounding decides no ReLU: one that differs changes gradients by far more than rounding."""
    block = copy.deepcopy(block).double()
    read: list[Tensor] = []  # by a ReLU
    for norm in list(block.norms)[: -1 if block.options["projection"] else None]:
        norm.register_forward_hook(lambda _, __, z: read.append(z.detach()))
    block.options = block.options | {"relu": False, "pool": False}
    read.append(block(*(image.double() for image in images)).detach())
    return min(float(z.abs().min()) for z in read) > 1e-4


def decided(shape: Shape, frozen: str = "batch", **options) -> tuple[Block, tuple[Tensor, ...]]:
    """Data of which rounding decides nothing: the first that is found."""
    for seed in range(300):
        block, images = freeze(shape.block(seed=seed, **options), frozen), shape.images(seed)
        if clear_of_zero(block, images):
            return block, images
    raise AssertionError("no data without values close to 0")


def assert_close(actual: dict, exact: dict, tolerance: float) -> None:
    """Every tensor within ``tolerance`` of the right one's largest value."""
    assert actual.keys() == exact.keys()
    for name, right in exact.items():
        error = (actual[name].double() - right.double()).abs().max()
        assert error <= tolerance * right.abs().max().clamp_min(1), f"{name} is off by {error:.3g}"


def largest(tensor: Tensor) -> float:
    return float(tensor.abs().max())


def usual(tensors: Tensor) -> float:
    """The Euclidean norm of the middle one of several tensors, stacked.

    Where rounding decides a ReLU or a maximum, gradients are off by as much as they are large; that happens to stock
    and to the op, though not for the same data, and half of the data is free of it on either side.
    """
    return float(torch.linalg.vector_norm(tensors.reshape(len(tensors), -1), dim=1).median())


def over_seeds(run: Callable[[int], dict], seeds: int) -> dict[str, Tensor]:
    """The tensors of ``run(seed)``, stacked."""
    found = [run(seed) for seed in range(seeds)]
    return {name: torch.stack([result[name] for result in found]) for name in found[0]}


def assert_as_precise(actual: dict, stock: dict, exact: dict, floor: float, measure=largest) -> None:
    """Every tensor's error at most twice that of the stock modules, plus ``floor`` of its own size or of 1."""
    assert actual.keys() == stock.keys() == exact.keys()
    for name, right in exact.items():
        assert actual[name].dtype == stock[name].dtype, name
        mine, theirs = (measure(found[name].double() - right) for found in (actual, stock))
        size = max(measure(right), 1.0)
        assert mine <= 2 * theirs + floor * size, f"{name} is off by {mine:.3g}, stock by {theirs:.3g}, of {size:.3g}"


class OwnMemory(TorchDispatchMode):
    """Asserts that results of our ops have memory of their own: of no operand, and of no other result."""

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        results = op(*args, **kwargs or {})
        if op.namespace == "resnet_fast":
            given, made = (
                [t.untyped_storage().data_ptr() for t in tree_leaves(tree) if isinstance(t, Tensor) and t.numel()]
                for tree in (args, results)
            )
            assert len(set(made)) == len(made), f"two results of {op} share memory"
            assert not set(made) & set(given), f"a result of {op} is an operand's memory"
        return results


def saved(run: Callable[[], object]) -> int:
    """Bytes that ``run`` keeps for the backward pass, each storage once."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor.detach()  # a result itself would hold its graph, which would hold it

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(storages.values())
