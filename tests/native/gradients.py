"""Runs weight gradients and covariances with their operands placed where a wrong access shows."""

import functools
import itertools
import sys
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_fast.kernels.contract import Affine, Geometry
from resnet_fast.kernels.native import inference as native
from resnet_fast.kernels.native import library, wgrad
from resnet_fast.kernels.reference import training as reference_training
from resnet_fast.kernels.reference.training import activate
from tests.cpu.ops.cases import WEIRD, WINOGRAD_TILES, Conv, make, nhwc
from tests.native.harness import TRICKY, Guarded, Place, placed

EPS = torch.finfo(torch.float32).eps

SHAPES = {
    **{name: conv for name, conv in {**WEIRD, **TRICKY}.items() if conv.c * conv.k <= 64 * 64},
    "several chunks of pixels": Conv(3, 16, 15, 14, 30, (1, 1), padding=(0, 0)),
    "several chunks of pixels, odd channels": Conv(3, 5, 21, 19, 15, stride=(1, 2), dilation=(1, 2)),
    "several chunks of tiles": Conv(5, 18, 17, 15, 17),
    "several blocks": Conv(1, 70, 6, 5, 150),
    "one block": Conv(2, 17, 13, 14, 64, (1, 1), padding=(0, 0)),
    "one narrow block": Conv(2, 16, 13, 14, 32, stride=(2, 1)),
    "no image": Conv(0, 16, 6, 5, 17),
}
"""Convolutions at the edges of the kernels: of the image, of a tile, of a vector of channels, of a chunk."""


def prologue_of(channels: int, seed: int = 1) -> Affine:
    generator = torch.Generator().manual_seed(seed)
    scale, shift = torch.rand(channels, generator=generator) + 0.5, torch.randn(channels, generator=generator)
    return Affine(scale * shift.sign(), shift)


def double(affine: Optional[Affine]) -> Optional[Affine]:
    return affine and Affine(*(v.double() for v in affine))


class Wgrad:
    """The gradient of a convolution's weight: its operands, the right result, and how far from it one may be."""

    def __init__(self, conv: Conv, prologue: bool, seed: int = 0) -> None:
        data = make(conv, torch.float32, seed)
        self.conv, self.x, self.weight = conv, data.x, data.weight
        self.dy = nhwc(torch.randn(conv.output, generator=torch.Generator().manual_seed(seed + 1)))
        self.prologue = prologue_of(conv.c) if prologue else None
        self.geometry = Geometry(*conv.geometry)
        self.shape = native.conv_shape(self.x.shape, self.weight.shape, *conv.geometry, False, False)

    @property
    def args(self) -> tuple:
        return self.dy, self.x, self.prologue, self.weight, self.geometry

    def algorithms(self) -> list[str]:
        return [name for name in wgrad.ALGORITHMS if library.wgrad_supports(self.shape, name)]

    @functools.cached_property
    def exact(self) -> Tensor:
        return self._exact(self.dy.double(), activate(self.x.double(), double(self.prologue)))

    def _exact(self, dy: Tensor, a: Tensor) -> Tensor:
        return reference_training.wgrad(dy, a, None, self.weight.double(), self.geometry)

    @functools.cached_property
    def size(self) -> float:
        """Of the largest element, or of the root of the sum of its squared products, where that is larger."""
        a = activate(self.x.double(), double(self.prologue))
        roots = self._exact(self.dy.double().square(), a.square()).sqrt()
        return max(self.exact.abs().max().item(), roots.max().item())

    @functools.cached_property
    def pytorch_error(self) -> float:
        if self.conv.blind or not self.conv.n:  # see Conv.blind
            return 0.0
        return (reference_training.wgrad(*self.args).double() - self.exact).abs().max().item()

    def check(self, actual: Tensor, algorithm: str) -> None:
        """Within twice PyTorch's error and four roundings of the largest element; Winograd's within 5e-5 of that."""
        assert actual.shape == self.weight.shape
        relative = 5e-5 if algorithm in WINOGRAD_TILES else 4 * EPS
        error, allowed = (
            (actual.double() - self.exact).abs().max().item(),
            2 * self.pytorch_error + relative * self.size,
        )
        assert error <= allowed, f"{algorithm}: error is {error / allowed:.3g} times the tolerance"

    def run(self, algorithm: str, place: Place, threads: int = 1) -> Tensor:
        """The gradient by one algorithm; checks that no input was written."""
        inputs = [placed(t, place) for t in (self.dy, self.x, *(self.prologue or ()))]
        before = [t.clone() for t in inputs]
        k, c, r, s = self.weight.shape
        dw = _output(place, k, r, s, c)
        vectors = (inputs[2], inputs[3]) if self.prologue else None
        library.wgrad(self.shape, algorithm, inputs[0], inputs[1], vectors, dw, threads)
        _check_unwritten(inputs, before)
        return dw.permute(0, 3, 1, 2)


