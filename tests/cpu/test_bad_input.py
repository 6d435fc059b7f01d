"""Wrong input gets the exception that the stock module raises, found by running it, and a message that helps."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

import resnet_fast
from resnet_fast.graph import functional
from tests.cpu.ops.cases import stock_error

conv_bn_act = torch.ops.resnet_fast.conv_bn_act
stem = torch.ops.resnet_fast.stem
global_avg_pool = torch.ops.resnet_fast.global_avg_pool


pytestmark = pytest.mark.usefixtures("one_thread")


def _raises_like(stock: BaseException, function: Callable, *args: Any, **kwargs: Any) -> BaseException:
    """Run ours; it must raise exactly the type that the stock one raised."""
    with pytest.raises(type(stock)) as caught:
        function(*args, **kwargs)
    assert type(caught.value) is type(stock), f"{type(caught.value).__name__}, stock raises {type(stock).__name__}"
    return caught.value


# --- ops --------------------------------------------------------------------------------------------------------------

GEOMETRY = {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "groups": 1, "relu": True}


def _call(**changed: Any) -> Tensor:
    arguments: dict[str, Any] = {
        "x": torch.randn(2, 4, 6, 5),
        "weight": torch.randn(8, 4, 3, 3),
        "scale": torch.ones(8),
        "shift": torch.zeros(8),
        "residual": None,
        **GEOMETRY,
        **changed,
    }
    return conv_bn_act(*arguments.values())


def test_the_unchanged_call_works():
    """What the cases below change one thing of."""
    assert _call().shape == (2, 8, 6, 5)
    assert _call(residual=torch.zeros(2, 8, 6, 5)).shape == (2, 8, 6, 5)


OPS: dict[str, tuple[dict, str]] = {
    # name: (what is changed, what the message must say)
    "x of 2 dimensions": ({"x": torch.ones(4, 6)}, r"x.*\[4, 6\].*4 dimensions"),
    "x of 3 dimensions": ({"x": torch.ones(4, 6, 5)}, r"x.*\[4, 6, 5\].*4 dimensions"),
    "x of 5 dimensions": ({"x": torch.ones(1, 2, 4, 6, 5)}, r"x.*\[1, 2, 4, 6, 5\].*4 dimensions"),
    "x with other channels": ({"x": torch.ones(2, 3, 6, 5)}, r"x.*3 channels.*\[2, 3, 6, 5\].*expected 4"),
    "x too small": ({"x": torch.ones(2, 4, 6, 1), "padding": (0, 0)}, r"x.*\[2, 4, 6, 1\].*width.*at least 3"),
    "x too low": ({"x": torch.ones(2, 4, 2, 6), "padding": (0, 0)}, r"x.*\[2, 4, 2, 6\].*height.*at least 3"),
    "x too small for the dilation": ({"dilation": (1, 4)}, r"x.*\[2, 4, 6, 5\].*width.*at least 9"),
    "x of integers": ({"x": torch.ones(2, 4, 6, 5, dtype=torch.int64)}, r"x.*int64.*float32.*floating-point"),
    "x and weight of integers": (
        {"x": torch.ones(2, 4, 6, 5, dtype=torch.int32), "weight": torch.ones(8, 4, 3, 3, dtype=torch.int32)},
        r"x.*int32.*int32.*floating-point",
    ),
    "x wider than weight": ({"x": torch.ones(2, 4, 6, 5).double()}, r"x.*float64.*weight.*float32"),
    "x narrower than weight in another way": (
        {"x": torch.ones(2, 4, 6, 5).half(), "weight": torch.randn(8, 4, 3, 3).bfloat16()},
        r"x.*float16.*weight.*bfloat16",
    ),
    "groups that divide nothing": ({"groups": 3}, r"groups.*3.*divisor.*8"),
    "groups of 0": ({"groups": 0}, r"groups.*0.*divisor.*8"),
    "negative groups": ({"groups": -1}, r"groups.*-1.*divisor.*8"),
    "groups and a weight of all channels": ({"groups": 2}, r"x.*4 channels.*expected 8.*groups=2"),
    "scale of another length": ({"scale": torch.ones(7)}, r"scale.*\[7\].*\[8\]"),
    "scale of 4 dimensions": ({"scale": torch.ones(1, 8, 1, 1)}, r"scale.*\[1, 8, 1, 1\].*\[8\]"),
    "scale in half precision": ({"scale": torch.ones(8).half()}, r"scale.*float16.*float32"),
    "shift of another length": ({"shift": torch.ones(1)}, r"shift.*\[1\].*\[8\]"),
    "shift of integers": ({"shift": torch.ones(8, dtype=torch.int32)}, r"shift.*int32.*float32"),
    "residual that would broadcast": (
        {"residual": torch.ones(1, 8, 1, 1)},
        r"residual.*\[1, 8, 1, 1\].*\[2, 8, 6, 5\]",
    ),
    "residual of another size": ({"residual": torch.ones(2, 8, 5, 6)}, r"residual.*\[2, 8, 5, 6\].*\[2, 8, 6, 5\]"),
    "residual of another dtype": ({"residual": torch.ones(2, 8, 6, 5).double()}, r"residual.*float64.*float32"),
    "x on another device": ({"x": torch.ones(2, 4, 6, 5, device="meta")}, r"weight.*cpu.*meta"),
    "weight on another device": ({"weight": torch.ones(8, 4, 3, 3, device="meta")}, r"weight.*meta.*cpu"),
    "scale on another device": ({"scale": torch.ones(8, device="meta")}, r"scale.*meta.*cpu"),
    "residual on another device": ({"residual": torch.ones(2, 8, 6, 5, device="meta")}, r"residual.*meta.*cpu"),
}


@pytest.mark.parametrize("name", OPS)
def test_conv_bn_act(name):
    """RuntimeError as from ``F.conv2d``, naming the argument, what it is and what was expected."""
    changed, message = OPS[name]
    with pytest.raises(RuntimeError, match=f"(?s){message}") as caught:
        _call(**changed)
    assert type(caught.value) is RuntimeError


@pytest.mark.parametrize("name", [name for name in OPS if "device" not in name])
def test_conv_bn_act_on_meta_tensors(name):
    """The fake kernel refuses what the real one refuses, with the same words: errors come at trace time."""
    changed, message = OPS[name]
    everything = {"x": torch.ones(2, 4, 6, 5), "weight": torch.ones(8, 4, 3, 3)}
    everything |= {"scale": torch.ones(8), "shift": torch.ones(8), **changed}
    moved = {k: v.to("meta") if isinstance(v, Tensor) else v for k, v in everything.items()}
    with pytest.raises(RuntimeError, match=f"(?s){message}"):
        _call(**moved)


STEMS: dict[str, tuple[dict, str]] = {
    "x of 3 dimensions": ({"x": torch.ones(3, 32, 32)}, r"x.*\[3, 32, 32\].*4 dimensions"),
    "x with other channels": ({"x": torch.ones(1, 4, 32, 32)}, r"x.*4 channels.*expected 3"),
    "x without pixels": ({"x": torch.ones(1, 3, 0, 32)}, r"x.*\[1, 3, 0, 32\].*height.*at least 7"),
    "weight of 3x3": ({"weight": torch.ones(8, 3, 3, 3)}, r"weight.*\[8, 3, 3, 3\].*7, 7"),
    "weight of 2 dimensions": ({"weight": torch.ones(8, 3)}, r"weight.*\[8, 3\].*7, 7"),
    "scale of another length": ({"scale": torch.ones(7)}, r"scale.*\[7\].*\[8\]"),
    "x of another dtype": ({"x": torch.ones(1, 3, 32, 32).double()}, r"x.*float64.*weight.*float32"),
}


@pytest.mark.parametrize("name", STEMS)
def test_stem(name):
    changed, message = STEMS[name]
    arguments = {"x": torch.ones(1, 3, 32, 32), "weight": torch.ones(8, 3, 7, 7), "scale": torch.ones(8)}
    arguments |= {"shift": torch.ones(8), **changed}
    with pytest.raises(RuntimeError, match=f"(?s){message}"):
        stem(*arguments.values())


@pytest.mark.parametrize("shape", [(3,), (3, 4), (2, 3, 4), (1, 2, 3, 4, 5)])
def test_global_avg_pool(shape):
    with pytest.raises(RuntimeError, match=rf"(?s)x.*{re.escape(str(list(shape)))}.*4 dimensions"):
        global_avg_pool(torch.ones(shape))


# --- modules ----------------------------------------------------------------------------------------------------------

INPUTS: dict[str, Callable[[], Any]] = {
    "1 dimension": lambda: torch.ones(3),
    "2 dimensions": lambda: torch.ones(3, 40),
    "3 dimensions": lambda: torch.ones(3, 40, 40),
    "5 dimensions": lambda: torch.ones(1, 1, 3, 40, 40),
    "other channels": lambda: torch.ones(2, 5, 40, 40),
    "no channels": lambda: torch.ones(2, 0, 40, 40),
    "no pixels": lambda: torch.ones(2, 3, 0, 40),
    "integers": lambda: torch.ones(2, 3, 40, 40, dtype=torch.int64),
    "bytes": lambda: torch.ones(2, 3, 40, 40, dtype=torch.uint8),
    "float64": lambda: torch.ones(2, 3, 40, 40, dtype=torch.float64),
    "float16": lambda: torch.ones(2, 3, 40, 40, dtype=torch.float16),
    "complex": lambda: torch.ones(2, 3, 40, 40, dtype=torch.complex64),
}


def _functional_pair() -> tuple[Callable, Callable, nn.Conv2d, nn.Module]:
    conv, bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8).eval()
    return lambda x: functional.conv_bn_act(x, conv, bn), lambda x: bn(conv(x)).relu(), conv, bn


@pytest.mark.parametrize("name", INPUTS)
def test_functional_input(name):
    """As ``relu(bn(conv(x)))``, with a message that names x."""
    ours, stock, *_ = _functional_pair()
    x = INPUTS[name]()
    error = _raises_like(stock_error(stock, x), ours, x)
    assert re.search(r"\bx\b|zero batch or zero channel", str(error)), error


@pytest.mark.parametrize("name", INPUTS)
def test_functional_stem_input(name):
    conv, bn = nn.Conv2d(3, 8, 7, 2, 3, bias=False), nn.BatchNorm2d(8).eval()
    x = INPUTS[name]()
    expected = stock_error(lambda x: nn.functional.max_pool2d(bn(conv(x)).relu(), 3, 2, 1), x)
    error = _raises_like(expected, functional.stem, x, conv, bn)
    assert re.search(r"\bx\b|zero batch or zero channel", str(error)), error


def test_functional_image_smaller_than_the_kernel():
    ours, stock, *_ = _functional_pair()
    x = torch.ones(1, 3, 40, 2)
    error = _raises_like(stock_error(stock, x), ours, x)
    assert re.search(r"x.*\[1, 3, 40, 2\].*width.*at least 3", str(error))


@pytest.mark.parametrize("shape", [(2, 8, 5, 5), (3, 8, 38, 38), (2, 7, 1, 1), (7,)])
def test_functional_residual_that_does_not_broadcast(shape):
    _, _, conv, bn = _functional_pair()
    x, residual = torch.ones(2, 3, 40, 40), torch.ones(shape)
    expected = stock_error(lambda: bn(conv(x)) + residual)
    _raises_like(expected, functional.conv_bn_act, x, conv, bn, residual)


def test_functional_norm_of_another_width():
    """The batch norm of another layer."""
    conv = nn.Conv2d(3, 8, 3, bias=False)
    for bn in (nn.BatchNorm2d(7).eval(), FrozenBatchNorm2d(7)):
        expected = stock_error(lambda bn=bn: bn(conv(torch.ones(2, 3, 40, 40))))
        error = _raises_like(expected, functional.conv_bn_act, torch.ones(2, 3, 40, 40), conv, bn)
        assert re.search(r"scale.*\[7\].*\[8\]", str(error))


def _blocks() -> dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module]]]:
    """Ours and the stock one, of 3 channels in, by name."""
    stock = torchvision.models.resnet

    def downsample(channels: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, channels, 1, 2, bias=False), nn.BatchNorm2d(channels))

    return {
        "BasicBlock": (
            lambda: resnet_fast.BasicBlock(3, 8, 2, downsample(8)),
            lambda: stock.BasicBlock(3, 8, 2, downsample(8)),
        ),
        "Bottleneck": (
            lambda: resnet_fast.Bottleneck(3, 8, 2, downsample(32)),
            lambda: stock.Bottleneck(3, 8, 2, downsample(32)),
        ),
        "ResNet": (
            lambda: resnet_fast.ResNet(resnet_fast.BasicBlock, [1, 1, 1, 1], num_classes=4),
            lambda: stock.ResNet(stock.BasicBlock, [1, 1, 1, 1], num_classes=4),
        ),
    }


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("module", ["BasicBlock", "Bottleneck", "ResNet"])
def test_block_and_model_input(module, name, mode):
    ours, stock = (make().train(mode == "train") for make in _blocks()[module])
    x = INPUTS[name]()
    _raises_like(stock_error(stock, x), ours, x)


@pytest.mark.parametrize("x", [None, 3.0, "image", [[1.0]]], ids=["None", "number", "string", "list"])
@pytest.mark.parametrize("module", ["BasicBlock", "Bottleneck", "ResNet"])
def test_block_and_model_input_that_is_no_tensor(module, x):
    ours, stock = (make().eval() for make in _blocks()[module])
    _raises_like(stock_error(stock, x), ours, x)


@pytest.mark.parametrize("module", ["BasicBlock", "Bottleneck", "ResNet"])
def test_wrong_number_of_arguments(module):
    ours, stock = (make().eval() for make in _blocks()[module])
    x = torch.ones(2, 3, 40, 40)
    for args, kwargs in (((), {}), ((x, x), {}), ((x,), {"residual": x})):
        _raises_like(stock_error(stock, *args, **kwargs), ours, *args, **kwargs)


@pytest.mark.parametrize("module", ["BasicBlock", "Bottleneck"])
def test_missing_downsample(module):
    """Shapes that do not add up fail at the addition, as in the stock block, in both modes."""
    x = torch.ones(2, 4, 8, 8)
    for mode in (True, False):
        ours, stock = (getattr(home, module)(4, 8, 2).train(mode) for home in (resnet_fast, torchvision.models.resnet))
        _raises_like(stock_error(stock, x), ours, x)


@pytest.mark.parametrize("module", ["BasicBlock", "Bottleneck", "ResNet"])
def test_batch_statistics_over_one_value(module):
    """Training on one image that shrinks to one pixel: the stock module's error, not a division by zero."""
    ours, stock = (make().train() for make in _blocks()[module])
    x = torch.ones(1, 3, 1, 1)
    expected = stock_error(stock, x)
    error = _raises_like(expected, ours, x)
    assert str(error) == str(expected)
    assert "more than 1 value per channel" in str(error)


