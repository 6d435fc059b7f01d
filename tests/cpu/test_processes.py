"""DDP in two gloo processes against one process: per-process, frozen and synchronised batch norm, in float64."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torchvision.models import resnet

from tests.cpu.processes import STEPS, freeze_norms, train
from tests.cpu.small_models import relative_error, short_resnet

TOLERANCE = 1e-9
BLOCKS = [resnet.BasicBlock, resnet.Bottleneck]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Of both processes, by case."""
    directory = tmp_path_factory.mktemp("processes")
    root = Path(__file__).parents[2]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launch, "-m", "tests.cpu.processes", str(directory)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    assert "Grad strides do not match" not in result.stderr
    return [torch.load(directory / str(rank)) for rank in (0, 1)]


def _same(result, expected, names=("gradients", "parameters", "buffers")):
    assert relative_error([result[name] for name in names], [expected[name] for name in names]) < TOLERANCE


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("name", ["each its own", "gradients in buckets"])
@pytest.mark.parametrize("rank", [0, 1])
def test_as_stock(found, rank, name, block):
    result = found[rank][f"{name}, {block.__name__}"]
    _same(result, found[rank][f"stock, {block.__name__}"])
    assert result["calls"] == (4 * STEPS, 4 * STEPS)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("rank", [0, 1])
def test_frozen_norms_as_one_process_with_the_joined_batch(found, rank, block):
    result = found[rank][f"frozen, {block.__name__}"]
    _same(result, train(freeze_norms(short_resnet(block))))
    assert result["calls"] == (3 * STEPS, 3 * STEPS)  # the stem is then an op of its own


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("name", ["synchronised", "synchronised, unequal"])
@pytest.mark.parametrize("rank", [0, 1])
def test_synchronised_norms_as_one_process_with_the_joined_batch(found, rank, name, block):
    result = found[rank][f"{name}, {block.__name__}"]
    _same(result, train(short_resnet(block)))
    assert result["calls"] == (4 * STEPS, 4 * STEPS)
