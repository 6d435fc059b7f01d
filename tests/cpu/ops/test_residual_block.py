"""The training op against the modules that it stands in for: results, every gradient, every running statistic."""

import copy
import itertools
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from resnet_fast import ops
from resnet_fast.graph import functional
from tests.cpu.ops.cases import HALF, assert_channels_last, dtype_name, nhwc, stock_error
from tests.cpu.ops.residual_blocks import (
    FROZEN,
    SHAPES,
    WINOGRAD,
    Block,
    Layer,
    OwnMemory,
    Shape,
    assert_as_precise,
    assert_close,
    decided,
    freeze,
    gradients,
    over_seeds,
    random_shape,
    results,
    saved,
    usual,
)
from tests.cpu.small_models import fused_calls

pytestmark = pytest.mark.usefixtures("one_thread")

EPS = torch.finfo(torch.float32).eps
FLOOR = 16 * EPS
"""Of the largest value: batch norm's backward pass takes differences of numbers some times as large as its result."""

shapes = pytest.mark.parametrize("name", SHAPES)
modes = pytest.mark.parametrize("frozen", FROZEN)
some = pytest.mark.parametrize("name", ["basic", "bottleneck, expand", "bottleneck, expand twice", "deep stem"])


def floor(shape: Shape) -> float:
    return WINOGRAD if shape.winograd else FLOOR


# --- against the definition -------------------------------------------------------------------------------------------


@modes
@shapes
def test_float64(name, frozen):
    block, images = freeze(SHAPES[name].block(), frozen), SHAPES[name].images()
    exact = results(block, images, False, torch.float64)
    assert_close(results(block, images, True, torch.float64), exact, 1e-12)


@modes
@shapes
def test_float32_errs_at_most_twice_as_much_as_stock(name, frozen):
    block, images = decided(SHAPES[name], frozen)
    exact = results(block, images, False, torch.float64)
    stock, fused = results(block, images, False), results(block, images, True)
    assert_as_precise(fused, stock, exact, floor(SHAPES[name]))
    assert_channels_last(fused["out"])


@pytest.mark.parametrize("dtype", HALF, ids=dtype_name)
@modes
@some
def test_half_precision(name, frozen, dtype):
    def run(fused, precision=None):
        def one(seed):
            block, images = freeze(SHAPES[name].block(seed=seed), frozen), SHAPES[name].images(seed)
            return results(block.to(dtype), [x.to(dtype) for x in images], fused, precision)

        return over_seeds(one, 15)

    assert_as_precise(run(True), run(False), run(False, torch.float64), torch.finfo(dtype).eps, usual)


@pytest.mark.parametrize("dtype", HALF, ids=dtype_name)
@modes
@some
def test_autocast(name, frozen, dtype):
    def run(fused, precision=None):
        def one(seed):
            block, images = freeze(SHAPES[name].block(seed=seed), frozen), SHAPES[name].images(seed)
            with torch.autocast("cpu", dtype, enabled=precision is None):
                return results(block, images, fused, precision)

        return over_seeds(one, 15)

    assert_as_precise(run(True), run(False), run(False, torch.float64), torch.finfo(dtype).eps, usual)


@pytest.mark.parametrize("seed", range(60))
def test_random_blocks(seed):
    """In float32 only that it runs and is near: its data may hang on rounding."""
    shape = random_shape(seed)
    block, images = shape.block(seed=seed), shape.images(seed)
    for norm in block.norms:
        norm.train(bool(torch.rand(()) < 0.6))
    try:
        exact = results(block, images, False, torch.float64)
    except ValueError as error:
        with pytest.raises(ValueError, match=re.escape(str(error))):
            results(block, images, True)
        return
    assert_close(results(block, images, True, torch.float64), exact, 1e-11)
    assert_close({"out": results(block, images, True)["out"]}, {"out": exact["out"]}, 1e-4)


@modes
@some
def test_repeats_are_bit_equal(name, frozen):
    block, images = freeze(SHAPES[name].block(), frozen), SHAPES[name].images()
    once, again = (results(block, images, True) for _ in range(2))
    for key, value in once.items():
        assert torch.equal(value, again[key]), key