@pytest.mark.parametrize("module", ["BasicBlock", "Bottleneck", "ResNet"])
def test_statistics_that_are_not_tracked(module):
    """Without running statistics, eval mode uses those of the batch and fails on one value like the stock module."""
    ours, stock = (make() for make in _blocks()[module])
    for model in (ours, stock):
        for bn in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
            bn.running_mean = bn.running_var = bn.num_batches_tracked = None
            bn.track_running_stats = False
        model.eval()
    ours.load_state_dict(stock.state_dict())
    x = torch.randn(2, 3, 40, 40)
    torch.testing.assert_close(ours(x), stock(x))
    one = torch.ones(1, 3, 1, 1)
    _raises_like(stock_error(stock, one), ours, one)


# --- construction and loading -----------------------------------------------------------------------------------------

CONSTRUCTORS: dict[str, Callable[[Any], Any]] = {
    "BasicBlock, groups": lambda home: home.BasicBlock(4, 4, groups=2),
    "BasicBlock, base_width": lambda home: home.BasicBlock(4, 4, base_width=32),
    "BasicBlock, dilation": lambda home: home.BasicBlock(4, 4, dilation=2),
    "BasicBlock, unknown argument": lambda home: home.BasicBlock(4, 4, width=2),
    "BasicBlock, no channels": lambda home: home.BasicBlock(),
    "Bottleneck, no channels": lambda home: home.Bottleneck(),
    "ResNet, two dilations": lambda home: home.ResNet(
        home.BasicBlock, [1, 1, 1, 1], replace_stride_with_dilation=[False, True]
    ),
    "ResNet, no dilations": lambda home: home.ResNet(
        home.BasicBlock, [1, 1, 1, 1], replace_stride_with_dilation=[False] * 4
    ),
    "ResNet, dilated BasicBlock": lambda home: home.ResNet(
        home.BasicBlock, [1, 2, 1, 1], replace_stride_with_dilation=[False, True, True]
    ),
    "ResNet, three stages": lambda home: home.ResNet(home.BasicBlock, [1, 1, 1]),
    "ResNet, negative classes": lambda home: home.ResNet(home.BasicBlock, [1, 1, 1, 1], num_classes=-1),
    "ResNet, grouped BasicBlock": lambda home: home.ResNet(home.BasicBlock, [1, 1, 1, 1], groups=2),
    "unknown weights": lambda home: home.resnet18(weights="IMAGENET1K_V9"),
    "weights of another model": lambda home: home.resnet18(weights=torchvision.models.ResNet50_Weights.IMAGENET1K_V1),
    "weights of another model, by name": lambda home: home.resnet18(weights="ResNet50_Weights.IMAGENET1K_V1"),
    "weights of no type": lambda home: home.resnet50(weights=3),
    "two positional arguments": lambda home: home.resnet18(None, True, 10),
    "unknown keyword": lambda home: home.resnet18(classes=10),
    "groups against the variant": lambda home: home.resnext50_32x4d(groups=16),
    "width against the variant": lambda home: home.resnext50_32x4d(width_per_group=8),
    "width against the wide variant": lambda home: home.wide_resnet50_2(width_per_group=64),
    "num_classes against the weights": lambda home: home.resnet18(weights="DEFAULT", num_classes=10),
}