def run_gram(x: Tensor, prologue: Optional[Affine], stride: tuple, place: Place, threads: int = 1) -> tuple:
    """Mean and covariance; checks that no input was written."""
    c = x.shape[1]
    shape = native.conv_shape(x.shape, (c, c, 1, 1), stride, (0, 0), (1, 1), 1, False, False)
    inputs = [placed(t, place) for t in (x, *(prologue or ()))]
    before = [t.clone() for t in inputs]
    mean, covariance = _output(place, c), _output(place, c, c)
    vectors = (inputs[1], inputs[2]) if prologue else None
    library.gram(shape, inputs[0], vectors, mean, covariance, threads)
    _check_unwritten(inputs, before)
    return mean, covariance


def check_gram(actual: tuple, x: Tensor, prologue: Optional[Affine], stride: tuple) -> None:
    """The mean within its own rounding, and one of the values'; the covariance relative to the deviations of its two
    channels: twice PyTorch's error, four roundings, and those of the values and of the mean."""
    mean, covariance = reference_training.gram(x.double(), double(prologue), stride)
    _, pytorch = reference_training.gram(x, prologue, stride)
    largest = x.abs().amax((0, 2, 3)).double()
    if prologue is not None:
        largest = largest * prologue.scale.abs() + prologue.shift.abs()
    assert ((actual[0].double() - mean).abs() <= 2 * EPS * largest).all()
    assert torch.equal(actual[1], actual[1].T)
    deviations = covariance.diag().sqrt()
    size = deviations.outer(deviations)
    # A prologue rounds its result, of which little may be left after the mean is taken away.
    rounding = 0.0 if prologue is None else EPS * (largest.outer(deviations) + deviations.outer(largest))
    allowed = 2 * (pytorch.double() - covariance).abs().max() + 4 * EPS * size + rounding + (EPS * largest).square()
    assert ((actual[1].double() - covariance).abs() <= allowed).all()


def _output(place: Place, *shape: int) -> Tensor:
    size = 4 * torch.Size(shape).numel()
    return torch.from_numpy(place(size)).fill_(0xFF).view(torch.float32).view(shape)


def _check_unwritten(inputs: list[Tensor], before: list[Tensor]) -> None:
    for tensor, copy in zip(inputs, before):
        assert torch.equal(tensor.view(torch.uint8), copy.view(torch.uint8)), "an input was written"


def main(variant: str) -> None:
    """Everything between pages without access; a program of its own, because a wrong access ends it."""
    torch.set_num_threads(1)
    library.select(variant)
    for at_end, conv, prologue in itertools.product((False, True), SHAPES.values(), (False, True)):
        case = Wgrad(conv, prologue)
        edge = "at the end" if at_end else "at the start"
        for algorithm in case.algorithms():
            print(variant, algorithm, edge, "with a prologue" if prologue else "", conv, flush=True)
            case.check(case.run(algorithm, Guarded(at_end)), algorithm)
        if conv.n:
            stride, x = conv.stride, F.pad(case.x, (0, 1, 0, 0))
            print(variant, "gram", edge, tuple(x.shape), stride, flush=True)
            check_gram(run_gram(x, case.prologue, stride, Guarded(at_end)), x, case.prologue, stride)
    print("done")


if __name__ == "__main__":
    main(sys.argv[1])
