"""``resnet-fast finetune`` in processes of its own: interrupted at some moment, and several at once."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch

from resnet_fast.cli import main
from tests.cpu.finetune_data import TINY, write_folder

pytestmark = pytest.mark.usefixtures("one_thread")

ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "PYTHONPATH")}


def losses(folder):
    entries = json.loads((folder / "metrics.json").read_text())
    return [(entry["epoch"], entry["train_loss"], entry["val_loss"]) for entry in entries]


# --- signals ------------------------------------------------------------------------------------------------------

EPOCHS = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("images"), 60)


@pytest.fixture(scope="module")
def uninterrupted(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    assert main(["finetune", str(folder), *TINY, "--epochs", str(EPOCHS), "--output", str(out)]) == 0
    return losses(out)


@pytest.mark.parametrize(
    ("number", "workers", "code"),
    [(signal.SIGINT, 1, 130), (signal.SIGTERM, 0, 143), (signal.SIGKILL, 1, -9)],
    ids=["int", "term", "kill"],
)
def test_interrupted_run_keeps_its_complete_epochs(number, workers, code, folder, uninterrupted, tmp_path):
    command = [sys.executable, "-m", "resnet_fast.finetune", str(folder), *TINY, "--epochs", str(EPOCHS)]
    command += ["--log-interval", "1", "--workers", str(workers), "--output", str(tmp_path)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT, start_new_session=True
    )
    said = []
    for line in process.stderr:
        said.append(line)
        if line.startswith(f"epoch 2/{EPOCHS}  batch 2/"):
            break
    os.killpg(process.pid, number)  # as a terminal does
    stdout, rest = process.communicate(timeout=60)
    assert process.returncode == code
    assert stdout == ""
    complete = sum("train loss" in line for line in [*said, *rest.splitlines()])
    assert 1 <= complete < EPOCHS
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]
    assert torch.load(tmp_path / "last.pt", weights_only=True)["epoch"] == complete
    if number != signal.SIGKILL:
        last = rest.strip().splitlines()[-1]
        assert last == f"interrupted; --resume {tmp_path}/last.pt goes on after epoch {complete}"
        assert "Traceback" not in rest
    assert main(["finetune", str(folder), "--resume", str(tmp_path / "last.pt")]) == 0
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