class Stock:
    """torchvision under the names that ``resnet_fast`` has."""

    BasicBlock = torchvision.models.resnet.BasicBlock
    Bottleneck = torchvision.models.resnet.Bottleneck

    def __getattr__(self, name: str) -> Any:
        return getattr(torchvision.models, name)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", CONSTRUCTORS)
def test_constructors(name, monkeypatch):
    """The stock exception, with the stock words where they are torchvision's. Nothing is downloaded."""

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("tried to download weights")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", refuse)
    construct = CONSTRUCTORS[name]
    with torch.device("meta"):
        expected = stock_error(construct, Stock())
        error = _raises_like(expected, construct, resnet_fast)
    if isinstance(expected, (ValueError, NotImplementedError)):
        assert str(error) == str(expected)


def test_state_dicts_that_do_not_fit():
    """Missing, unexpected and misshapen entries are told as by the stock model, word for word but for its class."""
    ours, stock = (make() for make in _blocks()["ResNet"])
    good = stock.state_dict()
    missing = {k: v for k, v in good.items() if k != "layer1.0.bn2.weight"}
    unexpected = {**good, "layer1.0.conv3.weight": torch.ones(1)}
    misshapen = {**good, "fc.weight": torch.ones(1, 1)}
    for state in (missing, unexpected, misshapen, {}):
        expected = stock_error(stock.load_state_dict, state)
        assert str(_raises_like(expected, ours.load_state_dict, state)) == str(expected)
    for state in (missing, unexpected):
        assert ours.load_state_dict(state, strict=False) == stock.load_state_dict(state, strict=False)
    _raises_like(stock_error(stock.load_state_dict, 3), ours.load_state_dict, 3)


