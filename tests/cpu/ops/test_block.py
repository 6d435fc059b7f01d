"""The arithmetic of ``ops/block.py``: which layers expand, what is kept, and statistics from nearly dependent
features."""

import copy

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from resnet_fast.kernels.contract import Geometry
from resnet_fast.kernels.reference import training as reference_training
from resnet_fast.ops import block_norm, residual_block
from resnet_fast.ops.block import Block as Described
from resnet_fast.ops.block import Layer as BlockLayer
from resnet_fast.ops.block import expands, saved_shapes
from tests.cpu.ops.residual_blocks import FROZEN, SHAPES, Block, Layer, Shape, assert_as_precise, freeze, results

pytestmark = pytest.mark.usefixtures("one_thread")

EPS = torch.finfo(torch.float32).eps


class Recorder(TorchDispatchMode):
    """The arguments and the results of every call of the training op."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.resnet_fast.residual_block.default:
            self.calls.append((args, result))
        return result


def recorded(block: Block, *images: Tensor) -> tuple[tuple, tuple]:
    with Recorder() as recorder:
        block.fused(*images)
    (call,) = recorder.calls
    return call


# --- which layers expand, and what is kept ----------------------------------------------------------------------------


def _layer(k: int, c: int, kernel: int = 1, groups: int = 1, padding: int = 0, batch: bool = True) -> BlockLayer:
    weight = torch.empty(k, c // groups, kernel, kernel)
    geometry = Geometry(padding=(padding, padding), groups=groups)
    return BlockLayer(weight, torch.ones(k), torch.zeros(k), 1e-5, geometry, batch)


EXPANDS = {
    "bottleneck": (_layer(16, 4), (2, 4, 4, 4), True),
    "not wide enough": (_layer(15, 8), (2, 8, 8, 8), False),
    "just wide enough": (_layer(16, 8), (2, 8, 8, 8), True),
    "too few pixels": (_layer(16, 8), (1, 8, 4, 7), False),
    "just enough pixels": (_layer(16, 8), (1, 8, 4, 8), True),
    "3x3": (_layer(16, 8, 3), (2, 8, 8, 8), False),
    "padded": (_layer(16, 8, padding=1), (2, 8, 8, 8), False),
    "in groups": (_layer(16, 8, groups=2), (2, 8, 8, 8), False),
    "frozen": (_layer(16, 8, batch=False), (2, 8, 8, 8), False),
}


@pytest.mark.parametrize(("layer", "x", "expected"), EXPANDS.values(), ids=EXPANDS)
def test_expands(layer, x, expected):
    one = Described((layer,), False, False, True, False, "")
    assert expands(one, layer, x) is expected
    assert not expands(one._replace(pool=True), layer, x), "a pool reads the raw result"


@pytest.mark.parametrize("frozen", FROZEN)
@pytest.mark.parametrize("name", SHAPES)
def test_saved_shapes(name, frozen):
    """What ``torch.compile`` and fake tensors are told is kept, and what is."""
    block, images = freeze(SHAPES[name].block(), frozen), SHAPES[name].images()
    with Recorder() as recorder:
        block.fused(*images)
    for (x, residual, weights, scales, shifts, *plain), (_, statistics, saved) in recorder.calls:
        made = residual_block.block_of(weights, scales, shifts, *plain)
        shapes = saved_shapes(made, x.shape, None if residual is None else residual.shape)
        assert [list(shape or []) for shape in shapes] == [list(tensor.shape) for tensor in saved]
        assert [tensor.dtype is torch.bool for tensor in saved] == [shape is None for shape in shapes]
        assert len(statistics) == sum(layer.batch_statistics for layer in made.layers)


def test_statistics_of_an_expand_layer_are_those_of_its_result():
    torch.manual_seed(0)
    x, weight = torch.randn(3, 5, 7, 6, dtype=torch.float64), torch.randn(11, 5, 1, 1, dtype=torch.float64)
    layer = _layer(11, 5)._replace(weight=weight)
    for stride in ((1, 1), (2, 3)):
        y = torch.nn.functional.conv2d(x, weight, stride=stride)
        mean, variance, cancels = block_norm.from_gram(layer, x, *reference_training.gram(x, None, stride))
        torch.testing.assert_close(mean, y.mean((0, 2, 3)))
        torch.testing.assert_close(variance, y.var((0, 2, 3), correction=0))
        assert not cancels


# --- nearly dependent features ----------------------------------------------------------------------------------------

EXPAND = Shape((4, 32, 14, 14), (Layer(64, 1),), relu=False)
SHORTCUT = Shape((4, 32, 14, 14), (Layer(32, 1), Layer(64, 1)), Layer(64, 1), relu=False)


def _common(ratio: float, shape: Shape = EXPAND, seed: int = 0) -> tuple[Block, Tensor]:
    """Channels that are all ``ratio`` times the same image plus noise, and filters of which half take it out again."""
    block = shape.block(seed=seed, momentum=1.0)
    generator = torch.Generator().manual_seed(seed)
    n, c, h, w = shape.x
    x = ratio * torch.randn(n, 1, h, w, generator=generator) + torch.randn(n, c, h, w, generator=generator)
    with torch.no_grad():
        weight = block.convs[-1].weight
        weight[::2] -= weight[::2].mean(1, keepdim=True)
    return block, x.contiguous(memory_format=torch.channels_last)


def _check(block: Block, x: Tensor) -> None:
    exact, stock, fused = (
        results(block, [x], False, torch.float64),
        results(block, [x], False),
        results(block, [x], True),
    )
    assert_as_precise(fused, stock, exact, 16 * EPS)  # without the safety it takes 80 and more


def _flags(block: Block, x: Tensor) -> list[bool]:
    _, (_, _, saved) = recorded(copy.deepcopy(block), x)
    return [bool(tensor) for tensor in saved if tensor.dtype == torch.bool]


@pytest.mark.parametrize("shape", [EXPAND, SHORTCUT], ids=["main", "shortcut"])
@pytest.mark.parametrize("ratio", [0.0, 1.0, 10.0, 100.0])
def test_common_mode(ratio, shape):
    """Statistics and gradients err at most twice as much as stock's, however dependent the features are."""
    for seed in range(3):
        block, x = _common(ratio, shape, seed)
        flags = _flags(block, x)
        assert flags, "no layer expands"
        assert flags[-1] is (ratio >= 10)
        _check(block, x)


