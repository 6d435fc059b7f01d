"""The benchmark: real workers, short rounds."""

import importlib
import json
import os
import signal
import time
import venv
from pathlib import Path

import numpy
import pytest
import torch
from torch import nn

from resnet_fast.bench import measure, peer_environment, runner, unavailable
from resnet_fast.bench.norms import randomise_batch_norm
from resnet_fast.bench.providers import NAMES, provider
from resnet_fast.bench.runner import Measurement
from resnet_fast.bench.worker import timed_round
from resnet_fast.cli import main
from resnet_fast.models.named import build

QUICK = ["--model", "resnet18", "--size", "32", "--rounds", "2", "--seconds", "0"]

PEERS = Path(__file__).parents[3] / ".venv-peers"


@pytest.fixture(autouse=True)
def peers(monkeypatch):
    """What `make bench-peers` made, unless another one is named."""
    if PEERS.exists() and peer_environment.VARIABLE not in os.environ:
        monkeypatch.setenv(peer_environment.VARIABLE, str(PEERS))


def children() -> list[tuple[int, str]]:
    """Process id and state of the child processes of this one."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == os.getpid():
            found.append((int(path.parent.name), fields[0]))
    return found


def test_every_provider_here_is_right_and_timed_alone():
    """All but torch.compile, which takes a while; while one runs, the others stand still."""
    names = [name for name in NAMES if name != "compile"]
    model = build("resnet18", num_classes=10)
    randomise_batch_norm(model, 0)
    before = {pid for pid, _ in children()}
    states = []

    def watch(text: str) -> None:
        if text.startswith("round"):
            states.append([state for pid, state in children() if pid not in before])

    results = measure(model, torch.randn(2, 3, 32, 32), providers=names, threads=1, rounds=2, seconds=0, progress=watch)
    assert [result.provider for result in results] == names
    for result in results:
        assert result.status == ("missing" if unavailable(result.provider) else "ok"), result.reason
    timed = [result for result in results if result.status == "ok"]
    for result in timed:
        assert result.error is not None
        assert 0 < result.error < 1e-5
        assert len(result.rounds_ms) == 2
        assert result.min_ms <= result.median_ms
        assert result.peak_mib > 20
    assert len(states) == 2 * len(timed)
    assert all(state == ["T"] * len(timed) for state in states)
    assert {pid for pid, _ in children()} <= before


def test_every_round_is_as_long_as_was_asked_for(monkeypatch):
    asked = []
    ask = runner.Worker.ask

    def noted(self, order, *rest):
        asked.append(order)
        return ask(self, order, *rest)

    monkeypatch.setattr(runner.Worker, "ask", noted)
    measure(nn.Linear(12, 4), torch.randn(2, 12), providers=["eager"], threads=1, rounds=1, seconds=0.05)
    assert [order for order in asked if order.startswith("time")] == ["time 0.05"]


def test_a_fast_wrong_answer_is_not_timed():
    first, second = nn.Linear(12, 4), nn.Linear(4, 4)
    with torch.no_grad():
        first.bias.fill_(1e6)  # float32 loses what is added to it
        second.weight.copy_(torch.eye(4))
        second.bias.fill_(-1e6)
    model = nn.Sequential(nn.Flatten(), first, second).eval()
    (result,) = measure(model, torch.randn(2, 3, 2, 2), providers=["eager"], threads=1, rounds=1, seconds=0)
    assert result.status == "inaccurate"
    assert result.error > 1e-4
    assert result.rounds_ms == []
    assert "expected at most 1e-04" in result.reason


def test_one_failure_does_not_stop_the_others(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("RESNET_FAST_IMPLEMENTATION", "nonsense")  # the worker of `ours` dies of it
    arguments = ["bench", *QUICK, "--providers", "ours,eager", "--batch", "1", "--json", str(tmp_path / "b.json")]
    assert main(arguments) == 1
    ours, eager = json.loads((tmp_path / "b.json").read_text())["workloads"][0]["providers"]
    assert ours["status"] == "failed"
    assert "RESNET_FAST_IMPLEMENTATION is 'nonsense'" in ours["reason"]
    assert eager["status"] == "ok"
    assert eager["median_ms"] > 0
    assert eager["ratio"] is None


def test_a_worker_that_does_not_answer_is_given_up(tmp_path):
    """While it still reads its provider."""
    worker = runner.Worker("eager", tmp_path, 1)
    with pytest.raises(runner.WorkerError, match="no answer within 0 s"):
        worker.ask("load nothing", 0.01)
    worker.kill()
    assert worker._process.returncode == -signal.SIGKILL


def test_missing_peer_is_shown_with_its_reason(monkeypatch, capsys):
    import sys

    monkeypatch.setitem(sys.modules, "openvino", None)
    assert main(["bench", *QUICK, "--providers", "eager,openvino", "--batch", "1", "--batch", "2", "--json", "-"]) == 0
    output = capsys.readouterr()
    data = json.loads(output.out)
    assert [workload["batch"] for workload in data["workloads"]] == [1, 2]
    for workload in data["workloads"]:
        eager, openvino = workload["providers"]
        assert eager["status"] == "ok"
        assert openvino["status"] == "missing"
        assert openvino["reason"] == "openvino is not installed: pip install 'resnet-fast[openvino]'"
    assert {"cpu", "cores", "isa", "packages"} <= set(data["machine"])
    assert "openvino is not installed" in output.err


def test_compile_without_a_compiler_is_missing(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert unavailable("compile") == "needs a C++ compiler, no-such-compiler is not there"


@pytest.mark.parametrize("name", ["ncnn", "MNN"])
@pytest.mark.parametrize("batch", [1, 3])
def test_peer_of_another_environment_is_right(name, batch):
    if reason := unavailable(name):
        pytest.skip(reason)
    model = build("resnet18", num_classes=10)
    randomise_batch_norm(model, 0)
    (result,) = measure(model, torch.randn(batch, 3, 48, 32), providers=[name], threads=1, rounds=1, seconds=0)
    assert result.status == "ok", result.reason
    assert result.error < 1e-5


@pytest.mark.parametrize("name", ["ncnn", "MNN"])
def test_peer_without_its_environment_is_missing(name, monkeypatch, tmp_path):
    reason = f"{name} is not installed: make bench-peers, and name the environment it makes in RESNET_FAST_PEERS"
    monkeypatch.delenv(peer_environment.VARIABLE, raising=False)
    assert unavailable(name) == reason
    monkeypatch.setenv(peer_environment.VARIABLE, str(tmp_path / "nowhere"))
    assert unavailable(name) == reason
    venv.create(tmp_path / "empty")
    monkeypatch.setenv(peer_environment.VARIABLE, str(tmp_path / "empty"))
    assert unavailable(name) == reason
    (result,) = measure(nn.Identity(), torch.zeros(1, 1), providers=[name], threads=1)
    assert (result.status, result.reason) == ("missing", reason)


def test_peer_of_another_environment_finds_neither_programs_nor_this_one(monkeypatch, tmp_path):
    """A converter like MNN's, that would run the `pip` on PATH, says what it sees."""
    venv.create(tmp_path / "env")
    packages = next((tmp_path / "env").glob("lib/python*/site-packages"))
    (packages / "numpy").symlink_to(Path(numpy.__file__).parent)
    (packages / "mnn-3.0.dist-info").mkdir()
    (packages / "mnn-3.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: MNN\nVersion: 3.0\n")
    (packages / "_tools.py").write_text(
        "import os, shutil, sys\n"
        "from importlib.util import find_spec\n"
        "seen = shutil.which('pip'), os.system('pip') >> 8, find_spec('torch'), find_spec('resnet_fast'), sys.prefix\n"
        "raise RuntimeError(repr(seen))\n"
    )
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "pip").write_text(f"#!/bin/sh\ntouch {tmp_path}/pip-ran\n")
    (programs / "pip").chmod(0o755)
    monkeypatch.setenv("PATH", str(programs), prepend=os.pathsep)
    monkeypatch.setenv("PYTHONPATH", str(Path(torch.__file__).parents[1]))
    monkeypatch.setenv(peer_environment.VARIABLE, str(tmp_path / "env"))
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 4)).eval()
    (result,) = measure(model, torch.randn(1, 3, 2, 2), providers=["MNN"], threads=1)
    command_not_found = 127
    assert result.status == "failed"
    assert result.reason == f"RuntimeError: {(None, command_not_found, None, None, str(tmp_path / 'env'))!r}"
    assert not (tmp_path / "pip-ran").exists()


