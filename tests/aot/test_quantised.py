"""The kernels on 8-bit numbers: their tiles, and where there are none. test_compile.py compiles them."""

import pytest

from resnet_fast.kernels.triton import tiles
from tests.aot.layers import EIGHT_BITS
from tests.aot.quantised_layers import quantised_launches
from tests.aot.shipped import TARGETS


@pytest.mark.parametrize(("architecture", "precision"), [target for target in TARGETS if target[1] in EIGHT_BITS])
def test_every_tile_is_in_use(architecture, precision):
    """The data holds no tile that no layer of the models gets."""
    shipped = {(bm, bn) for bm, bn, *_ in tiles.load(architecture)[precision]}
    used = {
        (item.launch.constants["BM"], item.launch.constants["BN"])
        for item in quantised_launches(architecture, precision)
        if "BK" in item.launch.constants
    }
    assert shipped == used


def test_no_tiles_of_fp8_where_it_is_refused():
    """sm_80's tiles are also those of sm_89 and sm_120, which have fp8."""
    assert tiles.load("gfx942")["fp8"] == []
    assert ("sm_80", "fp8") not in TARGETS
    assert ("sm_86", "fp8") not in TARGETS
