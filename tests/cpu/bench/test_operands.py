"""What a primitive reads and writes, against its arguments and results by hand."""

from types import SimpleNamespace

import pytest
import torch

from resnet_fast.bench.ledger import Ledger
from resnet_fast.bench.operands import Primitives
from resnet_fast.kernels.contract import Case
from resnet_fast.kernels.reference.training import Affine, Gate, Geometry, Gradient

N, C, K, H = 2, 8, 16, 6
IMAGE, WIDE_IMAGE, VECTOR = 2 * N * C * H * H, 2 * N * K * H * H, 4 * C
GEOMETRY = Geometry((1, 1), (1, 1))


def image(channels=C, size=H):
    shape = (N, channels, size, size)
    return torch.empty(shape, dtype=torch.half, device="meta").contiguous(memory_format=torch.channels_last)


def vector(channels=C):
    return torch.zeros(channels)


def affine():
    return Affine(vector(), vector())


def run(op, *args):
    """The result, and what was entered for it."""
    ledger, weight = Ledger(), torch.zeros(1)
    primitives = Primitives(ledger, SimpleNamespace(main=[SimpleNamespace(weight=weight)]))
    case = Case(op, "cpu", torch.half, C, K)
    result = getattr(primitives.pick(case), op)(*args)
    (move,) = ledger.moves
    assert move.op == op
    return result, move


def sizes(values):
    return sorted(value.size for value in values)


def test_every_operand_once_and_every_result_once():
    result, move = run("tail", image(), affine(), image(), affine(), True)
    assert sizes(move.reads) == [VECTOR] * 4 + [IMAGE] * 2
    assert sizes(move.writes) == [IMAGE]
    assert (result.shape, result.device.type, move.flops) == ((N, C, H, H), "meta", 0)


def test_statistics_have_data_and_images_have_none():
    weight = torch.zeros(K, C, 3, 3, dtype=torch.half)
    (y, mean, variance), move = run("conv_statistics", image(), None, weight, GEOMETRY)
    assert (y.device.type, mean.device.type, variance.device.type) == ("meta", "cpu", "cpu")
    assert mean.dtype == variance.dtype == torch.float32
    assert sizes(move.reads) == [IMAGE, weight.nbytes]
    assert move.flops == 2 * N * K * H * H * C * 9


@pytest.mark.parametrize("gated", [False, True])
def test_only_a_gate_reads_the_input_of_dgrad(gated):
    weight = torch.zeros(K, C, 3, 3, dtype=torch.half)
    gate = Gate(affine(), vector()) if gated else None
    gradient, move = run("dgrad", image(K), weight, GEOMETRY, image(), gate, None)
    assert sizes(move.reads) == sorted([WIDE_IMAGE, weight.nbytes, *([IMAGE, *[VECTOR] * 3] if gated else [])])
    assert sizes(move.writes) == sorted([IMAGE, *([VECTOR] * 2 if gated else [])])
    assert isinstance(gradient, Gradient)
    assert (gradient.product is not None) == gated


def test_wgrad_reads_no_weight():
    weight = torch.zeros(K, C, 3, 3, dtype=torch.half)
    dw, move = run("wgrad", image(K), image(), affine(), weight, GEOMETRY)
    assert sizes(move.reads) == sorted([WIDE_IMAGE, IMAGE, VECTOR, VECTOR])
    assert (dw.shape, dw.dtype, dw.device.type) == (weight.shape, torch.float32, "cpu")
    assert not move.writes[0].image


def test_a_gradient_that_is_passed_on_is_not_written():
    grad = image()
    (gradient, _), move = run("tail_backward", grad, None, None, None, None, None)
    assert gradient.g is grad
    assert sizes(move.reads) == [IMAGE]
    assert sizes(move.writes) == [VECTOR]
    _, move = run("tail_backward", grad, image(), image(), vector(), None, None)
    assert sizes(move.writes) == [VECTOR, VECTOR, IMAGE]


def test_strides_leave_pixels_unread():
    _, move = run("gram", image(), None, (2, 2))
    assert sizes(move.reads) == [IMAGE // 4]
    assert move.flops == N * (H // 2) ** 2 * C * (C + 1)
    given = (image(K, H // 2), torch.zeros(K, C), torch.zeros(C, C), vector(), (2, 2), image(), None)
    for gate, x in ((None, IMAGE // 4), (Gate(), IMAGE)):
        _, move = run("dgrad_expand", *given, gate, None)
        assert sizes(move.reads) == sorted([WIDE_IMAGE // 4, 4 * K * C, 4 * C * C, VECTOR, x])
        assert move.flops == 2 * N * (H // 2) ** 2 * (K * C + C * C)
