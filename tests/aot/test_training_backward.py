"""The backward pass of training: its tiles, and its offsets. test_compile.py compiles it."""

import pytest
import torch

from resnet_fast.kernels.contract import Gate, Geometry
from resnet_fast.kernels.triton import tiles
from resnet_fast.kernels.triton.dgrad import plan_dgrad
from resnet_fast.kernels.triton.wgrad import plan_wgrad
from tests.aot.layers import ARCHITECTURES, image
from tests.aot.shipped import everything


@pytest.mark.parametrize("kind", ["dgrad", "wgrad"])
@pytest.mark.parametrize(
    ("architecture", "precision"),
    [(a, p) for a in ARCHITECTURES for p in ("fp16", "tf32", "ieee") if not (a.startswith("gfx") and p == "tf32")],
)
def test_every_tile_is_in_use(architecture, precision, kind):
    """The data holds no tile that no layer of the models gets."""
    name = f"{kind}_{'half' if precision == 'fp16' else precision}"
    shipped = {tuple(tile[:2]) for tile in tiles.load(architecture)[name]}
    found = [one.launch for one in everything((architecture, precision))]
    mine = [launch for launch in found if launch.kernel.__name__ == f"{kind}_kernel"]
    assert shipped <= {(launch.constants["BM"], launch.constants["BN"]) for launch in mine}


def test_offsets_of_64_bits_beyond_2_gib():
    def constants(batch: int) -> list[dict]:
        x = image(batch, 64, 128, 128, torch.float16)
        weight = torch.empty(64, 64, 3, 3, device="meta")
        geometry = Geometry(padding=(1, 1))
        dgrad = plan_dgrad(x, weight, geometry, x, Gate(), None, "sm_90")
        wgrad = plan_wgrad(x, x, None, weight, geometry, "sm_90")
        return [plan.launches[0].constants for plan in (dgrad, wgrad)]

    assert not any(one["INDEX64"] for one in constants(2**11 - 1))
    assert all(one["INDEX64"] for one in constants(2**11))
