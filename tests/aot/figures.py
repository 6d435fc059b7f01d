"""The figures of ``docs/kernels.md``: ``python -m tests.aot.figures [FAMILY ...]`` compiles and prints its tables.

Tiles are given here, not picked, wherever a kernel can be given one: the page explains kernels, and stays right when
the tables of tiles change. Nothing is run and no GPU is needed.
"""

import argparse
import functools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, Optional

import torch

from resnet_fast.kernels.contract import Affine, Gate, Geometry
from resnet_fast.kernels.triton.chain import plan_conv_chain
from resnet_fast.kernels.triton.classifier import plan_head
from resnet_fast.kernels.triton.conv_quantised import plan_conv_quantised
from resnet_fast.kernels.triton.dgrad import plan_dgrad, plan_dgrad_expand
from resnet_fast.kernels.triton.forward import plan_conv_bn_act, plan_conv_statistics
from resnet_fast.kernels.triton.gram import plan_gram
from resnet_fast.kernels.triton.plan import Launch, Plan
from resnet_fast.kernels.triton.pool import plan_global_avg_pool, plan_tail_pool
from resnet_fast.kernels.triton.quantise import plan_quantise
from resnet_fast.kernels.triton.tail import plan_tail
from resnet_fast.kernels.triton.tail_backward import plan_bn_backward, plan_tail_backward, plan_tail_pool_backward
from resnet_fast.kernels.triton.tiles import Tile
from resnet_fast.kernels.triton.wgrad import plan_wgrad
from tests.aot.checks import resident_programs
from tests.aot.layers import DTYPES, float32_precision, image
from tests.aot.offline import Compiled, Worker

_HALF, _BATCH = torch.float16, 128
_MMA = Tile(128, 128, 64, 8, 3, False)
_WIDE = Tile(128, 256, 64, 8, 3, True)
_MFMA = Tile(128, 128, 64, 8, 2, False)
_SMALL = Tile(64, 64, 64, 4, 4, False)
_PORTED = (("sm_80", _MMA), ("sm_90", _MMA), ("sm_90", _WIDE), ("sm_100", _MMA), ("gfx942", _MFMA))

PAGE = Path(__file__).parents[2] / "docs/kernels.md"
HEADER = "| what | target | tile | loop / products | registers | shared memory | spills | programs |"


class Entry(NamedTuple):
    """One row: a launch of a plan, and what the page calls it."""

    what: str
    architecture: str
    plan: Plan
    at: int = 0

    @property
    def launch(self) -> Launch:
        return self.plan.launches[self.at]


def _vector(size: int) -> torch.Tensor:
    return torch.empty(size, device="meta")


def _affine(size: int) -> Affine:
    return Affine(_vector(size), _vector(size))


