"""verify_onnx and ``resnet-fast verify FILE.onnx``: what is found in a file at any later time."""

import json

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from PIL import Image
from torch import nn

from resnet_fast.cli import main
from resnet_fast.export import MissingPackageError, VerificationError, export_onnx, tensorrt, verify_onnx
from resnet_fast.export.metadata import Metadata
from resnet_fast.export.preprocessing import Preprocess
from resnet_fast.models.named import build

NORMALISE = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
SIZE = (3, 40, 48)


def tiny(channels=3):
    torch.manual_seed(0)
    tail = (nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
    return nn.Sequential(nn.Conv2d(channels, 8, 3), nn.BatchNorm2d(8), *tail).eval()


@pytest.fixture(scope="module")
def basic(tmp_path_factory):
    model, path = tiny(), tmp_path_factory.mktemp("verify") / "basic.onnx"
    return model, path, export_onnx(model, path, input_size=SIZE, tensorrt=False, **NORMALISE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Photographs of several sizes, one of them in grey, and a file that is none."""
    from skimage import data

    folder = tmp_path_factory.mktemp("photographs")
    (folder / "below").mkdir()
    Image.fromarray(data.astronaut()).save(folder / "astronaut.png")
    Image.fromarray(data.chelsea()).save(folder / "below" / "cat.JPG")
    Image.fromarray(data.coffee()[:, :99]).save(folder / "below" / "coffee.png")
    Image.fromarray(data.camera()).save(folder / "camera.png")
    (folder / "notes.txt").write_text("no picture")
    return folder


def changed(path, target, change):
    file = onnx.load(path)
    change(file)
    onnx.save(file, target)
    return target


# --- good files -----------------------------------------------------------------------------------------------------


def test_the_same_is_found_again(basic):
    model, path, result = basic
    assert verify_onnx(path, model, tensorrt=False) == result


def test_without_a_model(basic):
    result = verify_onnx(basic[1], tensorrt=False)
    assert (result.max_errors, result.tolerance, result.torch_error) == ({}, None, None)
    assert 0 <= result.batch_error < 1e-6
    assert result.op_counts == basic[2].op_counts


@pytest.mark.skipif(not tensorrt.available(), reason="the TensorRT-RTX wheels (extra `tensorrt`) are missing")
def test_tensorrt_is_asked_where_it_is_installed(basic):
    assert verify_onnx(basic[1]).engine.convolutions == 1


@pytest.mark.parametrize(
    "arguments",
    [{}, {"precision": "fp16", "preprocess": True, "softmax": True}, {"precision": "bf16", "preprocess": "normalise"}],
    ids=["plain", "pictures", "own size"],
)
def test_photographs(arguments, folder, tmp_path):
    model, path = tiny(), tmp_path / "m.onnx"
    written = export_onnx(model, path, input_size=SIZE, images=folder, tensorrt=False, **NORMALISE, **arguments)
    assert written.images == 4
    assert written.image_error > 0
    assert written.top1_agreement == 1
    assert verify_onnx(path, model, images=folder, tensorrt=False) == written


def test_disagreement_on_photographs_is_counted(folder, tmp_path):
    """Two classes that only float64 tells apart: in bfloat16 the first wins, in float64 the second."""
    model, path = tiny(), tmp_path / "m.onnx"
    with torch.no_grad():
        model[-1].weight[4] = model[-1].weight[7]
        model[-1].bias[4] = 20
        model[-1].bias[7] = 20 * (1 + 2**-12)  # 20 in bfloat16
    result = export_onnx(model, path, precision="bf16", input_size=SIZE, images=folder, tensorrt=False, **NORMALISE)
    assert result.top1_agreement == 0


# --- bad files ------------------------------------------------------------------------------------------------------


def test_another_model_is_noticed(basic):
    other = tiny()
    with torch.no_grad():
        other[-1].bias[3] += 1e-4
    with pytest.raises(VerificationError, match="from float64 PyTorch at batch 1, expected at most"):
        verify_onnx(basic[1], other, tensorrt=False)


def test_wrong_preprocessing_is_noticed(tmp_path):
    model, path = tiny(), tmp_path / "m.onnx"
    export_onnx(model, path, input_size=SIZE, preprocess=True, tensorrt=False, **NORMALISE)

    def change(file):
        for tensor in file.graph.initializer:
            if tensor.name == "preprocess.mean":
                tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) + np.float32(0.5), tensor.name))

    with pytest.raises(VerificationError):
        verify_onnx(changed(path, path, change), model, tensorrt=False)


def test_results_that_depend_on_the_batch_are_noticed(basic, tmp_path):
    def change(file):  # logits less their mean over the batch
        file.graph.output[0].name = "mixed"
        axes = numpy_helper.from_array(np.array([0], np.int64), "axes")
        file.graph.initializer.append(axes)
        file.graph.node.append(helper.make_node("ReduceMean", ["logits", "axes"], ["mean_logits"], name="m"))
        file.graph.node.append(helper.make_node("Sub", ["logits", "mean_logits"], ["mixed"], name="s"))

    with pytest.raises(VerificationError, match=r"differs by .* between batch 1 and 7"):
        verify_onnx(changed(basic[1], tmp_path / "m.onnx", change), tensorrt=False)


def test_results_that_are_not_finite_are_noticed(basic, tmp_path):
    def change(file):
        for tensor in file.graph.initializer:
            if tensor.name == "5.bias":
                tensor.CopyFrom(numpy_helper.from_array(np.full(10, np.nan, np.float32), tensor.name))

    with pytest.raises(VerificationError, match="not finite"):
        verify_onnx(changed(basic[1], tmp_path / "m.onnx", change), tensorrt=False)


def test_wrong_top_k_is_noticed(tmp_path):
    model, path = tiny(), tmp_path / "m.onnx"
    export_onnx(model, path, input_size=SIZE, top_k=2, tensorrt=False)

    def change(file):
        (node,) = [node for node in file.graph.node if node.op_type == "TopK"]
        node.attribute.append(helper.make_attribute("largest", 0))

    wrong = changed(path, path, change)
    for other in (None, model):
        with pytest.raises(VerificationError, match="scores and classes are not the 2 largest values"):
            verify_onnx(wrong, other, tensorrt=False)


@pytest.mark.skipif(not tensorrt.available(), reason="the TensorRT-RTX wheels (extra `tensorrt`) are missing")
def test_what_tensorrt_refuses_does_not_take_its_place(tmp_path):
    """A file that is right, with an operator that ONNX Runtime has and TensorRT has not."""
    model, path = tiny(), tmp_path / "m.onnx"
    path.write_text("the old file")

    class Determinant(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x):
            return torch.linalg.det(self.inner(x).view(-1, 1, 1, 10) * torch.eye(10)).view(-1, 1)

    with pytest.raises(VerificationError, match=r"TensorRT-RTX .* cannot .*m\.onnx'.*Det") as caught:
        export_onnx(Determinant(), path, input_size=SIZE, tensorrt=True)
    assert "leave TensorRT out with tensorrt=False" in str(caught.value)
    assert path.read_text() == "the old file"


def test_files_that_are_not_what_they_say(basic, tmp_path):
    def older(file):
        file.opset_import[0].version = 17

    def other(file):
        for entry in file.metadata_props:
            if entry.key == "precision":
                entry.value = "int4"

    with pytest.raises(RuntimeError, match="opset is 17, expected at least 18 for fp32"):
        verify_onnx(changed(basic[1], tmp_path / "m.onnx", older), tensorrt=False)
    with pytest.raises(ValueError, match="precision is 'int4', expected one of"):
        verify_onnx(changed(basic[1], tmp_path / "m.onnx", other), tensorrt=False)


def test_files_of_others_and_damaged_files(basic, tmp_path):
    with pytest.raises(FileNotFoundError, match="expected an ONNX file"):
        verify_onnx(tmp_path / "absent.onnx")
    (tmp_path / "broken.onnx").write_bytes(b"not a protobuf")
    with pytest.raises(RuntimeError, match=r"broken\.onnx', which is not valid ONNX"):
        verify_onnx(tmp_path / "broken.onnx")
    bare = changed(basic[1], tmp_path / "bare.onnx", lambda file: file.ClearField("metadata_props"))
    with pytest.raises(ValueError, match="no producer 'resnet_fast', expected a file of export_onnx"):
        verify_onnx(bare)
    truncated = tmp_path / "truncated.onnx"
    truncated.write_bytes(basic[1].read_bytes()[:-100])
    with pytest.raises((RuntimeError, ValueError)):
        verify_onnx(truncated)


def test_bad_arguments(basic, folder, tmp_path, monkeypatch):
    model, path, _ = basic
    with pytest.raises(ValueError, match="verify is False, expected True with images"):
        export_onnx(model, tmp_path / "m.onnx", input_size=SIZE, images=folder, verify=False)
    with pytest.raises(ValueError, match="but model is None, expected what to compare the file with"):
        verify_onnx(path, images=folder)
    with pytest.raises(ValueError, match="model reads 1 channels, expected 3"):
        verify_onnx(path, tiny(1))
    with pytest.raises(TypeError, match="model is str, expected a"):
        verify_onnx(path, "resnet18")
    with pytest.raises(FileNotFoundError, match="expected a folder with pictures in it or below"):
        verify_onnx(path, model, images=tmp_path)
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="images has 1 pictures, none of which can be read"):
        verify_onnx(path, model, images=tmp_path, tensorrt=False)
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'resnet-fast\[onnxruntime\]'"):
        verify_onnx(path)


def test_metadata_survives_the_file():
    class Holder:
        metadata_props = {}  # noqa: RUF012

    metadata = Metadata(
        "ResNet",
        (3, 40, 48),
        ("ant", "é"),
        (0.1, 0.2, 0.3),
        (1.0, 2.0, 3.0),
        60,
        "bicubic",
        "fp16",
        "fp16",
        Preprocess((40, 48), (0.1, 0.2, 0.3), (1.0, 2.0, 3.0), 60, "bicubic"),
    )
    holder = Holder()
    metadata.write(holder)
    assert Metadata.read(holder.metadata_props) == metadata
    for name in ("input_size", "precision", "preprocess"):
        with pytest.raises(ValueError, match="metadata is damaged"):
            Metadata.read({**holder.metadata_props, name: "{"} if name != "precision" else {"producer": "resnet_fast"})


# --- command line ---------------------------------------------------------------------------------------------------


def test_command_line(folder, tmp_path, capsys):
    path, weights = tmp_path / "m.onnx", tmp_path / "w.pt"
    torch.save(build("resnet18", num_classes=5, seed=1).state_dict(), weights)
    model = ["--weights", str(weights), "--num-classes", "5", "--images", str(folder), "--no-tensorrt"]
    means = ["--mean", "0.485,0.456,0.406", "--std", "0.229,0.224,0.225"]
    options = ["--precision", "fp16", "--preprocess", "resize", "--top-k", "2", "--softmax", "--size", "32"]
    assert main(["export", "resnet18", str(path), *options, *means, *model, "--json", "-"]) == 0
    written = json.loads(capsys.readouterr().out)
    assert (written["precision"], written["opset"], written["images"]) == ("fp16", 18, 4)
    assert [value.name for value in onnx.load(path).graph.output] == ["probabilities", "scores", "classes"]

    assert main(["verify", str(path), "--model", "resnet18", *model, "--json", "-"]) == 0
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert found == {key: value for key, value in written.items() if key != "model"}
    assert "4 pictures" in said.err

    assert main(["verify", str(path), "--no-tensorrt"]) == 0
    assert "Not compared with a model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["verify", "a.onnx", "b.onnx"], "verified by itself, not 2"),
        (["verify", "a.onnx", "--num-classes", "5"], "needs --model"),
        (["verify", "a.onnx", "--weights", "w.pt"], "needs --model"),
        (["verify", "resnet18", "--model", "resnet18"], "is for a FILE.onnx"),
        (["verify", "resnet18", "--no-tensorrt"], "is for a FILE.onnx"),
        (["export", "resnet18", "m.onnx", "--precision", "fp8"], "'fp8' is not one of 'fp32', 'fp16', 'bf16'"),
        (
            ["export", "resnet18", "m.onnx", "--precision", "bf16", "--opset", "21"],
            "21 is below 22, the lowest for bf16",
        ),
        (["export", "resnet18", "m.onnx", "--io-dtype", "bf16"], "'bf16' is not one of 'fp32', 'fp16'"),
        (["export", "resnet18", "m.onnx", "--preprocess", "crop"], "'crop' is not one of 'resize', 'normalise'"),
    ],
)
def test_usage_errors(arguments, said, capsys):
    assert main(arguments) == 2
    assert said in " ".join(capsys.readouterr().err.replace("│", " ").split())
