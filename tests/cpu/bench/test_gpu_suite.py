"""``resnet-fast gpu`` on the CPU: it says nothing about a GPU, but must not fail for a silly reason on one."""

import json
import time
from types import SimpleNamespace

import pytest
import torch

from resnet_fast.bench.gpu import parts, peers, report, suite
from resnet_fast.bench.gpu.cases import cases
from resnet_fast.bench.norms import randomise_batch_norm
from resnet_fast.cli import main
from resnet_fast.kernels import onednn
from resnet_fast.kernels.native import inference as native
from resnet_fast.kernels.triton.tuning import cudnn
from resnet_fast.models.named import build
from tests.fake_gpu import on_gpu

pytestmark = pytest.mark.usefixtures("one_thread")


def test_every_check_passes_and_is_reported(tmp_path):
    arguments = ["gpu", "--device", "cpu", "--quick", "--part", "numerics", "--part", "repeats", "--minutes", "5"]
    assert main([*arguments, "--out", str(tmp_path)]) == 0
    content = json.loads((tmp_path / "gpu.json").read_text())
    assert content["passed"] is True
    assert content["gpu"] == {}
    numerics, repeats = content["parts"]
    assert [numerics["status"], repeats["status"]] == ["ok", "ok"]
    names = {case.name for case in cases(quick=True)}
    eight_bits = {"conv_quantised", "conv_quantised: residual"}
    assert {result["case"] for result in numerics["results"]} == names | eight_bits
    assert {result["dtype"] for result in numerics["results"]} == {"float32", "bfloat16", "int8", "fp8"}
    assert {result["case"] for result in repeats["results"]} == names
    page = (tmp_path / "gpu.html").read_text()
    assert "says nothing about a GPU" in page
    assert all(name in page for name in names)


def test_a_wrong_kernel_is_seen(monkeypatch):
    for module in (native, onednn):
        right = module.conv_bn_act
        monkeypatch.setattr(module, "conv_bn_act", lambda *args, right=right: right(*args) * 1.01)
    results = list(parts.numerics("cpu", True))
    wrong = {result["case"] for result in results if not result["passed"]}
    assert {case.name for case in cases(quick=True) if case.name.startswith("conv_bn_act")} <= wrong
    assert not any(name.startswith("global_avg_pool") for name in wrong)


def test_a_race_is_seen(monkeypatch):
    right, calls = torch.ops.resnet_fast.global_avg_pool, []

    def sometimes(x):
        calls.append(x)
        return right(x) + (1e-6 if len(calls) % 7 == 0 else 0.0)

    case = next(case for case in cases(quick=True) if case.name.startswith("global_avg_pool"))
    case = case._replace(ours=lambda x: [sometimes(x)])
    monkeypatch.setattr(parts, "cases", lambda quick: [case])
    (result,) = parts.repeats("cpu", True)
    assert result["passed"] is False
    assert result["different"] == len(range(7, parts.REPEATS + 2, 7))


def test_a_case_that_raises_does_not_stop_the_others(monkeypatch):
    def broken(*args):
        raise RuntimeError("an illegal memory access was encountered")

    first, second = list(cases(quick=True))[-2:]
    monkeypatch.setattr(parts, "cases", lambda quick: [first._replace(ours=broken), second])
    results = list(parts.numerics("cpu", True))
    assert [result["passed"] for result in results[:4]] == [False, False, True, True]
    assert results[0]["reason"] == "RuntimeError: an illegal memory access was encountered"


# --- parts in processes ----------------------------------------------------------------------------------------------


def _process(monkeypatch, program: str) -> None:
    """Parts run this program instead of their own."""
    real = suite.subprocess.Popen

    def start(command, **kwargs):
        return real([command[0], "-c", program, *command[-2:]], **kwargs)

    monkeypatch.setattr(suite.subprocess, "Popen", start)


