"""The folder of a run: its own while it lasts, whatever it and the classes are called."""

import csv
import json
import os
import signal
import subprocess
import sys
import warnings

import numpy as np
import pytest

from resnet_fast.cli import main
from resnet_fast.cli.console import write_json
from resnet_fast.finetune import Settings, fonts, output_folder, report
from resnet_fast.finetune.arguments import SettingError
from resnet_fast.finetune.fonts import labels_and_fonts
from resnet_fast.finetune.output_folder import claimed
from tests.cpu.finetune.finetune_data import TINY, write_folder
from tests.cpu.finetune.test_finetune_processes import ENVIRONMENT

pytestmark = pytest.mark.usefixtures("one_thread")


# --- one run at a time ------------------------------------------------------------------------------------------------

HOLDER = """
import os, sys, time
from resnet_fast.finetune import Settings
from resnet_fast.finetune.output_folder import claimed

with claimed(Settings(output=sys.argv[1])):
    if "fork" in sys.argv and not os.fork():
        time.sleep(2)  # a worker that has yet to notice
        os._exit(0)
    print("held", flush=True)
    time.sleep(300)
"""


def holder(folder, *more):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder), *more], stdout=subprocess.PIPE, text=True, env=ENVIRONMENT
    )
    assert process.stdout.readline() == "held\n"
    return process


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(output_folder, "_PATIENCE", 0.2)


def test_a_second_run_is_refused_and_removes_nothing(tmp_path, impatient, capsys):
    data = write_folder(tmp_path / "data", 30)
    process = holder(tmp_path / "out")
    try:
        (tmp_path / "out" / ".last.0a1b2c3d.pt").write_bytes(b"being written")
        for more in ([], ["--overwrite"]):
            assert main(["finetune", str(data), *TINY, "--output", str(tmp_path / "out"), *more]) == 2
            assert "where another run writes" in " ".join(capsys.readouterr().err.split())
        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [".last.0a1b2c3d.pt", ".lock"]
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    with claimed(Settings(output=str(tmp_path / "out"))) as folder:
        assert [path.name for path in folder.iterdir()] == [".lock"]


def test_the_workers_of_a_killed_run_are_waited_for(tmp_path):
    process = holder(tmp_path, "fork")
    process.send_signal(signal.SIGKILL)
    process.wait()
    with claimed(Settings(output=str(tmp_path))):
        pass


def test_runs_without_a_folder_each_get_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with claimed(Settings()) as one, claimed(Settings()) as other:
        assert [one.name, other.name] == ["finetune", "finetune-2"]


def test_what_killed_runs_left_is_removed_and_nothing_else(tmp_path):
    left = [".curves.00112233.png", ".metrics.0011aaff.csv", ".best.00112233.pt", ".results.00112233.json"]
    kept = [".notes.00112233.png", ".notes.0011223.png", "x.00112233.png", ".gitignore"]
    for name in (*left, *kept):
        (tmp_path / name).touch()
    with claimed(Settings(output=str(tmp_path))):
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*kept, ".lock"])


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    claim = claimed(Settings(output=str(tmp_path / "file" / "out")))
    with pytest.raises(SettingError, match=r"--output is '.*file/out', expected a folder that can be written to"):
        claim.__enter__()


# --- odd names --------------------------------------------------------------------------------------------------------

ODD = ("$\\frac$", "[b]", ":cat:", "a,b", "猫", "100%_#")


def test_odd_names_do_not_end_a_finished_run(tmp_path, monkeypatch, capsys):
    data = write_folder(tmp_path / "data", 60, classes=5)
    for folder, name in zip(sorted(data.iterdir()), ODD):
        folder.rename(data / name)
    monkeypatch.chdir(tmp_path)
    out = "my out[/b] :dog:"
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert main(["finetune", str(data), *TINY, "--epochs", "1", "--output", out]) == 0
    said = capsys.readouterr().err
    assert f"everything is in {out}/" in said and ":cat:" in said and "[b]" in said
    assert f"next: resnet-fast export '{out}/best.pt' '{out}/model.onnx'\n" in said
    names = sorted(ODD[:5])
    assert (tmp_path / out / "classes.txt").read_text(encoding="utf-8").splitlines() == names
    with (tmp_path / out / "confusion.csv").open(newline="", encoding="utf-8") as file:
        assert next(csv.reader(file))[1:] == names
    assert (tmp_path / out / "confusion.png").stat().st_size > 5000


def test_the_results_are_written_before_the_pictures(tmp_path, monkeypatch):
    data = write_folder(tmp_path / "data", 30)

    def broken(*_):
        raise RuntimeError("no picture")

    monkeypatch.setattr(report, "_matrix", broken)
    assert main(["finetune", str(data), *TINY, "--epochs", "1", "--output", str(tmp_path / "out")]) == 1
    assert {"results.json", "classes.txt", "confusion.csv"} <= {path.name for path in (tmp_path / "out").iterdir()}


def test_a_name_that_no_font_can_write_has_its_number(tmp_path):
    names = ["dog", "猫", "\U0001f9ff\U000e0041", "$x"]
    labels, families = labels_and_fonts(names)
    assert labels[0] == "dog" and labels[2] == "2" and labels[3] == "$x" and families[0] == "DejaVu Sans"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report.write_confusion(tmp_path, np.eye(4, dtype=int), names)


def test_another_font_is_asked_for_what_the_first_lacks(monkeypatch):
    """As if the first had no letters: another that matplotlib brings has them."""
    asked = fonts._not_in
    monkeypatch.setattr(
        fonts, "_not_in", lambda file, rest: rest if file.endswith("DejaVuSans.ttf") else asked(file, rest)
    )
    labels, families = labels_and_fonts(["dog"])
    assert labels == ["dog"] and len(families) == 2 and families[1] != "DejaVu Sans"


def test_names_that_are_no_utf_8_come_to_json_as_escapes(tmp_path, capsys):
    name = os.fsdecode(b"caf\xe9")
    write_json({"output": name, "loss": float("nan"), "猫": 1}, str(tmp_path / "x.json"))
    assert json.loads((tmp_path / "x.json").read_text(encoding="utf-8")) == {"output": name, "loss": "nan", "猫": 1}
    report.write_json(tmp_path / "y.json", {"output": name})
    assert json.loads((tmp_path / "y.json").read_text(encoding="utf-8")) == {"output": name}
    write_json({"output": name}, "-")
    assert json.loads(capsys.readouterr().out) == {"output": name}


def test_json_goes_to_a_terminal_that_knows_no_chinese():
    code = "from resnet_fast.cli.console import write_json; write_json({'猫': 'é'}, '-')"
    environment = {**ENVIRONMENT, "PYTHONIOENCODING": "latin-1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment, check=True)
    assert json.loads(done.stdout) == {"猫": "é"}