@pytest.mark.parametrize("wrong", [None, 3, "resnet50", torch.ones(1), nn.Module], ids=str)
def test_accelerate_wants_a_module(wrong):
    for function in (resnet_fast.accelerate, resnet_fast.restore, resnet_fast.explain):
        with pytest.raises(TypeError, match=rf"model.*{type(wrong).__name__}.*Module"):
            function(wrong)


@pytest.mark.parametrize("shape", [(8,), (8, 4), (8, 4, 3), (8, 4, 3, 3, 1)])
def test_weight_of_other_dimensions(shape):
    """RuntimeError that names the weight, before anything is computed from its shape."""
    with pytest.raises(RuntimeError, match=rf"(?s)weight.*{re.escape(str(list(shape)))}.*4 dimensions"):
        _call(weight=torch.ones(shape))


@pytest.mark.parametrize(("argument", "value"), [("stride", (0, 1)), ("dilation", (1, 0)), ("padding", (-1, 0))])
def test_geometry_without_sense(argument, value):
    """``F.conv2d`` raises RuntimeError; so must the op, naming the argument and its value, for meta tensors as well."""
    stock = {k: v for k, v in GEOMETRY.items() if k != "relu"}
    x, weight = torch.ones(2, 4, 6, 5), torch.ones(8, 4, 3, 3)
    expected = stock_error(nn.functional.conv2d, x, weight, None, **{**stock, argument: value})
    for device in ("cpu", "meta"):
        tensors = {"x": x.to(device), "weight": weight.to(device)}
        tensors |= {name: torch.ones(8, device=device) for name in ("scale", "shift")}
        error = _raises_like(expected, _call, **tensors, **{argument: value})
        assert re.search(rf"{argument}.*{value[0]}.*{value[1]}", str(error)), error


@pytest.mark.parametrize("x", [None, [[1.0]]], ids=["None", "list"])
def test_functional_input_that_is_no_tensor(x):
    """TypeError as from the stock convolution."""
    ours, stock, *_ = _functional_pair()
    _raises_like(stock_error(stock, x), ours, x)


def test_functional_input_on_another_device():
    """x without data and modules with: the stock modules' exception."""
    ours, stock, *_ = _functional_pair()
    x = torch.ones(2, 3, 40, 40, device="meta")
    _raises_like(stock_error(stock, x), ours, x)
