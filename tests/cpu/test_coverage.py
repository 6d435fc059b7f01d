"""How many convolutions of timm's and torchvision's models run fused, what is in the way of the others, and that the
models compute what they did."""

import copy

import pytest
import timm
import torch
import torchvision

import resnet_fast
from tests.cpu.small_models import fused_calls, images, randomise_norms, relative_error

GATE = {"gate (Sigmoid)"}
DENSE = {"is returned", *(f"features.transition{i}.pool (AvgPool2d)" for i in (1, 2, 3))}
MODELS = {
    # how many are fused, and of how many; what is said of the others
    "botnet26t_256": (28, 31, {"split"}),
    "cspresnet50": (55, 55, set()),
    "densenet121": (59, 120, DENSE),
    "dla34": (37, 38, {"flatten (Flatten)"}),
    "dpn68": (45, 72, {"is read by 2 others", "flatten (Flatten)"}),
    "efficientnet_b0": (49, 81, GATE | {"act1 (SiLU)"}),
    "mobilenetv3_small_050": (43, 53, {"gate (Hardsigmoid)", "act2 (Hardswish)"}),
    "regnetx_002": (44, 44, set()),
    "regnety_002": (57, 70, GATE),
    "repvgg_a0": (44, 44, set()),
    "resnest14d": (23, 27, {"rsoftmax (RadixSoftmax)"}),
    "seresnext26ts": (39, 47, GATE),
    "skresnet18": (36, 44, {"is read by 2 others"}),
    "tresnet_m": (78, 96, GATE),
    "vovnet39a": (39, 39, set()),
    "torchvision densenet121": (59, 120, DENSE),
    "torchvision efficientnet_b0": (49, 81, {"scale_activation (Sigmoid)", "activation (SiLU)"}),
    "torchvision regnet_y_400mf": (69, 85, {"scale_activation (Sigmoid)"}),
    "torchvision vgg11": (8, 8, set()),
}


def build(name):
    torch.manual_seed(0)
    if name.startswith("torchvision "):
        return getattr(torchvision.models, name.removeprefix("torchvision "))(num_classes=7)
    return timm.create_model(name, num_classes=7)


@pytest.mark.parametrize("name", MODELS)
def test_fused_and_what_is_in_the_way(name):
    explanation = resnet_fast.explain(resnet_fast.accelerate(build(name).eval()))
    said = {reason.partition(":")[0].partition(",")[0] for reason in explanation.obstacles.values()}
    fused, convolutions, obstacles = MODELS[name]
    assert (explanation.fused, explanation.convolutions) == (fused, convolutions)
    assert len(explanation.obstacles) == convolutions - fused
    assert {reason.removeprefix("is followed by ") for reason in said} == obstacles
    text = " ".join(str(explanation).split())
    assert all(path.rpartition(".")[2] in text for path in explanation.obstacles)


def _outcome(model, x):
    """Logits in both modes, gradients, and the state after a step; all in float64."""
    with torch.no_grad():
        logits = model.eval()(x)
    torch.manual_seed(1)  # for dropouts
    trained = model.train()(x)
    (trained * torch.linspace(-1, 1, trained.numel(), dtype=x.dtype).view_as(trained)).sum().backward()
    # In one vector: that of a bias before batch statistics is 0, but for rounding.
    gradients = torch.cat([p.grad.flatten() for p in model.parameters()])
    return logits, trained.detach(), gradients, list(model.state_dict().values())


SMALL = [
    *("efficientnet_b0", "mobilenetv3_small_050", "regnety_002", "repvgg_a0", "resnest14d", "seresnext26ts"),
    *("skresnet18", "torchvision regnet_y_400mf"),
]


@pytest.mark.parametrize("name", SMALL)
def test_as_stock_in_both_modes(name):
    stock = randomise_norms(build(name)).double()
    fast = resnet_fast.accelerate(stock, inplace=False)
    x = images(2, 3, 64, 64).double()
    results = []
    calls = fused_calls(lambda: results.append(_outcome(fast, x)))
    assert {"conv_bn_act", "residual_block"} <= set(calls)
    assert relative_error(results[0], _outcome(copy.deepcopy(stock), x)) < 1e-10
    assert list(fast.state_dict()) == list(stock.state_dict())
