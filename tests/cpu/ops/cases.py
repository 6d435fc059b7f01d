"""Shapes, data, poisoned buffers and tolerances shared by the CPU tests."""

import functools
from typing import NamedTuple, Optional

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from resnet_fast import ops
from resnet_fast.kernels.contract import Case
from resnet_fast.kernels.native import inference as native
from resnet_fast.kernels.native import planner
from resnet_fast.kernels.reference import inference as reference

# The function itself: tests put counters in its place in the module.
_definition = reference.conv_bn_act
_definition_stem = reference.stem

_EPS32 = torch.finfo(torch.float32).eps

HALF = [torch.bfloat16, torch.float16]
SERVED = [torch.float32, *HALF]


def dtype_name(dtype: object) -> Optional[str]:
    """For ``parametrize(ids=...)``."""
    return str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else None


def cpu_implementations() -> list[str]:
    """Names of the implementations that serve float32 on this CPU; Triton's interpreter has a test lane of its own."""
    case = Case("conv_bn_act", "cpu", torch.float32, 64, 64, (3, 3), (1, 1), (1, 1))
    return [name for name, module in ops.IMPLEMENTATIONS.items() if name != "triton" and not module.supports(case)]


class Conv(NamedTuple):
    """One fused convolution, without its data."""

    n: int
    c: int
    h: int
    w: int
    k: int
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    @property
    def geometry(self) -> tuple:
        return self.stride, self.padding, self.dilation, self.groups

    @property
    def taps(self) -> int:
        """Length of the sum behind one output."""
        return self.c // self.groups * self.kernel[0] * self.kernel[1]

    @property
    def output(self) -> tuple[int, int, int, int]:
        sizes = [
            (size + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1
            for size, pad, dilation, kernel, stride in zip(
                (self.h, self.w), self.padding, self.dilation, self.kernel, self.stride
            )
        ]
        return self.n, self.k, sizes[0], sizes[1]

    @property
    def blind(self) -> bool:
        """Whether some output sees nothing but padding: there oneDNN reads wild addresses, and must not be called."""
        sides = zip((self.h, self.w), self.kernel, self.padding, self.dilation)
        return any(padding > dilation * (kernel - 1) or size < dilation for size, kernel, padding, dilation in sides)

    def case(self, dtype: torch.dtype, op: str = "conv_bn_act") -> Case:
        return Case(op, "cpu", dtype, self.c, self.k, self.kernel, *self.geometry)


WEIRD = {
    "round": Conv(2, 64, 8, 8, 64),
    "batch 1": Conv(1, 32, 7, 7, 32),
    "odd sizes": Conv(3, 20, 9, 11, 10),
    "1 channel": Conv(2, 1, 9, 11, 10),
    "3 channels to 1": Conv(1, 3, 11, 9, 1),
    "1 to 1": Conv(2, 1, 5, 4, 1),
    "17 channels": Conv(2, 17, 7, 9, 33),
    "smaller than the kernel": Conv(2, 16, 2, 1, 16, (5, 5), padding=(2, 2)),
    "one pixel": Conv(3, 32, 1, 1, 20),
    "one row": Conv(2, 13, 1, 17, 9, (1, 3), padding=(0, 1)),
    "5x3, asymmetric": Conv(2, 17, 9, 8, 33, (5, 3), (2, 1), (2, 0), (1, 2)),
    "3x5, one side padded": Conv(1, 16, 7, 9, 12, (3, 5), (1, 2), (0, 2)),
    "padding beyond the kernel": Conv(1, 6, 4, 5, 7, (3, 3), padding=(4, 3)),
    "stride beyond the kernel": Conv(2, 8, 11, 10, 8, (2, 2), (3, 4), (0, 1)),
    "dilation past the border": Conv(1, 16, 5, 5, 16, padding=(4, 4), dilation=(4, 4)),
    "dilation 2, stride 2": Conv(1, 24, 9, 10, 16, stride=(2, 2), padding=(2, 2), dilation=(2, 2)),
    "1x1, odd channels": Conv(2, 33, 5, 7, 17, (1, 1), padding=(0, 0)),
    "1x1/2": Conv(2, 32, 9, 8, 48, (1, 1), (2, 2), (0, 0)),
    "1x1 with padding": Conv(1, 32, 4, 5, 16, (1, 1), padding=(1, 1)),
    "2 groups": Conv(1, 48, 6, 7, 64, groups=2),
    "3 groups of 5": Conv(2, 15, 7, 6, 30, groups=3),
    "32 groups of 4": Conv(1, 128, 6, 5, 128, stride=(2, 2), groups=32),
    "1x1 in groups": Conv(1, 32, 5, 6, 64, (1, 1), padding=(0, 0), groups=4),
    "depthwise": Conv(1, 40, 7, 6, 40, groups=40),
    "depthwise, prime, 2 outputs each": Conv(1, 37, 5, 6, 74, stride=(2, 2), groups=37),
}


@functools.cache
def network_convs() -> dict[str, Conv]:
    """Every distinct convolution of ResNet-18, ResNet-50 and ResNeXt-50, its channels kept, its images made small."""
    found: dict[str, Conv] = {}
    for builder in (torchvision.models.resnet18, torchvision.models.resnet50, torchvision.models.resnext50_32x4d):
        with torch.device("meta"):
            model = builder()
        for conv in (m for m in model.modules() if isinstance(m, nn.Conv2d)):
            name = f"{conv.in_channels}-{conv.out_channels} {conv.kernel_size[0]}x{conv.kernel_size[1]}"
            name += f"/{conv.stride[0]}" + (f" groups {conv.groups}" if conv.groups > 1 else "")
            sizes: tuple = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups)
            height, width = (15, 18) if conv.in_channels == 3 else (6, 7) if conv.out_channels < 512 else (4, 3)
            found.setdefault(name, Conv(2, conv.in_channels, height, width, conv.out_channels, *sizes))
    return found


