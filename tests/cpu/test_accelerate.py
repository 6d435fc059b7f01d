"""``accelerate``, ``restore``, ``explain`` on the models people have: same answers, same keys, fused where promised."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import resnet_fast
from resnet_fast.kernels.native import library
from tests.cpu.small_models import (
    accelerated,
    errors_against_float64,
    fused_calls,
    images,
    randomise_norms,
    relative_error,
    small_resnet,
)

TORCHVISION = ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext50_32x4d", "wide_resnet50_2"]
SEGMENTATION = ["fcn_resnet50", "deeplabv3_resnet50"]
TIMM = [
    "resnet18",
    "resnet50",
    "resnet50d",
    "resnet26t",
    "seresnet50",
    "resnext50_32x4d",
    "ecaresnet26t",
    "resnetblur50",
]
# Not ResNets, but built from the same layers: whatever is fused there must be right as well.
OTHERS = ["mobilenet_v2", "densenet121", "regnet_y_400mf", "shufflenet_v2_x1_0", "efficientnet_b0"]


def _check_same(stock: nn.Module, x: torch.Tensor) -> nn.Module:
    randomise_norms(stock).eval()
    before = {key: value.clone() for key, value in stock.state_dict().items()}
    fast = accelerated(stock)
    with torch.inference_mode():
        expected, result = stock(x), fast(x)
        assert relative_error(result, expected) < 1e-4
        stock_error, fast_error = errors_against_float64(stock, fast, x)
    # Twice, as for one op, and one eps for networks so exact that a last bit counts. Winograd may take more.
    assert fast_error <= max(2 * stock_error + torch.finfo(torch.float32).eps, 0 if library.unavailable() else 5e-5)
    assert list(fast.state_dict()) == list(before)
    assert all(torch.equal(value, before[key]) for key, value in fast.state_dict().items())
    return fast


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision_classification(name):
    fast = _check_same(torchvision.models.get_model(name, weights=None), images())
    assert {row.status for row in resnet_fast.explain(fast).rows} == {"fused"}
    with torch.inference_mode():
        calls = fused_calls(lambda: fast(images(1, 3, 32, 32)))
    convolutions = sum(isinstance(m, nn.Conv2d) for m in fast.modules())
    assert calls.count("stem") == 1
    assert calls.count("conv_bn_act") == convolutions - 1
    assert calls.count("head") == 1


@pytest.mark.parametrize("name", SEGMENTATION)
def test_torchvision_segmentation(name):
    _check_same(torchvision.models.get_model(name, weights=None, weights_backbone=None), images())


@pytest.mark.parametrize("name", TIMM)
def test_timm(name):
    _check_same(timm.create_model(name, pretrained=False), images())


@pytest.mark.parametrize("name", OTHERS)
def test_other_architectures(name):
    _check_same(torchvision.models.get_model(name, weights=None), images())


def test_timm_features_only():
    fast = _check_same(timm.create_model("resnet26t", features_only=True), images())
    assert fused_calls(lambda: fast(images())).count("conv_bn_act") > 20


@pytest.mark.parametrize("frozen", [True, False])
def test_detection(frozen):
    """Faster R-CNN, whose backbone runs the ResNet's children one by one, with FrozenBatchNorm2d or BatchNorm2d."""
    norm = torchvision.ops.FrozenBatchNorm2d if frozen else nn.BatchNorm2d
    torch.manual_seed(0)
    body = torchvision.models.resnet50(norm_layer=norm)
    backbone = torchvision.models.detection.backbone_utils._resnet_fpn_extractor(body, 3)
    stock = torchvision.models.detection.FasterRCNN(backbone, num_classes=5, min_size=128, max_size=128)
    randomise_norms(stock).eval()
    fast = accelerated(stock)
    x = images(1, 3, 128, 160).abs()
    with torch.inference_mode():
        assert relative_error(fast.backbone(x), stock.backbone(x)) < 1e-4
        result, expected = fast([x[0]])[0], stock([x[0]])[0]
        calls = fused_calls(lambda: fast.backbone(x))
    assert torch.equal(result["labels"], expected["labels"])
    assert relative_error(result["boxes"], expected["boxes"]) < 1e-4
    assert relative_error(result["scores"], expected["scores"]) < 1e-4
    assert (calls.count("stem"), calls.count("conv_bn_act")) == (1, 52)


def test_torchvision_builder_is_reached_too():
    stock = torchvision.models.detection.fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None, min_size=96)
    fast = accelerated(stock.eval())
    assert list(fast.state_dict()) == list(stock.state_dict())
    assert fused_calls(lambda: fast.backbone(images())).count("conv_bn_act") == 52


# --- blocks that people write ---


