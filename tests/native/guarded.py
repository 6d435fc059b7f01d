"""Runs every algorithm between pages without access; a program of its own, because a wrong access ends it."""

import torch

from resnet_fast.kernels.native import abi, library, passes
from resnet_fast.kernels.native.abi import Shape
from tests.cpu.ops.cases import Conv, make
from tests.native import int8_cases
from tests.native.harness import TRICKY, Expected, Guarded, algorithms_for, convolve, placed, resnet_convs, run
from tests.native.pass_cases import SHAPES, Memory, everything
from tests.native.pass_cases import make as make_passes


def _random_convs(count: int) -> list[Conv]:
    """3x3 convolutions and others, with sides and channels around those of tiles and vectors."""
    generator = torch.Generator().manual_seed(0)

    def one_of(*values: int) -> int:
        return values[int(torch.randint(len(values), (1,), generator=generator))]

    convs = []
    for i in range(count):
        r, s = (3, 3) if i % 2 else (one_of(1, 2, 3, 5), one_of(1, 3, 4))
        stride = (1, 1) if i % 2 else (one_of(1, 2), one_of(1, 2, 3))
        padding = (one_of(0, 1, 2), one_of(0, 1, 3))
        c, k = one_of(1, 3, 4, 7, 8, 9, 15, 16, 17, 33), one_of(1, 4, 5, 8, 15, 16, 17, 31, 32, 33)
        convs.append(Conv(one_of(1, 2), c, one_of(5, 6, 7, 9), one_of(5, 8, 11), k, (r, s), stride, padding))
    return convs


def main(variant: str) -> None:
    torch.set_num_threads(1)
    library.select(variant)
    for at_end in (True, False):
        print("at their ends" if at_end else "at their starts", flush=True)
        _everything(variant, at_end)
    print("done")


def _everything(variant: str, at_end: bool) -> None:
    small = [conv for conv in resnet_convs().values() if conv.c * conv.k <= 128 * 128]
    for conv in [*TRICKY.values(), *small, *_random_convs(60)]:
        data = make(conv, torch.float32)
        for pool in (False, True):
            algorithms = algorithms_for(conv, pool)
            expected = Expected(data, not pool, True, pool) if algorithms else None
            for algorithm in algorithms:
                print(variant, algorithm, "with a pool" if pool else "", conv, flush=True)
                actual = convolve(data, algorithm, not pool, True, Guarded(at_end), pool)
                expected.check(actual, algorithm)
    for conv in [*TRICKY.values(), *small, *_random_convs(60)]:
        numbers = int8_cases.make(conv)
        for pool in (False, True):
            for algorithm in int8_cases.algorithms_for(conv, pool):
                print(variant, "int8", algorithm, "with a pool" if pool else "", conv, flush=True)
                for to_float in (False,) if pool else (False, True):
                    flags = (not pool, True, to_float)
                    y = int8_cases.convolve(numbers, algorithm, *flags, Guarded(at_end), pool)
                    assert torch.equal(y, int8_cases.exact(numbers, *flags, pool))
    for n, c, h, w in ((1, 1, 1, 1), (2, 3, 5, 4), (1, 16, 3, 3), (1, 17, 6, 5), (3, 40, 2, 7)):
        print(variant, "pools, sum, layouts", (n, c, h, w), flush=True)
        x, place = torch.randn(n, c, h, w), Guarded(at_end)
        image, plain, size = placed(x, place), placed(x.flatten(), place), (n, h, w, c)
        shape = Shape(abi.FLOAT32, n, h, w, c, h, w, c, 3, 3, 1, 1, 1, 1, 1, 1, 1, 0, 0)
        for kind in (abi.MAX_POOL, abi.AVG_POOL, abi.ADD, abi.TO_NCHW):
            run(kind, shape, image, size, place, residual=image if kind == abi.ADD else None)
        run(abi.TO_NHWC, shape, plain, size, place)
    for name in SHAPES:
        print(variant, "training's passes", name, flush=True)
        memory = Memory(Guarded(at_end))
        passes._image = memory.image
        everything(memory.copy(make_passes(name)))
