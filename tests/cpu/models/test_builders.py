"""The ten builders and the blocks against torchvision's: names, parameters, weights, results, training."""

import inspect
from collections import Counter
from typing import Any

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models import resnet as stock
from torchvision.ops import FrozenBatchNorm2d

import resnet_fast
from resnet_fast import ops
from resnet_fast.kernels.native import library
from tests.cpu.ops.cases import stock_error

BUILDERS = [
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "resnext101_64x4d",
    "wide_resnet50_2",
    "wide_resnet101_2",
]
WEIGHTS = [
    "ResNet18_Weights",
    "ResNet34_Weights",
    "ResNet50_Weights",
    "ResNet101_Weights",
    "ResNet152_Weights",
    "ResNeXt50_32X4D_Weights",
    "ResNeXt101_32X8D_Weights",
    "ResNeXt101_64X4D_Weights",
    "Wide_ResNet50_2_Weights",
    "Wide_ResNet101_2_Weights",
]


pytestmark = pytest.mark.usefixtures("one_thread")


def _pair(name: str, **kwargs: Any) -> tuple[nn.Module, nn.Module]:
    """Ours and torchvision's, with the same parameters and with running statistics as after training."""
    with torch.device("meta"):
        models = getattr(resnet_fast, name)(**kwargs), getattr(torchvision.models, name)(**kwargs)
    ours, theirs = (model.to_empty(device="cpu") for model in models)
    _fill(theirs)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def _fill(model: nn.Module) -> None:
    """Quicker than the initialisation of a large model, and the activations keep their size through its depth."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            fan_in = module.weight[0].numel()
            nn.init.uniform_(module.weight, -((6 / fan_in) ** 0.5), (6 / fan_in) ** 0.5, generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, (nn.BatchNorm2d, FrozenBatchNorm2d)):
            with torch.no_grad():
                module.running_mean.normal_(0, 0.1, generator=generator)
                module.running_var.uniform_(0.7, 1.5, generator=generator)
                module.weight.uniform_(0.5, 1.0, generator=generator)
                module.bias.normal_(0, 0.1, generator=generator)
            if isinstance(module, nn.BatchNorm2d):
                module.num_batches_tracked.zero_()
        elif isinstance(module, nn.GroupNorm):
            nn.init.ones_(module.weight), nn.init.zeros_(module.bias)


def _check_same_output(ours: nn.Module, theirs: nn.Module, x: torch.Tensor, tolerance: float = 1e-4) -> None:
    with torch.inference_mode():
        actual, expected = ours.eval()(x), theirs.eval()(x)
    assert expected.isfinite().all()
    assert expected.std(0).max() > 0.01 * expected.abs().max(), "the images of the batch are not told apart"
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * float(expected.abs().max()))


def _images(n: int = 2, size: int = 64) -> torch.Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(1))


# --- what the builders are --------------------------------------------------------------------------------------------


def test_everything_public():
    """Our names are torchvision's, and nothing is missing that torchvision's resnet module exports."""
    assert {*BUILDERS, *WEIGHTS, "ResNet"} == set(stock.__all__)
    assert set(stock.__all__) <= set(resnet_fast.__all__)
    assert all(hasattr(resnet_fast, name) for name in resnet_fast.__all__)


@pytest.mark.parametrize("name", BUILDERS)
def test_signature(name):
    """Same parameters, kinds, defaults and annotations; help() shows a docstring that says which network it is."""
    ours, theirs = getattr(resnet_fast, name), getattr(torchvision.models, name)
    assert inspect.signature(ours).parameters == inspect.signature(theirs).parameters
    assert inspect.signature(ours).return_annotation is resnet_fast.ResNet
    assert ours.__name__ == theirs.__name__
    assert ours.__doc__


@pytest.mark.parametrize("name", ["ResNet", "Bottleneck", "BasicBlock"])
def test_constructor_signature(name):
    """Same defaults, in the same order. Only the blocks' first two have names that say what they are."""
    ours, theirs = (
        list(inspect.signature(getattr(home, name)).parameters.values())[0 if name == "ResNet" else 2 :]
        for home in (resnet_fast, stock)
    )
    assert [(p.name, p.kind, p.default) for p in ours] == [(p.name, p.kind, p.default) for p in theirs]


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_are_torchvisions_own(name):
    """Not copies: ``get_weight`` and ``isinstance`` checks elsewhere know only the originals."""
    assert getattr(resnet_fast, name) is getattr(torchvision.models, name)


