"""Checkpoints as people have them: what is read, what they know, and what is said where they do not fit."""

import argparse
import copy
import json
import urllib.error
from pathlib import PurePosixPath

import numpy as np
import onnx
import pytest
import torch
import torchvision
from PIL import Image
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torchvision.models import ResNet18_Weights

from resnet_fast.cli import main
from resnet_fast.export import export_onnx
from resnet_fast.models.checkpoint import finetuned, read_checkpoint
from resnet_fast.models.named import build
from tests.cpu.finetune.finetune_data import TINY, write_folder

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(3)
    return torchvision.models.resnet18(num_classes=5).eval()


def prefixed(prefix):
    return lambda model: {f"{prefix}{name}": tensor for name, tensor in model.state_dict().items()}


WILD = {
    "module.": prefixed("module."),
    "_orig_mod.": prefixed("_orig_mod."),
    "both": prefixed("module._orig_mod."),
    "lightning": lambda model: {"state_dict": prefixed("model.")(model), "epoch": 3, "pytorch-lightning_version": "2"},
    "model_state_dict": lambda model: {"model_state_dict": model.state_dict(), "loss": np.float64(0.5)},
    "net": lambda model: {"net": prefixed("module.")(model), "acc": np.float32(93.5)},
    "state_dict_ema": lambda model: {"state_dict_ema": model.state_dict(), "args": argparse.Namespace(lr=0.1)},
    "reference": lambda model: {"model": model.state_dict(), "args": argparse.Namespace(output=PurePosixPath("x"))},
    "average": lambda model: AveragedModel(model).state_dict(),
    "saved average": lambda model: {"model_ema": AveragedModel(model).state_dict(), "epoch": 1},
    "parallel": lambda model: nn.DataParallel(model).state_dict(),
    "compiled": lambda model: torch.compile(model).state_dict(),
}


