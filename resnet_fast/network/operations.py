"""The operations of the native library, each on images that have a shape but no data: what is known becomes a step."""

import math
from dataclasses import dataclass, field
from typing import Any, Optional

import torch
from torch import nn

from resnet_fast.graph import batch_norm, functional
from resnet_fast.graph.conditions import Path
from resnet_fast.graph.ranges import ranges_of
from resnet_fast.kernels.contract import Case
from resnet_fast.kernels.native import abi, library, planner
from resnet_fast.kernels.native import inference as native
from resnet_fast.kernels.packing import PackCache
from resnet_fast.network import memory
from resnet_fast.network.precision import Quantised, quantise_weights, requantised
from resnet_fast.network.steps import Image, NotPlanned, Pack, Step, Storage, Weights, of_images, sources

_packs = PackCache()
_CPU = torch.device("cpu")


@dataclass
class Steps:
    """Makes the steps, one operation after another."""

    threads: int
    device: torch.device = _CPU
    native: bool = True  # whether the native library is to run them
    steps: list[Step] = field(default_factory=list)
    at: Path = ()  # the module whose operation it is
    _overwritten: set[Storage] = field(default_factory=set)  # by a forward that works in place
    _converted: dict[Storage, Image] = field(default_factory=dict)  # memory of a copy -> what it is a copy of
    _shelf: memory.Shelf = field(default_factory=memory.Shelf)

    def name(self) -> str:
        return ".".join(self.at) or "it"

    # --- memory ---

    def read(self, image: Any) -> Image:
        if not isinstance(image, Image):
            raise NotPlanned(f"{self.name()} computes with what is no image")
        if image.storage in self._overwritten:
            raise NotPlanned(f"{self.name()} reads what was written over")
        return image

    def overwrite(self, image: Image) -> None:
        """Called by operations in place, whose result gets memory of its own all the same."""
        self._overwritten.add(image.storage)

    def overwrites(self, image: Image) -> bool:
        return image.storage in self._overwritten

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
            raise NotPlanned(f"{self.name()} needs an image of 4 dimensions")
        return image

    # --- operations ---

    def conv(
        self,
        x: Any,
        conv: nn.Conv2d,
        path: Path,
        norm: Optional[batch_norm.BatchNorm] = None,
        residual: Any = None,
        relu: bool = False,
        pool: bool = False,
    ) -> Image:
        x = self.pixels(x)
        if x.shape[1] != conv.weight.shape[1] * conv.groups:
            raise NotPlanned(f"{'.'.join(path)} gets {x.shape[1]} channels")
        geometry = functional.geometry_of(conv)
        sizes: Any = (*x.shape[1:2], *conv.weight.shape[:1], conv.weight.shape[2:], *geometry)
        reason = self.native and native.supports(Case("conv_bn_act", "cpu", torch.float32, *sizes))
        if reason:
            raise NotPlanned(f"{'.'.join(path)}: {reason}")
        shape = native.conv_shape(x.shape, conv.weight.shape, *geometry, relu=relu, pool=pool)
        if min(shape.p, shape.q) < 1:
            raise NotPlanned("the image is smaller than a window")
        y_shape = (shape.n, shape.k, *native.output_size(shape))
        if residual is not None:
            residual = self.pixels(residual)
            if residual.shape != y_shape:
                raise NotPlanned(f"{'.'.join(path)} is added to another shape")
        return self._convolution(x, shape, y_shape, conv, norm, residual, path)

    def _convolution(
        self,
        x: Image,
        shape: abi.Shape,
        y_shape: tuple[int, ...],
        layer: Any,
        norm: Optional[batch_norm.BatchNorm],
        residual: Optional[Image],
        path: Path,
    ) -> Image:
        weight, bias = layer.weight, layer.bias
        counter = getattr(norm, "num_batches_tracked", None)
        for t in sources(Weights(weight, bias, norm)):
            if (
                t.device != self.device
                or t.numel() == 0
                or t.is_inference()
                or (t.dtype != torch.float32 and t is not counter)
            ):
                where = "the CPU" if self.device == _CPU else str(self.device)
                raise NotPlanned(f"{'.'.join(path)} has weights that are no ordinary float32 on {where}")
        sized = norm is not None and not isinstance(norm, batch_norm.Affine)
        if sized and norm.running_var.shape != weight.shape[:1]:  # type: ignore[union-attr]
            raise NotPlanned(f"{'.'.join(path)} has a norm of another size")
        if self.native and not library.supports(shape, "gemm"):
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
            ranges=ranges_of(layer),
        )

    def prepare(self, step: Step, images: int) -> None:
        """Choose the algorithm of a convolution that will run on so many images at a time, and pack its weights."""
        assert step.weights is not None
        shape = of_images(step.shape, images)
        step.algorithm = planner.choose_native(shape, self.threads)
        norm = step.weights.norm
        key = (
            *(step.in_int8, step.algorithm, library.variant(), shape.groups),
            *(step.weights.bias is None, norm and batch_norm.settings_of(norm)),
        )
        pack = self._pack_int8 if step.in_int8 else self._pack
        made = _packs.get(sources(step.weights), key, lambda: pack(step, shape))
        if step.in_int8:
            scale, shift = requantised(step, made)
            made = Pack(made.weight, shift, scale)
        step.pack = made

    def _pack(self, step: Step, shape: abi.Shape) -> Pack:
        assert step.weights is not None
        weight, bias, norm = step.weights
        scale, shift = (None, bias) if norm is None else batch_norm.fold_batch_norm(norm, bias)
        window = weight.detach().reshape(weight.shape[0], -1, shape.r, shape.s)
        packed = self._shelf.copy(library.pack(shape, step.algorithm, window, scale, threads=self.threads))
        zero = torch.zeros(weight.shape[0], device="cpu")
        return Pack(packed, zero if shift is None else zero.copy_(shift.detach()))

    def _pack_int8(self, step: Step, shape: abi.Shape) -> Quantised:
        """The weight packed; scale and shift of the convolution are made for every pair of scales around it."""
        made = quantise_weights(step)
        packed = library.pack(shape, step.algorithm, made.weight, threads=self.threads)
        return made._replace(weight=self._shelf.copy(packed))

    def linear(self, x: Any, layer: nn.Linear) -> Image:
        x = self.read(x)
        if len(x.shape) != 2 or x.shape[1] != layer.in_features:
            raise NotPlanned(f"{self.name()} gets an input of {len(x.shape)} dimensions, or of another size")
        n, c = x.shape
        k = layer.out_features
        shape = abi.Shape(abi.FLOAT32, n, 1, 1, c, 1, 1, k, 1, 1, 1, 1, 0, 0, 1, 1, 1)
        return self._convolution(x, shape, (n, k), layer, None, None, self.at)

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
        kernel, padding = pair(kernel), pair(padding)
        stride = kernel if stride is None else pair(stride)
        if any(2 * pad > size for pad, size in zip(padding, kernel)):
            raise NotPlanned(f"{self.name()} pads by more than half its window")
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
                raise NotPlanned(f"{self.name()} adds images of different shapes")
        n = x.shape[0]
        shape = abi.Shape(n=n, h=1, w=1, c=x.storage.size // n, relu=relu)
        rest = None if residual is None else residual.storage
        return self._emit(abi.ADD, shape, x, x.shape, x.nhwc, residual=rest)

    def flatten(self, x: Any, start_dim: int = 0, end_dim: int = -1) -> Image:
        x = self.read(x)
        if start_dim != 1 or end_dim not in (-1, len(x.shape) - 1):
            raise NotPlanned(f"{self.name()} flattens other dimensions than [N, C, H, W] -> [N, C * H * W]")
        x = self.in_order(x, False)
        return Image((x.shape[0], math.prod(x.shape[1:])), x.storage, False)


def pair(value: Any) -> tuple[int, int]:
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