class TutorialBlock(nn.Module):
    """The usual hand-written block, with functional ReLUs and its own names."""

    def __init__(self, inputs, outputs, stride=1):
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=True)
        self.first_norm = nn.BatchNorm2d(outputs)
        self.second = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.second_norm = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))

    def forward(self, x):
        out = F.relu(self.first_norm(self.first(x)))
        out = self.second_norm(self.second(out))
        out += self.shortcut(x)
        return F.relu(out)


class TutorialNet(nn.Module):
    """CIFAR style, ending in the ``view`` that a channels_last tensor would break."""

    def __init__(self, channels=3):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.stage1 = nn.Sequential(TutorialBlock(16, 16), TutorialBlock(16, 32, 2))
        self.linear = nn.Linear(32 * 4, 10)

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.stage1(out)
        out = F.avg_pool2d(out, 4)
        out = out.view(out.size(0), -1)
        return self.linear(out)


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 31])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_hand_written_network(channels, layout):
    torch.manual_seed(0)
    stock = randomise_norms(TutorialNet(channels)).eval()
    fast = accelerated(stock)
    x = images(2, channels, 16, 16).contiguous(memory_format=layout)
    if x.is_contiguous():
        assert relative_error(fast(x), stock(x)) < 1e-5
        assert fused_calls(lambda: fast(x)) == ["conv_bn_act"] * 6
    else:  # given channels_last, the stock network's view raises
        for model in (stock, fast):
            with pytest.raises(RuntimeError, match="view size is not compatible"):
                model(x)


@pytest.mark.parametrize("channels", [1, 5])
def test_any_number_of_input_channels(channels):
    stock = small_resnet()
    stock.conv1 = nn.Conv2d(channels, 64, 7, 2, 3, bias=False)
    fast = accelerated(stock)
    x = images(2, channels, 33, 47)
    assert relative_error(fast(x), stock(x)) < 1e-5
    assert "stem" in fused_calls(lambda: fast(x))


def test_our_block_in_a_tutorial_network():
    torch.manual_seed(0)
    block = randomise_norms(resnet_fast.BasicBlock(in_channels=8, out_channels=8)).eval()
    plain = resnet_fast.restore(block, inplace=False)
    assert type(plain) is torchvision.models.resnet.BasicBlock
    x = images(2, 8, 9, 11)
    assert relative_error(block(x), plain(x)) < 1e-6
    assert fused_calls(lambda: block(x)) == ["conv_bn_act"] * 2


# --- what accelerate and restore promise ---


def test_in_place_and_copy():
    model = small_resnet()
    block_class = type(model.layer1[0])
    copied = resnet_fast.accelerate(model, inplace=False)
    assert type(model.layer1[0]) is block_class
    assert copied is not model
    assert resnet_fast.accelerate(model) is model
    assert isinstance(model.layer1[0], block_class)
    assert type(model.layer1[0]).__name__ == block_class.__name__


def test_restore_gives_the_very_classes_and_attributes_back():
    model = small_resnet()
    classes = [type(m) for m in model.modules()]
    attributes = [set(m.__dict__) for m in model.modules()]
    resnet_fast.restore(resnet_fast.accelerate(model))
    assert [type(m) for m in model.modules()] == classes
    assert [set(m.__dict__) for m in model.modules()] == attributes


def test_accelerate_twice_is_accelerate_once():
    model = resnet_fast.accelerate(small_resnet())
    classes = [type(m) for m in model.modules()]
    assert [type(m) for m in resnet_fast.accelerate(model).modules()] == classes


def test_accelerating_leaves_flags_and_weights_alone():
    model = small_resnet().train()
    model.layer1.eval()
    flags = [m.training for m in model.modules()]
    versions = [t._version for t in model.state_dict(keep_vars=True).values()]
    resnet_fast.accelerate(model)
    assert [m.training for m in model.modules()] == flags
    assert [t._version for t in model.state_dict(keep_vars=True).values()] == versions


@pytest.mark.parametrize("function", [resnet_fast.accelerate, resnet_fast.restore, resnet_fast.explain])
def test_not_a_module(function):
    with pytest.raises(TypeError, match=r"model is a dict, expected a torch\.nn\.Module"):
        function({})


def test_weights_changed_after_acceleration_count():
    fast, stock = accelerated(small_resnet()), small_resnet(seed=5)
    x = images()
    with torch.inference_mode():
        fast(x)
    fast.load_state_dict(stock.state_dict())
    assert relative_error(fast(x), stock(x)) < 1e-5
    fast.train()
    stock.train()
    for model in (fast, stock):
        optimiser = torch.optim.SGD(model.parameters(), lr=0.05)
        model(x).square().mean().backward()
        optimiser.step()
        model.eval()
    with torch.inference_mode():
        assert relative_error(fast(x), stock(x)) < 1e-5


