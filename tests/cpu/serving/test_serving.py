"""Model repositories as files: what is in them, what is refused, and that nothing half-done is left.

tests/serving/ has the same on the real server.
"""

import errno
import json
import re
from pathlib import Path

import onnx
import pytest
import torch
from google.protobuf import text_format
from torch import nn
from tritonclient.grpc import model_config_pb2

from resnet_fast.cli import main
from resnet_fast.export import MissingPackageError
from resnet_fast.models.named import build
from resnet_fast.serving import config, repository, write_repository
from resnet_fast.serving.repository import _move
from resnet_fast.serving.server import VARIABLE, Installation, installation, servable
from tests.cpu.small_models import small_resnet

SMALL = {"input_size": (3, 32, 32), "verify": False}


@pytest.fixture(autouse=True)
def always_one_thread(one_thread):
    """Small shapes only."""


def parsed(model: Path) -> model_config_pb2.ModelConfig:
    """config.pbtxt as the server reads it: a field that it does not know is an error."""
    return text_format.Parse((model / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below ``folder``, hidden ones too."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The repository of a small network, of which other tests only read."""
    folder = tmp_path_factory.mktemp("repository") / "models"
    labels = [f'the "{index}th" \\ class: é' for index in range(7)]
    return write_repository(small_resnet(), folder, name="net", max_batch=6, queue_delay=500, classes=labels, **SMALL)


# --- what is written --------------------------------------------------------------------------------------------------


def test_both_configurations_describe_the_onnx_file(written):
    file = written.folder / "net_onnx/1/model.onnx"
    assert written.export.path == file
    graph = onnx.load(file).graph
    (given,), (wanted,) = graph.input, graph.output
    for name, backend in (("net", "python"), ("net_onnx", "onnxruntime")):
        config = parsed(written.folder / name)
        assert (config.name, config.backend, config.max_batch_size) == (name, backend, 6)
        for port, value in ((config.input[0], given), (config.output[0], wanted)):
            assert port.name == value.name
            assert port.data_type == model_config_pb2.TYPE_FP32
            assert list(port.dims) == [dim.dim_value for dim in value.type.tensor_type.shape.dim][1:]
        assert list(config.dynamic_batching.preferred_batch_size) == [4, 6]
        assert config.dynamic_batching.max_queue_delay_microseconds == 500
        assert [(group.count, group.kind) for group in config.instance_group] == [
            (1, config.instance_group[0].KIND_AUTO)
        ]
        assert [warm_up.batch_size for warm_up in config.model_warmup] == [1, 4, 6]
        for warm_up in config.model_warmup:
            assert list(warm_up.inputs["input"].dims) == [3, 32, 32]
        labels = (written.folder / name / config.output[0].label_filename).read_text().splitlines()
        assert labels == [f'the "{index}th" \\ class: é' for index in range(7)]


def test_tensorrt_builds_one_engine_for_all_batches(written):
    """Kept in a folder; its profile is from one image to the largest batch."""
    (accelerator,) = parsed(written.folder / "net_onnx").optimization.execution_accelerators.gpu_execution_accelerator
    assert accelerator.name == "tensorrt"
    options = dict(accelerator.parameters)
    assert options["trt_engine_cache_enable"] == "1"
    assert options["trt_engine_cache_path"] == "net_onnx-engines"
    shapes = [options[f"trt_profile_{bound}_shapes"] for bound in ("min", "opt", "max")]
    assert shapes == ["input:1x3x32x32", "input:6x3x32x32", "input:6x3x32x32"]
    # The graph has the precision; TensorRT has no such setting any more.
    assert "precision_mode" not in options


def test_the_readme_has_the_shapes_and_names(written):
    text = written.readme.read_text()
    assert "--minShapes=input:1x3x32x32 --optShapes=input:6x3x32x32 --maxShapes=input:6x3x32x32" in text
    assert "--onnx=net_onnx/1/model.onnx" in text
    assert "$" not in text
    (example,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    compile(example, "README.md", "exec")


def test_a_network_without_a_name_runs_as_onnx(written):
    assert written.runtime == "onnxruntime"
    assert parsed(written.folder / "net").parameters["runtime"].string_value == "onnxruntime"
    files = contents(written.folder)
    assert files["net/1/model.onnx"] == files["net_onnx/1/model.onnx"]
    assert "net/1/weights.pt" not in files


def test_a_network_with_a_name_is_built_anew(tmp_path):
    model = build("resnet18", num_classes=4, seed=3)
    result = write_repository(model, tmp_path / "m", name="r", architecture="resnet18", threads=3, instances=2, **SMALL)
    assert result.runtime == "torch"
    config = parsed(tmp_path / "m/r")
    values = {key: value.string_value for key, value in config.parameters.items()}
    assert values == {"runtime": "torch", "threads": "3", "model": "resnet18", "classes": "4", "dtype": "float32"}
    assert config.instance_group[0].count == 2
    assert not config.output[0].label_filename
    again = build("resnet18", weights=str(tmp_path / "m/r/1/weights.pt"), num_classes=4)
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_images_of_any_size(tmp_path):
    """A file with open dimensions: the server takes any, the warm-up has some, TensorRT's profile is left to see."""
    open_sides = config.Port("image", "TYPE_UINT8", (-1, -1, 3))
    outputs = (config.Port("probabilities", "TYPE_FP32", (7,)), config.Port("classes", "TYPE_INT64", (5,)))
    signature = config.Signature(open_sides, outputs)
    assert not signature.plain
    batching = config.Batching(4, 0, 1)
    text = config.onnxruntime_config("net_onnx", "net", signature, batching, labels=True)
    read = text_format.Parse(text, model_config_pb2.ModelConfig())
    assert list(read.input[0].dims) == [-1, -1, 3]
    assert read.input[0].data_type == model_config_pb2.TYPE_UINT8
    assert all(min(warm_up.inputs["image"].dims) > 0 for warm_up in read.model_warmup)
    assert [output.label_filename for output in read.output] == ["labels.txt", ""]
    options = read.optimization.execution_accelerators.gpu_execution_accelerator[0].parameters
    assert not any("profile" in name for name in options)


@pytest.mark.parametrize(("most", "preferred"), [(1, [1]), (3, [3]), (4, [4]), (16, [4, 8, 16]), (20, [4, 8, 16, 20])])
def test_preferred_batches(most, preferred):
    batching = config.Batching(most, 0, 1)
    assert batching.preferred == preferred
    assert batching.usual in preferred


def test_models_beside_each_other(tmp_path):
    """Another name adds, the same name is refused, and with ``overwrite`` replaced as a whole."""
    folder = tmp_path / "models"
    write_repository(small_resnet(), folder, name="one", classes=list("abcdefg"), **SMALL)
    write_repository(small_resnet(seed=5), folder, name="two", **SMALL)
    before = contents(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["one", "one_onnx", "two", "two_onnx"]
    with pytest.raises(FileExistsError, match=r"has a model 'one(_onnx)?': overwrite=True replaces it"):
        write_repository(small_resnet(seed=6), folder, name="one", **SMALL)
    assert contents(folder) == before
    write_repository(small_resnet(seed=6), folder, name="one", overwrite=True, **SMALL)
    after = contents(folder)
    assert after["one/1/model.onnx"] != before["one/1/model.onnx"]
    assert "one/labels.txt" in before.keys() - after.keys()
    assert {name: after[name] for name in after if name.startswith("two")} == {
        name: before[name] for name in before if name.startswith("two")
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["models"]


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"name": "a/b"}, "name is 'a/b', expected letters"),
        ({"name": ""}, "name is '', expected letters"),
        ({"name": "net\n"}, "expected letters"),
        ({"max_batch": 0}, "max_batch is 0, expected an integer of at least 1"),
        ({"instances": True}, "instances is True"),
        ({"queue_delay": -1}, "queue_delay is -1, expected an integer of at least 0"),
        ({"dynamic_batch": False}, "dynamic_batch is False, expected True"),
        ({"classes": ["a", "b\nc", *"defgh"]}, "classes has 'b\\nc', expected names of one line each"),
        ({"classes": ["a"]}, "classes has 1 names, expected 7"),
        ({"architecture": "resnet50"}, "architecture is 'resnet50', which has other parameters than the model"),
    ],
)
def test_bad_arguments_leave_nothing(tmp_path, arguments, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        write_repository(small_resnet(), tmp_path / "models", **{"name": "net", **SMALL, **arguments})
    assert list(tmp_path.iterdir()) == []


def test_folders_of_others_are_not_touched(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/cat.jpg").write_bytes(b"a cat")
    theirs = tmp_path / "models/net"
    theirs.mkdir(parents=True)
    (theirs / "config.pbtxt").write_text('name: "net"\n')
    before = contents(tmp_path)
    for folder, said in (
        ("photos", "holds 'cat.jpg'; expected a model repository"),
        ("photos/cat.jpg", "a file; expected a model repository"),
        ("models", "whose model 'net' was not written by resnet-fast"),
    ):
        with pytest.raises(FileExistsError, match=said):
            write_repository(small_resnet(), tmp_path / folder, name="net", overwrite=True, **SMALL)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        write_repository(small_resnet(), tmp_path / "absent/models", name="net", **SMALL)
    assert contents(tmp_path) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["models", "photos"]


@pytest.mark.parametrize("failing", [1, 2, 3, 4])
def test_a_failed_move_changes_nothing(tmp_path, monkeypatch, failing):
    """Whichever of the four fails: the two old models away, the two new ones in."""
    folder, new = tmp_path / "models", tmp_path / "new"
    for place, text in ((folder, "old"), (new, "new")):
        for name in ("net", "net_onnx", *(["other"] if text == "old" else [])):
            (place / name / "1").mkdir(parents=True)
            (place / name / "1/model").write_text(text)
    before = contents(folder)
    rename, moved = Path.rename, []

    def full(self, target):
        moved.append(target)
        if len(moved) == failing:
            raise OSError(errno.EIO, "the disk is gone")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", full)
    with pytest.raises(OSError, match="the disk is gone"):
        _move(new, folder, ["net", "net_onnx"])
    assert len(moved) == 2 * failing - 1  # those before it are taken back
    assert contents(folder) == before


def test_a_failed_first_move_leaves_no_folder(tmp_path):
    (tmp_path / "new/net").mkdir(parents=True)
    with pytest.raises(FileNotFoundError):
        _move(tmp_path / "new", tmp_path / "models", ["net", "absent"])
    assert not (tmp_path / "models").exists()
    assert (tmp_path / "new/net").is_dir()


def test_a_failed_first_export_leaves_no_folder(tmp_path):
    class Broken(nn.Module):
        def forward(self, x):
            return x.flatten(1).sum(1)

    with pytest.raises(TypeError, match="expected one tensor of shape"):
        write_repository(Broken(), tmp_path / "models", name="net", **SMALL)
    assert list(tmp_path.iterdir()) == []


def test_what_another_writes_meanwhile_is_not_replaced(tmp_path, monkeypatch):
    export = repository.export_onnx

    def meanwhile(*arguments, **named):
        result = export(*arguments, **named)
        (tmp_path / "models/net").mkdir(parents=True)
        (tmp_path / "models/net/config.pbtxt").write_text("another's")
        return result

    monkeypatch.setattr(repository, "export_onnx", meanwhile)
    with pytest.raises(FileExistsError, match="which has a model 'net'"):
        write_repository(small_resnet(), tmp_path / "models", name="net", **SMALL)
    assert contents(tmp_path) == {"models/net/config.pbtxt": b"another's"}


# --- the command ------------------------------------------------------------------------------------------------------


def test_export_command(tmp_path, capsys):
    """Number of classes and their names come from a checkpoint of ``resnet-fast finetune``."""
    model, file = build("resnet18", num_classes=3, seed=1), tmp_path / "best.pt"
    torch.save({"model": model.state_dict(), "classes": ["ant", "bee", "cat"]}, file)
    line = ["export", "resnet18", "--weights", str(file), "--size", "32", "--no-verify", "--json", "-"]
    line += ["--triton-repository", str(tmp_path / "models"), "--name", "bugs", "--max-batch", "4"]
    assert main(line) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["models"] == ["bugs", "bugs_onnx"]
    assert told["runtime"] == "torch"
    assert (tmp_path / "models/bugs/labels.txt").read_text() == "ant\nbee\ncat\n"
    assert parsed(tmp_path / "models/bugs").max_batch_size == 4
    assert main(line) == 1
    assert "--overwrite replaces it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ([], "give OUTPUT or --triton-repository, and not both"),
        (["m.onnx", "--triton-repository", "models"], "give OUTPUT or --triton-repository, and not both"),
        (["--triton-repository", "models", "--static-batch"], "does not fit --triton-repository"),
    ],
)
def test_usage_errors(more, said, capsys):
    assert main(["export", "resnet18", *more]) == 2
    assert said in " ".join(capsys.readouterr().err.replace("│", " ").split())


# --- the server's program ---------------------------------------------------------------------------------------------


def test_no_server(monkeypatch, tmp_path, capsys):
    """Exit code 4, and what to do about it."""
    monkeypatch.setenv(VARIABLE, str(tmp_path / "absent"))
    monkeypatch.setenv("PATH", "")
    with pytest.raises(MissingPackageError, match="make server"):
        installation()
    assert main(["serve", str(tmp_path)]) == 4
    assert "make server" in capsys.readouterr().err


def test_a_server_on_path(monkeypatch, tmp_path):
    """As in a container: the backends lie beside the program's folder."""
    program = tmp_path / "bin/tritonserver"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setenv(VARIABLE, str(tmp_path / "absent"))
    monkeypatch.setenv("PATH", str(program.parent))
    assert installation() == Installation(program, tmp_path / "backends")


def test_what_a_server_can_load(written, tmp_path):
    """By the backends that it has, each known by its library."""
    for name in ("onnxruntime", "empty"):
        (tmp_path / name).mkdir()
    (tmp_path / "onnxruntime/libtriton_onnxruntime.so").touch()
    gpu = Installation(tmp_path / "tritonserver", tmp_path)
    assert gpu.backend_names == ["onnxruntime"]
    assert servable(written.folder, gpu) == (["net_onnx"], ["net"])


def test_no_server_answers(capsys):
    assert main(["loadtest", "127.0.0.1:9", "net"]) == 1  # the port of a protocol that nobody serves
    assert "no server answers" in capsys.readouterr().err
