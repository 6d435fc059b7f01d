"""From a module's fused graph to steps of the native kernels, for one shape of input.

The graphs of ``fusion`` are interpreted with ``Image``s, which have a shape but no data; every operation that the
native library knows becomes a ``Step``. Children are followed into their own graphs, so a whole network becomes one
list. Whatever is not known here ends it with ``NotPlanned``.
"""

import math
import operator
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map

from resnet_fast.graph import conditions, functional
from resnet_fast.graph.bottleneck_pairs import Row
from resnet_fast.graph.conditions import Path
from resnet_fast.graph.program import Fused, Program, build, channels_last, hidden_state, laid_out_like
from resnet_fast.graph.programs import program_of
from resnet_fast.kernels.contract import Case
from resnet_fast.kernels.native import abi, library, planner
from resnet_fast.kernels.native import inference as native
from resnet_fast.kernels.packing import PackCache
from resnet_fast.network import memory

_packs = PackCache()
# Leaf modules of these packages may be traced like containers: their forward does nothing that a trace would miss.
_KNOWN_PACKAGES = ("torch", "torchvision", "timm", "resnet_fast")


class NotPlanned(Exception):
    """Why a module cannot run as one native program."""


@dataclass(eq=False)
class Storage:
    """Memory for ``size`` floats. Values that are views of one another share it."""

    size: int


@dataclass(eq=False, frozen=True)
class Image:
    """A value of the graph: dense float32, ``[N, C, H, W]`` in either order of memory, or ``[N, C]``."""

    shape: tuple[int, ...]
    storage: Storage
    nhwc: bool

    @property
    def in_both_orders(self) -> bool:
        return len(self.shape) != 4 or self.shape[1] == 1 or self.shape[2:] == (1, 1)


class Weights(NamedTuple):
    """What a convolution's or a linear layer's numbers are made of."""

    weight: Tensor
    bias: Optional[Tensor]
    norm: Optional[functional.BatchNorm]


class Pack(NamedTuple):
    """What a convolution reads beside its input."""

    weight: Tensor  # bytes, in the layout of the algorithm
    shift: Tensor  # [K]


@dataclass(eq=False)
class Step:
    """One operation of the native library, before memory is assigned."""

    kind: int
    shape: abi.Shape
    x: Storage
    y: Storage
    residual: Optional[Storage] = None
    # Of a convolution:
    weights: Optional[Weights] = None
    path: Path = ()  # the module
    algorithm: str = ""  # this and the next by ``Lowering.prepare``
    pack: Optional[Pack] = None


