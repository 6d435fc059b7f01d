"""The fused ops on modules: the numbers and gradients of ``relu(bn(conv(x)) + residual)``, and no stale fold, ever."""

import copy
import itertools
from collections.abc import Callable
from typing import Optional

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from resnet_fast.graph import batch_norm, functional
from tests.cpu.ops.cases import HALF, assert_channels_last, dtype_name, nhwc

CHANNELS = 40  # the fold's first 64 bytes are compared: tests that write must be able to write behind them


pytestmark = pytest.mark.usefixtures("one_thread")


def _conv(bias: bool = False, **options) -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(6, CHANNELS, 3, **{"padding": 1, "bias": bias, **options})


def _bn(cls: type = nn.BatchNorm2d, **options) -> nn.Module:
    """A batch norm in eval mode with statistics as after training."""
    generator = torch.Generator().manual_seed(1)
    bn = cls(CHANNELS, **options).eval()
    with torch.no_grad():
        bn.running_mean.copy_(torch.randn(CHANNELS, generator=generator))
        bn.running_var.copy_(torch.rand(CHANNELS, generator=generator) + 0.2)
        for tensor in (bn.weight, bn.bias):
            if tensor is not None:
                tensor.copy_(torch.randn(CHANNELS, generator=generator))
    return bn


def _x(n: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(n, 6, 7, 9, generator=torch.Generator().manual_seed(2)).to(dtype)


def stock(x: Tensor, conv: nn.Conv2d, bn: nn.Module, residual: Optional[Tensor] = None, relu: bool = True) -> Tensor:
    y = bn(conv(x))
    y = y if residual is None else y + residual
    return F.relu(y) if relu else y


def _check(conv: nn.Conv2d, bn: nn.Module, x: Optional[Tensor] = None, tolerance: float = 1e-5) -> None:
    """Accelerated and stock agree, in all four epilogues, relative to the largest result."""
    x = _x(dtype=conv.weight.dtype) if x is None else x
    residual = torch.randn_like(stock(x, conv, bn))
    for added, relu in itertools.product((None, residual), (False, True)):
        actual, expected = functional.conv_bn_act(x, conv, bn, added, relu), stock(x, conv, bn, added, relu)
        assert actual.dtype == expected.dtype
        assert_channels_last(actual)
        torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * float(expected.detach().abs().max()))


# --- modules as they come ---------------------------------------------------------------------------------------------

MODULES: dict[str, tuple[dict, type, dict]] = {
    "plain": ({}, nn.BatchNorm2d, {}),
    "not affine": ({}, nn.BatchNorm2d, {"affine": False}),
    "conv bias": ({"bias": True}, nn.BatchNorm2d, {}),
    "conv bias, not affine": ({"bias": True}, nn.BatchNorm2d, {"affine": False}),
    "large eps": ({}, nn.BatchNorm2d, {"eps": 0.7}),
    "frozen": ({}, FrozenBatchNorm2d, {}),
    "frozen, conv bias, large eps": ({"bias": True}, FrozenBatchNorm2d, {"eps": 0.7}),
    "geometry": ({"stride": (2, 1), "padding": (0, 2), "dilation": (1, 2), "groups": 2}, nn.BatchNorm2d, {}),
}


