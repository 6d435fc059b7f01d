"""Servers that end: in good order, by SIGKILL, and while they start; and the commands, as a user types them."""

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from tritonclient.utils import InferenceServerException

from resnet_fast.finetune.digits import digits
from resnet_fast.models.named import build
from resnet_fast.serving.server import VARIABLE, Server
from resnet_fast.verify import WINOGRAD
from tests.serving import served
from tests.serving.served import NET, PLAIN, PROTOCOLS, ask, assert_right

ROOT = Path(__file__).parents[2]


def model_processes(server):
    """The processes that the server started for its Python models."""
    found = subprocess.run(
        ["ps", "-o", "pid=,args=", "--ppid", str(server.process.pid)], capture_output=True, text=True
    )
    return [int(line.split()[0]) for line in found.stdout.splitlines() if "triton_python_backend_stub" in line]


def ends_within(seconds, pid):
    end = time.monotonic() + seconds
    while Path(f"/proc/{pid}").exists() and time.monotonic() < end:
        time.sleep(0.1)
    return not Path(f"/proc/{pid}").exists()


def test_killed_and_started_again(repository, tmp_path):
    """By SIGKILL, with requests under way: clients are told at once, nothing is left, and the next one serves."""
    folder, models = repository
    sent = served.images(2)
    first = served.server(folder, tmp_path / "first", models=[PLAIN])
    (process,) = model_processes(first)
    told = threading.Event()

    def keep_asking():
        try:
            while True:
                ask("http", first.http, PLAIN, sent.numpy())
        except Exception:  # the client's own classes, of no common base
            told.set()

    client = threading.Thread(target=keep_asking, daemon=True)
    client.start()
    time.sleep(0.3)
    os.kill(first.process.pid, signal.SIGKILL)
    assert first.process.wait(30) == -signal.SIGKILL
    assert told.wait(30)
    assert not first.ready()
    assert list(Path("/dev/shm").glob(f"{first._shared}*"))
    first.kill()
    assert ends_within(30, process)
    assert not list(Path("/dev/shm").glob(f"{first._shared}*"))

    places = {"http": first.http, "grpc": first.grpc, "metrics": first.metrics}
    ports = {f"{name}_port": int(place.rpartition(":")[2]) for name, place in places.items()}
    with Server(folder, models=[PLAIN], log=tmp_path / "second", **ports) as second:
        second.wait(180)
        assert_right(models[PLAIN], sent, ask("http", second.http, PLAIN, sent.numpy()))

        # Stopped in good order, it answers what it has accepted.
        answers = []

        def keep_on():
            with contextlib.suppress(Exception):
                while True:
                    answers.append(ask("http", second.http, PLAIN, sent.numpy()))

        asking = [threading.Thread(target=keep_on, daemon=True) for _ in range(4)]
        for thread in asking:
            thread.start()
        end = time.monotonic() + 30
        while len(answers) < 8 and time.monotonic() < end:
            time.sleep(0.001)
        assert second.stop() == 0
        for thread in asking:
            thread.join(30)
        for answer in answers:
            assert_right(models[PLAIN], sent, answer)
    assert len(answers) >= 8
    assert not list(Path("/dev/shm").glob(f"{second._shared}*"))


def test_a_killed_model_process(repository, tmp_path):
    """Without it, the model refuses within seconds, the other one goes on; loaded again, it serves again."""
    folder, models = repository
    sent = served.images(4)
    with served.server(folder, tmp_path / "log", models=[NET, PLAIN]) as server:
        client = PROTOCOLS["http"].InferenceServerClient(server.http)
        both = model_processes(server)
        assert len(both) == 2
        (process,) = (pid for pid in both if f"/{PLAIN}/" in Path(f"/proc/{pid}/cmdline").read_text())
        os.kill(process, signal.SIGKILL)
        start = time.monotonic()
        with pytest.raises(InferenceServerException, match="not healthy"):
            ask("http", server.http, PLAIN, sent.numpy())
        assert time.monotonic() - start < 15
        assert_right(models[NET], sent, ask("http", server.http, NET, sent.numpy()))
        client.unload_model(PLAIN)
        client.load_model(PLAIN)
        client.close()
        assert_right(models[PLAIN], sent, ask("http", server.http, PLAIN, sent.numpy()))


def test_a_model_that_cannot_be_loaded(repository, tmp_path):
    """The server ends, and its own reason is told."""
    folder, _ = repository
    weights = folder / NET / "1" / "weights.pt"
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2])
    try:
        with pytest.raises(RuntimeError, match=r"the server ended with code 1: .*(not loaded|failed)"):
            served.server(folder, tmp_path / "log", models=[NET])
        assert "weights.pt' is not loaded: it is no checkpoint" in (tmp_path / "log").read_text()
    finally:
        weights.write_bytes(content)


