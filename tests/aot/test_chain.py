"""Chains of two 1x1 convolutions: where there are some, and their tiles. test_compile.py compiles them."""

from resnet_fast.kernels.triton import tiles
from tests.aot.chain_layers import STAGES, covered
from tests.aot.layers import ARCHITECTURES


def test_what_is_covered():
    """In half precision the first three stages of ResNet-50; in full float32 nothing."""
    for architecture in ARCHITECTURES:
        assert covered(architecture, "fp16") == list(STAGES[:3])
        assert covered(architecture, "ieee") == []


def test_every_tile_is_in_use():
    for architecture in ARCHITECTURES:
        for name, precision in (("half", "fp16"), ("tf32", "tf32")):
            shipped = tiles.load(architecture)["chain"][name]
            assert [widest for widest, *_ in shipped] == [width for width, _ in covered(architecture, precision)]