@pytest.mark.parametrize("gradients", [True, False], ids=["gradients", "no_grad"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=dtype_name)
@pytest.mark.parametrize("name", MODULES)
def test_modules(name, dtype, gradients):
    """Whatever batch norm holds or lacks, with the cached fold and with the differentiated one."""
    conv_options, cls, bn_options = MODULES[name]
    conv, bn = _conv(**conv_options).to(dtype), _bn(cls, **bn_options).to(dtype)
    with torch.set_grad_enabled(gradients):
        _check(conv, bn, tolerance=1e-5 if dtype == torch.float32 else 1e-13)
        _check(conv, bn, tolerance=1e-5 if dtype == torch.float32 else 1e-13)  # from the caches


@pytest.mark.parametrize("bn_dtype", ["half", "float32"])
@pytest.mark.parametrize("dtype", HALF, ids=dtype_name)
def test_half_modules(dtype, bn_dtype):
    """A half-precision model, with its batch norms in half precision as well or kept in float32."""
    conv, bn = _conv(bias=True).to(dtype), _bn()
    if bn_dtype == "half":
        bn = bn.to(dtype)
    with torch.no_grad():
        # The stock modules round three times more.
        _check(conv, bn, tolerance=8 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("frozen_norm", [False, True])
def test_one_eps_each(frozen_norm):
    """A changed ``eps`` counts at the next call, though no tensor has changed."""
    conv, bn = _conv(), _bn(FrozenBatchNorm2d if frozen_norm else nn.BatchNorm2d)
    with torch.no_grad():
        for eps in (1e-5, 0.5, 1e-5):
            bn.eps = eps
            _check(conv, bn)


def test_one_norm_with_and_without_conv_bias():
    """Two convolutions may share a batch norm; a bias may come and go."""
    bn, plain, biased = _bn(), _conv(), _conv(bias=True)
    with torch.no_grad():
        for conv in (plain, biased, plain, biased):
            _check(conv, bn)
        biased.bias = None
        _check(biased, bn)
        bn.weight, bn.bias = None, None
        _check(biased, bn)


def test_running_statistics_used_whatever_the_mode():
    """``functional`` reads no training flag and updates nothing: the modules decide that above it."""
    conv, bn = _conv(), _bn()
    expected = stock(_x(), conv, bn)
    bn.train()
    before = {k: v.clone() for k, v in bn.state_dict().items()}
    torch.testing.assert_close(functional.conv_bn_act(_x(), conv, bn), expected)
    assert all(torch.equal(v, before[k]) for k, v in bn.state_dict().items())


@pytest.mark.parametrize("name", MODULES)
def test_fold_batch_norm(name):
    """``bn(y + bias) == y * scale + shift``, in float32 at least."""
    conv_options, cls, bn_options = MODULES[name]
    bias = _conv(**conv_options).bias
    y = torch.randn(2, CHANNELS, 3, 3)
    for dtype in (torch.float32, torch.float64, torch.float16):
        bn = _bn(cls, **bn_options).to(dtype)
        given = None if bias is None else bias.to(dtype)
        scale, shift = batch_norm.fold_batch_norm(bn, given)
        assert scale.dtype == shift.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert scale.shape == shift.shape == (CHANNELS,)
        wide = y.to(scale.dtype)
        expected = copy.deepcopy(bn).to(scale.dtype)(wide if given is None else wide + given.view(1, -1, 1, 1))
        actual = wide * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cls", [nn.BatchNorm2d, FrozenBatchNorm2d])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=dtype_name)
def test_stem(dtype, cls):
    torch.manual_seed(0)
    conv, bn = nn.Conv2d(3, CHANNELS, 7, 2, 3, bias=False).to(dtype), _bn(cls).to(dtype)
    x = torch.randn(2, 3, 33, 30).to(dtype)
    actual, expected = functional.stem(x, conv, bn), F.max_pool2d(stock(x, conv, bn), 3, 2, 1)
    assert_channels_last(actual)
    allowed = {torch.float32: 1e-5, torch.float64: 1e-13, torch.bfloat16: 0.05}[dtype]
    torch.testing.assert_close(actual, expected, rtol=0, atol=allowed * float(expected.detach().abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALF], ids=dtype_name)
def test_global_avg_pool(dtype):
    x = _x(dtype=dtype)
    torch.testing.assert_close(functional.global_avg_pool(x), F.adaptive_avg_pool2d(x, 1))


# --- residuals --------------------------------------------------------------------------------------------------------

RESIDUALS = {
    "per channel": (1, CHANNELS, 1, 1),
    "per pixel": (2, 1, 7, 9),
    "per image": (2, 1, 1, 1),
    "without batch": (CHANNELS, 7, 9),
    "scalar": (),
}


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("name", RESIDUALS)
def test_residuals_that_broadcast(name, relu):
    """``+`` broadcasts in the stock modules, so it does here; gradients are summed back."""
    conv, bn = _conv(), _bn()
    results = []
    for function in (functional.conv_bn_act, stock):
        residual = torch.randn(RESIDUALS[name], generator=torch.Generator().manual_seed(3)).requires_grad_()
        y = function(_x(), conv, bn, residual, relu)
        y.square().sum().backward()
        results.append((y, residual.grad))
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_a_residual_that_makes_the_result_larger():
    """A batch of one broadcast to the residual's two, with ``+``; ``+=`` cannot, here as in PyTorch."""
    conv, bn, residual = _conv(), _bn(), torch.randn(2, CHANNELS, 7, 9)
    actual = functional.conv_bn_act(_x(1), conv, bn, residual)
    torch.testing.assert_close(actual, stock(_x(1), conv, bn, residual))
    with pytest.raises(RuntimeError, match="doesn't match the broadcast shape"), torch.no_grad():
        functional.conv_bn_act(_x(1), conv, bn, residual, inplace_add=True)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("other", [torch.float64, torch.bfloat16, torch.float16], ids=dtype_name)
def test_residuals_of_another_dtype(other, inplace):
    """Promoted by ``+`` and not by ``+=``, as PyTorch does."""
    conv, bn, x = _conv(), _bn(), _x()
    residual = torch.randn(2, CHANNELS, 7, 9).to(other)
    with torch.no_grad():
        actual = functional.conv_bn_act(x, conv, bn, residual, inplace_add=inplace)
        y = bn(conv(x))
        y = y.add_(residual) if inplace else y + residual
    assert actual.dtype == y.dtype
    torch.testing.assert_close(actual, F.relu(y), rtol=1e-4, atol=1e-4)


def test_the_residual_is_not_written():
    """Neither the one that the op adds, nor the one added in a step of its own."""
    conv, bn = _conv(), _bn()
    for shape in ((2, CHANNELS, 7, 9), (1, CHANNELS, 1, 1)):
        residual = nhwc(torch.randn(shape))
        before = residual.clone()
        for inplace in (False, True):
            with torch.no_grad():
                functional.conv_bn_act(_x(), conv, bn, residual, inplace_add=inplace)
        assert torch.equal(residual, before)


# --- gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("name", MODULES)
def test_gradients(name, relu):
    """Every leaf gets the gradient of the unfused modules in float64: conv.weight, conv.bias, bn's, x, residual."""
    conv_options, cls, bn_options = MODULES[name]
    conv, bn = _conv(**conv_options).double(), _bn(cls, **bn_options).double()
    results = []
    for function in (functional.conv_bn_act, stock):
        conv.zero_grad(), bn.zero_grad()
        x = _x(dtype=torch.float64).requires_grad_()
        residual = torch.ones_like(stock(x, conv, bn)).detach().requires_grad_()
        function(x, conv, bn, residual, relu).square().sum().backward()
        results.append([leaf.grad.clone() for leaf in (x, residual, *conv.parameters(), *bn.parameters())])
    assert len(results[0]) == 3 + (conv.bias is not None) + 2 * (cls is nn.BatchNorm2d and bn.weight is not None)
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_gradients_of_a_partly_frozen_block():
    """Convolution frozen, batch norm trained, and the other way round."""
    for frozen, trained in ((0, 1), (1, 0)):
        modules = (_conv(), _bn())
        modules[frozen].requires_grad_(False)
        functional.conv_bn_act(_x(), *modules).sum().backward()
        assert all(p.grad is not None for p in modules[trained].parameters())
        assert all(p.grad is None for p in modules[frozen].parameters())


def test_gradients_after_inference_mode():
    """Evaluation first, under inference_mode, then training: nothing that was cached may be an inference tensor."""
    conv, bn = _conv(), _bn()
    for parameter in bn.parameters():
        parameter.requires_grad_(False)  # so that the fold is cached
    with torch.inference_mode():
        inferred = functional.conv_bn_act(_x(), conv, bn)
    y = functional.conv_bn_act(_x().requires_grad_(), conv, bn)
    y.sum().backward()
    assert torch.equal(y, inferred)
    assert conv.weight.grad is not None


def test_no_graph_is_kept_by_the_caches():
    """A fold made without gradients does not hide that batch norm's parameters want them later, nor the reverse."""
    conv, bn = _conv(), _bn()
    with torch.no_grad():
        functional.conv_bn_act(_x(), conv, bn)
    for _ in range(2):
        functional.conv_bn_act(_x(), conv, bn).sum().backward()
        assert bn.weight.grad is not None
    with torch.no_grad():
        assert not functional.conv_bn_act(_x(), conv, bn).requires_grad


@pytest.mark.parametrize("dtype", HALF, ids=dtype_name)
def test_autocast(dtype):
    """float32 modules under autocast: the dtypes of the stock modules, float32 gradients, either residual."""
    conv, bn = _conv(), _bn()
    for residual_dtype in (torch.float32, dtype):
        residual = torch.randn(2, CHANNELS, 7, 9).to(residual_dtype)
        with torch.autocast("cpu", dtype):
            actual, expected = functional.conv_bn_act(_x(), conv, bn, residual), stock(_x(), conv, bn, residual)
        assert actual.dtype == expected.dtype
        torch.testing.assert_close(actual.float(), expected.float(), rtol=0.05, atol=0.1)
        actual.float().sum().backward()
        assert {p.grad.dtype for p in (*conv.parameters(), *bn.parameters())} == {torch.float32}


# --- the fold is never stale ------------------------------------------------------------------------------------------


def _after(tensor: Tensor) -> Tensor:
    """The last channels."""
    return tensor[-8:]


def _optimiser(make: Callable) -> Callable:
    def write(conv: nn.Module, bn: nn.Module) -> None:
        parameters = [*conv.parameters(), *bn.parameters()]
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
            _after(parameter.grad).fill_(1)
        make(parameters).step()

    return write


def _load_state_dict(conv: nn.Module, bn: nn.Module) -> None:
    for module in (conv, bn):
        state = copy.deepcopy(module.state_dict())
        for tensor in state.values():
            if tensor.is_floating_point():
                _after(tensor).mul_(0.5)
        module.load_state_dict(state)


def _assign_state_dict(conv: nn.Module, bn: nn.Module) -> None:
    for module in (conv, bn):
        state = {k: v * 0.5 if v.is_floating_point() else v for k, v in module.state_dict().items()}
        module.load_state_dict(state, assign=True)


def _tensors(conv: nn.Module, bn: nn.Module) -> list[Tensor]:
    return [conv.weight, bn.running_mean, bn.running_var, bn.weight, bn.bias]


def _copy_no_grad(conv: nn.Module, bn: nn.Module) -> None:
    with torch.no_grad():
        for tensor in _tensors(conv, bn):
            _after(tensor).copy_(_after(tensor) * 0.5)


def _copy_inference_mode(conv: nn.Module, bn: nn.Module) -> None:
    with torch.inference_mode():
        for tensor in _tensors(conv, bn):
            new = tensor.clone()
            _after(new).mul_(0.5)
            tensor.copy_(new)


def _copy_data(conv: nn.Module, bn: nn.Module) -> None:
    for tensor in _tensors(conv, bn):
        tensor.data.copy_(tensor.data * 0.5)


def _partly_through_data(conv: nn.Module, bn: nn.Module) -> None:
    conv.weight.data[5] = 0
    conv.weight.data[:, 3] *= 2
    bn.running_mean.data[7:] += 1


def _through_numpy(conv: nn.Module, bn: nn.Module) -> None:
    for tensor in _tensors(conv, bn):
        _after(tensor.detach()).numpy()[...] *= 0.5


KEPT: list[Tensor] = []


def _set_data(conv: nn.Module, bn: nn.Module) -> None:
    for tensor in _tensors(conv, bn):
        new = tensor.data.clone()
        _after(new).mul_(0.5)
        KEPT.append(tensor.data)  # freed memory would be overwritten, and by that give the write away
        tensor.data = new


def _set_parameter(conv: nn.Module, bn: nn.Module) -> None:
    for module in (conv, bn):
        module.weight = nn.Parameter(module.weight.detach() * 0.5)
    bn.running_var = bn.running_var * 0.5


def _train_forward(conv: nn.Module, bn: nn.Module) -> None:
    bn.train()
    with torch.no_grad():
        bn(torch.randn(2, CHANNELS, 5, 5) * 3 + 1)
    bn.eval()


def _to_double_and_back(conv: nn.Module, bn: nn.Module) -> None:
    with torch.no_grad():
        for tensor in _tensors(conv.double(), bn.double()):
            _after(tensor).mul_(0.5)
    conv.float(), bn.float()


def _reset(conv: nn.Module, bn: nn.Module) -> None:
    conv.reset_parameters(), bn.reset_parameters()


WRITES = {
    "SGD": _optimiser(lambda p: torch.optim.SGD(p, lr=0.3, foreach=False)),
    "SGD, foreach": _optimiser(lambda p: torch.optim.SGD(p, lr=0.3, foreach=True)),
    "AdamW": _optimiser(lambda p: torch.optim.AdamW(p, lr=0.3, weight_decay=0, foreach=False)),
    "Adam, foreach": _optimiser(lambda p: torch.optim.Adam(p, lr=0.3, foreach=True)),
    "load_state_dict": _load_state_dict,
    "load_state_dict(assign=True)": _assign_state_dict,
    "copy_ under no_grad": _copy_no_grad,
    "copy_ under inference_mode": _copy_inference_mode,
    "data.copy_": _copy_data,
    "data[...] = ": _partly_through_data,
    "numpy": _through_numpy,
    "data = new": _set_data,
    "weight = nn.Parameter(new)": _set_parameter,
    "running statistics": _train_forward,
    "double and back": _to_double_and_back,
    "reset_parameters": _reset,
}


def _check_write(write: Callable, channels_last: bool = False) -> None:
    conv, bn = _conv(), _bn()
    if channels_last:
        conv = conv.to(memory_format=torch.channels_last)
    x = _x()
    for _ in range(3):
        with torch.inference_mode():
            before = stock(x, conv, bn, relu=False)
            assert_same(functional.conv_bn_act(x, conv, bn, relu=False), before)
        write(conv, bn)
        with torch.no_grad():
            expected = stock(x, conv, bn, relu=False)
            assert not torch.allclose(expected, before, rtol=1e-3, atol=1e-3), "the write changes nothing"
            assert_same(functional.conv_bn_act(x, conv, bn, relu=False), expected)


def assert_same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("name", WRITES)
def test_writes_are_seen(name, channels_last):
    """Whatever changes a parameter or buffer, however far from its first bytes, the next result is the new one."""
    _check_write(WRITES[name], channels_last)


def test_a_copy_is_independent():
    """deepcopy shares no fold with its original: each sees its own parameters, before and after either is changed."""
    conv, bn = _conv(), _bn()
    with torch.no_grad():
        functional.conv_bn_act(_x(), conv, bn)
        twin_conv, twin_bn = copy.deepcopy(conv), copy.deepcopy(bn)
        _copy_no_grad(twin_conv, twin_bn)
        for pair in ((conv, bn), (twin_conv, twin_bn)):
            assert_same(functional.conv_bn_act(_x(), *pair), stock(_x(), *pair))
        _copy_no_grad(conv, bn)
        for pair in ((conv, bn), (twin_conv, twin_bn)):
            assert_same(functional.conv_bn_act(_x(), *pair), stock(_x(), *pair))


def test_a_model_built_under_inference_mode():
    """Its parameters carry no versions, so nothing of it is cached, and writes are seen all the same."""
    with torch.inference_mode():
        conv, bn = _conv(), _bn()
        for _ in range(2):
            assert_same(functional.conv_bn_act(_x(), conv, bn), stock(_x(), conv, bn))
            _copy_no_grad(conv, bn)


@pytest.mark.parametrize("optimiser", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
def test_fused_optimisers_are_seen(optimiser):
    """``fused=True`` writes parameters without raising their versions (PyTorch 2.14), here behind the first bytes."""
    options = {} if optimiser is torch.optim.SGD else {"weight_decay": 0}
    _check_write(_optimiser(lambda p: optimiser(p, lr=0.3, fused=True, **options)))


def test_running_statistics_of_later_channels_are_seen():
    """A training step raises no version of the running statistics, only that of ``num_batches_tracked``.

    The first 16 channels are dead, so that the comparison of first bytes sees nothing; on a GPU there is none.
    """
    conv, bn = _conv(), _bn()
    with torch.no_grad():
        conv.weight[:16] = 0
        bn.running_mean[:16] = 0
        bn.running_var[:16] = 0
        functional.conv_bn_act(_x(), conv, bn, relu=False)
        bn.train()(conv(_x()) * 3)
        bn.eval()
        assert_same(functional.conv_bn_act(_x(), conv, bn, relu=False), stock(_x(), conv, bn, relu=False))