@pytest.mark.parametrize(("name", "weights"), list(zip(BUILDERS, WEIGHTS)))
def test_registry(name, weights):
    """``get_model`` and its kin know the builders, under names of their own."""
    registered = f"fast_{name}"
    assert registered in torchvision.models.list_models()
    assert torchvision.models.get_model_builder(registered) is getattr(resnet_fast, name)
    assert torchvision.models.get_model_weights(registered) is getattr(torchvision.models, weights)
    assert torchvision.models.get_model_weights(getattr(resnet_fast, name)) is getattr(torchvision.models, weights)
    assert torchvision.models.get_model_builder(name) is getattr(torchvision.models, name), "the stock one is untouched"


def test_get_model():
    model = torchvision.models.get_model("fast_resnet18", weights=None, num_classes=7)
    assert type(model) is resnet_fast.ResNet
    assert model.fc.out_features == 7


@pytest.mark.parametrize("name", BUILDERS)
def test_state_dict(name):
    """Same keys in the same order, same shapes and dtypes, same trainable parameters: checkpoints go both ways."""
    with torch.device("meta"):
        ours, theirs = getattr(resnet_fast, name)(), getattr(torchvision.models, name)()
    for entries in ("state_dict", "named_parameters", "named_buffers", "named_modules"):
        a, b = (dict(getattr(model, entries)()) for model in (ours, theirs))
        assert list(a) == list(b)
        if entries == "named_modules":
            assert [type(m).__name__ for m in a.values()] == [type(m).__name__ for m in b.values()]
        else:
            assert all(
                (a[k].shape, a[k].dtype, a[k].requires_grad) == (b[k].shape, b[k].dtype, b[k].requires_grad) for k in a
            )
    theirs.load_state_dict(ours.state_dict(), assign=True)


def test_attributes_that_others_read():
    """Detection, segmentation and pruning code reads these; subclass checks must hold as well."""
    ours, theirs = (
        home.resnet50(replace_stride_with_dilation=[False, True, True]) for home in (resnet_fast, torchvision.models)
    )
    for name in ("inplanes", "dilation", "groups", "base_width"):
        assert getattr(ours, name) == getattr(theirs, name)
    assert ours._norm_layer is nn.BatchNorm2d
    assert isinstance(ours, stock.ResNet)
    assert [name for name, _ in ours.named_children()] == [name for name, _ in theirs.named_children()]
    for name in ("layer1.0", "layer2.0", "layer4.2"):
        a, b = ours.get_submodule(name), theirs.get_submodule(name)
        assert isinstance(a, stock.Bottleneck)
        assert type(a) is resnet_fast.Bottleneck
        assert (a.stride, a.expansion, a.downsample is None) == (b.stride, b.expansion, b.downsample is None)
    basic = resnet_fast.resnet18().layer1[0]
    assert type(basic) is resnet_fast.BasicBlock
    assert isinstance(basic, stock.BasicBlock)
    assert (resnet_fast.BasicBlock.expansion, resnet_fast.Bottleneck.expansion) == (1, 4)


def test_initialisation():
    """From the same seed come the same parameters, zero-initialised residuals included."""
    for options in ({}, {"zero_init_residual": True}):
        states = []
        for home in (resnet_fast, torchvision.models):
            torch.manual_seed(3)
            states.append(home.resnet18(num_classes=5, **options).state_dict())
        ours, theirs = states
        assert all(torch.equal(ours[k], theirs[k]) for k in theirs)
        assert bool(ours["layer1.0.bn2.weight"].any()) is not bool(options)
    torch.manual_seed(3)
    model = resnet_fast.ResNet(resnet_fast.Bottleneck, [1, 1, 1, 1], zero_init_residual=True)
    assert not model.layer1[0].bn3.weight.any()
    assert model.layer1[0].bn2.weight.all()


# --- legacy arguments and weights -------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Arguments other than a weight enum:UserWarning")
@pytest.mark.parametrize("arguments", [((False,), {}), ((), {"pretrained": False}), ((None,), {})], ids=str)
def test_legacy_interface(arguments):
    """``pretrained=False`` and a positional argument still work, with torchvision's own warnings."""
    args, kwargs = arguments
    heard = []
    for builder in (resnet_fast.resnet18, torchvision.models.resnet18):
        with pytest.warns(UserWarning, match="is deprecated|will be|positional") as caught, torch.device("meta"):
            builder(*args, **kwargs)
        heard.append([str(warning.message) for warning in caught])
    assert heard[0] == heard[1]
    assert heard[0]


def test_num_classes_conflicts():
    """The weights' number of classes wins or the call fails, before anything is downloaded."""
    weights = torchvision.models.ResNet18_Weights.DEFAULT
    expected = stock_error(torchvision.models.resnet18, weights=weights, num_classes=10)
    with pytest.raises(ValueError, match="num_classes") as caught:
        resnet_fast.resnet18(weights=weights, num_classes=10)
    assert str(caught.value) == str(expected)
    for name in ("resnext50_32x4d", "wide_resnet50_2"):
        expected = stock_error(getattr(torchvision.models, name), width_per_group=65)
        with pytest.raises(ValueError, match="width_per_group") as caught:
            getattr(resnet_fast, name)(width_per_group=65)
        assert str(caught.value) == str(expected)