# --- explain ---


def test_explain_names_the_reason():
    model = timm.create_model("seresnet50", pretrained=False).eval()
    rows = {row.path: row for row in resnet_fast.explain(resnet_fast.accelerate(model)).rows}
    assert rows["layer1.0"].status == "partly fused"
    assert rows["layer1.0"].reason == "own forward: act3 (ReLU)"
    assert rows["layer1.0.se"].reason.startswith("fc2 is followed by gate (Sigmoid): no batch norm, addition or ReLU")
    assert any("conv1+bn1+act1" in step or "conv1+bn1+relu" in step for step in rows["layer1.0"].steps)


def test_explain_sees_hooks_norms_and_parametrizations():
    model = resnet_fast.accelerate(small_resnet())
    model.layer1[0].bn1.register_forward_hook(lambda *_: None)
    model.layer2[0].bn2 = nn.GroupNorm(8, 128)
    nn.utils.parametrizations.weight_norm(model.layer3[0].conv1)
    rows = {row.path: row for row in resnet_fast.explain(model).rows}
    assert rows["layer1.0"].reason == "bn1 has hooks"
    assert "bn2" in rows["layer2.0"].reason
    assert "conv1 is a ParametrizedConv2d" in rows["layer3.0"].reason
    assert rows["layer4.0"].status == "fused"
    text = str(resnet_fast.explain(model))
    assert all(path in text for path in rows if path)
    assert text.startswith("4 of 12 convolutions fused")


def test_explain_before_acceleration():
    explanation = resnet_fast.explain(small_resnet())
    assert explanation.rows
    assert all(row.status == "stock" and "accelerate()" in row.reason for row in explanation.rows)
    assert str(explanation).startswith("0 of 12 convolutions fused")


def test_explain_as_text():
    """A summary, one line for equal neighbours, no line beyond 80 columns; training mode where it is asked for."""
    model = resnet_fast.accelerate(torchvision.models.resnet50().eval())
    lines = str(resnet_fast.explain(model)).splitlines()
    assert lines[0].startswith("53 of 53 convolutions fused; whole network: not planned yet")
    assert [line.split()[0] for line in lines[3:]] == ["(model)"] + [
        f"layer{stage}.{blocks}" for stage, last in ((1, 2), (2, 3), (3, 5), (4, 2)) for blocks in ("0", f"1–{last}")
    ]
    with torch.inference_mode():
        model(images())
    texts = [str(resnet_fast.explain(model, training=training)) for training in (False, True)]
    assert all(len(line) <= 80 for text in texts for line in text.splitlines())
    assert "raining" not in texts[0]
    assert "In training mode:\n(model)" in texts[1] and "\nlayer1.1–2  Bottleneck  conv1…relu: " in texts[1]
    if library.unavailable() is None:
        assert texts[0].startswith("53 of 53 convolutions fused; the whole network runs as one native program")
    page = resnet_fast.explain(model, training=True)._repr_html_()
    assert page.count("<table>") == 2 and page.count("<tr>") == 18
    data = resnet_fast.explain(model).as_dict()
    assert (data["fused"], data["convolutions"], len(data["rows"])) == (53, 53, 17)
    assert all(row["training"] for row in data["rows"])


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (nn.Transformer(64, 2, 1, 1), "It has 7 LayerNorm, 4 Linear, 3 MultiheadAttention."),
        (nn.Sequential(nn.Conv2d(3, 8, 1), nn.GroupNorm(2, 8), nn.ReLU()), "It has 1 Conv2d, 1 GroupNorm."),
        (nn.ReLU(), "It has no layers with parameters."),
    ],
)
def test_explain_says_what_a_model_has_where_nothing_is_fused(model, said):
    explanation = resnet_fast.explain(resnet_fast.accelerate(model))
    assert explanation.summary == f"Nothing is fused, for the model has no Conv2d followed by BatchNorm2d. {said}"


def test_explain_groups_what_is_not_fused():
    model = timm.create_model("convnext_atto", pretrained=False).eval()
    text = str(resnet_fast.explain(resnet_fast.accelerate(model)))
    assert "stages.0.blocks.0.mlp and 11 more  Mlp" in text
    assert "fc1 is followed by" in text
    assert all(len(line) <= 80 for line in text.splitlines())


def test_explain_in_training_mode_speaks_of_eval():
    model = resnet_fast.accelerate(small_resnet().train())
    assert {row.status for row in resnet_fast.explain(model).rows} == {"fused"}
    assert resnet_fast.explain(model).as_dict()["rows"][0]["kind"] == "ResNet"


def test_copy_of_a_copy():
    fast = copy.deepcopy(accelerated(small_resnet()))
    assert fused_calls(lambda: fast(images()))
