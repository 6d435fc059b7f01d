"""Layers of ResNet-18, ResNet-50 and ResNeXt-50, with the tiles that were chosen for them, on small images."""

import pytest

from resnet_fast.kernels.triton import descriptor, tiles
from resnet_fast.kernels.triton import table as kernels
from resnet_fast.utils import compat
from tests.aot import backward_layers, layers
from tests.interpreter import checking
from tests.interpreter import test_triton_training_backward as backward
from tests.interpreter import test_triton_training_forward as forward
from tests.ptx import launching, reduced
from tests.ptx.test_tf32 import Conv, rounded_factors, tf32

ARCHITECTURES = ("sm_80", "sm_90")
PRECISIONS = ("fp16", "bf16", "tf32")


@pytest.fixture(autouse=True)
def _nothing_left_to_chance():
    launching.disagreements.clear()
    yield
    assert not launching.disagreements


__all__ = ["rounded_factors"]


def _forward_tile(layer: layers.Layer, batch: int, precision: str, architecture: str) -> tiles.Tile:
    return reduced.picked(lambda: layers.plan_layer(layer, batch, precision, architecture))


def _chosen() -> list[reduced.Chosen]:
    return reduced.cheapest(
        [
            reduced.Chosen(architecture, layer, precision, _forward_tile(layer, batch, precision, architecture))
            for architecture in ARCHITECTURES
            for layer in layers.model_layers()
            for batch in layers.BATCHES
            for precision in PRECISIONS
        ]
    )


CHOSEN = _chosen()
each_chosen = pytest.mark.parametrize("chosen", CHOSEN, ids=reduced.Chosen.name)


@each_chosen
def test_inference(chosen, monkeypatch):
    if chosen.tile.kernel != "pointers":  # these make many tiles each, of images of any size
        monkeypatch.setattr(descriptor, "programs", lambda work, *_: min(work, 3))
    conv, dtype = chosen.conv(), layers.DTYPES[chosen.precision]
    x, weight, *rest = conv.inputs(dtype)
    if chosen.precision == "tf32":
        x, weight = tf32(x), tf32(weight)
    inputs = x, weight, *rest
    with reduced.forced(chosen.tile), compat.float32_in_tf32(chosen.precision == "tf32"):
        actual = kernels.conv_bn_act(*inputs, *conv.geometry())
    exact = checking.conv_exact(*inputs, *conv.geometry())
    checking.assert_within(actual, exact, checking.conv_tolerance(exact, *inputs, *conv.geometry()))


# Statistics are of whole sums, so that training's convolutions are not cut, nor read through descriptors. The first
# layer's images have no prologue.
TRAINED = [one for one in CHOSEN if one.tile.parts == 1 and one.tile.kernel == "pointers"]


@pytest.mark.parametrize("chosen", TRAINED, ids=reduced.Chosen.name)
def test_statistics(chosen, request):
    conv, dtype = chosen.conv(), layers.DTYPES[chosen.precision]
    x, weight, *_ = conv.inputs(dtype)
    if chosen.precision == "tf32":
        request.getfixturevalue("rounded_factors")
    prologue = forward.affine(conv.c) if conv.c > 3 else None
    with reduced.forced(chosen.tile), compat.float32_in_tf32(chosen.precision == "tf32"):
        forward.check_conv_statistics(x, prologue, weight, conv)


def _gradients(name: str) -> list[reduced.Chosen]:
    """Of the layers' backward passes."""
    return reduced.cheapest(
        [
            reduced.Chosen(architecture, layer, precision, _gradient_tile(name, layer, batch, precision, architecture))
            for architecture in ARCHITECTURES
            for layer in layers.model_layers()
            if layer.groups == 1 and not (name == "dgrad" and layer.c == 3)
            for batch in backward_layers.BATCHES
            for precision in PRECISIONS
        ]
    )


def _gradient_tile(name: str, layer: layers.Layer, batch: int, precision: str, architecture: str) -> tiles.Tile:
    def plan() -> None:
        plans = backward_layers._conv(layer, batch, layers.DTYPES[precision], architecture)
        next(one for one in plans if one[0].startswith(f"{name} "))

    with compat.float32_in_tf32(precision == "tf32"):
        return reduced.picked(plan)


@pytest.mark.parametrize("chosen", _gradients("dgrad"), ids=reduced.Chosen.name)
def test_dgrad(chosen):
    with reduced.forced(chosen.tile), compat.float32_in_tf32(chosen.precision == "tf32"):
        backward.check_dgrad(_gradient_conv(chosen), layers.DTYPES[chosen.precision], "of a raw one", True)


@pytest.mark.parametrize("chosen", _gradients("wgrad"), ids=reduced.Chosen.name)
def test_wgrad(chosen, request):
    prologue = chosen.layer.c > 3
    if chosen.precision == "tf32" and prologue:
        request.getfixturevalue("rounded_factors")
    with reduced.forced(chosen.tile), compat.float32_in_tf32(chosen.precision == "tf32"):
        backward.check_wgrad(_gradient_conv(chosen), layers.DTYPES[chosen.precision], prologue)


def _gradient_conv(chosen: reduced.Chosen) -> backward.Conv:
    """In TF32, of numbers that lose nothing."""
    kind = Conv if chosen.precision == "tf32" else backward.Conv
    return kind(*chosen.conv()[:10])
