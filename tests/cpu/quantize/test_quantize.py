"""quantize: the model that it gives, when it runs in int8 and when not, and what is said of it."""

import copy
import io
import logging
import pickle

import numpy as np
import pytest
import torch
from torch import nn

import resnet_fast
from resnet_fast import network
from resnet_fast.export import export_onnx
from resnet_fast.finetune import qat
from resnet_fast.graph.conditions import Accelerated
from resnet_fast.kernels import packing
from resnet_fast.kernels.native import library
from tests.cpu.quantize.networks import IMAGES, MODELS, SIZE, by_ops, quantised
from tests.cpu.small_models import images, relative_error, small_resnet
from tests.cpu.trained import Trained

X = images(2, 3, SIZE, SIZE)
LABELLED = torch.utils.data.TensorDataset(IMAGES, torch.zeros(len(IMAGES), dtype=torch.long))


def ran(model):
    """What the last call ran as."""
    return resnet_fast.explain(model).summary


def in_int8(model):
    return ", 13 of 13 layers in int8" in ran(model)


# --- the model --------------------------------------------------------------------------------------------------------


def test_it_is_the_same_model_frozen_and_in_eval_mode():
    model, int8 = quantised()
    assert type(model) is not type(int8) and isinstance(int8, Accelerated)
    assert [name for name, _ in int8.named_modules()] == [name for name, _ in model.named_modules()]
    state, own = model.state_dict(), int8.state_dict()
    assert state.keys() == own.keys() and all(torch.equal(state[name], own[name]) for name in state)
    assert not any(module.training for module in int8.modules())
    assert not any(parameter.requires_grad for parameter in int8.parameters())
    assert not isinstance(model, Accelerated)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert relative_error(int8(X), model(X)) > 1e-4  # it does round


def test_in_place():
    model = small_resnet()
    assert resnet_fast.quantize(model, IMAGES, inplace=True) is model
    assert torch.equal(model(X), quantised()[1](X))
    assert in_int8(model)


def test_wrappers_are_taken_off():
    model = small_resnet()
    int8 = resnet_fast.quantize(nn.DataParallel(model), IMAGES)
    assert torch.equal(int8(X), quantised()[1](X))


def test_a_quantised_model_is_quantised_anew():
    _, int8 = quantised()
    again = resnet_fast.quantize(int8, ranges=resnet_fast.quantisation_of(int8).largest)
    assert torch.equal(again(X), int8(X))
    assert resnet_fast.quantisation_of(again).method is None


def test_it_is_the_float_model_again_when_it_is_restored():
    model, int8 = quantised()
    with pytest.raises(ValueError, match="model is a ResNet that is not quantised, expected what quantize"):
        resnet_fast.quantisation_of(resnet_fast.restore(int8, inplace=False))
    assert relative_error(resnet_fast.accelerate(resnet_fast.restore(int8))(X), model(X)) < 1e-4


def test_it_exports_as_the_float_model(tmp_path):
    _, int8 = quantised()
    assert export_onnx(int8, tmp_path / "m.onnx", input_size=(3, SIZE, SIZE)).precision == "fp32"


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_keep_their_ranges(twin):
    _, int8 = quantised()
    copied = twin(int8)
    assert torch.equal(copied(X), int8(X))
    assert resnet_fast.quantisation_of(copied) == resnet_fast.quantisation_of(int8)
    assert in_int8(copied)


def test_a_part_of_it_runs_in_int8_too():
    _, int8 = quantised()
    block = int8.layer2
    x = torch.relu(images(1, 64, 8, 8))
    block(x)
    assert {step.path for step in network.last_plan(block[0]).steps if step.path and step.in_int8} == {
        ("conv1",),
        ("conv2",),
        ("downsample", "0"),
    }


def test_what_torch_save_writes_is_a_stock_model_that_is_in_int8_when_it_is_accelerated():
    model, int8 = quantised()
    file = io.BytesIO()
    torch.save(int8, file)
    loaded = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    assert type(loaded) is type(model) and torch.equal(loaded(X), model(X))
    assert torch.equal(resnet_fast.accelerate(loaded)(X), int8(X))