def test_a_process_that_dies_leaves_what_it_had_found(monkeypatch):
    _process(
        monkeypatch,
        "import os, sys\n"
        'print(\'{"case": "a", "dtype": "float16", "passed": true}\', flush=True)\n'
        "print('CUDA error: unspecified launch failure', file=sys.stderr, flush=True)\n"
        "os.abort()\n",
    )
    found = suite.run("cpu", 1, only=["numerics"])
    (part,) = found.parts
    assert (part.status, part.reason) == ("crashed", "CUDA error: unspecified launch failure")
    assert part.results == [{"case": "a", "dtype": "float16", "passed": True}]
    assert not found.passed


def test_a_process_that_takes_too_long_is_ended(monkeypatch):
    _process(
        monkeypatch,
        'import time\nprint(\'{"case": "a", "passed": true}\\n{"case": "b\', end=\'\', flush=True)\ntime.sleep(60)\n',
    )
    start = time.perf_counter()
    found = suite.run("cpu", 0.05, only=["repeats"])
    assert time.perf_counter() - start < 30
    assert found.parts[0].status == "out of time"
    assert found.parts[0].results == [{"case": "a", "passed": True}]  # the line that was cut off is not guessed at
    assert not found.passed


def test_no_checks_is_no_pass(monkeypatch):
    _process(monkeypatch, "")
    assert not suite.run("cpu", 1, only=["numerics"]).passed


def test_numerics_are_compiled_by_many_processes_on_a_gpu(monkeypatch):
    """One of them dies: what it had found counts, and the others' results."""
    monkeypatch.setattr(suite.os, "cpu_count", lambda: 5)
    _process(
        monkeypatch,
        "import json, os, sys\n"
        "print(json.dumps({'case': sys.argv[1:], 'passed': True}), flush=True)\n"
        "if sys.argv[1] == '1': os.abort()\n",
    )
    (part,) = suite.run("cuda", 1, only=["numerics"]).parts
    assert [result["case"] for result in part.results] == [[str(i), "3"] for i in range(3)]
    assert part.status == "crashed"
    monkeypatch.setattr(suite.os, "cpu_count", lambda: 100)
    assert len(suite.run("cuda", 1, only=["numerics"]).parts[0].results) == suite._COMPILERS
    assert len(suite.run("cuda", 1, only=["repeats"]).parts[0].results) == 1, "which are to run alone"


def test_shares_of_the_numerics_are_all_of_them(monkeypatch):
    monkeypatch.setattr(parts, "_compared", lambda case, name, device: {})
    monkeypatch.setattr(parts, "_eight_bits", lambda *arguments: {"case": "eight bits", "dtype": arguments})

    def found(*share):
        return [(result["case"], result["dtype"]) for result in parts.numerics("cuda", True, *share)]

    assert sorted(map(str, found())) == sorted(map(str, [one for i in range(5) for one in found((i, 5))]))
    assert len({len(found((i, 5))) for i in range(5)}) <= 2


def test_what_is_worth_most_comes_first_and_is_saved_as_soon_as_it_is_found(monkeypatch):
    seen = []

    def save(found):
        seen.append([(part.name, len(part.results)) for part in found.parts])

    monkeypatch.setattr(suite, "Bench", Bench)
    for name in ("prepare", "prepare_training"):
        monkeypatch.setattr(suite, name, lambda *args, **kwargs: None)
    monkeypatch.setattr(suite, "INFERENCE", [suite.Workload("resnet18", n, "float32", 32) for n in (1, 2)])
    _process(monkeypatch, 'print(\'{"case": "a", "layer": "b", "passed": true}\')')
    found = suite.run("cpu", 10, only=["numerics", "inference", "layers"], save=save)
    assert seen[:3] == [[("numerics", 1)], [("numerics", 1), ("inference", 1)], [("numerics", 1), ("inference", 2)]]
    assert seen[-1] == [("numerics", 1), ("inference", 2), ("layers", 1)]
    assert found.seconds > 0
    assert list(suite._SHARES) == ["numerics", "repeats", "inference", "training", "layers", "tuned", "peers"]


# --- whole models -----------------------------------------------------------------------------------------------------


