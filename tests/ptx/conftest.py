"""This lane executes the PTX of the Triton kernels on a CPU: ``python -m pytest tests/ptx [--all]``.

What is checked, and how exactly, is what the interpreter's lane checks of the kernels' source: most tests are its own.
Triton compiles here, so the lane needs a process without TRITON_INTERPRET=1.
"""

import os

import pytest

if os.environ.get("TRITON_INTERPRET") == "1":
    raise pytest.UsageError("tests/ptx compiles; it needs a process without TRITON_INTERPRET=1")

import torch

from resnet_fast.utils import compat
from tests.ptx import launching

torch.set_num_threads(1)  # the cases are small; more threads only wait for each other

_EACH = 7  # of the cases, without --all; it shares no factor with the number of dtypes, so that all of them come


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without --all, every test that is no machine's own has only some of its cases."""
    if config.getoption("--all"):
        return
    seen: dict[str, int] = {}
    kept = []
    for one in items:
        ours = "tests/ptx/" in one.nodeid and one.get_closest_marker("every") is None
        name = one.nodeid.partition("[")[0]
        at = seen[name] = seen.get(name, -1) + 1
        if not ours or at % _EACH == len(seen) % min(_EACH, 3):
            kept.append(one)
    config.hook.pytest_deselected(items=[one for one in items if one not in kept])
    items[:] = kept


@pytest.fixture(autouse=True)
def _executed():
    torch.manual_seed(0)
    with launching.executed("sm_80"), compat.float32_in_tf32(False):
        yield


# What the interpreter's tests ask for: its guards, which the machine has of its own, and other tiles than the chosen
# ones, which this lane is about.
@pytest.fixture
def guarded() -> None:
    pass


@pytest.fixture
def tile() -> None:
    pass


@pytest.fixture
def small() -> None:
    pass

