"""The examples run as a user runs them; each ends with an error unless blocks are trained fused and the loss falls."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
LINE = "resnet_fast.accelerate("


def _run(*command: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(EXAMPLES.parent)}
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment, timeout=600)


@pytest.mark.parametrize(("name", "steps"), [("timm", 9), ("lightning", 18), ("accelerate", 12), ("faster_rcnn", 5)])
def test_runs_and_learns(name, steps):
    result = _run(str(EXAMPLES / f"finetune_{name}.py"), "--steps", str(steps))
    assert result.returncode == 0, result.stdout + result.stderr
    assert "blocks that ran fused" in result.stdout


def test_recipe_of_torchvision_in_two_processes():
    script = str(EXAMPLES / "finetune_torchvision_reference.py")
    result = _run("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", script, "--steps=9")
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("blocks that ran fused") == 2


def test_notices_that_nothing_runs_fused(tmp_path):
    """The same without the one line."""
    lines = (EXAMPLES / "finetune_timm.py").read_text().splitlines(keepends=True)
    assert sum(LINE in line for line in lines) == 1
    (tmp_path / "common.py").write_text((EXAMPLES / "common.py").read_text())
    script = tmp_path / "stock.py"
    script.write_text("".join(line for line in lines if LINE not in line))
    result = _run(str(script), "--steps", "3")
    assert result.returncode != 0
    assert "no block was trained by the fused ops" in result.stderr


@pytest.mark.parametrize("script", sorted(EXAMPLES.glob("finetune_*.py")), ids=lambda script: script.stem)
def test_is_one_line_away_from_the_stock_loop(script):
    lines = script.read_text().splitlines()
    assert sum("resnet_fast" in line for line in lines) == 2  # the import and the call
    assert sum(LINE in line for line in lines) == 1