@pytest.mark.parametrize("name", WILD)
def test_checkpoints_in_the_wild_are_understood(name, network, tmp_path):
    torch.save(WILD[name](network), tmp_path / "w.pth")
    model = build("resnet18", weights=str(tmp_path / "w.pth"), num_classes=5)
    assert all(torch.equal(tensor, network.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_a_checkpoint_of_another_model_is_named(network, tmp_path, capsys):
    torch.save(network.state_dict(), tmp_path / "w.pth")
    assert main(["verify", "resnet50", "--weights", str(tmp_path / "w.pth")]) == 1
    (said,) = capsys.readouterr().err.strip().splitlines()
    assert said.endswith("w.pth' does not fit resnet50: this is a resnet18")


def test_other_classes_are_named(network, tmp_path, capsys):
    torch.save(network.state_dict(), tmp_path / "w.pth")
    assert main(["verify", "resnet18", "--weights", str(tmp_path / "w.pth")]) == 1
    assert "its last layer has 5 classes, that of the model 1000" in capsys.readouterr().err


def test_what_nobody_knows_is_summed_up_in_a_line(network, tmp_path, capsys):
    torch.save({f"encoder.{name}": tensor for name, tensor in network.state_dict().items()}, tmp_path / "w.pth")
    assert main(["verify", "resnet18", "--weights", str(tmp_path / "w.pth")]) == 1
    (said,) = capsys.readouterr().err.strip().splitlines()
    assert "missing: 122, e.g. 'bn1.bias', unknown to it: 122, e.g. 'encoder.bn1.bias'" in said


def test_weights_without_a_network_say_what_to_do(tmp_path, monkeypatch, capsys):
    def unreachable(*_, **__):
        raise urllib.error.URLError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    monkeypatch.setattr("torch.hub.urlopen", unreachable)
    data = str(write_folder(tmp_path / "data", 30))
    out = ["--output", str(tmp_path / "out")]
    for arguments in (["verify", "resnet18", "--weights", "DEFAULT"], ["finetune", data, "--weights", "DEFAULT", *out]):
        assert main(arguments) == 1
        said = capsys.readouterr().err.strip().splitlines()[-1]
        url = ResNet18_Weights.DEFAULT.url
        assert (
            f"{url} cannot be downloaded: no network; put that file into '{tmp_path / 'hub'}/hub/checkpoints'" in said
        )
    assert not (tmp_path / "out").exists()


# --- those of our own -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Images of 48 x 48 in three classes, and the folder of a run on them."""
    folder = tmp_path_factory.mktemp("run")
    write_folder(folder / "data", 30)
    arguments = [*TINY, "--image-size", "48", "--epochs", "1", "--output", str(folder / "out")]
    assert main(["finetune", str(folder / "data"), *arguments]) == 0
    return folder / "data", folder / "out"


def metadata(path):
    return {entry.key: entry.value for entry in onnx.load(path).metadata_props}


@pytest.mark.parametrize("name", ["best.pt", "last.pt"])
@pytest.mark.parametrize("asked", ["model", "weights"])
def test_export_asks_nothing_that_the_checkpoint_knows(name, asked, run, tmp_path):
    file = str(run[1] / name)
    given = [file] if asked == "model" else ["timm:test_resnet", "--weights", file]
    assert main(["export", *given, str(tmp_path / "m.onnx"), "--no-tensorrt"]) == 0
    said = metadata(tmp_path / "m.onnx")
    assert json.loads(said["classes"]) == ["one", "two", "zero"]
    assert json.loads(said["input_size"]) == [3, 48, 48] and json.loads(said["resize"]) == 55
    assert json.loads(said["mean"]) == [0.485, 0.456, 0.406] and json.loads(said["std"]) == [0.229, 0.224, 0.225]


def test_export_from_python_takes_it_from_the_checkpoint_too(run, tmp_path):
    model = build(str(run[1] / "best.pt"))
    export_onnx(model, tmp_path / "m.onnx", weights=run[1] / "best.pt", classes=["a", "b", "c"], verify=False)
    said = metadata(tmp_path / "m.onnx")
    assert json.loads(said["classes"]) == ["a", "b", "c"] and json.loads(said["input_size"]) == [3, 48, 48]


def test_int8_from_a_checkpoint_and_a_folder_with_broken_pictures(run, tmp_path, capsys):
    pictures = write_folder(tmp_path / "pictures", 12)
    broken = sorted(pictures.rglob("*.png"))[2]
    broken.write_bytes(b"")
    Image.new("RGBA", (9, 9)).save(pictures / "clear.png")
    arguments = ["export", str(run[1] / "best.pt"), str(tmp_path / "m.onnx"), "--precision", "int8", "--no-tensorrt"]
    assert main([*arguments, "--calibration", str(pictures), "--images", str(pictures), "--json", "-"]) == 0
    said = capsys.readouterr()
    assert "1 pictures of the calibration could not be read" in said.err
    quantisation = json.loads(said.out)["quantisation"]
    assert quantisation["skipped"] == [str(broken)] and quantisation["images"] == 12
    assert json.loads(metadata(tmp_path / "m.onnx")["mean"]) == [0.485, 0.456, 0.406]


def test_int8_without_images_is_refused_before_the_work(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("resnet_fast.export.to_onnx.folded", lambda *_: pytest.fail("the model was traced"))
    arguments = ["export", str(run[1] / "best.pt"), str(tmp_path / "m.onnx"), "--precision", "int8"]
    for more in ([], ["--target", "cpu"], ["--calibration", str(tmp_path / "none")]):
        (tmp_path / "none").mkdir(exist_ok=True)
        assert main([*arguments, *more]) == 1
        assert "expected" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["none"]


def test_a_checkpoint_stands_for_its_model_in_every_command(run, capsys):
    assert main(["explain", str(run[1] / "best.pt")]) == 0
    capsys.readouterr()
    assert main(["verify", str(run[1] / "best.pt"), "--size", "48"]) == 0


def test_one_that_does_not_know_its_model_says_so(network, tmp_path, capsys):
    torch.save(network.state_dict(), tmp_path / "w.pth")
    assert main(["export", str(tmp_path / "w.pth"), str(tmp_path / "m.onnx")]) == 2
    assert "does not say which model it is of" in " ".join(capsys.readouterr().err.split())
    assert finetuned(tmp_path / "w.pth") is None


def test_finetune_takes_the_model_from_the_checkpoint(run, tmp_path):
    arguments = ["finetune", str(run[0]), *TINY[2:], "--epochs", "1", "--output", str(tmp_path)]
    assert main([*arguments, "--weights", str(run[1] / "best.pt")]) == 0
    assert json.loads((tmp_path / "results.json").read_text())["model"] == "timm:test_resnet"


def test_names_of_classes_from_any_editor(run, tmp_path, capsys):
    arguments = ["export", str(run[1] / "best.pt"), str(tmp_path / "m.onnx"), "--no-verify", "--classes"]
    (tmp_path / "names.txt").write_bytes("\ufeffcat\r\ndog\r\neel\r\n\r\n".encode())
    assert main([*arguments, str(tmp_path / "names.txt")]) == 0
    assert json.loads(metadata(tmp_path / "m.onnx")["classes"]) == ["cat", "dog", "eel"]
    for content, said in ((b"caf\xe9\n", "is no text in UTF-8"), (b"\n", "is empty, expected a name a line")):
        (tmp_path / "names.txt").write_bytes(content)
        assert main([*arguments, str(tmp_path / "names.txt")]) == 2
        assert said in " ".join(capsys.readouterr().err.split())


def test_a_state_dict_is_read_as_it_is(network, tmp_path):
    state = copy.deepcopy(network.state_dict())
    torch.save(state, tmp_path / "w.pth")
    assert list(read_checkpoint(tmp_path / "w.pth")) == list(state)
