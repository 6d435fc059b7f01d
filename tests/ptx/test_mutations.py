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

    def __init__(self, name: str) -> None:
        conv = CONVS[name]
        inputs, geometry = conv.inputs(torch.float16), conv.geometry()
        self.exact = conv_exact(*inputs, *geometry)
        self.tolerance = conv_tolerance(self.exact, *inputs, *geometry)
        self.plan = forward.plan_conv_bn_act(*inputs, *geometry, "sm_80")
        (launch,) = self.plan.launches
        self.launch = launch
        made = launch.kernel.warmup(*launch.args, grid=launch.grid, **launch.constants, **OPTIONS)
        self.text = made.asm["ptx"]

    def run(self, change=lambda text: text) -> None:
        self.plan.result.fill_(torch.nan)
        launching.execute_launch(self.launch, change)
        assert_within(self.plan.result, self.exact, self.tolerance)


@pytest.mark.parametrize("name", CONVS)
@pytest.mark.parametrize(
    ("kind", "error", "fewest", "each"),
    [
        (mutations.barriers, PtxError, 4, 1),
        (mutations.waits, PtxError, 4, 1),
        (mutations.swizzles, (PtxError, AssertionError), 6, 1),
        (mutations.products, AssertionError, 16, 5),
    ],
    ids=["barriers", "waits", "swizzles", "products"],
)
def test_every_mistake_is_caught(kind, error, fewest, each, name):
    case = Case(name)
    case.run()
    found = kind(case.text)
    assert len(found) >= fewest
    for mutation in found[::each]:
        try:
            case.run(mutation.change)
        except error:
            continue
        pytest.fail(f"not caught: {mutation.name}")