# --- batch norm's settings --------------------------------------------------------------------------------------------

NORMS = {
    "momentum": {"momentum": 0.3},
    "momentum None": {"momentum": None},
    "momentum 0": {"momentum": 0.0},
    "eps": {"eps": 0.1},
    "no affine": {"affine": False},
    "no tracking": {"track_running_stats": False},
    "neither": {"affine": False, "track_running_stats": False},
    "synchronised": {"norm": nn.SyncBatchNorm},
    "frozen class": {"norm": FrozenBatchNorm2d},
}


@modes
@pytest.mark.parametrize("options", NORMS.values(), ids=NORMS)
@pytest.mark.parametrize("name", ["bottleneck, expand twice", "bias", "stem"])
def test_norms(name, options, frozen):
    """Two steps, so that ``num_batches_tracked`` and momentum count."""
    if options.get("norm") is nn.SyncBatchNorm and "frozen" not in frozen:
        pytest.skip("SyncBatchNorm has no forward on the CPU to compare with")
    block = freeze(SHAPES[name].block(**options), frozen).double()
    x = SHAPES[name].images()[0].double()
    stock, fused = copy.deepcopy(block), copy.deepcopy(block)
    if options.get("norm") is nn.SyncBatchNorm:
        stock.norms = nn.ModuleList(_plain(norm) for norm in stock.norms)
    for step in range(2):
        expected, out = stock(x + step), fused.fused(x + step)
        assert_close({"out": out}, {"out": expected}, 1e-12)
        assert_close(gradients(out, {}, fused), gradients(expected, {}, stock), 1e-12)
    for (key, buffer), expected in zip(fused.named_buffers(), stock.buffers()):
        assert torch.allclose(buffer, expected, rtol=1e-12), key
        assert buffer.dtype == expected.dtype


def _plain(norm: nn.SyncBatchNorm) -> nn.BatchNorm2d:
    plain = nn.BatchNorm2d(norm.num_features).train(norm.training).double()
    plain.load_state_dict(norm.state_dict())
    return plain


def test_synchronised_norm_in_one_process():
    block = SHAPES["basic"].block(nn.SyncBatchNorm).double()
    x = SHAPES["basic"].images()[0].double()
    stock = copy.deepcopy(block)
    stock.norms = nn.ModuleList(_plain(norm) for norm in stock.norms)
    assert_close({"out": block.fused(x)}, {"out": stock(x)}, 1e-12)
    for buffer, expected in zip(block.buffers(), stock.buffers()):
        torch.testing.assert_close(buffer, expected)


@some
def test_gamma_of_zero(name):
    """As torchvision's ``zero_init_residual`` sets it: gradients of what lies before are 0, that of gamma is not."""
    block, images = SHAPES[name].block().double(), SHAPES[name].images()
    nn.init.zeros_(block.norms[len(SHAPES[name].layers) - 1].weight)
    nn.init.zeros_(block.norms[0].weight[:2])
    exact = results(block, images, False, torch.float64)
    assert_close(results(block, images, True, torch.float64), exact, 1e-12)


@modes
@some
def test_constant_channels(name, frozen):
    """A filter of zeros: its variance is 0, which must come out as 0 and not as a rounding below it."""
    block, images = freeze(SHAPES[name].block(), frozen).double(), SHAPES[name].images()
    with torch.no_grad():
        for conv in block.convs:
            conv.weight[1] = 0
    exact = results(block, images, False, torch.float64)
    assert_close(results(block, images, True, torch.float64), exact, 1e-12)
    fused = results(block.float(), images, True)
    assert all(value.isfinite().all() for value in fused.values())


