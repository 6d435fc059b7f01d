"""export_onnx: what is in the file, that it computes what the model does, and that nothing half-done is left."""

import copy
import json
import os
import resource
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn
from torchvision.models import ResNet18_Weights, resnet
from torchvision.ops import FrozenBatchNorm2d

import resnet_fast
from resnet_fast.bench.norms import randomise_batch_norm
from resnet_fast.export import MissingPackageError, VerificationError, export_onnx, tensorrt
from resnet_fast.export.compare import compare
from resnet_fast.export.file_checks import check_file
from resnet_fast.export.folding import fold_batch_norm, thaw
from resnet_fast.export.precision import folded as folded_network
from resnet_fast.export.runner import session
from resnet_fast.utils import compat
from resnet_fast.utils.files import replacing

RESNET_OPS = {"Conv", "Relu", "Add", "MaxPool", "GlobalAveragePool", "Flatten", "Gemm"}


def small(block=resnet.BasicBlock, **kwargs):
    torch.manual_seed(0)
    model = resnet.ResNet(block, [1, 1, 1, 1], num_classes=10, **kwargs)
    for module in model.modules():
        if isinstance(module, FrozenBatchNorm2d):
            module.running_mean.uniform_(-0.5, 0.5)
            module.running_var.uniform_(0.5, 2)
            module.weight.uniform_(0.25, 0.75)
    randomise_batch_norm(model, 0)
    return model


def with_biases():
    """Frozen batch norms behind convolutions with a bias."""
    model = small(norm_layer=FrozenBatchNorm2d)
    model.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=True)
    model.layer2[0].conv2 = nn.Conv2d(128, 128, 3, 1, 1, bias=True)
    return model


def resnext():
    return small(resnet.Bottleneck, groups=8, width_per_group=8, replace_stride_with_dilation=[False, True, True])


def ours():
    torch.manual_seed(0)
    model = resnet_fast.ResNet(resnet_fast.BasicBlock, [1, 1, 1, 1], num_classes=10)
    randomise_batch_norm(model, 0)
    return model


def tiny(norm=nn.BatchNorm2d):
    """No ResNet, but quick to export."""
    torch.manual_seed(0)
    tail = (nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
    return nn.Sequential(nn.Conv2d(3, 8, 3), norm(8), *tail)


def timm_model():
    return pytest.importorskip("timm").create_model("test_resnet", num_classes=10)


MODELS = {
    "accelerated": lambda: resnet_fast.accelerate(small().eval()),
    "resnext": resnext,
    "biases": with_biases,
    "ours": ours,
    "timm": timm_model,
}


@pytest.fixture(scope="module")
def basic(tmp_path_factory):
    """A model, and the file that it was exported to with everything that can be said about it."""
    model = small()
    path = tmp_path_factory.mktemp("export") / "basic.onnx"
    classes = [f"class {index} é" for index in range(10)]
    result = export_onnx(
        model, path, input_size=(3, 40, 48), classes=classes, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7)
    )
    return model, path, result


@pytest.mark.parametrize("name", MODELS)
def test_file_computes_what_the_model_does(name, tmp_path):
    model = MODELS[name]()
    result = export_onnx(model, tmp_path / "m.onnx", input_size=(3, 33, 47), verify=False)
    assert set(result.op_counts) <= RESNET_OPS | ({"AveragePool"} if name == "timm" else set())
    runtime = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    precise = resnet_fast.restore(copy.deepcopy(model)).eval().double()
    for batch in (1, 2, 7):
        images = torch.randn(batch, 3, 33, 47, generator=torch.Generator().manual_seed(batch))
        with torch.inference_mode():
            expected = precise(images.double()).numpy()
        (found,) = runtime.run(None, {"input": images.numpy()})
        assert found.shape == (batch, 10)
        np.testing.assert_allclose(found, expected, rtol=0, atol=5e-6 * np.abs(expected).max())


