"""Mistakes put into the PTX of real kernels: each must be seen, by the machine or by the comparison of the results."""

from collections.abc import Callable
from typing import Any, Optional

import pytest
import torch

from resnet_fast.kernels.triton import descriptor, forward
from resnet_fast.kernels.triton.plan import OPTIONS
from resnet_fast.kernels.triton.tiles import Tile
from resnet_fast.utils import compat
from tests.aot.test_descriptors import NARROW
from tests.interpreter.cases import Conv
from tests.interpreter.checking import assert_within, conv_exact, conv_tolerance
from tests.ptx import launching, mutations, tensor_maps
from tests.ptx.parse import PtxError

pytestmark = pytest.mark.every

CONVS = {
    "3x3": Conv(3, 64, 5, 7, 64, residual=True),
    "1x1": Conv(3, 256, 5, 7, 64, (1, 1), padding=(0, 0)),
}


class Case:
    """A convolution, in float16, with the tile that was chosen for it, or with another."""

    def __init__(self, conv: Conv, architecture: str, tile: Optional[Tile] = None) -> None:
        inputs, geometry = conv.inputs(torch.float16), conv.geometry()
        self.exact = conv_exact(*inputs, *geometry)
        self.tolerance = conv_tolerance(self.exact, *inputs, *geometry)
        self.plan = forward.plan_conv_bn_act(*inputs, *geometry, architecture, tile=tile)
        (launch,) = self.plan.launches
        self.launch = launch
        made = launch.kernel.warmup(*launch.args, grid=launch.grid, **launch.constants, **OPTIONS)
        self.text = made.asm["ptx"]

    def run(self, change=lambda text: text) -> None:
        self.plan.result.fill_(torch.nan)
        launching.execute_launch(self.launch, change)
        assert_within(self.plan.result, self.exact, self.tolerance)


OURS = (PtxError, AssertionError)
KINDS = {
    "sm_80": [
        (mutations.barriers, PtxError, 4, 1),
        (mutations.waits, PtxError, 4, 1),
        (mutations.swizzles, OURS, 6, 1),
        (mutations.products, AssertionError, 16, 5),
    ],
    "sm_90": [
        (mutations.loop_barriers, PtxError, 2, 1),
        (mutations.waits, PtxError, 2, 1),
        (mutations.product_waits, PtxError, 2, 1),
        (mutations.fences, PtxError, 1, 1),
    ],
}


@pytest.mark.parametrize("name", CONVS)
@pytest.mark.parametrize(
    ("architecture", "kind", "error", "fewest", "each"),
    [(architecture, *kind) for architecture, kinds in KINDS.items() for kind in kinds],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_every_mistake_is_caught(architecture, kind, error, fewest, each, name):
    check(Case(CONVS[name], architecture), kind, error, fewest, each)


def check(case: Case, kind: Callable, error: Any, fewest: int, each: int) -> None:
    """At least so many mistakes, of which each so-manieth is made."""
    case.run()
    found = kind(case.text)
    assert len(found) >= fewest
    missed = []
    for mutation in found[::each]:
        try:
            case.run(mutation.change)
        except error:
            continue
        missed.append(mutation.name)
    assert not missed


# With tensor descriptors; several tiles a program, so that mbarriers have several phases and copies go where others
# went.
DESCRIBED = {"3x3": Conv(5, 64, 5, 7, 64, residual=True), "1x1": Conv(20, 256, 5, 7, 64, (1, 1), padding=(0, 0))}
with_descriptors = pytest.mark.skipif(not compat.has_descriptors(), reason="this Triton has no tensor descriptors")


def described(name: str, monkeypatch) -> Case:
    monkeypatch.setattr(descriptor, "programs", lambda *_: 2)
    return Case(DESCRIBED[name], "sm_90", NARROW._replace(kernel="descriptors"))


@with_descriptors
@pytest.mark.parametrize("architecture", ["sm_90"])
@pytest.mark.parametrize("name", DESCRIBED)
@pytest.mark.parametrize(
    ("kind", "error"),
    [
        (mutations.phase_waits, PtxError),
        (mutations.expectations, PtxError),
        (mutations.arrivals, PtxError),
        (mutations.bulk_copies, OURS),
        (mutations.barriers_before_copies, PtxError),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_every_mistake_with_copies_is_caught(architecture, kind, error, name, monkeypatch):
    check(described(name, monkeypatch), kind, error, 1, 1)


@with_descriptors
@pytest.mark.parametrize("architecture", ["sm_90"])
@pytest.mark.parametrize("name", DESCRIBED)
@pytest.mark.parametrize(
    "change",
    [
        lambda one: one._replace(swizzle=0),
        lambda one: one._replace(strides=(one.strides[0] + 16, *one.strides[1:])),
        lambda one: one._replace(sizes=(*one.sizes[:-1], one.sizes[-1] + 1)),
        lambda one: one._replace(sizes=(one.sizes[0] - 1, *one.sizes[1:])),
        lambda one: one._replace(box=(*one.box[:-1], one.box[-1] // 2)),
        lambda one: one._replace(address=one.address + 16),
    ],
    ids=["no swizzle", "a stride", "one row more", "a channel less", "half a box", "16 bytes further"],
)
def test_a_wrong_tensor_map_is_caught(architecture, change, name, monkeypatch):
    case = described(name, monkeypatch)
    case.run()
    encode = tensor_maps.encode
    monkeypatch.setattr(launching._Driver, "utils", launching.encoder(lambda *given: change(encode(*given))))
    with pytest.raises(OURS):
        case.run()
