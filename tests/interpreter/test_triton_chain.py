"""Two convolutions in one kernel, against the definition in float64; and networks whose bottlenecks run in rows.

Every access is checked (guard.py). The second convolution is checked on what the first one stored: that is its input by
definition, so both results have the tolerance of a single convolution.
"""

import copy
from typing import NamedTuple

import pytest
import torch
from torchvision.models import resnet

import resnet_fast
from resnet_fast.graph import functional
from resnet_fast.kernels.contract import Case
from resnet_fast.kernels.reference import inference as reference
from resnet_fast.kernels.triton import chain, operands, tiles
from resnet_fast.kernels.triton import table as kernels
from tests.cpu.small_models import randomise_norms
from tests.interpreter.cases import each_dtype, nhwc
from tests.interpreter.checking import (
    assert_as_good_as_pytorch,
    assert_within,
    conv_exact,
    conv_tolerance,
)

_POINTWISE = ((1, 1), (0, 0), (1, 1), 1, True)


class Chain(NamedTuple):
    """``[n, c, h, w] -> [n, k, h, w] -> [n, last, h, w]``."""

    n: int
    c: int
    h: int
    w: int
    k: int
    last: int

    def inputs(self, dtype: torch.dtype) -> list[torch.Tensor]:
        """x, weight, scale, shift, residual, next_weight, next_scale, next_shift; results are of the order of 1."""
        n, c, h, w, k, last = self
        x, residual = (nhwc(torch.randn(n, channels, h, w).to(dtype)) for channels in (c, k))
        weight, next_weight = (torch.randn(a, b, 1, 1) / b**0.5 for a, b in ((k, c), (last, k)))
        vectors = [(torch.rand(size) + 0.5, torch.randn(size)) for size in (k, last)]
        vectors[0][0][0] = vectors[1][0][0] = 0.0  # zero-initialised batch norms
        return [x, weight.to(dtype), *vectors[0], residual, next_weight.to(dtype), *vectors[1]]


CHAINS = {
    "round": Chain(2, 32, 8, 8, 128, 32),
    "7x9 pixels": Chain(1, 16, 7, 9, 64, 16),
    "to the next stage": Chain(1, 16, 6, 6, 64, 32),
    "17 channels": Chain(1, 17, 5, 7, 33, 10),
    "one channel": Chain(2, 1, 3, 5, 7, 1),
    "narrow in between": Chain(1, 40, 3, 3, 20, 48),
    "one pixel": Chain(3, 32, 1, 1, 64, 16),
}
# Whole small problems, tiles with tails along every dimension, and one that is finished in two halves.
TILES = {
    "default": None,
    "small": tiles.ChainTile(rows=16, columns=16, warps=4, stages=1, split=False),
    "split": tiles.ChainTile(rows=32, columns=32, warps=4, stages=1, split=True),
}

guarded = pytest.mark.usefixtures("guarded")
each_chain = pytest.mark.parametrize("name", CHAINS)


@pytest.fixture(params=TILES)
def tile(request, monkeypatch):
    forced = TILES[request.param]
    if forced is not None:
        monkeypatch.setattr(tiles, "pick_chain", lambda *problem: forced)


def check(inputs: list[torch.Tensor]) -> None:
    out, z = kernels.conv_chain(*inputs)
    for actual, args in ((out, inputs[:5]), (z, [out, *inputs[5:], None])):
        exact = conv_exact(*args, *_POINTWISE)
        assert actual.dtype == inputs[0].dtype
        assert actual.is_contiguous(memory_format=torch.channels_last)
        assert_within(actual, exact, conv_tolerance(exact, *args, *_POINTWISE))


@guarded
@each_dtype
@each_chain
def test_chain(name, dtype, tile):
    check(CHAINS[name].inputs(dtype))


@guarded
@each_dtype
def test_no_less_precise_than_pytorch(dtype):
    inputs = CHAINS["round"].inputs(dtype)
    exact = reference.conv_chain(*(t.double() for t in inputs))
    for actual, pytorch, wide in zip(kernels.conv_chain(*inputs), reference.conv_chain(*inputs), exact):
        assert_as_good_as_pytorch(actual, pytorch, wide)


@guarded
@each_dtype
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ["one pixel", "17 channels"])
def test_nan_and_inf(name, value, dtype, monkeypatch):
    """In each of the tensors: they reach what they should, and nothing else."""
    monkeypatch.setattr(tiles, "pick_chain", lambda *problem: TILES["small"])
    inputs = CHAINS[name].inputs(dtype)
    for position in range(len(inputs)):
        changed = [tensor.clone() for tensor in inputs]
        changed[position][(-1,) + (0,) * (changed[position].dim() - 1)] = value
        check(changed)


@guarded
@each_dtype
def test_accumulates_in_float32(dtype):
    """Both sums go far beyond float16's range and come back into it, by the scale."""
    x, weight, scale, shift, residual, next_weight, next_scale, next_shift = CHAINS["round"].inputs(dtype)
    wide = (x * 2e3, weight * 2e2, scale / 4e5, shift, residual)
    check([*wide, next_weight * 2e4, next_scale / 2e4, next_shift])


@guarded
@each_dtype
def test_any_strides_and_a_wider_weight(dtype):
    x, weight, scale, shift, residual, next_weight, next_scale, next_shift = CHAINS["7x9 pixels"].inputs(dtype)
    sliced = torch.cat([residual, residual], dim=3)[:, :, :, 3:12]
    check([x.contiguous(), weight, scale, shift, sliced, next_weight, next_scale, next_shift])
    expanded = torch.tensor([0.5]).expand(64)
    check([x, weight.float(), expanded, shift, residual.contiguous(), next_weight.float(), next_scale, next_shift])