def _conv(
    architecture: str,
    tile: Tile,
    c: int,
    size: int,
    k: int,
    kernel: int = 3,
    stride: int = 1,
    groups: int = 1,
    residual: bool = False,
    prologue: bool = False,
    statistics: bool = False,
    batch: int = _BATCH,
    precision: str = "fp16",
) -> Plan:
    dtype, pad = DTYPES[precision], kernel // 2
    x = image(batch, c, size, size, dtype)
    weight = torch.empty(k, c // groups, kernel, kernel, dtype=dtype, device="meta")
    shape = (batch, k, -(-size // stride), -(-size // stride))
    scale, shift = (None, None) if statistics else _affine(k)
    with float32_precision(precision):
        return plan_conv_bn_act(
            x, weight, scale, shift, image(*shape, dtype) if residual else None, (stride, stride), (pad, pad), (1, 1),
            groups, not statistics, architecture, _affine(c) if prologue else None, tile,
        )  # fmt: skip


def _reduce(architecture: str, tile: Tile) -> Plan:
    """The 1x1 convolution that begins a bottleneck of ResNet-50's last stage; too long a loop to be unrolled."""
    return _conv(architecture, tile, 2048, 7, 512, 1)


def _expand(architecture: str, tile: Tile) -> Plan:
    """The one that ends a bottleneck of the third stage."""
    return _conv(architecture, tile, 256, 14, 1024, 1, residual=True)


def gemm() -> Iterator[Entry]:
    for architecture, tile in _PORTED:
        yield Entry("1x1 2048->512", architecture, _reduce(architecture, tile))


def conv() -> Iterator[Entry]:
    for architecture, tile in _PORTED:
        yield Entry("3x3 256->256", architecture, _conv(architecture, tile, 256, 14, 256))
    stem = Tile(128, 64, 32, 4, 4, False)
    yield Entry("7x7/2 3->64", "sm_90", _conv("sm_90", stem, 3, 224, 64, 7, stride=2))
    grouped = Tile(128, 32, 32, 4, 4, False)
    yield Entry("3x3 256->256, 32 groups", "sm_90", _conv("sm_90", grouped, 256, 28, 256, groups=32))


def epilogue() -> Iterator[Entry]:
    for split in (False, True):
        tile = _WIDE._replace(split=split)
        for architecture in ("sm_90", "sm_80"):
            what = f"1x1 256->1024, residual, {'SPLIT' if split else 'whole'}"
            yield Entry(what, architecture, _expand(architecture, tile))


def parts() -> Iterator[Entry]:
    tile = _SMALL._replace(parts=8)
    plan = _conv("sm_90", tile, 512, 7, 512, residual=True, batch=1)
    for at in range(len(plan.launches)):
        yield Entry("3x3 512->512 7x7, 8 parts", "sm_90", plan, at)


def descriptors() -> Iterator[Entry]:
    through, specialised = _WIDE._replace(kernel="descriptors"), Tile(256, 128, 64, 8, 3, True, "specialised")
    for architecture, tile in (("sm_90", through), ("sm_100", specialised)):
        yield Entry(f"1x1 2048->512, {tile.kernel}", architecture, _reduce(architecture, tile))
        yield Entry(f"3x3 256->256, {tile.kernel}", architecture, _conv(architecture, tile, 256, 14, 256))


def chain() -> Iterator[Entry]:
    for width, size in ((64, 56), (128, 28), (256, 14)):
        x, residual = image(_BATCH, width, size, size, _HALF), image(_BATCH, 4 * width, size, size, _HALF)
        weight, back = (
            torch.empty(*shape, 1, 1, dtype=_HALF, device="meta") for shape in ((4 * width, width), (width, 4 * width))
        )
        plan = plan_conv_chain(
            x, weight, *_affine(4 * width), residual, back, *_affine(width), "sm_90"
        )  # fmt: skip
        yield Entry(f"1x1 {width}->{4 * width}->{width}", "sm_90", plan)


def small() -> Iterator[Entry]:
    """Kernels without a product on tensor cores."""
    weight, bias = torch.empty(1000, 2048, dtype=_HALF, device="meta"), _vector(1000)
    yield Entry("head 2048->1000", "sm_90", plan_head(image(1, 2048, 7, 7, _HALF), weight, bias, "sm_90"))
    stem = image(_BATCH, 64, 112, 112, _HALF)
    yield Entry("max-pool", "sm_90", plan_tail_pool(stem, None, "sm_90"))
    yield Entry("max-pool, prologue", "sm_90", plan_tail_pool(stem, _affine(64), "sm_90"))
    yield Entry("average pool", "sm_90", plan_global_avg_pool(image(_BATCH, 2048, 7, 7, _HALF), "sm_90"))


def quantised() -> Iterator[Entry]:
    deep = _MMA._replace(reduction=128)
    for architecture, tile, dtype in (
        ("sm_80", deep, torch.int8),
        ("sm_90", deep, torch.int8),
        ("sm_100", deep, torch.int8),
        ("sm_90", deep, torch.float8_e4m3fn),
    ):
        weight = torch.empty(256, 256, 3, 3, dtype=dtype, device="meta")
        plan = plan_conv_quantised(
            image(_BATCH, 256, 14, 14, dtype), weight, *_affine(256), None, 1.0, 0.03, (1, 1), (1, 1), (1, 1), 1, True,
            dtype, architecture, tile,
        )  # fmt: skip
        yield Entry(f"3x3 256->256, {str(dtype).removeprefix('torch.')}", architecture, plan)
    real = image(_BATCH, 64, 56, 56, _HALF)
    yield Entry("quantise", "sm_90", plan_quantise(real, 0.02, torch.int8, "sm_90"))


def forward() -> Iterator[Entry]:
    """What training adds to the forward pass."""
    for c, size, k, kernel in ((2048, 7, 512, 1), (256, 14, 256, 3)):
        for flags in ((), ("prologue",), ("statistics",)):
            plan = _conv("sm_90", _MMA, c, size, k, kernel, **dict.fromkeys(flags, True))
            yield Entry(", ".join((f"{kernel}x{kernel} {c}->{k}", *flags)), "sm_90", plan)
    x = image(_BATCH, 256, 14, 14, _HALF)
    weight = torch.empty(256, 256, 3, 3, dtype=_HALF, device="meta")
    plan = plan_conv_statistics(x, None, weight, Geometry(padding=(1, 1)), "sm_90")
    yield Entry("combine 256", "sm_90", plan, 1)
    yield Entry("gram 256", "sm_90", plan_gram(x, _affine(256), (1, 1), "sm_90"))
    wide = image(_BATCH, 1024, 14, 14, _HALF)
    yield Entry("tail, residual", "sm_90", plan_tail(wide, _affine(1024), wide, None, True, "sm_90"))


def backward() -> Iterator[Entry]:
    x, half, v = image(_BATCH, 256, 14, 14, _HALF), image(_BATCH, 256, 7, 7, _HALF), _vector(256)
    weight, pad = torch.empty(256, 256, 3, 3, device="meta"), (1, 1)
    gate = Gate(_affine(256), v)
    for name, one in (("3x3", None), ("3x3, gate", gate)):
        plan = plan_dgrad(x, weight, Geometry((1, 1), pad), x, one, None, "sm_90")
        yield Entry(f"dgrad {name}", "sm_90", plan)
    plan = plan_dgrad(half, weight, Geometry((2, 2), pad), x, gate, None, "sm_90")
    yield Entry("dgrad 3x3/2, gate", "sm_90", plan)
    wide, q = image(_BATCH, 1024, 14, 14, _HALF), torch.empty(256, 256, device="meta")
    expand = torch.empty(1024, 256, device="meta")
    plan = plan_dgrad_expand(wide, expand, q, v, (1, 1), x, _affine(256), gate, None, "sm_90")
    yield Entry("dgrad expand 256->1024, gate", "sm_90", plan)
    for name, prologue in (("", None), (", prologue", _affine(256))):
        plan = plan_wgrad(x, x, prologue, weight, Geometry((1, 1), pad), "sm_90")
        yield Entry(f"wgrad 3x3{name}", "sm_90", plan)
    wide_vector = _vector(1024)
    plan = plan_tail_backward(wide, wide, wide, wide_vector, None, None, "sm_90")
    yield Entry("tail backward", "sm_90", plan)
    plan = plan_bn_backward(x, x, v, v, v, v, True, "sm_90")
    yield Entry("batch norm backward", "sm_90", plan)
    stem, pooled = image(_BATCH, 64, 112, 112, _HALF), image(_BATCH, 64, 56, 56, _HALF)
    plan = plan_tail_pool_backward(pooled, stem, _affine(64), _vector(64), "sm_90")
    yield Entry("pool backward", "sm_90", plan, 1)


FAMILIES: dict[str, Callable[[], Iterator[Entry]]] = {
    one.__name__: one for one in (gemm, conv, epilogue, parts, descriptors, chain, small, quantised, forward, backward)
}


@functools.cache
def rows(family: str) -> list[str]:
    """A family's rows of Markdown."""
    with Worker() as worker:
        return [_row(one, worker.compile([one.launch], one.architecture)[0]) for one in FAMILIES[family]()]


def _row(one: Entry, made: Compiled) -> str:
    cells = (
        one.what,
        one.architecture,
        _tile(one.launch),
        _loop(made),
        str(made.registers),
        str(made.shared),
        f"{made.spilled} bytes" if made.spilled or made.local_accesses else "0",
        str(resident_programs(one.architecture, made)),
    )
    return f"| {' | '.join(cells)} |"


def _tile(launch: Launch) -> str:
    constants = launch.constants
    names = [name for name in ("BM", "BN", "BK", "BC", "BP", "BLOCK") if name in constants]
    stages: Optional[int] = constants.get("num_stages")
    return (
        "x".join(str(constants[name]) for name in names)
        + f" w{constants['num_warps']}"
        + ("" if stages is None else f" s{stages}")
    )


def _loop(made: Compiled) -> str:
    loop = made.loop
    if not loop.products:
        return f"{loop.instructions} in all"
    each = f"{loop.instructions} / {loop.products} = {loop.instructions / loop.products:.1f}"
    return each if loop.rolled else f"{each}, unrolled"


def table(family: str) -> str:
    """As it stands in the page, below a comment that names the family."""
    return "\n".join([HEADER, f"|{'---|' * (HEADER.count('|') - 1)}", *rows(family)])


def replaced(page: str, family: str) -> str:
    """``page`` with the family's table as it is now."""
    return re.sub(rf"(<!-- figures: {family} -->\n)(\|.*\n)*", lambda found: f"{found[1]}{table(family)}\n", page)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", nargs="*", metavar="FAMILY", help=f"of {', '.join(FAMILIES)}; all by default")
    parser.add_argument("--write", action="store_true", help="also put them into the page")
    options = parser.parse_args()
    unknown = [name for name in options.family if name not in FAMILIES]
    if unknown:
        parser.error(f"{unknown[0]!r}, expected some of {', '.join(FAMILIES)}")
    for name in options.family or FAMILIES:
        print(f"{name}\n\n{table(name)}\n", flush=True)
        if options.write:
            PAGE.write_text(replaced(PAGE.read_text(), name))


if __name__ == "__main__":
    main()