def test_weights_are_loaded(monkeypatch):
    """By enum or by name, through the enum's own ``get_state_dict``, hash checked, into every parameter."""
    weights = torchvision.models.ResNet18_Weights.IMAGENET1K_V1
    theirs = torchvision.models.resnet18()
    _fill(theirs)
    asked = []

    def load(url: str, *args: Any, **kwargs: Any) -> dict:
        asked.append((url, kwargs.get("check_hash"), kwargs.get("progress")))
        return theirs.state_dict()

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", load)
    for given in (weights, "IMAGENET1K_V1", "DEFAULT"):
        ours = resnet_fast.resnet18(weights=given, progress=False)
        assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), theirs.state_dict().values()))
    assert asked == [(weights.url, True, False)] * 3
    assert resnet_fast.resnet18(weights=weights, num_classes=1000).fc.out_features == 1000


# --- results ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["resnet18", "resnet34", "resnet50", "resnext50_32x4d", "wide_resnet50_2", "resnet101"]
)
def test_output(name, monkeypatch):
    """The stock state_dict loaded, the stock output, in both layouts; and every convolution ran in a fused op.

    As a whole network, which calls no ops, and op by op.
    """
    ours, theirs = _pair(name, num_classes=10)
    served = []
    serve = ops.inference.implementation
    monkeypatch.setattr(ops.inference, "implementation", lambda case, x: served.append(case.op) or serve(case, x))
    _check_same_output(ours, theirs, _images())
    if library.unavailable() is None:
        assert resnet_fast.explain(ours).network.startswith("one native program")
        assert not served
    served.clear()
    monkeypatch.setenv("RESNET_FAST_IMPLEMENTATION", "onednn")
    _check_same_output(ours, theirs, _images())
    convs = sum(isinstance(module, nn.Conv2d) for module in theirs.modules())
    assert Counter(served) == {"stem": 1, "conv_bn_act": convs - 1, "head": 1}
    _check_same_output(ours, theirs, _images(2, 65).contiguous(memory_format=torch.channels_last))
    assert {row.status for row in resnet_fast.explain(ours).rows} == {"fused"}