@dataclass
class Lowering:
    """Makes the steps. ``plain`` keeps the graphs of modules that are not accelerated, for the next shape."""

    threads: int
    plain: dict[Path, tuple[type, Program]]
    steps: list[Step] = field(default_factory=list)
    _at: Path = ()  # the module being followed
    _overwritten: set[Storage] = field(default_factory=set)  # by a forward that works in place
    _converted: dict[Storage, Image] = field(default_factory=dict)  # memory of a copy -> what it is a copy of
    _shelf: memory.Shelf = field(default_factory=memory.Shelf)

    # --- following modules and graphs ---

    def graph(self, module: nn.Module, program: Program, inputs: tuple) -> Any:
        """The results of ``program``'s graph: ``Image``s, in the structure that the module's forward returns."""
        if program.graph is None or len(inputs) != len(program.inputs):
            raise NotPlanned(program.reason or f"{self._name()} is called with other than its required inputs")
        env: dict[fx.Node, Any] = {}
        given = iter(inputs)
        for node in program.graph.nodes:
            if node.op == "placeholder":
                env[node] = next(given)
                continue
            args, kwargs = _mapped(node.args, env), _mapped(node.kwargs, env)
            if node.op == "output":
                return args[0]
            env[node] = self._node(module, node, args, kwargs)
        raise AssertionError("a graph ends in its output")

    def _node(self, module: nn.Module, node: fx.Node, args: tuple, kwargs: dict[str, Any]) -> Any:
        if node.op in ("get_attr", "call_module"):
            path = tuple(str(node.target).split("."))
            child = conditions.child_at(module, path)
            if child is None:
                raise NotPlanned(f"{self._name()} uses {node.target}, which is no module")
            if node.op == "get_attr":
                return _At(child, (*self._at, *path))
            return self._module(child, (*self._at, *path), args, kwargs)
        if getattr(node.target, "__module__", "") == "_operator" and not any(isinstance(arg, Image) for arg in args):
            return node.target(*args, **kwargs)  # type: ignore[operator]  # sizes
        if isinstance(node.target, Row):
            x, *blocks = args
            for block in blocks:
                x = self._module(block.module, block.path, (x,), {})
            return x
        lower = _CALLS.get(node.target)
        if lower is None:
            raise NotPlanned(f"{self._name()} calls {getattr(node.target, '__name__', node.target)}")
        try:
            return lower(self, *args, **kwargs)
        except (TypeError, ValueError) as error:  # arguments that are not foreseen here
            raise NotPlanned(
                f"{self._name()} calls {getattr(node.target, '__name__', node.target)}: {error}"
            ) from error

    def _module(self, module: nn.Module, path: Path, args: tuple, kwargs: dict[str, Any]) -> Any:
        outside, self._at = self._at, path
        try:
            reason = conditions.customised(module)
            if reason:
                raise NotPlanned(f"{self._name()} {reason}")
            lower = _MODULES.get(type(module))
            if lower is not None:
                if kwargs or len(args) != 1 or not isinstance(args[0], Image):
                    raise NotPlanned(f"{self._name()} is called with more than an image")
                return lower(self, module, args[0])
            if kwargs:
                raise NotPlanned(f"{self._name()} is called with keywords")
            return self.graph(module, self._program(module), args)
        finally:
            self._at = outside

    def _program(self, module: nn.Module) -> Program:
        """The graph to follow into, its conditions checked."""
        if isinstance(module, Fused):
            program = program_of(module)
            assert program is not None
            reason = program.refusal(module)
        else:
            known = type(module).__module__.split(".")[0] in _KNOWN_PACKAGES
            if not known and not any(True for _ in module.children()):
                raise NotPlanned(f"{self._name()} is a {type(module).__name__}")
            if hidden_state(module):
                raise NotPlanned(f"{self._name()} has an attribute {hidden_state(module)}")
            stock, program = self.plain.get(self._at, (None, None))
            if stock is not type(module) or program is None or program.stale(module):
                program = build(module)
                self.plain[self._at] = type(module), program
            reason = "training mode" if module.training else program.parts_refusal(module)
        if reason:
            raise NotPlanned(f"{self._name()}: {reason}")
        return program

    def _name(self) -> str:
        return ".".join(self._at) or "it"

    # --- memory ---

    def read(self, image: Any) -> Image:
        if not isinstance(image, Image):
            raise NotPlanned(f"{self._name()} computes with what is no image")
        if image.storage in self._overwritten:
            raise NotPlanned(f"{self._name()} reads what was written over")
        return image

    def overwrite(self, image: Image) -> None:
        """Called by operations in place, whose result gets memory of its own all the same."""
        self._overwritten.add(image.storage)

    def _emit(self, kind: int, shape: abi.Shape, x: Image, y_shape: tuple[int, ...], nhwc: bool, **rest: Any) -> Image:
        y = Image(y_shape, Storage(math.prod(y_shape)), nhwc)
        self.steps.append(Step(kind, shape, x.storage, y.storage, **rest))
        return y

    def in_order(self, image: Any, nhwc: bool) -> Image:
        """The image with that order of memory."""
        image = self.read(image)
        if image.nhwc == nhwc or image.in_both_orders:
            return Image(image.shape, image.storage, nhwc)
        original = self._converted.get(image.storage)
        if original is not None:
            return self.read(original)
        n, c, h, w = image.shape
        kind = abi.TO_NHWC if nhwc else abi.TO_NCHW
        copy = self._emit(kind, abi.Shape(n=n, h=h, w=w, c=c), image, image.shape, nhwc)
        self._converted[copy.storage] = image
        return copy

    def pixels(self, image: Any) -> Image:
        """A 4-dimensional image in NHWC."""
        image = self.in_order(image, True)
        if len(image.shape) != 4:
            raise NotPlanned(f"{self._name()} needs an image of 4 dimensions")
        return image

    # --- operations ---

    def conv(
        self,
        x: Any,
        conv: nn.Conv2d,
        path: Path,
        norm: Optional[functional.BatchNorm] = None,
        residual: Any = None,
        relu: bool = False,
        pool: bool = False,
    ) -> Image:
        x = self.pixels(x)
        if x.shape[1] != conv.weight.shape[1] * conv.groups:
            raise NotPlanned(f"{'.'.join(path)} gets {x.shape[1]} channels")
        geometry: Any = (conv.stride, conv.padding, conv.dilation, conv.groups)
        sizes: Any = (*x.shape[1:2], *conv.weight.shape[:1], conv.weight.shape[2:], *geometry)
        reason = native.supports(Case("conv_bn_act", "cpu", torch.float32, *sizes))
        if reason:
            raise NotPlanned(f"{'.'.join(path)}: {reason}")
        shape = native.conv_shape(x.shape, conv.weight.shape, *geometry, relu=relu, pool=pool)  # type: ignore[misc]
        if min(shape.p, shape.q) < 1:
            raise NotPlanned("the image is smaller than a window")
        y_shape = (shape.n, shape.k, *native.output_size(shape))
        if residual is not None:
            residual = self.pixels(residual)
            if residual.shape != y_shape:
                raise NotPlanned(f"{'.'.join(path)} is added to another shape")
        return self._convolution(x, shape, y_shape, conv.weight, conv.bias, norm, residual, path)

    def _convolution(
        self,
        x: Image,
        shape: abi.Shape,
        y_shape: tuple[int, ...],
        weight: Tensor,
        bias: Optional[Tensor],
        norm: Optional[functional.BatchNorm],
        residual: Optional[Image],
        path: Path,
    ) -> Image:
        counter = getattr(norm, "num_batches_tracked", None)
        for t in _sources(Weights(weight, bias, norm)):
            if (
                t.device.type != "cpu"
                or t.numel() == 0
                or t.is_inference()
                or (t.dtype != torch.float32 and t is not counter)
            ):
                raise NotPlanned(f"{'.'.join(path)} has weights that are no ordinary float32 on the CPU")
        if norm is not None and norm.running_var.shape != weight.shape[:1]:  # type: ignore[union-attr]
            raise NotPlanned(f"{'.'.join(path)} has a norm of another size")
        if not library.supports(shape, "gemm"):
            raise NotPlanned(f"{'.'.join(path)}: the native kernels do not cover it")
        return self._emit(
            abi.CONV,
            shape,
            x,
            y_shape,
            True,
            residual=None if residual is None else residual.storage,
            weights=Weights(weight, bias, norm),
            path=path,
        )

    def prepare(self, step: Step, images: int) -> None:
        """Choose the algorithm of a convolution that will run on so many images at a time, and pack its weights."""
        assert step.weights is not None
        weight, bias, norm = step.weights
        shape = of_images(step.shape, images)
        step.algorithm = algorithm = planner.choose_native(shape, self.threads)

        def pack() -> Pack:
            scale, shift = (None, bias) if norm is None else functional.fold_batch_norm(norm, bias)
            window = weight.detach().reshape(weight.shape[0], -1, shape.r, shape.s)
            packed = self._shelf.copy(library.pack(shape, algorithm, window, scale, threads=self.threads))
            zero = torch.zeros(weight.shape[0], device="cpu")
            return Pack(packed, zero if shift is None else zero.copy_(shift.detach()))

        key = (algorithm, library.variant(), shape.groups, bias is None, norm is not None and norm.eps)
        step.pack = _packs.get(_sources(step.weights), key, pack)

    def linear(self, x: Any, layer: nn.Linear) -> Image:
        x = self.read(x)
        if len(x.shape) != 2 or x.shape[1] != layer.in_features:
            raise NotPlanned(f"{self._name()} gets an input of {len(x.shape)} dimensions, or of another size")
        n, c = x.shape
        k = layer.out_features
        shape = abi.Shape(abi.FLOAT32, n, 1, 1, c, 1, 1, k, 1, 1, 1, 1, 0, 0, 1, 1, 1)
        return self._convolution(x, shape, (n, k), layer.weight, layer.bias, None, None, self._at)

    def pool(
        self,
        x: Any,
        kind: int,
        kernel: Any,
        stride: Any = None,
        padding: Any = 0,
        ceil_mode: bool = False,
    ) -> Image:
        x = self.pixels(x)
        n, c, h, w = x.shape
        kernel, padding = _pair(kernel), _pair(padding)
        stride = kernel if stride is None else _pair(stride)
        if any(2 * pad > size for pad, size in zip(padding, kernel)):
            raise NotPlanned(f"{self._name()} pads by more than half its window")
        p, q = (_pool_extent(size, *sizes, ceil_mode) for size, sizes in zip((h, w), zip(kernel, stride, padding)))
        shape = abi.Shape(abi.FLOAT32, n, h, w, c, p, q, c, *kernel, *stride, *padding, 1, 1, 1)
        return self._emit(kind, shape, x, (n, c, p, q), True)

    def global_avg_pool(self, x: Any, keepdim: bool = True) -> Image:
        x = self.pixels(x)
        n, c, h, w = x.shape
        y = self.pool(x, abi.AVG_POOL, (h, w))
        return y if keepdim else Image((n, c), y.storage, True)

    def add(self, x: Any, residual: Any, relu: bool = False) -> Image:
        """``relu?(x + residual?)``, element by element."""
        x = self.read(x)
        if residual is not None:
            residual = self.in_order(residual, x.nhwc)
            if residual.shape != x.shape:
                raise NotPlanned(f"{self._name()} adds images of different shapes")
        n = x.shape[0]
        shape = abi.Shape(n=n, h=1, w=1, c=x.storage.size // n, relu=relu)
        rest = None if residual is None else residual.storage
        return self._emit(abi.ADD, shape, x, x.shape, x.nhwc, residual=rest)

    def flatten(self, x: Any, start_dim: int = 0, end_dim: int = -1) -> Image:
        x = self.read(x)
        if start_dim != 1 or end_dim not in (-1, len(x.shape) - 1):
            raise NotPlanned(f"{self._name()} flattens other dimensions than [N, C, H, W] -> [N, C * H * W]")
        x = self.in_order(x, False)
        return Image((x.shape[0], math.prod(x.shape[1:])), x.storage, False)


def of_images(shape: abi.Shape, images: int) -> abi.Shape:
    """The same operation on another number of images."""
    copy = abi.Shape.from_buffer_copy(shape)
    copy.n = images
    return copy


def _sources(weights: Weights) -> tuple[Tensor, ...]:
    """The tensors that a pack depends on."""
    weight, bias, norm = weights
    sources = [weight, bias]
    if norm is not None:
        counter = getattr(norm, "num_batches_tracked", None)  # see functional.fold_batch_norm
        sources += [norm.running_var, norm.running_mean, norm.weight, norm.bias, counter]
    return tuple(t for t in sources if t is not None)


@dataclass(frozen=True)
class _At:
    """A child as an argument."""

    module: Any
    path: Path


def _mapped(value: Any, env: dict[fx.Node, Any]) -> Any:
    if isinstance(value, fx.Node):
        return env[value]
    if isinstance(value, tuple) and not hasattr(value, "_fields"):
        return tuple(_mapped(v, env) for v in value)
    if isinstance(value, list):
        return [_mapped(v, env) for v in value]
    return {k: _mapped(v, env) for k, v in value.items()} if isinstance(value, dict) else value


def _pair(value: Any) -> tuple[int, int]:
    one, other = value if isinstance(value, (tuple, list)) else (value, value)
    return one, other


def _pool_extent(size: int, kernel: int, stride: int, padding: int, ceil_mode: bool) -> int:
    free = size + 2 * padding - kernel
    out = (-(-free // stride) if ceil_mode else free // stride) + 1
    if ceil_mode and (out - 1) * stride >= size + padding:
        out -= 1  # the last window must start inside the image or before it
    if out < 1:
        raise NotPlanned("the image is smaller than a window")
    return out


# --- functions and methods in a graph ---------------------------------------------------------------------------------


def _conv_bn_act(
    low: Lowering, x: Any, conv: _At, bn: _At, residual: Any = None, relu: bool = True, inplace_add: bool = False
) -> Image:
    return low.conv(x, conv.module, conv.path, bn.module, residual, relu)


def _stem(low: Lowering, x: Any, conv: _At, bn: _At) -> Image:
    return low.conv(x, conv.module, conv.path, bn.module, relu=True, pool=True)


def _head(low: Lowering, x: Any, layers: tuple[_At, ...]) -> Image:
    y = low.flatten(low.global_avg_pool(x), 1)
    for layer in layers:
        y = low._module(layer.module, layer.path, (y,), {})
    return y


def _channels_last(low: Lowering, x: Any) -> Any:
    return low.in_order(x, True) if isinstance(x, Image) and len(x.shape) == 4 else x


def _laid_out_like(low: Lowering, value: Any, given: Any) -> Any:
    if not isinstance(given, Image) or len(given.shape) != 4 or (given.nhwc and not given.in_both_orders):
        return value

    def restored(leaf: Any) -> Any:
        return low.in_order(leaf, False) if isinstance(leaf, Image) and len(leaf.shape) == 4 else leaf

    return tree_map(restored, value)


def _relu(low: Lowering, x: Any, inplace: bool = False) -> Image:
    y = low.add(x, None, relu=True)
    if inplace:
        low.overwrite(x)
    return y


def _add(low: Lowering, x: Any, other: Any) -> Image:
    return low.add(x, other)


def _add_(low: Lowering, x: Any, other: Any) -> Image:
    y = low.add(x, other)
    low.overwrite(x)
    return y


def _max_pool(
    low: Lowering,
    x: Any,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Image:
    if _pair(dilation) != (1, 1) or return_indices:
        raise NotPlanned(f"{low._name()} pools with dilation or indices")
    return low.pool(x, abi.MAX_POOL, kernel_size, stride, padding, ceil_mode)


def _avg_pool(
    low: Lowering,
    x: Any,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: Optional[int] = None,
) -> Image:
    if (count_include_pad and _pair(padding) != (0, 0)) or divisor_override is not None:
        raise NotPlanned(f"{low._name()} averages with padding or a divisor of its own")
    return low.pool(x, abi.AVG_POOL, kernel_size, stride, padding, ceil_mode)


def _adaptive_avg_pool(low: Lowering, x: Any, output_size: Any) -> Image:
    if output_size not in (1, (1, 1)):
        raise NotPlanned(f"{low._name()} pools to {output_size}")
    return low.global_avg_pool(x)


def _mean(low: Lowering, x: Any, dim: Any, keepdim: bool = False) -> Image:
    if tuple(dim) not in ((2, 3), (-2, -1)):
        raise NotPlanned(f"{low._name()} averages over other dimensions than (2, 3)")
    return low.global_avg_pool(x, keepdim)


def _dropout(low: Lowering, x: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Image:
    if training:
        raise NotPlanned(f"{low._name()} drops out")
    return low.read(x)


def _view(low: Lowering, x: Any, *shape: Any) -> Image:
    """Only the flattening kind, and only where memory is in that order: elsewhere the stock ``view`` raises."""
    x = low.read(x)
    if x.nhwc and not x.in_both_orders:
        raise NotPlanned(f"{low._name()} views an image in channels_last")
    return _reshape(low, x, *shape)


def _reshape(low: Lowering, x: Any, *shape: Any) -> Image:
    x = low.read(x)
    sizes = tuple(shape[0]) if len(shape) == 1 and isinstance(shape[0], (tuple, list)) else shape
    if len(sizes) != 2 or sizes[0] != x.shape[0] or sizes[1] not in (-1, math.prod(x.shape[1:])):
        raise NotPlanned(f"{low._name()} reshapes to {list(sizes)}")
    return low.flatten(x, 1)


def _size(low: Lowering, x: Any, dim: Optional[int] = None) -> Any:
    return x.shape if dim is None else x.shape[dim]


def _getattr(low: Lowering, x: Any, name: str) -> Any:
    if not isinstance(x, Image) or name != "shape":
        raise NotPlanned(f"{low._name()} asks for {name}")
    return x.shape


_CALLS: dict[Any, Callable[..., Any]] = {
    functional.conv_bn_act: _conv_bn_act,
    functional.stem: _stem,
    functional.global_avg_pool: Lowering.global_avg_pool,
    functional.head: _head,
    channels_last: _channels_last,
    laid_out_like: _laid_out_like,
    **dict.fromkeys((F.relu, torch.relu, "relu"), _relu),
    **dict.fromkeys((F.relu_, torch.relu_, "relu_"), lambda low, x: _relu(low, x, inplace=True)),
    **dict.fromkeys((operator.add, torch.add, "add"), _add),
    **dict.fromkeys((operator.iadd, "add_"), _add_),
    **dict.fromkeys((F.max_pool2d, torch.max_pool2d), _max_pool),
    F.avg_pool2d: _avg_pool,
    F.adaptive_avg_pool2d: _adaptive_avg_pool,
    **dict.fromkeys((torch.mean, "mean"), _mean),
    F.dropout: _dropout,
    **dict.fromkeys((torch.flatten, "flatten"), Lowering.flatten),
    "view": _view,
    "reshape": _reshape,
    "size": _size,
    getattr: _getattr,
    OrderedDict: lambda low, items: OrderedDict(items),
}


# --- layers -----------------------------------------------------------------------------------------------------------


def _plain_conv(low: Lowering, conv: nn.Module, x: Image) -> Image:
    reason = conditions.conv_refusal(conv)
    if reason:
        raise NotPlanned(f"{low._name()} {reason}")
    return low.conv(x, conv, low._at)  # type: ignore[arg-type]


def _dropout_layer(low: Lowering, layer: nn.Module, x: Image) -> Image:
    return _dropout(low, x, training=layer.training)


def _max_pool_layer(low: Lowering, pool: Any, x: Image) -> Image:
    return _max_pool(
        low, x, pool.kernel_size, pool.stride, pool.padding, pool.dilation, pool.ceil_mode, pool.return_indices
    )


def _avg_pool_layer(low: Lowering, pool: Any, x: Image) -> Image:
    window = (pool.kernel_size, pool.stride, pool.padding)
    return _avg_pool(low, x, *window, pool.ceil_mode, pool.count_include_pad, pool.divisor_override)


_MODULES: dict[type, Callable[[Lowering, Any, Image], Image]] = {
    nn.Conv2d: _plain_conv,
    nn.Linear: lambda low, layer, x: low.linear(x, layer),
    nn.ReLU: lambda low, layer, x: _relu(low, x, layer.inplace),
    nn.Identity: lambda low, layer, x: low.read(x),
    nn.Dropout: _dropout_layer,
    nn.MaxPool2d: _max_pool_layer,
    nn.AvgPool2d: _avg_pool_layer,
    nn.AdaptiveAvgPool2d: lambda low, layer, x: _adaptive_avg_pool(low, x, layer.output_size),
    nn.Flatten: lambda low, layer, x: low.flatten(x, layer.start_dim, layer.end_dim),
}
