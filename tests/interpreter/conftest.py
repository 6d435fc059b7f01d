"""This lane runs the Triton kernels in Triton's interpreter, on the CPU.

    TRITON_INTERPRET=1 python -m pytest tests/interpreter

Triton decides at import whether a kernel is compiled or interpreted, so the lane needs a process of its own.
"""

import os

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    raise pytest.UsageError("tests/interpreter needs TRITON_INTERPRET=1 and a process of its own")

import torch

from resnet_fast.kernels.triton import tiles
from tests.interpreter import bfloat16, cases, eight_bits, guard, older

bfloat16.install()
eight_bits.install()
older.install()


torch.set_num_threads(1)  # the cases are small; more threads only wait for each other


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def guarded(monkeypatch):
    """Any access of a kernel outside its operands is an error."""
    guards = guard.Guards()
    guards.install(monkeypatch)
    return guards


@pytest.fixture(params=cases.TILES)
def tile(request, monkeypatch):
    """The test runs once with each of the tiles."""
    forced = cases.TILES[request.param]
    if forced is not None:
        monkeypatch.setattr(tiles, "pick", lambda *problem: forced)