@guarded
def test_updated_weights_are_packed_again():
    inputs = CHAINS["17 channels"].inputs(torch.float32)
    check(inputs)
    inputs[1].mul_(-0.5)
    inputs[5].add_(0.1)
    check(inputs)


@guarded
def test_offsets_of_64_bits(monkeypatch, tile):
    monkeypatch.setattr(operands, "_INT32_ELEMENTS", 0)
    check(CHAINS["7x9 pixels"].inputs(torch.float32))


def test_supports(monkeypatch):
    case = Case("conv_chain", "cpu", torch.float32, 64, 64)
    assert kernels.supports(case) is None
    assert kernels.supports(case._replace(in_channels=17, dtype=torch.bfloat16)) is None
    assert "float64" in kernels.supports(case._replace(dtype=torch.float64))
    for wide in (case._replace(in_channels=2048), case._replace(out_channels=2048)):
        assert "2048" in kernels.supports(wide)
        assert not kernels.chain_pays(wide, 10**6)
    assert kernels.chain_pays(case, 1)  # the interpreter counts as a device of one multiprocessor
    monkeypatch.setitem(tiles.load("interpreter"), "multiprocessors", 3)
    assert not kernels.chain_pays(case, 2 * 1024)
    assert kernels.chain_pays(case, 2 * 1024 + 1)


def test_a_chain_that_fits_no_tile_is_refused():
    with pytest.raises(ValueError, match="no tile of interpreter for ieee takes 2048 channels in and 16 out"):
        kernels.conv_chain(*Chain(1, 2048, 1, 1, 16, 16).inputs(torch.float32))


def test_empty_tensors_get_the_definition():
    out, z = kernels.conv_chain(*Chain(0, 4, 5, 5, 8, 6).inputs(torch.float32))
    assert out.shape == (0, 8, 5, 5)
    assert z.shape == (0, 6, 5, 5)


# --- the op, and networks -------------------------------------------------------------------------------------------


@pytest.fixture
def launched(monkeypatch):
    """The chains that were launched; everything goes to Triton."""
    monkeypatch.setenv("RESNET_FAST_IMPLEMENTATION", "triton")
    plans = []

    def planned(*args, **options):
        plans.append(plan(*args, **options))
        return plans[-1]

    plan = chain.plan_conv_chain
    monkeypatch.setattr(chain, "plan_conv_chain", planned)
    return plans


def test_the_op_asks_whether_it_pays(launched, monkeypatch):
    inputs = CHAINS["round"].inputs(torch.float32)
    one = torch.ops.resnet_fast.conv_chain(*inputs)
    assert len(launched) == 1
    monkeypatch.setattr(kernels, "chain_pays", lambda case, rows: rows > 128)  # it has 2 * 8 * 8
    two = torch.ops.resnet_fast.conv_chain(*inputs)
    assert len(launched) == 1
    for chained, apart in zip(one, two):
        torch.testing.assert_close(chained, apart, rtol=1e-5, atol=1e-5)


def bottlenecks(**kwargs) -> torch.nn.Module:
    """The first two stages of a ResNet: rows of three and of two."""
    torch.manual_seed(0)
    model = resnet.ResNet(resnet.Bottleneck, [3, 2, 1, 1], **kwargs)
    model.layer3 = model.layer4 = torch.nn.Identity()
    model.fc = torch.nn.Linear(512, 7)
    return randomise_norms(model).eval()


@each_dtype
@torch.no_grad()
def test_network(dtype, launched, monkeypatch):
    """Chained it is as precise as torchvision, and the same as unchained up to the order of sums."""
    stock = bottlenecks().to(dtype, memory_format=torch.channels_last)
    fast = resnet_fast.accelerate(stock, inplace=False)
    x = torch.randn(2, 3, 40, 32).to(dtype)
    exact = copy.deepcopy(stock).double()(x.double())
    result = fast(x)
    assert [plan.launches[0].constants["K"] for plan in launched] == [256, 256, 512]
    assert_as_good_as_pytorch(result, stock(x), exact)

    monkeypatch.setattr(functional, "chained", lambda *args: False)
    apart = fast(x)
    assert len(launched) == 3
    assert_as_good_as_pytorch(result, apart, exact)


@torch.no_grad()
def test_explain_names_the_kernels(launched):
    fast = resnet_fast.accelerate(bottlenecks())
    rows = {row.path: row for row in resnet_fast.explain(fast).rows}
    found = [step for step in rows[""].steps if "in one kernel" in step]
    assert found[0].startswith("layer1.0.conv3 and layer1.1.conv1 in one kernel")
    assert len(found) == 3
    fast.layer1[1].register_forward_hook(lambda *_: None)
    rows = {row.path: row for row in resnet_fast.explain(fast).rows}
    assert [step for step in rows[""].steps if "in one kernel" in step] == found[2:]


@torch.no_grad()
def test_grouped_and_wide_networks(launched):
    for kwargs in ({"groups": 8, "width_per_group": 8}, {"width_per_group": 96}):
        launched.clear()
        stock = bottlenecks(**kwargs)
        x = torch.randn(1, 3, 32, 32)
        exact = copy.deepcopy(stock).double()(x.double())
        result = resnet_fast.accelerate(stock, inplace=False)(x)
        assert len(launched) == 3
        assert_as_good_as_pytorch(result, stock(x), exact)