OPTIONS: dict[str, dict] = {
    "dilated": {"replace_stride_with_dilation": [False, True, True]},
    "dilated, last stage": {"replace_stride_with_dilation": [False, False, True]},
    "frozen norm": {"norm_layer": FrozenBatchNorm2d},
    "group norm": {"norm_layer": lambda channels: nn.GroupNorm(8, channels)},
    "instance norm": {"norm_layer": lambda channels: nn.InstanceNorm2d(channels, affine=True)},
    "large eps": {"norm_layer": lambda channels: nn.BatchNorm2d(channels, eps=0.5)},
    "narrow groups": {"groups": 4, "width_per_group": 16},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_constructor_options(name):
    """Each option changes the network as it changes torchvision's."""
    models = [
        home.ResNet(home.Bottleneck, [1, 1, 1, 1], num_classes=10, **OPTIONS[name]) for home in (resnet_fast, stock)
    ]
    ours, theirs = models
    _fill(theirs)
    ours.load_state_dict(theirs.state_dict())
    _check_same_output(ours, theirs, _images())
    for a, b in zip(ours.modules(), theirs.modules()):
        if isinstance(a, nn.Conv2d):
            assert (a.stride, a.dilation, a.padding, a.groups) == (b.stride, b.dilation, b.padding, b.groups)


@pytest.mark.parametrize("block", ["BasicBlock", "Bottleneck"])
@pytest.mark.parametrize("downsample", [False, True])
def test_blocks_by_keyword(block, downsample):
    """``in_channels`` and ``out_channels`` by name or by position, with torchvision's results."""
    cls, stock_cls = getattr(resnet_fast, block), getattr(stock, block)
    width = 8 * cls.expansion
    stride = 2 if downsample else 1

    def shortcut() -> Any:
        layers = nn.Conv2d(width, width, 1, stride, bias=False), nn.BatchNorm2d(width)
        return nn.Sequential(*layers) if downsample else None

    theirs = stock_cls(width, 8, stride, shortcut())
    _fill(theirs)
    x = torch.randn(2, width, 9, 7)
    for ours in (
        cls(in_channels=width, out_channels=8, stride=stride, downsample=shortcut()),
        cls(width, 8, stride, shortcut()),
    ):
        ours.load_state_dict(theirs.state_dict())
        _check_same_output(ours, theirs, x, 1e-5)
        for layout in (torch.contiguous_format, torch.channels_last):
            y, expected = ours(x.contiguous(memory_format=layout)), theirs(x.contiguous(memory_format=layout))
            assert y.stride() == expected.stride(), "the result lies in memory as the stock block's"


def test_blocks_do_not_write_their_input():
    for block in (resnet_fast.BasicBlock(8, 8), resnet_fast.Bottleneck(32, 8)):
        x = torch.randn(2, block.conv1.in_channels, 6, 6).contiguous(memory_format=torch.channels_last)
        before = x.clone()
        with torch.inference_mode():
            block.eval()(x)
        assert torch.equal(x, before)


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_training_follows_the_stock_model(name):
    """Loss, every gradient and every running statistic of three steps, and the evaluation after each of them."""
    layers = {"resnet18": ("BasicBlock", [1, 1, 1, 1]), "resnet50": ("Bottleneck", [1, 1, 1, 1])}[name]
    models = [home.ResNet(getattr(home, layers[0]), layers[1], num_classes=5) for home in (resnet_fast, stock)]
    ours, theirs = models
    _fill(theirs)
    ours.load_state_dict(theirs.state_dict())
    ours, theirs = models = [model.double() for model in models]
    optimisers = [torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9) for model in models]
    for step in range(3):
        x = torch.randn(4, 3, 40, 40, generator=torch.Generator().manual_seed(step)).double()
        losses = []
        for model, optimiser in zip(models, optimisers):
            optimiser.zero_grad()
            loss = nn.functional.cross_entropy(model.train()(x), torch.tensor([0, 1, 2, 3]))
            loss.backward()
            losses.append(loss)
        torch.testing.assert_close(*losses, rtol=1e-9, atol=1e-9)
        for (key, a), b in zip(ours.named_parameters(), theirs.parameters()):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-7, atol=1e-9, msg=f"gradient of {key}")
        for optimiser in optimisers:
            optimiser.step()
        state = theirs.state_dict()
        torch.testing.assert_close(ours.state_dict(), state, rtol=1e-7, atol=1e-9)
        assert state["bn1.num_batches_tracked"] == step + 1
        _check_same_output(ours, theirs, x)


@pytest.mark.parametrize("momentum", [0.1, None, 1.0])
def test_training_forward_updates_running_statistics(momentum):
    """Also the cumulative average (momentum None), under no_grad as well, and the next evaluation uses them."""
    ours, theirs = (
        home.ResNet(home.BasicBlock, [1, 1, 1, 1], 5, norm_layer=lambda c: nn.BatchNorm2d(c, momentum=momentum))
        for home in (resnet_fast, stock)
    )
    ours.load_state_dict(theirs.state_dict())
    ours, theirs = ours.double(), theirs.double()
    for seed in range(3):
        x = torch.randn(2, 3, 40, 40, generator=torch.Generator().manual_seed(seed)).double()
        with torch.no_grad():
            torch.testing.assert_close(ours.train()(x), theirs.train()(x), rtol=1e-9, atol=1e-9)
        state = theirs.state_dict()
        torch.testing.assert_close(ours.state_dict(), state, rtol=1e-7, atol=1e-9)
        _check_same_output(ours, theirs, x)


def test_frozen_batch_norm_in_training():
    """``bn.eval()`` after ``model.train()``: statistics stand still, the affine parameters learn."""
    ours, theirs = (home.ResNet(home.BasicBlock, [1, 1, 1, 1], 5) for home in (resnet_fast, stock))
    _fill(theirs)
    ours.load_state_dict(theirs.state_dict())
    for model in (ours, theirs):
        model.train()
        for bn in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
            bn.eval()
        model(_images()).square().sum().backward()
    state = theirs.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in ours.state_dict().items())
    for a, b in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-3 * float(b.grad.abs().max()))


def test_gradients_in_eval_mode():
    """Saliency maps and fine-tuning in eval mode: every gradient that the stock model has, to rounding."""
    ours, theirs = (home.ResNet(home.Bottleneck, [1, 1, 1, 1], 5) for home in (resnet_fast, stock))
    _fill(theirs)
    ours.load_state_dict(theirs.state_dict())
    images = [_images().double().requires_grad_() for _ in range(2)]
    for model, x in zip((ours, theirs), images):
        model.double().eval()(x).square().sum().backward()
    torch.testing.assert_close(images[0].grad, images[1].grad, rtol=1e-7, atol=1e-10)
    for (key, a), b in zip(ours.named_parameters(), theirs.parameters()):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-7, atol=1e-9 * float(b.grad.abs().max()) + 1e-12, msg=key)