class Bench:
    """Stands in for ``bench.Bench``: says what it is asked."""

    def __init__(self, providers, threads, device):
        self.present = list(providers)
        self.status = "ok"

    def __enter__(self):
        return self

    def __exit__(self, *raised):
        pass

    def measure(self, folder, *, order, progress, patience, rounds, seconds):
        from resnet_fast.bench import Measurement

        time.sleep(0.2)
        return [Measurement(name, name, self.status, rounds_ms=[2.0, 1.0, 3.0]) for name in self.present]


def test_models_are_left_out_when_time_is_short(monkeypatch):
    monkeypatch.setattr(suite, "Bench", Bench)
    monkeypatch.setattr(suite, "prepare", lambda *args, **kwargs: None)
    monkeypatch.setattr(suite, "INFERENCE", [suite.Workload("resnet18", n, "float32", 32) for n in (1, 2, 4)])
    monkeypatch.setattr(suite, "_LAST", 3.0)
    part = suite.run("cpu", 3.5 / 60, only=["inference"]).parts[0]
    assert len(part.results) >= 1  # the most important one, whatever it takes
    assert len(part.results) + len(part.left_out) == 3
    assert part.left_out
    assert part.left_out[-1] == "resnet18, batch 4, float32"


def test_a_whole_model_is_timed_beside_its_peers(tmp_path):
    found = suite.run("cpu", 4, quick=True, only=["inference"])
    (part,) = found.parts
    assert part.status == "ok", part.reason
    by_name = {entry["provider"]: entry for entry in part.results[0]["providers"]}
    assert by_name["ours"]["status"] == by_name["channels_last"]["status"] == "ok"
    assert by_name["graphed"]["reason"] == "runs on cuda, not on cpu"
    assert by_name["tensorrt"]["status"] == "missing"
    assert report.write_report(found, tmp_path)["passed"] is False  # no check was made
    assert "resnet18, batch 2, float32" in (tmp_path / "gpu.html").read_text()


# --- single layers beside their peers ---------------------------------------------------------------------------------


def test_layers_are_timed_beside_their_peers(tmp_path):
    found = suite.run("cpu", 3, quick=True, only=["peers"])
    (part,) = found.parts
    assert (part.status, part.left_out) == ("ok", []), part.reason
    assert [result["layer"] for result in part.results] == [
        "3x3/1 64->64 16x16 +relu, batch 1",
        "3x3/1 64->64 16x16 +residual +relu, batch 1",
    ]
    for result in part.results:
        assert not result["rejected"]
        assert list(result["milliseconds"]) == ["ours", "eager", "torch.compile"]
        assert max(result["errors"].values()) <= parts.WINOGRAD  # the widest that any float32 algorithm here may have
    report.write_report(found, tmp_path)
    page = (tmp_path / "gpu.html").read_text()
    assert "3x3/1 64-&gt;64 16x16 +residual +relu, batch 1" in page
    assert ">torch.compile<" in page


def test_what_was_planned_and_not_reached_is_named(monkeypatch):
    _process(
        monkeypatch,
        "import time\n"
        'print(\'{"planned": ["a", "b", "c"]}\\n{"layer": "a", "milliseconds": {}}\', flush=True)\n'
        "time.sleep(60)\n",
    )
    (part,) = suite.run("cpu", 0.05, only=["peers"]).parts
    assert part.status == "out of time"
    assert part.results == [{"layer": "a", "milliseconds": {}}]
    assert part.left_out == ["b", "c"]


def test_layers_of_a_resnet50():
    found = [place.name() for place in peers.distinct(build("resnet50"), 224)]
    assert len(found) == len(set(found))
    assert {name.split()[0] for name in found} == {"7x7/2", "3x3/1", "3x3/2", "1x1/1", "1x1/2"}
    assert found[0] == "3x3/1 256->256 14x14 +relu"  # in five of the sixteen blocks
    assert [name for name in found if name.startswith("1x1") and "64->256 56x56" in name] == [
        "1x1/1 64->256 56x56 +residual +relu",
        "1x1/1 64->256 56x56",
    ]
    # Every stage: a reduction of its first block and of the others, a 3x3 of stride 2 (but the first) and of stride 1,
    # an expansion and a shortcut.
    assert len(found) == 1 + 4 * 5 + 3