@some
def test_constant_input(name):
    """Every channel of the first convolution is constant but for its border."""
    block, x = SHAPES[name].block(), torch.ones(SHAPES[name].x)
    exact = results(block, [x], False, torch.float64)
    assert_close(results(block, [x], True, torch.float64), exact, 1e-9)  # divided by sqrt(eps), 3 digits are lost


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("place", ["x", "weight"])
@modes
@some
def test_nan_and_infinity_propagate(name, frozen, place, value):
    """Nothing that is not a number in stock's results may be one in ours."""
    block, images = freeze(SHAPES[name].block(), frozen), SHAPES[name].images()
    with torch.no_grad():
        if place == "x":
            images[0][0, 1, 1, 1] = value
        else:
            block.convs[1 % len(block.convs)].weight[0, 0] = value
    stock, fused = results(block, images, False), results(block, images, True)
    for key, expected in stock.items():
        assert not (fused[key].isfinite() & ~expected.isfinite()).any(), key


# --- what stock refuses -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["basic", "bottleneck, expand twice", "bias"])
def test_one_value_per_channel(name):
    """As batch norm raises it, and with the running statistics untouched."""
    block = SHAPES[name].block()
    x = torch.randn(1, block.convs[0].in_channels, 1, 1)
    buffers = [buffer.clone() for buffer in block.buffers()]
    expected = stock_error(copy.deepcopy(block), x)
    with pytest.raises(type(expected), match="Expected more than 1 value per channel") as raised:
        block.fused(x)
    assert str(raised.value) == str(expected)
    assert all(torch.equal(one, other) for one, other in zip(block.buffers(), buffers))


@pytest.mark.parametrize("name", ["basic", "bottleneck, expand"])
def test_one_value_per_channel_with_frozen_statistics(name):
    block = freeze(SHAPES[name].block(), "frozen").double()
    x = torch.randn(1, block.convs[0].in_channels, 1, 1, dtype=torch.float64)
    assert_close({"out": block.fused(x)}, {"out": block(x)}, 1e-12)


@modes
@pytest.mark.parametrize("name", ["basic", "bottleneck, expand twice", "stem"])
def test_empty_batch(name, frozen):
    """An accelerated block takes its modules then; the op alone must still give a result of the right shape."""
    block = freeze(SHAPES[name].block(), frozen)
    x = torch.randn(0, *SHAPES[name].x[1:], requires_grad=True)
    out = block.fused(x)
    assert out.shape == block(x).shape
    (d_x,) = torch.autograd.grad(out.sum(), x)
    assert d_x.shape == x.shape


BAD = {
    "x has shape .*expected 4 dimensions": lambda b: b.fused(torch.randn(8, 9, 9)),
    "x is a list, expected a tensor": lambda b: b.fused([1.0]),
    "x has 7 channels.*expected 8": lambda b: b.fused(torch.randn(2, 7, 9, 9)),
    "x is torch.float64, expected torch.float32": lambda b: b.fused(torch.randn(2, 8, 9, 9).double()),
    "size of tensor a \\(12\\) must match the size of tensor b \\(5\\)": lambda _: functional.residual_block(
        torch.randn(2, 8, 9, 9),
        [nn.Conv2d(8, 12, 1), nn.Conv2d(8, 5, 1)],
        [nn.BatchNorm2d(12), nn.BatchNorm2d(5)],
        projection=True,
    ),
    "size of tensor a \\(12\\) must match the size of tensor b \\(8\\)": lambda _: functional.residual_block(
        torch.randn(2, 8, 9, 9), [nn.Conv2d(8, 12, 1)], [nn.BatchNorm2d(12)], identity=True
    ),
}


@pytest.mark.parametrize(("message", "call"), BAD.items(), ids=BAD)
def test_bad_input(message, call):
    block = SHAPES["basic"].block()
    buffers = [buffer.clone() for buffer in block.buffers()]
    with pytest.raises((TypeError, ValueError, RuntimeError), match=message):
        call(block)
    assert all(torch.equal(one, other) for one, other in zip(block.buffers(), buffers))


# --- inputs of other layouts, shapes and dtypes -----------------------------------------------------------------------


LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "every other pixel": lambda x: F.interpolate(x, scale_factor=2)[:, :, ::2, 1::2],
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "inside a larger one": lambda x: F.pad(x, (1, 1, 1, 1, 2, 3), value=torch.nan)[:, 2:-3, 1:-1, 1:-1],
}