def test_result_and_metadata(basic):
    _, path, result = basic
    file = onnx.load(path)
    assert set(result.op_counts) == RESNET_OPS
    assert result.op_counts["Conv"] == 12
    assert result.size == path.stat().st_size
    assert set(result.max_errors) == {1, 2, 7}
    assert max(result.max_errors.values()) <= result.tolerance
    assert (result.engine is not None) == tensorrt.available()
    said = {entry.key: entry.value for entry in file.metadata_props}
    assert (file.producer_name, file.producer_version) == ("resnet_fast", resnet_fast.__version__)
    assert said["resnet_fast_version"] == resnet_fast.__version__
    assert json.loads(said["input_size"]) == [3, 40, 48]
    assert json.loads(said["classes"])[9] == "class 9 é"
    assert json.loads(said["mean"]) == [0.1, 0.2, 0.3]
    assert json.loads(said["std"]) == [0.5, 0.6, 0.7]


def test_file_holds_no_trace_of_the_source(basic):
    _, path, _ = basic
    content = path.read_bytes()
    for trace in (b"site-packages", b"torchvision", b"stack_trace", os.getcwd().encode()):
        assert trace not in content
    file = onnx.load(path)
    assert all(not node.metadata_props and not node.doc_string for node in file.graph.node)
    assert all(not value.metadata_props for value in (*file.graph.input, *file.graph.output, *file.graph.initializer))


def test_batch_is_open_or_one(basic, tmp_path):
    assert onnx.load(basic[1]).graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    result = export_onnx(tiny(), tmp_path / "static.onnx", input_size=(3, 40, 48), dynamic_batch=False)
    assert set(result.max_errors) == {1}
    shape = onnx.load(tmp_path / "static.onnx").graph.input[0].type.tensor_type.shape
    assert [dim.dim_value for dim in shape.dim] == [1, 3, 40, 48]


@pytest.mark.parametrize("opset", [18, 19, 20, 22])
def test_opset_is_that_of_the_file(opset, tmp_path):
    result = export_onnx(tiny(), tmp_path / "m.onnx", opset=opset, input_size=(3, 32, 32))
    assert result.opset == opset
    assert [entry.version for entry in onnx.load(tmp_path / "m.onnx").opset_import] == [opset]


def test_file_in_another_opset_is_refused(basic):
    with pytest.raises(RuntimeError, match="opset is 20, but PyTorch could write this model only in opset 18"):
        check_file(basic[1], 20)


@pytest.mark.parametrize("make", [lambda: tiny(FrozenBatchNorm2d), lambda: resnet_fast.accelerate(small())])
def test_given_model_is_not_changed(make, tmp_path):
    model = make().train()
    list(model.children())[1].eval()  # as somebody who freezes a part does
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    kinds = [(type(module), module.training) for module in model.modules()]
    gradients = [parameter.requires_grad for parameter in model.parameters()]
    export_onnx(model, tmp_path / "m.onnx", input_size=(3, 32, 32), verify=False)
    assert [(type(module), module.training) for module in model.modules()] == kinds
    assert [parameter.requires_grad for parameter in model.parameters()] == gradients
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_weights_say_classes_size_and_normalisation(tmp_path):
    model = tiny()
    model[-1] = nn.Linear(8, 1000)
    export_onnx(model, tmp_path / "m.onnx", weights=ResNet18_Weights.IMAGENET1K_V1, verify=False)
    said = {entry.key: entry.value for entry in onnx.load(tmp_path / "m.onnx").metadata_props}
    assert json.loads(said["classes"])[0] == "tench"
    assert json.loads(said["input_size"]) == [3, 224, 224]
    assert json.loads(said["std"]) == [0.229, 0.224, 0.225]


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"opset": 17}, ValueError, "opset is 17, expected an integer of at least 18"),
        ({"opset": 18.0}, ValueError, "opset is 18.0, expected an integer"),
        ({"opset": 1000}, ValueError, "opset is 1000, expected at most"),
        ({"input_size": (1, 32, 32)}, ValueError, r"input_size is \(1, 32, 32\), expected 3 channels"),
        ({"input_size": (3, 32)}, ValueError, "expected three positive integers"),
        ({"input_size": (3, 0, 32)}, ValueError, "expected three positive integers"),
        ({"classes": ["a", "b"]}, ValueError, "classes has 2 names, expected 10"),
        ({"mean": [0.5]}, ValueError, r"mean is \(0.5,\), expected 3 numbers"),
        ({"std": [1, 1, 0]}, ValueError, "expected positive numbers"),
        ({"weights": "DEFAULT"}, TypeError, "weights is 'DEFAULT', expected a torchvision weights enum member"),
    ],
)
def test_bad_arguments(arguments, error, message, tmp_path):
    arguments = {"input_size": (3, 32, 32), **arguments}
    with pytest.raises(error, match=message):
        export_onnx(tiny(), tmp_path / "m.onnx", **arguments)
    assert list(tmp_path.iterdir()) == []