@pytest.mark.parametrize("ratio", [10.0, 100.0])
def test_common_mode_needs_the_safety(ratio, monkeypatch):
    """The same check, without: it must be able to fail."""
    monkeypatch.setattr(reference_training, "MOST_CANCELLATION", float("inf"))
    block, x = _common(ratio)
    assert _flags(block, x) == [False]
    with pytest.raises(AssertionError, match="is off by"):
        _check(block, x)


def test_large_mean():
    """A mean far from 0 is no dependence: covariances are taken around it."""
    block, x = _common(0.0)
    x = x + 100
    assert _flags(block, x) == [False]
    _check(block, x)


def test_identical_channels():
    """Of rank 1 to the bit: half of the filters give a variance of 0."""
    block, x = _common(10.0)
    x = x[:, :1].expand(-1, 32, -1, -1).contiguous(memory_format=torch.channels_last)
    fused = results(block, [x], True)
    assert _flags(block, x) == [True]
    assert all(value.isfinite().all() for value in fused.values())
    assert all((fused[name] >= 0).all() for name in fused if name.endswith("running_var"))


def test_nan_is_no_cancellation_but_stays():
    block, x = _common(0.0)
    x[0, 0, 0, 0] = torch.nan
    stock, fused = results(block, [x], False), results(block, [x], True)
    for name, expected in stock.items():
        assert torch.equal(expected.isnan(), fused[name].isnan()), name


def test_statistics_come_from_the_weight_as_the_convolution_rounds_it():
    """In bfloat16, under autocast, the weight is rounded on the way; its statistics must be of what is multiplied."""
    block, x = _common(1.0)
    with torch.autocast("cpu", torch.bfloat16):
        results_ = results(block, [x], True)
    y = torch.nn.functional.conv2d(x.bfloat16().double(), block.convs[0].weight.bfloat16().double())
    torch.testing.assert_close(results_["norms.0.running_mean"].double(), y.mean((0, 2, 3)), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(results_["norms.0.running_var"].double(), y.var((0, 2, 3)), rtol=1e-5, atol=1e-6)
