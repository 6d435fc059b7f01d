"""``resnet-fast finetune`` in processes of its own: interrupted at some moment, and several at once."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch

from resnet_fast.cli import main
from tests.cpu.finetune.finetune_data import TINY, write_folder

pytestmark = pytest.mark.usefixtures("one_thread")

ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "PYTHONPATH")}


def losses(folder):
    entries = json.loads((folder / "metrics.json").read_text())
    return [(entry["epoch"], entry["train_loss"], entry["val_loss"]) for entry in entries]


# --- signals ------------------------------------------------------------------------------------------------------

RECIPE = [*TINY, "--epochs", "3", "--log-interval", "1"]

# A run that is sent a signal, with its workers, as a terminal does, in the middle of its second epoch.
PROGRAM = """
import logging, os, signal, sys
from resnet_fast.cli import main

signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run as a shell's background job

class Signal(logging.Handler):
    def emit(self, record):
        if record.getMessage().startswith("epoch 2/3  batch 3/6"):
            os.killpg(0, int(sys.argv[1]))

logging.getLogger("resnet_fast.finetune").addHandler(Signal())
sys.exit(main(["finetune", *sys.argv[2:]]))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(write_folder(tmp_path_factory.mktemp("images"), 60))


@pytest.fixture(scope="module")
def uninterrupted(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    assert main(["finetune", folder, *RECIPE, "--output", str(out)]) == 0
    return losses(out)


@pytest.mark.parametrize(
    ("number", "workers", "code"),
    [(signal.SIGINT, 1, 130), (signal.SIGTERM, 0, 143), (signal.SIGKILL, 1, -9)],
    ids=["int", "term", "kill"],
)
def test_interrupted_run_keeps_its_complete_epochs(number, workers, code, folder, uninterrupted, tmp_path):
    last = tmp_path / "last.pt"
    command = [sys.executable, "-c", PROGRAM, str(int(number)), folder, *RECIPE]
    command += ["--workers", str(workers), "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, start_new_session=True, timeout=300)
    assert done.returncode == code, done.stderr[-3000:]
    assert done.stdout == ""
    if number != signal.SIGKILL:
        assert done.stderr.strip().splitlines()[-1] == f"interrupted; --resume {last} goes on after epoch 1"
        assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == [".lock"]
    assert torch.load(last, weights_only=True)["epoch"] == 1
    assert main(["finetune", folder, "--resume", str(last)]) == 0
    assert losses(tmp_path) == uninterrupted


# --- several processes --------------------------------------------------------------------------------------------


def test_two_processes_learn_what_one_does_from_the_joined_batch(tmp_path):
    write_folder(tmp_path / "data" / "train", 64)
    write_folder(tmp_path / "data" / "val", 31)
    broken = sorted((tmp_path / "data" / "val").rglob("*.png"))[4]
    broken.write_bytes(b"")
    recipe = [
        str(tmp_path / "data"),
        *TINY,
        "--epochs",
        "2",
        "--opt",
        "sgd",
        "--lr",
        "0.02",
        "--auto-augment",
        "ta_wide",
    ]
    recipe += ["--model-ema", "--grad-accum-steps", "2", "--sync-bn"]
    assert main(["finetune", *recipe, "--batch-size", "16", "--output", str(tmp_path / "one")]) == 0
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "-m", "resnet_fast.finetune", *recipe, "--batch-size", "8", "--output", str(tmp_path / "two")]
    done = subprocess.run([*command, "--json", "-"], capture_output=True, text=True, env=ENVIRONMENT, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout)["epochs"] == 2  # once, so from one process
    assert done.stderr.count("train loss") == 2
    assert done.stderr.count(f"skipped {broken}: ") == 1

    one, two = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("one", "two"))
    for alone, joined in zip(one, two, strict=True):
        assert joined["val_skipped"] == alone["val_skipped"] == 1
        for name in ("lr", "train_loss", "val_loss", "ema_loss", "val_accuracy"):
            assert joined[name] == pytest.approx(alone[name], rel=1e-3), name
    states = [torch.load(tmp_path / name / "last.pt", weights_only=True)["model"] for name in ("one", "two")]
    for name, tensor in states[0].items():
        torch.testing.assert_close(states[1][name], tensor, rtol=1e-2, atol=1e-3, msg=name)