class Features(nn.Module):
    def forward(self, x):
        return {"features": x}


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        ({"state": "dict"}, TypeError, "model is dict, expected a torch.nn.Module"),
        (tiny().half(), ValueError, "model has 0.weight in torch.float16, expected torch.float32"),
        (nn.Conv2d(3, 4, 1, device="meta"), ValueError, "weight on the meta device"),
        (nn.Conv2d(3, 4, 1), TypeError, r"model gives shape \[1, 4, 32, 32\], expected one tensor of shape"),
        (Features(), TypeError, "model gives dict, expected one tensor"),
    ],
)
def test_bad_models(model, error, message, tmp_path):
    with pytest.raises(error, match=message):
        export_onnx(model, tmp_path / "m.onnx", input_size=(3, 32, 32))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("path", "error", "message"),
    [
        (".", IsADirectoryError, "a folder; expected a file name"),
        ("absent/m.onnx", FileNotFoundError, "its folder '.*absent' does not exist"),
        ("/proc/m.onnx", OSError, "cannot write to the folder of path '/proc/m.onnx'"),
    ],
)
def test_bad_paths(path, error, message, tmp_path):
    with pytest.raises(error, match=message):
        export_onnx(tiny(), tmp_path / path, input_size=(3, 32, 32))


def test_missing_onnxruntime(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'resnet-fast\[onnxruntime\]'"):
        export_onnx(tiny(), tmp_path / "m.onnx", input_size=(3, 32, 32))
    assert export_onnx(tiny(), tmp_path / "m.onnx", input_size=(3, 32, 32), verify=False).max_errors == {}


# --- nothing half-done ----------------------------------------------------------------------------------------------


def test_what_killed_processes_left_goes_after_a_day(tmp_path):
    names = [".m.00112233.onnx", ".m.44556677.onnx", ".other.00112233.onnx", ".m.0011223x.onnx"]
    for name in names:
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (0, 0) if name != names[1] else None)
    with replacing(tmp_path / "m.onnx") as temporary:
        temporary.write_bytes(b"new")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*names[1:], "m.onnx"])


class Unfaithful(nn.Module):
    """Computes something else when traced, as a bug in the exporter would."""

    def __init__(self):
        super().__init__()
        self.inner = tiny()

    def forward(self, x):
        return self.inner(x) * (1.001 if torch.compiler.is_exporting() else 1.0)


def test_wrong_file_does_not_take_its_place(tmp_path):
    target = tmp_path / "m.onnx"
    target.write_text("the old file")
    with pytest.raises(VerificationError, match="from float64 PyTorch at batch 1, expected at most"):
        export_onnx(Unfaithful(), target, input_size=(3, 32, 32))
    assert target.read_text() == "the old file"
    assert list(tmp_path.iterdir()) == [target]