def test_models_that_are_not_there(repository, tmp_path):
    with pytest.raises(FileNotFoundError, match="models has 'nett', but no folder in the repository is called so"):
        Server(repository[0], models=["nett"])
    with pytest.raises(FileNotFoundError, match="models has 'net_onnx', but no backend for it is not installed"):
        Server(repository[0], models=[f"{NET}_onnx"])
    with pytest.raises(FileNotFoundError, match="expected a folder with models in it"):
        Server(tmp_path)


# --- the commands -----------------------------------------------------------------------------------------------------


def block(language, page):
    """The first block of ``language``, line by line, without the remarks."""
    text = re.search(rf"```{language}\n(.*?)```", page, re.DOTALL)[1]
    return [line.partition("  #")[0].rstrip() for line in text.splitlines() if line.strip()]


@pytest.fixture
def command(tmp_path):
    """Runs a line as a shell in an empty folder would; what follows is for ``subprocess.Popen``."""
    # The Python of the server's backend ignores PYTHONPATH, but not the folder that it is started in.
    (tmp_path / "resnet_fast").symlink_to(ROOT / "resnet_fast")
    environment = {**os.environ, VARIABLE: os.path.abspath(os.environ.get(VARIABLE, ".venv-server"))}

    def run(line, *more, **settings):
        program, *arguments = shlex.split(line)
        assert program == "resnet-fast"
        full = [sys.executable, "-m", "resnet_fast.cli", *arguments, *more]
        return subprocess.Popen(full, cwd=tmp_path, env=environment, text=True, **settings)

    return run


def test_the_six_lines(command, tmp_path):
    """From a checkpoint to an answer as docs/serving.md has it, but for the ports."""
    page = (ROOT / "docs/serving.md").read_text()
    install, export, serve = block("sh", page)
    client = block("python", page)
    assert len(client) == 3
    assert install == "make server"  # which this lane does first
    assert command("resnet-fast finetune digits --epochs 1").wait(300) == 0
    assert command(export).wait(300) == 0
    http, grpc, metrics = served.free_ports()
    ports = ["--http-port", http, "--grpc-port", grpc, "--metrics-port", metrics]
    with (tmp_path / "log").open("w") as log:
        running = command(serve, *map(str, ports), stdout=log, stderr=log)
    try:
        end = time.monotonic() + 180
        while "ready: digits at" not in (said := (tmp_path / "log").read_text()):
            assert running.poll() is None, said
            assert time.monotonic() < end, said
            time.sleep(0.1)
        assert "digits_onnx is left out: this server lacks its backend" in said
        program = "\n".join(client).replace("localhost:8000", f"localhost:{http}")
        printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
        assert printed.returncode == 0, printed.stderr
        model = build("resnet18", weights=str(tmp_path / "runs/finetune/best.pt"), num_classes=10)
        with torch.inference_mode():
            expected = model(torch.zeros(1, 3, 32, 32))[0]
        numbers = [float(number) for number in printed.stdout.strip("[] \n").split()]
        # NumPy prints eight digits.
        assert numbers == pytest.approx(expected.tolist(), rel=1e-6, abs=WINOGRAD * expected.abs().max().item())

        images = digits(0).test_images[:4]
        found = ask("http", f"127.0.0.1:{http}", "digits", images.numpy(), class_count=1)
        with torch.inference_mode():
            best = model(images).argmax(1).tolist()
        assert [text[0].decode().split(":")[1:] for text in found] == [[str(label), str(label)] for label in best]

        url, json_file = f"127.0.0.1:{http}", tmp_path / "load.json"
        line = f"resnet-fast loadtest {url} digits --concurrency 1 --concurrency 3 --seconds 1 --json {json_file}"
        assert command(line).wait(120) == 0
        levels = json.loads(json_file.read_text())["levels"]
        assert [level["concurrency"] for level in levels] == [1, 3]
        assert all(level["requests"] and not level["failed"] for level in levels)
    finally:
        running.terminate()
        assert running.wait(60) == 0
    assert "stopping" in (tmp_path / "log").read_text()


def test_serve_ends_with_its_server(command, repository, tmp_path):
    """And says so, with the exit code of an error."""
    http, grpc, metrics = served.free_ports()
    line = f"resnet-fast serve {repository[0]} --model {PLAIN} --http-port {http} --grpc-port {grpc}"
    with (tmp_path / "log").open("w") as log:
        running = command(line, "--metrics-port", str(metrics), stdout=log, stderr=log)
    end = time.monotonic() + 180
    while "ready: plain" not in (tmp_path / "log").read_text() and time.monotonic() < end:
        time.sleep(0.1)
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(running.pid)], capture_output=True, text=True)
    (server,) = map(int, found.stdout.split())
    os.kill(server, signal.SIGKILL)
    assert running.wait(60) == 1
    assert "error: the server ended with code -9" in (tmp_path / "log").read_text()