@pytest.mark.parametrize("name", NAMES)
def test_providers_keep_to_the_protocol(name):
    assert provider(name).title
    assert callable(importlib.import_module(f"resnet_fast.bench.providers.{name}").load)


def test_a_provider_is_what_its_module_says_and_the_defaults():
    ncnn = provider("ncnn")
    assert (ncnn.title, ncnn.needs, ncnn.onnx, ncnn.apart) == ("ncnn, image by image", "ncnn", True, True)
    assert (ncnn.devices, ncnn.unavailable()) == (("cpu",), None)
    assert (provider("eager").needs, provider("eager").devices) == (None, ("cpu", "cuda"))


def test_ratio_is_theirs_over_ours():
    ours = Measurement("ours", "", "ok", rounds_ms=[2.0, 4.0, 3.0])
    peer = Measurement("eager", "", "ok", rounds_ms=[9.0, 5.0, 6.0])
    assert peer.as_dict(ours)["ratio"] == 2.0
    assert peer.as_dict(ours)["min_ms"] == 5.0
    assert ours.as_dict(ours)["ratio"] == 1.0


def test_rounds_last_as_long_as_asked():
    calls = []
    start = time.perf_counter()
    times = timed_round(lambda: calls.append(time.sleep(0.01)), 0.2)
    assert 0.25 <= time.perf_counter() - start < 2
    assert len(calls) > len(times) >= 3
    assert min(times) >= 0.01