def test_a_peer_that_fails_does_not_stop_the_others(monkeypatch):
    def fails(*args):
        raise RuntimeError("no valid triton configs\nin many lines")

    monkeypatch.setattr(peers, "_compiled", fails)
    model = build("resnet18")
    randomise_batch_norm(model, 0)
    plan, result = peers.compare(model, 32, (1,), torch.float32, "cpu", most=1)
    assert [result["layer"]] == plan["planned"]
    assert result["rejected"] == {"torch.compile": "RuntimeError: no valid triton configs"}
    assert list(result["milliseconds"]) == ["ours", "eager"]
    assert report._ratio(result) == result["milliseconds"]["eager"] / result["milliseconds"]["ours"]
    del result["milliseconds"]["ours"]
    assert report._ratio(result) != report._ratio(result)


@pytest.mark.parametrize("residual", [False, True])
def test_cudnns_fused_op_gets_what_it_wants(residual, monkeypatch):
    def convolution_relu(x, weight, bias, *geometry):
        return torch.relu(torch.nn.functional.conv2d(x, weight, bias, *geometry))

    def convolution_add_relu(x, weight, z, alpha, bias, *geometry):
        return torch.relu(torch.nn.functional.conv2d(x, weight, bias, *geometry) + alpha * z)

    monkeypatch.setattr(torch, f"{cudnn.LIBRARY}_convolution_relu", convolution_relu)
    monkeypatch.setattr(torch, f"{cudnn.LIBRARY}_convolution_add_relu", convolution_add_relu)
    torch.manual_seed(0)
    model = build("resnet18")
    randomise_batch_norm(model, 0)
    place = next(place for place in peers.distinct(model, 32) if place.residual)
    x = torch.randn(1, *place.image)
    z = torch.randn(1, *place.image) if residual else None
    with torch.no_grad():
        work = peers._competitors(place.layer, on_gpu(x), z)[cudnn.FUSED]()
        torch.testing.assert_close(work(x, z), place.layer(x, z))


# --- the report and the command ---------------------------------------------------------------------------------------


def test_layers_show_the_fastest_of_both_sides(tmp_path):
    layer = {
        "model": "resnet50",
        "batch": 32,
        "dtype": "float16",
        "shape": "float16 b32 56x56x64",
        "algorithm": "cudnn fused",
        "milliseconds": {"triton 128x64x64": 0.04, "triton 64x64x64": 0.03, "cudnn fused": 0.024},
        "rejected": {},
    }
    unlucky = {**layer, "shape": "nothing ran", "milliseconds": {"cudnn fused": 0.02}}
    part = suite.Part("layers", results=[layer, unlucky])
    found = suite.Suite("cpu", 10, False, [part], 1.0)
    first, second = report._choices(found)
    assert (first["ours"], first["pytorchs"], first["ratio"]) == (0.03, 0.024, pytest.approx(0.8))
    assert second["ours"] != second["ours"]
    report.write_report(found, tmp_path)
    assert "0.0300" in (tmp_path / "gpu.html").read_text()


def test_a_gpu_is_described(monkeypatch):
    properties = SimpleNamespace(
        name="NVIDIA H100", major=9, minor=0, multi_processor_count=132, total_memory=80 * 2**30
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    assert report.gpu("cuda")["capability"] == "9.0"
    assert report.gpu("cuda")["memory_gib"] == 80.0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(capsys, tmp_path):
    assert main(["gpu", "--out", str(tmp_path)]) == 4
    assert "--device cuda needs a GPU" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [(["--device", "tpu"], "'cuda', 'cpu'"), (["--device", "cpu", "--part", "all"], "repeats")],
)
def test_bad_arguments(arguments, expected, capsys, tmp_path):
    assert main(["gpu", *arguments, "--out", str(tmp_path)]) == 2
    assert expected in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
