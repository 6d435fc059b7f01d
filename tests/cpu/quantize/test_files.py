"""save_quantized and load_quantized."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torchvision.models import resnet

import resnet_fast
from tests.cpu.quantize.networks import IMAGES, quantised
from tests.cpu.small_models import small_resnet

X = IMAGES[:2]

each_kind = pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth"])


def broken(path, change):
    """The file's content, changed."""
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)


@each_kind
@pytest.mark.parametrize("inplace", [False, True])
def test_what_is_loaded_is_what_was_saved(suffix, inplace, tmp_path):
    _, int8 = quantised()
    path = tmp_path / f"m{suffix}"
    resnet_fast.save_quantized(int8, path)
    other = small_resnet(seed=3)
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    loaded = resnet_fast.load_quantized(other, path, inplace=inplace)
    assert (loaded is other) == inplace
    assert torch.equal(loaded(X), int8(X))
    assert resnet_fast.quantisation_of(loaded) == resnet_fast.quantisation_of(int8)
    assert inplace or all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())


def test_the_file_has_the_state_dict_for_everybody(tmp_path):
    model, int8 = quantised()
    for name in ("m.safetensors", "m.pt"):
        resnet_fast.save_quantized(int8, tmp_path / name)
    assert load_file(tmp_path / "m.safetensors").keys() == model.state_dict().keys()
    state = torch.load(tmp_path / "m.pt", weights_only=True)["state_dict"]
    small_resnet(seed=3).load_state_dict(state)


def test_tied_weights_can_be_saved(tmp_path):
    model = nn.Sequential(
        nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2)
    )
    model[0].bias = model[1].bias
    int8 = resnet_fast.quantize(model.eval(), IMAGES)
    resnet_fast.save_quantized(int8, tmp_path / "m.safetensors")
    assert torch.equal(resnet_fast.load_quantized(model, tmp_path / "m.safetensors")(X), int8(X))


def _drop(content):
    del content["state_dict"]["layer2.0.conv1.weight"]


def _rename(content):
    about = json.loads(content["resnet_fast_int8"])
    about["layers"][3]["path"] = "layer9.conv1"
    content["resnet_fast_int8"] = json.dumps(about)


def _reshape(content):
    content["state_dict"]["fc.bias"] = torch.zeros(9)


def _empty(content):
    content.clear()


WRONG = {
    "a missing tensor": (_drop, r"which lacks 'layer2.0.conv1.weight'; expected the tensors of a ResNet as this one"),
    "another shape": (_reshape, r"which has of another shape 'fc.bias'; expected"),
    "ranges for another layer": (_rename, r"which has ranges for 'layer9.conv1', no layer of this model"),
    "no ranges": (lambda content: content.pop("resnet_fast_int8"), r"expected a file that save_quantized wrote"),
    "other text": (lambda content: content.update(resnet_fast_int8="[]"), r"expected a file that save_quantized wrote"),
    "nothing": (_empty, r"expected a file that save_quantized wrote"),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("inplace", [False, True])
def test_what_does_not_fit_is_said_and_the_model_unchanged(name, inplace, tmp_path):
    change, message = WRONG[name]
    _, int8 = quantised()
    path = tmp_path / "m.pt"
    resnet_fast.save_quantized(int8, path)
    broken(path, change)
    model = small_resnet(seed=3)
    expected = model(X)
    with pytest.raises(ValueError, match=message):
        resnet_fast.load_quantized(model, path, inplace=inplace)
    assert torch.equal(model(X), expected)
    assert type(model) is resnet.ResNet and model.fc.weight.requires_grad


def test_another_model(tmp_path):
    _, int8 = quantised()
    resnet_fast.save_quantized(int8, tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match=r"which lacks 'layer1.0.bn3.bias', .* and has of another shape"):
        resnet_fast.load_quantized(small_resnet(resnet.Bottleneck), tmp_path / "m.safetensors")


def test_names_of_files(tmp_path):
    model, int8 = quantised()
    with pytest.raises(ValueError, match=r"expected a name that ends in \.safetensors, \.pt, \.pth"):
        resnet_fast.save_quantized(int8, tmp_path / "m.bin")
    with pytest.raises(ValueError, match=r"expected a name that ends in \.safetensors, \.pt, \.pth"):
        resnet_fast.load_quantized(model, tmp_path / "m.bin")
    with pytest.raises(FileNotFoundError):
        resnet_fast.load_quantized(model, tmp_path / "m.safetensors")
    with pytest.raises(FileNotFoundError):
        resnet_fast.load_quantized(model, tmp_path / "m.pt")
    with pytest.raises(FileNotFoundError, match="but its folder"):
        resnet_fast.save_quantized(int8, tmp_path / "none" / "m.pt")
    for name in ("m.safetensors", "m.pt"):
        (tmp_path / name).write_bytes(b"no such thing")
        with pytest.raises(ValueError, match="which cannot be read: "):
            resnet_fast.load_quantized(model, tmp_path / name)
    save_file({"a": torch.zeros(1)}, tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match="expected a file that save_quantized wrote"):
        resnet_fast.load_quantized(model, tmp_path / "m.safetensors")


def test_a_model_that_is_not_quantised_is_not_saved(tmp_path):
    with pytest.raises(ValueError, match="model is a ResNet that is not quantised, expected what quantize"):
        resnet_fast.save_quantized(small_resnet(), tmp_path / "m.pt")
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    _, int8 = quantised()
    path = tmp_path / "m.pt"
    path.write_text("old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        resnet_fast.save_quantized(int8, path)
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1