def test_results_do_not_vary():
    _, int8 = quantised("bottleneck")
    assert len({int8(X).numpy().tobytes() for _ in range(3)}) == 1
    again = resnet_fast.quantize(MODELS["bottleneck"](), IMAGES)
    assert torch.equal(again(X), int8(X))


# --- ranges -----------------------------------------------------------------------------------------------------------


def test_ranges_need_no_images(tmp_path):
    model, int8 = quantised()
    report = resnet_fast.quantisation_of(int8)
    assert torch.equal(resnet_fast.quantize(model, ranges=report.largest)(X), int8(X))
    assert torch.equal(resnet_fast.quantize(model, ranges=report)(X), int8(X))
    file = export_onnx(
        model, tmp_path / "m.onnx", precision="int8", calibration=IMAGES, input_size=IMAGES.shape[1:], verify=False
    )
    assert torch.equal(resnet_fast.quantize(model, ranges=file.quantisation)(X), int8(X))


def test_given_ranges_go_before_measured_ones():
    model, _ = quantised()
    report = resnet_fast.quantisation_of(resnet_fast.quantize(model, IMAGES, ranges={"fc.input": 9.0}))
    assert report.largest["fc.input"] == 9.0
    assert report.images == len(IMAGES) and report.method == "mse"


def test_ranges_of_quantisation_aware_training():
    model = small_resnet()
    prepared = qat.prepare_qat(copy.deepcopy(model))
    qat.calibrate(prepared, [IMAGES])
    int8 = resnet_fast.quantize(model, ranges=qat.ranges(prepared))
    expected = prepared.eval()(X)
    assert relative_error(int8(X), expected) < 0.05
    assert in_int8(int8)


@pytest.mark.parametrize(
    "given",
    [
        lambda: IMAGES.numpy(),
        lambda: [(image, 0) for image in IMAGES],
        lambda: torch.utils.data.DataLoader(LABELLED, batch_size=3),
        lambda: torch.utils.data.DataLoader(IMAGES, batch_size=5),
    ],
)
def test_images_in_other_forms(given):
    model, int8 = quantised()
    assert torch.equal(resnet_fast.quantize(model, given())(X), int8(X))


# --- when it runs in int8 ---------------------------------------------------------------------------------------------


def test_with_gradients_enabled_and_without():
    _, int8 = quantised()
    with torch.no_grad():
        expected = int8(X)
    with torch.inference_mode():
        assert torch.equal(int8(X), expected)
    result = int8(X)
    assert torch.equal(result, expected) and not result.requires_grad
    assert in_int8(int8)


NOT_INT8 = {
    "training mode": ("training mode", lambda model: model.train()(X)),
    "a gradient of the image": ("its input requires a gradient", lambda model: model(X.clone().requires_grad_())),
    "gradients of parameters": ("its parameters require gradients", lambda model: model.requires_grad_(True)(X)),
    "half precision": (
        "its input is a torch.bfloat16 of 4 dimensions, expected",
        lambda model: model.bfloat16()(X.bfloat16()),
    ),
}


@pytest.mark.parametrize("name", NOT_INT8)
def test_elsewhere_it_runs_as_the_float_model_does_and_says_so(name):
    reason, call = NOT_INT8[name]
    model, int8 = quantised()
    expected = call(resnet_fast.accelerate(model.requires_grad_(False)))
    assert torch.equal(call(int8), expected)
    assert reason in ran(int8).replace("\n", " ")
    layers = resnet_fast.explain(int8).precisions
    assert {layer.precision for layer in layers} == {"fp32"}
    assert reason in layers[0].reason and all(layer.reason for layer in layers)


def test_blocks_of_a_model_with_a_hook_run_by_themselves():
    model, int8 = quantised()
    seen = []
    int8.layer1.register_forward_hook(lambda *_: seen.append(1))
    result = int8(X)
    assert seen and 1e-4 < relative_error(result, model(X)) < 0.1
    reasons = {layer.path: layer.reason for layer in resnet_fast.explain(int8).precisions}
    assert {path for path, reason in reasons.items() if reason} == {"conv1", "fc"}
    assert reasons["conv1"].startswith("the last call ran in float32: ") and reasons["conv1"].endswith("has hooks")


