"""The command line, run in this process: exit codes, JSON, and what is said when something is wrong."""

import importlib.metadata
import json
import os
import re
import signal
import subprocess
import sys

import onnx
import pytest
import torch
import torchvision
import typer
from safetensors.torch import save_file

import resnet_fast
from resnet_fast import ops
from resnet_fast.bench.norms import randomise_batch_norm
from resnet_fast.cli import main
from resnet_fast.cli.app import app
from resnet_fast.cli.console import write_json
from resnet_fast.kernels.contract import Case
from resnet_fast.kernels.native import library, planner
from resnet_fast.models.named import build, read_checkpoint
from resnet_fast.utils.optional import EXTRAS
from resnet_fast.verify import WINOGRAD, check_layers

COMMANDS = typer.main.get_command(app).commands
SMALL = ["--size", "64", "--batch", "1"]


def parsed(text):
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


# --- exit codes and messages --------------------------------------------------------------------------------------


def test_console_script_and_module_agree():
    for command in (["resnet-fast"], [sys.executable, "-m", "resnet_fast.cli"]):
        path = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
        done = subprocess.run(
            [*command, "--version"], capture_output=True, text=True, check=True, env={**os.environ, "PATH": path}
        )
        assert done.stdout.strip() == resnet_fast.__version__


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["explain", "resnt50"], "did you mean resnet50"),
        (["verify", "resnet18", "rsnet34"], "did you mean resnet34"),
        (["explain", "timm:resnet50_d"], "timm:resnet50"),
        (["bench", "--providers", "ours,onnxruntim"], "did you mean onnxruntime?"),
        (["demo", "--providers", "tensorrt"], "no provider is called 'tensorrt'"),
        (["export", "resnet18", "m.onnx", "--opset", "17"], "17 is below 18"),
        (["export", "resnet18", "m.onnx", "--mean", "a,b,c"], "expected numbers with commas"),
        (["export", "resnet18", "m.onnx", "--weights", "IMAGENET1K_V9"], "IMAGENET1K_V1"),
        (["verify", "resnet18", "resnet34", "--weights", "DEFAULT"], "fits one model, not 2"),
        (["verfy"], "Did you mean 'verify'?"),
        (["bench", "--rounds", "0"], "--rounds"),
        (["tune", "resnet18", "--device", "cpu", "--dtype", "float16"], "expected float32"),
        (["tune", "resnet18", "--dtype", "int8"], "'int8' is not one of 'float32', 'float16', 'bfloat16'"),
        (["tune", "resnet18", "--device", "tpu"], "'tpu' is not one of 'auto', 'cpu', 'cuda'"),
        (["export", "resnet18", "m.onnx", "--precision", "fp8"], "'fp8' is not one of 'fp32', 'fp16', 'bf16', 'int8'"),
        (["roofline", "resnet18", "--model", "resnet34"], "give one of them"),
    ],
)
def test_usage_errors_exit_with_2(arguments, said, capsys):
    assert main(arguments) == 2
    output = capsys.readouterr()
    assert said in " ".join(output.err.replace("│", " ").split())
    assert output.out == ""