@modes
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_layouts(layout, frozen):
    for name in ("bottleneck, expand", "residual"):
        block, images = freeze(SHAPES[name].block(), frozen), SHAPES[name].images()
        expected = results(block, images, True)
        actual = results(block, [layout(image) for image in images], True)
        for key, value in expected.items():
            assert torch.equal(actual[key], value), key
        assert actual["d x"].shape == images[0].shape


def test_gradient_of_any_layout():
    """Autograd hands over what the loss makes: expanded, transposed, sliced."""
    block, (x,) = SHAPES["bottleneck, expand"].block().double(), SHAPES["bottleneck, expand"].images()
    x = x.double().requires_grad_()
    losses = (torch.sum, lambda y: y.mean((2, 3)).square().sum(), lambda y: y[:, ::2, 1:].transpose(1, 2).norm())
    for loss in losses:
        expected = torch.autograd.grad(loss(block(x)), [x, *block.parameters()])
        actual = torch.autograd.grad(loss(block.fused(x)), [x, *block.parameters()])
        for one, other in zip(actual, expected):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


RESIDUALS = {
    "one pixel": lambda shape: torch.randn(*shape[:2], 1, 1),
    "one channel": lambda shape: torch.randn(shape[0], 1, *shape[2:]),
    "one number": lambda shape: torch.tensor(0.5),
    "one image": lambda shape: torch.randn(shape[1:]),
    "more images": lambda shape: torch.randn(3, *shape),
    "float64": lambda shape: torch.randn(shape, dtype=torch.float64),
}


@modes
@pytest.mark.parametrize("make", RESIDUALS.values(), ids=RESIDUALS)
def test_residuals_of_other_shapes_and_dtypes(make, frozen):
    shape = SHAPES["residual"]
    block, residual = freeze(shape.block(), frozen), make(shape.residual)
    images = (shape.images()[0], residual)
    stock, fused = ({"out": run(*images)} for run in (copy.deepcopy(block), copy.deepcopy(block).fused))
    assert fused["out"].dtype == stock["out"].dtype
    assert_close(fused, stock, WINOGRAD)


def test_inplace_add_keeps_the_dtype():
    shape = SHAPES["residual"]
    block, (x, residual) = shape.block(), shape.images()
    out = functional.residual_block(x, block.convs, block.norms, residual.double(), inplace_add=True)
    assert out.dtype == torch.float32


# --- gradients that are not asked for ---------------------------------------------------------------------------------


@modes
@pytest.mark.parametrize("name", ["basic, projection", "bottleneck, expand twice", "shortcut of a residual"])
def test_every_gradient_alone(name, frozen):
    """Of one tensor at a time: the others' must not be needed to find it."""
    block, images = freeze(SHAPES[name].block(), frozen).double(), [x.double() for x in SHAPES[name].images()]
    exact = results(block, images, True)
    named = dict(block.named_parameters())
    sources = {"x": images[0], **({"residual": images[1]} if len(images) > 1 else {}), **named}
    for key, source in sources.items():
        for tensor in sources.values():
            tensor.requires_grad_(tensor is source)
        out = block.fused(*images)
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(7)).to(out.dtype)
        (found,) = torch.autograd.grad(out, [source], grad)
        torch.testing.assert_close(found, exact[f"d {key}"], rtol=1e-10, atol=1e-12, msg=key)


@modes
@shapes
def test_results_have_memory_of_their_own(name, frozen):
    """As custom operators must: PyTorch warns of others, and will refuse them."""
    block, images = freeze(SHAPES[name].block(), frozen), SHAPES[name].images()
    with OwnMemory():
        results(block, images, True)


def test_no_gradient_wanted():
    block = SHAPES["basic"].block().requires_grad_(False)
    assert not block.fused(SHAPES["basic"].images()[0]).requires_grad
    with torch.no_grad():
        assert not SHAPES["basic"].block().fused(SHAPES["basic"].images()[0]).requires_grad


def test_frozen_blocks_save_nothing():
    block = freeze(SHAPES["bottleneck, expand twice"].block(), "frozen").requires_grad_(False)
    (x,) = SHAPES["bottleneck, expand twice"].images()
    assert saved(lambda: block.fused(x)) == 0