def test_weights_that_become_nan_are_told_of():
    _, int8 = quantised()
    int8.conv1.weight.fill_(torch.nan)
    int8(X)
    layer = resnet_fast.explain(int8).precisions[0]
    assert layer.reason == "the last call ran in float32: conv1 has weights with NaN or infinity"


def test_autocast_is_what_it_is_elsewhere():
    model, int8 = quantised()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(int8(X), resnet_fast.accelerate(model)(X))
    assert "autocast" in ran(int8)
    int8(X)
    assert in_int8(int8)


def test_gradients_flow_where_they_are_wanted():
    _, int8 = quantised()
    x = X.clone().requires_grad_()
    int8(x).sum().backward()
    assert x.grad.abs().max() > 0


def test_changed_weights_are_quantised_again_and_the_ranges_stay(monkeypatch):
    _, int8 = quantised()
    before, report = int8(X), resnet_fast.quantisation_of(int8)
    with torch.no_grad():
        int8.layer1[0].conv1.weight.mul_(0.5)
        int8.layer2[0].bn2.running_mean.add_(0.1)
        int8.layer2[0].bn2.num_batches_tracked.add_(1)
    after = int8(X)
    assert relative_error(after, before) > 1e-3
    assert torch.equal(by_ops(monkeypatch, int8, X), after)
    packing.clear_all()
    assert torch.equal(int8(X), after)
    assert resnet_fast.quantisation_of(int8) == report


def test_a_loaded_state_dict_is_seen():
    _, int8 = quantised()
    int8(X)
    other = small_resnet(seed=3)
    int8.load_state_dict(other.state_dict())
    ranges = resnet_fast.quantisation_of(int8).largest
    assert torch.equal(int8(X), resnet_fast.quantize(other, ranges=ranges)(X))


def test_compiled_it_runs_its_own_program():
    _, int8 = quantised()
    expected = int8(X)
    compiled = torch.compile(int8, backend="eager")
    assert torch.equal(compiled(X), expected)
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="leave out fullgraph"):
        torch.compile(copy.deepcopy(int8), backend="eager", fullgraph=True)(X)


def test_whoever_keeps_addresses_keeps_the_weights_in_int8(monkeypatch):
    _, int8 = quantised()
    monkeypatch.setenv("RESNET_FAST_IMPLEMENTATION", "reference")
    int8(X)
    program = network.last_plan(int8)._program
    with packing.held() as held:
        int8(X)
    assert any(one is program for one in held)


@pytest.mark.skipif(library.unavailable() is not None, reason=str(library.unavailable()))
def test_what_is_measured_in_int8_is_no_choice_for_float():
    _, int8 = quantised()
    tuning = resnet_fast.tune(int8, X, calls=1)
    assert tuning.choices and all(" int8 " in choice.shape for choice in tuning.choices)


# --- what is said -----------------------------------------------------------------------------------------------------


def test_explain_has_layers_ranges_and_what_ran():
    _, int8 = quantised()
    untried = copy.deepcopy(int8)
    assert all(layer.precision == "int8" and not layer.reason for layer in resnet_fast.explain(untried).precisions)
    int8(X)
    explanation = resnet_fast.explain(int8)
    text = str(explanation)
    assert "In int8:" in text
    ranges = resnet_fast.quantisation_of(int8).largest
    shown = f"input ±{ranges['layer1.0.conv2.input']:.4g}, residual ±{ranges['layer1.0.conv2.residual']:.4g}"
    assert any(line.startswith("layer1.0.conv2 ") and line.endswith(shown) for line in text.splitlines())
    block = next(row for row in explanation.rows if row.path == "layer1.0")
    assert all(": native int8 " in step or ": int8 " in step for step in block.steps)
    layer = explanation.as_dict()["precisions"][0]
    assert layer == {"path": "conv1", "precision": "int8", "ranges": {"input": ranges["conv1.input"]}, "reason": ""}
    assert all(len(line) <= 80 for line in text.splitlines())


def test_a_float_model_has_no_such_table():
    explanation = resnet_fast.explain(resnet_fast.accelerate(small_resnet()))
    assert explanation.precisions == [] and "int8" not in str(explanation)


