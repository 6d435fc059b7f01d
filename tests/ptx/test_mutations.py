"""Mistakes put into the PTX of real kernels: each must be seen, by the machine or by the comparison of the results."""

import pytest
import torch

from resnet_fast.kernels.triton import forward
from resnet_fast.kernels.triton.plan import OPTIONS
from tests.interpreter.cases import Conv
from tests.interpreter.checking import assert_within, conv_exact, conv_tolerance
from tests.ptx import launching, mutations
from tests.ptx.parse import PtxError

pytestmark = pytest.mark.every

CONVS = {
    "3x3": Conv(3, 64, 5, 7, 64, residual=True),
    "1x1": Conv(3, 256, 5, 7, 64, (1, 1), padding=(0, 0)),
}


class Case:
    """A convolution, in float16, with the tile that was chosen for it."""

    def __init__(self, name: str, architecture: str) -> None:
        conv = CONVS[name]
        inputs, geometry = conv.inputs(torch.float16), conv.geometry()
        self.exact = conv_exact(*inputs, *geometry)
        self.tolerance = conv_tolerance(self.exact, *inputs, *geometry)
        self.plan = forward.plan_conv_bn_act(*inputs, *geometry, architecture)
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
    """At least so many mistakes, of which each so-manieth is made."""
    case = Case(name, architecture)
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