def test_expand_layers_save_no_result():
    shape = Shape((2, 32, 16, 16), (Layer(8, 1), Layer(8), Layer(32, 1)), identity=True)
    block, (x,) = shape.block(), shape.images()
    x.requires_grad_()
    image = 2 * 16 * 16 * 4
    everything = image * (32 + 8 + 8 + 32)  # x, two raw results, and the block's own, whose sign is the ReLU's mask
    assert everything <= saved(lambda: block.fused(x)) < everything + image * 8
    assert saved(lambda: block(x)) > everything + image * 32


# --- derivatives of derivatives, and PyTorch's own checks -------------------------------------------------------------

TINY = {
    "expand": Shape((2, 2, 3, 3), (Layer(2, 1), Layer(2), Layer(4, 1)), Layer(4, 1)),
    "identity": Shape((2, 2, 3, 2), (Layer(2), Layer(2)), identity=True),
    "residual, no ReLU": Shape((2, 2, 3, 2), (Layer(3, 1),), residual=(2, 3, 3, 2), relu=False),
    "pool": Shape((2, 1, 5, 5), (Layer(2, 3, 2),), pool=True),
}


@pytest.mark.parametrize("frozen", ["batch", "frozen", "odd frozen"])
@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("check", [torch.autograd.gradcheck, torch.autograd.gradgradcheck])
def test_gradcheck(check, name, frozen):
    block, images = decided(TINY[name], frozen)
    block = block.double()
    inputs = [image.double().requires_grad_() for image in images]
    parameters = dict(block.named_parameters())

    def run(*tensors):
        split = len(inputs)
        tied = dict(zip(parameters, tensors[split:]))
        return torch.func.functional_call(_Fused(block), {f"block.{k}": v for k, v in tied.items()}, tensors[:split])

    assert check(run, (*inputs, *parameters.values()), atol=1e-5, eps=1e-6)


class _Fused(nn.Module):
    def __init__(self, block: Block) -> None:
        super().__init__()
        self.block = block

    def forward(self, *images):
        return self.block.fused(*images)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=dtype_name)
@pytest.mark.parametrize("frozen", ["batch", "odd frozen"])
@pytest.mark.parametrize("name", ["bottleneck, expand twice", "residual", "stem"])
def test_opcheck(name, frozen, dtype):
    """Schema, fake kernels, autograd registration and ``torch.compile``'s view of the op."""
    block, images = freeze(SHAPES[name].block(), frozen).to(dtype), [x.to(dtype) for x in SHAPES[name].images()]
    calls = []

    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "resnet_fast":
                calls.append((func, args))
            return func(*args, **(kwargs or {}))

    with Recorder():
        block.fused(*images)
    ((op, args),) = calls
    args = [[t.detach().requires_grad_() for t in a] if _is_tensors(a) else a for a in args]
    args[0] = args[0].detach().requires_grad_()
    found = torch.library.opcheck(op, tuple(args))
    assert set(found.values()) == {"SUCCESS"}, found


def _is_tensors(value) -> bool:
    return isinstance(value, (list, tuple)) and bool(value) and isinstance(value[0], torch.Tensor)


def test_every_implementation(monkeypatch):
    """The native kernels and the definition are two ways to the same block."""
    block, images = decided(SHAPES["bottleneck, expand twice"])
    exact = results(block, images, False, torch.float64)
    stock = results(block, images, False)
    for implementation in ops.TRAINING:
        monkeypatch.setenv("RESNET_FAST_IMPLEMENTATION", implementation)
        assert_as_precise(results(block, images, True), stock, exact, FLOOR)


def test_calls():
    block = SHAPES["bottleneck, expand"].block()
    x = nhwc(SHAPES["bottleneck, expand"].images()[0]).requires_grad_()
    calls = fused_calls(lambda: block.fused(x).sum().backward())
    assert calls == ["residual_block", "residual_block_backward"]
    assert all(p.grad is not None for p in itertools.chain(block.parameters(), [x]))