def test_layers_that_are_not_in_int8_are_named(caplog):
    """A reflecting convolution is not fused; one that is called twice has two ranges; one has nothing to read."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
            self.twice = nn.Conv2d(8, 8, 1)
            self.low, self.dead = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
            self.fc = nn.Linear(8, 5)
            nn.init.constant_(self.low.bias, -1000)

        def forward(self, x):
            x = torch.relu(self.norm(self.first(x)))
            x = self.twice(torch.relu(self.twice(x)))
            x = x + self.dead(torch.relu(self.low(x)))
            return self.fc(x.mean((2, 3)))

    model = Net().eval()
    with caplog.at_level(logging.WARNING, "resnet_fast"):
        int8 = resnet_fast.quantize(model, IMAGES)
    reasons = {layer.path: layer.reason for layer in resnet_fast.explain(int8).precisions}
    assert reasons["first"] == reasons["low"] == reasons["fc"] == ""
    assert reasons["dead"].startswith("its input was 0 on every calibration image, expected other numbers")
    assert [reason for path, reason in reasons.items() if path.startswith("twice")] == [
        "is called more than once, expected once"
    ] * 2
    assert "dead (its input was 0" in caplog.text and "3 layers are not in int8" in caplog.text
    report = resnet_fast.quantisation_of(int8)
    assert {layer.path: layer.reason for layer in report.layers} == reasons
    assert "dead.input" not in report.largest
    result = int8(X)
    assert ", 3 of 6 layers in int8" in ran(int8)
    assert relative_error(result, model(X)) < 0.1


def test_a_convolution_that_is_not_fused_stays_in_float(caplog):
    torch.manual_seed(0)
    model = small_resnet()
    model.layer2[0].conv1.padding_mode = "reflect"
    model.layer2[0].conv1._reversed_padding_repeated_twice = [1, 1, 1, 1]
    with caplog.at_level(logging.WARNING, "resnet_fast"):
        int8 = resnet_fast.quantize(model, IMAGES)
    (layer,) = [one for one in resnet_fast.explain(int8).precisions if one.path == "layer2.0.conv1"]
    assert layer.precision == "fp32" and "pads with 'reflect', not zeros" in layer.reason
    assert "layer2.0.conv1" in caplog.text
    assert relative_error(int8(X), model(X)) < 0.1


# --- how much is lost -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return Trained(tmp_path_factory.mktemp("trained"))


def test_accuracy_of_a_trained_network(trained):
    labelled = torch.utils.data.TensorDataset(trained.digits, trained.labels)
    int8 = resnet_fast.quantize(trained.model, trained.calibration, validation=labelled)
    logits = int8(trained.digits).double().numpy()
    before = trained.accuracy(trained.digit_logits)
    assert before > 85 and before - trained.accuracy(logits) <= 0.5
    for found, expected in ((logits, trained.digit_logits), (int8(trained.photographs), trained.photograph_logits)):
        assert np.linalg.norm(np.asarray(found) - expected) <= 0.05 * np.linalg.norm(expected)
    judgement = resnet_fast.quantisation_of(int8).judgement
    assert judgement.images == len(trained.digits)
    assert abs(100 * judgement.accuracy - trained.accuracy(logits)) <= 0.5  # the file's, judged by ONNX Runtime


def test_layers_are_left_out_until_the_drop_is_allowed(trained):
    labelled = torch.utils.data.TensorDataset(trained.digits, trained.labels)
    ranges = {"layer2.0.conv1.input": 1e-3}  # what nobody can do without
    int8 = resnet_fast.quantize(
        trained.model, trained.calibration, ranges=ranges, validation=labelled, max_accuracy_drop=0.5
    )
    report = resnet_fast.quantisation_of(int8)
    assert "layer2.0.conv1" in report.fall_back
    layers = {layer.path: layer for layer in report.layers}
    assert layers["layer2.0.conv1"].precision == "fp32"
    assert layers["layer2.0.conv1"].reason == "was left out to keep max_accuracy_drop at 0.5"
    assert all(layer.logit_error is not None for layer in report.layers)
    before = trained.accuracy(trained.digit_logits)
    assert before - trained.accuracy(int8(trained.digits).numpy()) <= 0.5 + 0.5  # judged by ONNX Runtime
    again = resnet_fast.quantize(trained.model, ranges=report)
    assert resnet_fast.quantisation_of(again).fall_back == report.fall_back
    assert torch.equal(again(X), int8(X))