class Norm(NamedTuple):
    """What batch norm holds, in float32."""

    mean: Tensor
    var: Tensor
    weight: Tensor
    bias: Tensor
    eps: float = 1e-5

    def folded(self) -> tuple[Tensor, Tensor]:
        """Scale and shift, rounded to float32 once."""
        scale = self.weight.double() / (self.var.double() + self.eps).sqrt()
        return scale.float(), (self.bias.double() - self.mean.double() * scale).float()


class Data(NamedTuple):
    """One call of ``conv_bn_act``, with the batch norm that scale and shift come from."""

    conv: Conv
    x: Tensor
    weight: Tensor
    scale: Tensor
    shift: Tensor
    residual: Tensor
    norm: Norm

    def args(self, residual: bool, relu: bool) -> tuple:
        images = (self.x, self.weight, self.scale, self.shift)
        return (*images, self.residual if residual else None, *self.conv.geometry, relu)


def make(conv: Conv, dtype: torch.dtype, seed: int = 0, norm: Optional[Norm] = None) -> Data:
    """Data whose results are of the order of 1, with one zero and some negative batch-norm weights."""
    generator = torch.Generator().manual_seed(seed)
    randn = functools.partial(torch.randn, generator=generator)
    if norm is None:
        # Not too close to 0, where float16 has to leave oneDNN; test_extreme_statistics goes there.
        gamma = (torch.rand(conv.k, generator=generator) + 0.5) * randn(conv.k).sign()
        norm = Norm(randn(conv.k) / 2, torch.rand(conv.k, generator=generator) + 0.3, gamma, randn(conv.k))
        norm.weight[0] = 0.0 if conv.k > 1 else 1.0  # a zero-initialised last batch norm
    x = randn(conv.n, conv.c, conv.h, conv.w)
    weight = randn(conv.k, conv.c // conv.groups, *conv.kernel) / max(conv.taps, 1) ** 0.5
    residual = randn(conv.output)
    return Data(conv, nhwc(x.to(dtype)), weight.to(dtype), *norm.folded(), nhwc(residual.to(dtype)), norm)


def nhwc(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


class Poison:
    """Places tensors between borders of NaN; ``check`` says whether anything, tensor or border, was written.

    A read beyond a tensor makes its result NaN, which the comparison with the definition then finds.
    """

    def __init__(self, border: int = 4096) -> None:
        self.border = border
        self._buffers: list[tuple[Tensor, Tensor]] = []

    def __call__(self, tensor: Tensor) -> Tensor:
        """A copy of a dense ``tensor``, in its layout, inside a larger poisoned buffer."""
        size = tensor.numel()
        buffer = torch.full((size + 2 * self.border,), torch.nan, dtype=tensor.dtype)
        view = buffer.as_strided(tensor.shape, tensor.stride(), self.border)
        view.copy_(tensor)
        self._buffers.append((buffer, buffer.clone()))
        return view

    def args(self, args: tuple) -> tuple:
        return tuple(self(arg) if isinstance(arg, Tensor) else arg for arg in args)

    def check(self) -> None:
        assert self._buffers, "nothing was poisoned"
        for buffer, before in self._buffers:
            assert torch.equal(buffer.view(torch.uint8), before.view(torch.uint8)), "an input or its border was written"


# --- the right result, and how far from it a result may be ------------------------------------------------------------


def _double(args: tuple) -> tuple:
    return tuple(arg.double() if isinstance(arg, Tensor) else arg for arg in args)


def exact_conv(args: tuple) -> Tensor:
    """The definition in float64, on the very inputs of the call."""
    return _definition(*_double(args))


def exact_stem(args: tuple) -> Tensor:
    return _definition_stem(*_double(args))


def unfused(data: Data, residual: bool, relu: bool, dtype: Optional[torch.dtype] = None) -> Tensor:
    """What a user has now: PyTorch's convolution, batch norm, addition and ReLU one after the other, in one dtype."""
    dtype = dtype or data.x.dtype
    y = F.conv2d(data.x.to(dtype), data.weight.to(dtype), None, *data.conv.geometry)
    norm = data.norm
    y = F.batch_norm(y, norm.mean, norm.var, norm.weight, norm.bias, False, 0.0, norm.eps)
    if residual:
        y = y + data.residual.to(dtype)
    return F.relu(y) if relu else y


WINOGRAD_TILES = {"winograd2": 2, "winograd4": 4, "winograd_stem": 4}
"""Sides of the output tiles of Winograd's algorithms."""


def winograd(args: tuple) -> int:
    """Side of Winograd's output tiles, if a call with these arguments is served so here and now; else 0."""
    x, weight, _, _, _, stride, padding, dilation, groups, relu = args
    kernel = (weight.shape[2], weight.shape[3])
    geometry = (stride, padding, dilation, groups)
    case = Case("conv_bn_act", "cpu", x.dtype, x.shape[1], weight.shape[0], kernel, *geometry)
    if ops.implementation_for(case) != "native":
        return 0
    shape = native.conv_shape(x.shape, weight.shape, *geometry, relu, False)
    return WINOGRAD_TILES.get(planner.choose(shape, torch.get_num_threads()), 0)


def tiles_with(marked: Tensor, tile: int) -> Tensor:
    """Every output, in all channels, that shares a tile of Winograd's algorithm with one that is ``marked``.

    Its transforms mix the pixels under a tile, so that NaN and infinities spread over the whole of it, mostly as NaN.
    """
    high, wide = marked.shape[2:]
    any_channel = F.pad(marked.any(1, keepdim=True).float(), (0, -wide % tile, 0, -high % tile))
    tiles = F.max_pool2d(any_channel, tile).repeat_interleave(tile, 2).repeat_interleave(tile, 3)
    return tiles[..., :high, :wide].bool().expand_as(marked)


def tolerance(args: tuple, exact: Tensor, pytorch: Optional[Tensor], tile: Optional[int] = None) -> Tensor:
    """How far each element of a right result may be from ``exact``: twice PyTorch's error, plus a floor.

    PyTorch's error is the largest of its unfused operators, in the same dtype, in the same channel: channels differ by
    orders of magnitude once batch norm is folded in. It can happen to be tiny where there are few outputs, and a fused
    op rounds in other places, hence the floor, which is a sum of

    - the roundings of the result and of the shift to the dtype, half an ulp of each;
    - the rounding of the scaled weight to the dtype: n independent errors of up to half an ulp of a product, whose sum
      stays under 2 * eps / sqrt(12) * (root of the sum of the squared products) in 999 of 1000 cases and under 1.2
      times eps times that root for any number of outputs that a test has;
    - n float32 additions. The partial sums of products of random sign are of the order of the same root, or of the
      result where that is larger, and each addition errs by half an ulp of one, again with random sign: sqrt(n) *
      eps32 * that size.

    Winograd's algorithm may err by 5e-5 of the channel's largest output, or of the same root if that is larger (the
    bound of design.md, section 3): its transforms add numbers many times as large as the result, whatever its size.
    ``tile`` is the side of its output tiles, 0 where another algorithm serves, None to ask ``winograd``.
    """
    x, weight, scale, shift, residual, *geometry, _ = args
    eps = torch.finfo(x.dtype).eps
    folded = weight.double() * scale.double().view(-1, 1, 1, 1)
    squares = F.conv2d(x.double().nan_to_num(0, 0, 0).square(), folded.nan_to_num(0, 0, 0).square(), None, *geometry)
    vector = shift.double().abs().view(1, -1, 1, 1)
    extra = vector.square() + (0 if residual is None else residual.double().nan_to_num(0, 0, 0).square())
    terms = weight[0].numel() + 3
    floor = eps / 2 * (exact.nan_to_num(0, 0, 0).abs() + vector) + 1.2 * eps * squares.sqrt()
    partial = (squares + extra + exact.nan_to_num(0, 0, 0).square()).sqrt()
    floor = floor + terms**0.5 * _EPS32 * partial + torch.finfo(x.dtype).smallest_normal * eps
    if winograd(args) if tile is None else tile:
        floor = floor + 5e-5 * squares.sqrt().maximum(exact.nan_to_num(0, 0, 0).abs()).amax((0, 2, 3), keepdim=True)
    if pytorch is None or pytorch.numel() == 0:
        return floor
    error = (pytorch.double() - exact).abs().nan_to_num(0, 0, 0)  # it may overflow where we need not
    # Each of its three roundings is at most half an ulp of something of this size. A larger error is a bug of PyTorch
    # (oneDNN has some), which excuses nothing.
    sane = 4 * eps * (exact.nan_to_num(0, 0, 0).abs() + vector + extra.sqrt() + squares.sqrt() * terms**0.5)
    return floor + 2 * error.minimum(sane).amax((0, 2, 3), keepdim=True)


def assert_close(actual: Tensor, exact: Tensor, allowed: Tensor) -> None:
    """Every element within ``allowed``; NaN and infinities exactly where ``exact`` has them in the result's dtype."""
    assert actual.shape == exact.shape
    expected = exact.to(actual.dtype)
    finite = expected.isfinite()
    assert torch.equal(actual.isnan(), expected.isnan()), "NaN in other places"
    infinite = expected.isinf()
    assert torch.equal(actual[infinite], expected[infinite]), "infinities in other places"
    excess = (actual.double() - exact).abs()[finite] / allowed.expand_as(exact)[finite]
    assert excess.numel() == 0 or excess.max() <= 1, f"error is {excess.max():.3g} times the tolerance"


def assert_channels_last(y: Tensor) -> None:
    assert y.is_contiguous(memory_format=torch.channels_last), f"strides {y.stride()} of shape {tuple(y.shape)}"


def stock_error(function, *args, **kwargs) -> BaseException:
    """What the stock module raises; that it raises is part of the test."""
    try:
        function(*args, **kwargs)
    except Exception as error:
        return error
    raise AssertionError("the stock module accepts this")