def test_full_disk_leaves_the_old_file(tmp_path):
    target = tmp_path / "m.onnx"
    target.write_text("the old file")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # the file is larger
    try:
        with pytest.raises(OSError, match="File too large"):
            export_onnx(tiny(), target, input_size=(3, 32, 32))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert target.read_text() == "the old file"
    assert list(tmp_path.iterdir()) == [target]


def test_replacing_follows_links_and_obeys_umask(tmp_path):
    real, link = tmp_path / "real.txt", tmp_path / "link.txt"
    link.symlink_to(real)
    mask = os.umask(0o027)
    try:
        with replacing(link) as temporary:
            assert temporary.suffix == ".txt"
            temporary.write_text("new")
    finally:
        os.umask(mask)
    assert link.is_symlink()
    assert real.read_text() == "new"
    assert real.stat().st_mode & 0o777 == 0o640


# --- folding --------------------------------------------------------------------------------------------------------


def folded(model, images):
    traced = compat.unguarded(torch.export.export(model.eval(), (images,)))
    return traced, fold_batch_norm(traced)


def test_fold_is_right_for_extreme_statistics():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=True), nn.BatchNorm2d(4, eps=1e-3))
    with torch.no_grad():
        model[1].running_var.copy_(torch.tensor([1e-40, 1e-3, 1.0, 1e12]))
        model[1].running_mean.copy_(torch.tensor([1e3, 0.0, -1e3, 1.0]))
        model[1].weight.copy_(torch.tensor([0.0, -2.0, 1e-3, 1e3]))
        model[1].bias.uniform_(-1, 1)
    images = torch.randn(2, 3, 8, 8)
    traced, count = folded(model, images)
    assert count == 1
    assert not any("batch_norm" in str(node.target) for node in traced.graph.nodes)
    expected = copy.deepcopy(model).double()(images.double())
    torch.testing.assert_close(traced(images).double(), expected, rtol=1e-5, atol=1e-5)


def test_fold_keeps_shared_weights_apart():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)
            self.bn1, self.bn2, self.bn3 = (nn.BatchNorm2d(3) for _ in range(3))
            randomise_batch_norm(self, 0)
            self.bn2.running_mean.add_(3)

        def forward(self, x):
            y = self.conv(self.bn1(self.conv(x)))
            return self.bn2(y) + self.bn3(y)

    model, images = Shared(), torch.randn(2, 3, 8, 8)
    traced, count = folded(model, images)
    assert count == 1  # the second convolution's result goes to two batch norms
    torch.testing.assert_close(traced(images), model.eval()(images), rtol=1e-5, atol=1e-5)


def test_batch_statistics_are_not_folded():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False))
    images = torch.randn(2, 3, 8, 8)
    traced, count = folded(model, images)
    assert count == 0
    torch.testing.assert_close(traced(images), model(images))


def test_thaw_keeps_eps_and_values():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), FrozenBatchNorm2d(4, eps=0.1))
    model[1].running_var.uniform_(1e-3, 2)
    model[1].weight.uniform_(-1, 1)
    images = torch.randn(2, 3, 8, 8)
    expected = model(images)
    thaw(model)
    assert type(model[1]) is nn.BatchNorm2d
    torch.testing.assert_close(model(images), expected)


# --- verification by itself -----------------------------------------------------------------------------------------


def test_file_of_another_model_is_noticed(basic):
    _, path, _ = basic
    other = small().eval()
    with torch.no_grad():
        other.fc.bias[3] += 1e-3
    with pytest.raises(VerificationError):
        compare(path, other, folded_network(other, (3, 40, 48), dynamic_batch=True), (1, 2))


def test_unreadable_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected an ONNX file"):
        session(tmp_path / "absent.onnx")
    broken = Path(tmp_path / "broken.onnx")
    broken.write_bytes(b"not a protobuf")
    with pytest.raises(ValueError, match=r"broken\.onnx', which ONNX Runtime .* cannot load"):
        session(broken)