def test_runtime_errors_exit_with_1_and_one_line(capsys, tmp_path):
    assert main(["export", "resnet18", str(tmp_path / "absent" / "m.onnx")]) == 1
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert "does not exist" in said[0]
    assert main(["export", "resnet18", str(tmp_path / "absent" / "m.onnx"), "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_ctrl_c_exits_with_130(monkeypatch, capsys):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("resnet_fast.models.named.build", interrupted)
    assert main(["explain", "resnet18"]) == 130
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("more", [["m.onnx"], ["--triton-repository", "models"]])
def test_sigterm_leaves_nothing_half_written(more, tmp_path, monkeypatch, capsys):
    def terminated(*_):
        os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("it goes on")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("resnet_fast.export.to_onnx.folded", terminated)
    before = signal.getsignal(signal.SIGTERM)
    assert main(["export", "resnet18", *more, "--size", "32"]) == 143
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    "arguments",
    [["finetune", "digits", "--device", "cuda"], ["gpu"], ["tune", "resnet18", "--device", "cuda"]],
    ids=lambda arguments: arguments[0],
)
def test_a_missing_device_exits_with_4(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 4
    assert "--device cuda" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("module", "arguments", "extra"),
    [
        ("timm", ["explain", "timm:test_resnet"], "timm"),
        ("onnxruntime", ["export", "resnet18", "m.onnx"], "onnxruntime"),
        ("skimage", ["demo"], "demo"),
        ("jinja2", ["demo"], "demo"),
        ("safetensors", ["verify", "resnet18", "--weights", "w.safetensors"], "safetensors"),
    ],
)
def test_missing_packages_exit_with_4_and_name_the_extra(module, arguments, extra, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "w.safetensors").write_bytes(b"")
    for name in [name for name in sys.modules if name.partition(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    assert main(arguments) == 4
    assert f"pip install 'resnet-fast[{extra}]'" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["w.safetensors"]


def test_extras_bring_what_they_are_said_to():
    requirements = importlib.metadata.requires("resnet-fast")
    distributions = {
        "sklearn": "scikit-learn",
        "skimage": "scikit-image",
        "onnxruntime": "onnxruntime-gpu",
        "tensorrt_rtx_libs": "tensorrt-rtx-cu13-libs",
        "tensorrt_rtx_bindings": "tensorrt-rtx-cu13-bindings",
    }
    for module, extra in EXTRAS.items():
        name = distributions.get(module, module)
        assert any(re.match(rf"{name}\b.*extra == ['\"]{extra}['\"]", line) for line in requirements), (module, extra)


# --- what all commands have in common ---------------------------------------------------------------------------------

NEEDED = {  # what a command cannot do without
    "explain": ["resnet18"],
    "verify": ["resnet18"],
    "tune": ["resnet18"],
    "traffic": ["resnet18"],
    "finetune": ["digits"],
    "export": ["resnet18", "m.onnx"],
    "serve": ["."],
    "loadtest": ["127.0.0.1:9", "net"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_80_columns(command, monkeypatch, capsys):
    """No option's name is cut, no switch asks for a value, and every option is explained."""
    monkeypatch.setenv("COLUMNS", "80")
    assert main([command, "--help"]) == 0
    text = capsys.readouterr().out
    assert all(len(line) <= 80 for line in text.splitlines())
    words = text.replace(",", " ").split()
    params = COMMANDS[command].params
    assert {name for param in params for name in (*param.opts, *param.secondary_opts) if name[0] == "-"} <= set(words)
    assert all(param.help for param in params)
    assert "<bool>" not in text
    assert {"--json", "--quiet", "--debug"} <= set(words)


def test_help_imports_nothing_that_takes_time():
    program = f"""
import sys
from resnet_fast.cli import main
from resnet_fast.cli.app import app
for arguments in ([], ["--version"], ["verfy"], *([name, "--help"] for name in {list(COMMANDS)})):
    main(arguments)
slow = {{"torch", "torchvision", "numpy", "onnx", "triton", "matplotlib", "timm"}} & set(sys.modules)
assert not slow, slow
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("command", COMMANDS)
def test_where_json_goes_is_checked_before_the_work(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for target, said in (("absent/r.json", "does not exist"), (str(tmp_path), "is a folder")):
        assert main([command, *NEEDED.get(command, []), "--json", target]) == 2
        output = capsys.readouterr()
        assert said in " ".join(output.err.split())
    assert not list(tmp_path.iterdir())


def test_quiet_leaves_errors_and_json(tmp_path, capsys):
    for command in (["explain", "timm:test_resnet"], ["traffic", "resnet18"], ["doctor"]):
        assert main([*command, "--quiet", "--json", str(tmp_path / "r.json")]) == 0
        assert capsys.readouterr() == ("", "")
        assert parsed((tmp_path / "r.json").read_text())
    assert main(["explain", "resnt50", "-q"]) == 2
    assert "did you mean resnet50" in capsys.readouterr().err
    assert main(["explain", "timm:test_resnet"]) == 0  # and the next call speaks again
    assert "convolutions fused" in capsys.readouterr().err


def test_shells_complete_commands(monkeypatch, capsys):
    monkeypatch.setenv("_RESNET_FAST_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "resnet-fast ex")
    monkeypatch.setenv("COMP_CWORD", "1")
    assert main([]) == 0
    assert capsys.readouterr().out.split() == ["explain", "export"]


# --- doctor, explain ----------------------------------------------------------------------------------------------


def test_doctor_says_what_the_dispatcher_does(capsys, monkeypatch):
    assert main(["doctor", "--json", "-"]) == 0
    output = capsys.readouterr()
    data = parsed(output.out)
    assert data["machine"]["packages"]["torch"] == torch.__version__.partition("+")[0]
    assert data["machine"]["cores"] >= 1
    double = [row for row in data["implementations"] if row["dtype"] == "float64"]
    assert {row["served_by"] for row in double} == {"reference"}
    assert all(reason for row in double for reason in row["others"].values())
    monkeypatch.setenv("RESNET_FAST_IMPLEMENTATION", "reference")
    assert main(["doctor", "--json", "-"]) == 0
    assert {row["served_by"] for row in parsed(capsys.readouterr().out)["implementations"]} == {"reference"}


def test_json_to_stdout_is_all_there_is_on_stdout(capsys):
    assert main(["explain", "timm:test_resnet", "--json", "-"]) == 0
    output = capsys.readouterr()
    data = parsed(output.out)
    assert data["model"] == "timm:test_resnet"
    assert {row["status"] for row in data["rows"]} <= {"fused", "partly fused", "stock"}
    assert any(row["status"] == "fused" for row in data["rows"])
    assert data["summary"] in " ".join(output.err.split())


def test_json_file_survives_a_failure(tmp_path):
    target = tmp_path / "result.json"
    target.write_text("old")
    with pytest.raises(TypeError):
        write_json({"not": object()}, str(target))
    assert target.read_text() == "old"
    write_json({"error": float("nan"), "batches": {1: (2.5, float("inf"))}}, str(target))
    assert parsed(target.read_text()) == {"error": "nan", "batches": {"1": [2.5, "inf"]}}
    assert list(tmp_path.iterdir()) == [target]


# --- tune ---------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(library.unavailable() is not None, reason="tunes the native kernels")
def test_tune_says_that_the_machine_is_busy(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("RESNET_FAST_CACHE", str(tmp_path))
    for load, count in ((0.2, 0), (1.7, 1)):
        monkeypatch.setattr("resnet_fast.bench.machine.load", lambda load=load: load)
        monkeypatch.setattr("resnet_fast.tune", _refuse)
        assert main(["tune", "resnet18", "--device", "cpu", "--size", "32"]) == 1
        assert capsys.readouterr().err.count("this machine is busy") == count


def _refuse(*_):
    raise RuntimeError("not now")


def test_tune_measures_and_keeps(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("RESNET_FAST_CACHE", str(tmp_path))
    planner.choices.forget()
    arguments = ["tune", "resnet18", "--size", "32", "--device", "cpu", "--calls", "1", "--threads", "1"]
    try:
        assert main([*arguments, "--json", "-"]) == 0
    finally:
        planner.choices.forget()
        planner.changed()
    output = capsys.readouterr()
    data = parsed(output.out)
    assert (data["model"], data["batch"], data["device"], data["dtype"]) == ("resnet18", 1, "cpu", "float32")
    assert len(data["choices"]) >= 8
    for choice in data["choices"]:
        assert choice["milliseconds"][choice["fastest"]] == min(choice["milliseconds"].values())
    kept = json.loads((tmp_path / "cpu-choices.json").read_text())["machines"]
    assert {choice["convolution"] for choice in data["choices"]} <= set(next(iter(kept.values())))
    assert "cpu-choices.json" in output.err


# --- verify -------------------------------------------------------------------------------------------------------


def test_verify_passes_and_reports_every_block_and_layer(tmp_path, capsys):
    assert main(["verify", "resnet18", *SMALL, "--layers", "--json", str(tmp_path / "v.json")]) == 0
    assert capsys.readouterr().out == ""
    data = parsed((tmp_path / "v.json").read_text())
    checks = data["models"]["resnet18"]
    assert data["passed"]
    assert [check["path"] for check in checks if check["kind"] == "block"] == [
        f"layer{stage}.{block}" for stage in range(1, 5) for block in range(2)
    ]
    layers = {check["path"] for check in checks if check["kind"] == "layer"}
    assert {"conv1", "layer1.0.conv1", "layer2.0.conv1", "layer2.0.downsample.0", "layer4.0.conv2"} <= layers
    assert all(0 < check["error"] <= check["limit"] for check in checks)


def test_verify_notices_a_slightly_wrong_kernel(monkeypatch, tmp_path, capsys):
    name = ops.implementation_for(Case("conv_bn_act", "cpu", torch.float32, 64, 64, (3, 3), (1, 1), (1, 1)))
    implementation = ops.IMPLEMENTATIONS[name]
    right = implementation.conv_bn_act

    def wrong(x, weight, scale, *rest):
        return right(x, weight, scale * 1.0001 if weight.shape[-1] == 3 else scale, *rest)

    monkeypatch.setattr(implementation, "conv_bn_act", wrong)
    assert main(["verify", "resnet18", *SMALL, "--layers", "--json", str(tmp_path / "v.json")]) == 3
    assert "checks failed" in capsys.readouterr().err
    data = parsed((tmp_path / "v.json").read_text())
    assert not data["passed"]
    passed = {check["path"]: check["passed"] for check in data["models"]["resnet18"] if check["kind"] == "layer"}
    assert passed["layer2.0.downsample.0"]  # 1x1
    assert not passed["layer1.0.conv1"]


def test_layers_pair_each_convolution_with_its_own_norm():
    stock = build("resnet18")
    randomise_batch_norm(stock, 1)
    stock.layer1[0].bn1.running_mean.add_(5)  # would be seen if another norm were taken
    checks = list(check_layers(stock, torch.randn(1, 3, 64, 64)))
    assert all(check.passed for check in checks)
    assert len({check.path for check in checks}) == len(checks) >= 11
    if library.unavailable() is None:  # a layer's limit is Winograd's only where Winograd's algorithm serves
        limits = {check.detail.rpartition(" ")[2]: check.limit / check.scale for check in checks}
        assert limits["gemm"] < WINOGRAD / 5 and limits["winograd_stem"] == pytest.approx(WINOGRAD)


# --- weights ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(3)
    return torchvision.models.resnet18(num_classes=5).eval()


def test_export_with_a_checkpoint(network, tmp_path, capsys):
    torch.save(network.state_dict(), tmp_path / "w.pt")
    (tmp_path / "names.txt").write_text("ant\nbee\ncat\ndog\nelk\n")
    arguments = ["export", "resnet18", str(tmp_path / "m.onnx"), "--weights", str(tmp_path / "w.pt"), "--size", "32"]
    assert main([*arguments, "--num-classes", "5", "--classes", str(tmp_path / "names.txt"), "--json", "-"]) == 0
    data = parsed(capsys.readouterr().out)
    assert data["op_counts"]["Conv"] == 20
    assert set(data["max_errors"]) == {"1", "2", "7"}
    file = onnx.load(tmp_path / "m.onnx")
    assert {entry.key: entry.value for entry in file.metadata_props}["classes"] == '["ant", "bee", "cat", "dog", "elk"]'
    bias = next(tensor for tensor in file.graph.initializer if tensor.name == "fc.bias")
    assert onnx.numpy_helper.to_array(bias).tolist() == network.fc.bias.tolist()

    assert main(arguments) == 1  # 1000 classes
    said = capsys.readouterr().err
    assert "its last layer has 5 classes, that of the model 1000" in said


def test_unfitting_checkpoint_is_reported_as_torchvision_does(network, tmp_path, capsys):
    state = network.state_dict()
    state["extra.weight"] = state.pop("bn1.weight")
    torch.save(state, tmp_path / "w.pt")
    assert main(["verify", "resnet18", "--weights", str(tmp_path / "w.pt"), "--num-classes", "5"]) == 1
    said = capsys.readouterr().err
    assert 'Missing key(s) in state_dict: "bn1.weight"' in said
    assert 'Unexpected key(s) in state_dict: "extra.weight"' in said


class Payload:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def test_code_in_a_checkpoint_is_not_run(tmp_path, capsys):
    torch.save({"fc.weight": Payload(tmp_path / "marker")}, tmp_path / "w.pt")
    assert main(["verify", "resnet18", "--weights", str(tmp_path / "w.pt")]) == 1
    assert "is not loaded: it is no checkpoint, or holds Python objects" in capsys.readouterr().err
    assert not (tmp_path / "marker").exists()
    torch.load(tmp_path / "w.pt", weights_only=False)
    assert (tmp_path / "marker").exists()  # so the file would have


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"model": state, "epoch": 3},
        lambda state: {"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}},
    ],
    ids=["plain", "torchvision", "distributed"],
)
def test_usual_checkpoints_are_understood(wrap, network, tmp_path):
    torch.save(wrap(network.state_dict()), tmp_path / "w.pth")
    state = read_checkpoint(tmp_path / "w.pth")
    assert list(state) == list(network.state_dict())
    assert torch.equal(state["fc.weight"], network.fc.weight)


def test_safetensors(network, tmp_path):
    save_file(network.state_dict(), tmp_path / "w.safetensors")
    model = build("resnet18", weights=str(tmp_path / "w.safetensors"), num_classes=5)
    assert all(torch.equal(tensor, network.state_dict()[name]) for name, tensor in model.state_dict().items())
    (tmp_path / "broken.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(RuntimeError, match="is not loaded"):
        read_checkpoint(tmp_path / "broken.safetensors")


@pytest.mark.parametrize("content", [[1, 2], {"epoch": 3}, b"text"])
def test_what_is_no_state_dict(content, tmp_path):
    if isinstance(content, bytes):
        (tmp_path / "w.pt").write_bytes(content)
    else:
        torch.save(content, tmp_path / "w.pt")
    with pytest.raises(RuntimeError, match=r"w\.pt' (holds no state_dict|is not loaded)"):
        read_checkpoint(tmp_path / "w.pt")


def test_same_seed_same_model():
    models = [build("resnet18", seed=seed) for seed in (4, 4, 5)]
    for model in models:
        randomise_batch_norm(model, 4)
    assert torch.equal(models[0].fc.weight, models[1].fc.weight)
    assert torch.equal(models[0].layer1[0].bn1.running_var, models[1].layer1[0].bn1.running_var)
    assert not torch.equal(models[0].fc.weight, models[2].fc.weight)
