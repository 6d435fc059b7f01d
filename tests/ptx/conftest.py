"""This lane executes the PTX of the Triton kernels on a CPU: ``python -m pytest tests/ptx [--all]``.

What is checked, and how exactly, is what the interpreter's lane checks of the kernels' source: most tests are its own.
Triton compiles here, so the lane needs a process without TRITON_INTERPRET=1.
"""

import os

import pytest

if os.environ.get("TRITON_INTERPRET") == "1":
    raise pytest.UsageError("tests/ptx compiles; it needs a process without TRITON_INTERPRET=1")

import torch

from resnet_fast.kernels.contract import Affine
from resnet_fast.kernels.reference import training as reference
from resnet_fast.utils import compat
from tests.interpreter import checking
from tests.interpreter import test_triton_chain as chain
from tests.interpreter import test_triton_ops as ops
from tests.interpreter import test_triton_small_maps as small_maps
from tests.interpreter import test_triton_training_backward as training_backward
from tests.interpreter import test_triton_training_forward as training_forward
from tests.ptx import launching

torch.set_num_threads(1)  # the cases are small; more threads only wait for each other

_EACH = 17  # of the cases, without --all; it shares no factor with the number of dtypes, so that all of them come


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without --all, a test that is none of the machine itself has only some of its cases for each architecture."""
    if config.getoption("--all"):
        return
    seen: dict[str, int] = {}
    kept = []
    for one in items:
        ours = "tests/ptx/" in one.nodeid and one.get_closest_marker("every") is None
        name = one.nodeid.partition("[")[0] + ("sm_90" if "sm_90" in one.nodeid else "")
        at = seen[name] = seen.get(name, -1) + 1
        if not ours or at % _EACH == 0:
            kept.append(one)
    config.hook.pytest_deselected(items=[one for one in items if one not in kept])
    items[:] = kept


ARCHITECTURES = ("sm_80", "sm_90")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every test that executes a kernel of ours does so as each architecture has it; a file may name fewer."""
    marks = {one.name for one in metafunc.definition.iter_markers()}
    if "every" not in marks and "chosen" not in metafunc.fixturenames:
        metafunc.parametrize("architecture", getattr(metafunc.module, "ARCHITECTURES", ARCHITECTURES))


@pytest.fixture
def architecture(request) -> str:
    """Whose code is executed: that of the test's layer, where it has one."""
    chosen = getattr(request.node, "callspec", None)
    return getattr(chosen and chosen.params.get("chosen"), "architecture", "sm_80")


@pytest.fixture(autouse=True)
def _executed(monkeypatch, architecture):
    torch.manual_seed(0)
    monkeypatch.setattr(reference, "_apply", _apply_rounding_once)
    for module in (chain, ops, small_maps, training_forward, training_backward):
        monkeypatch.setattr(module, "assert_as_good_as_pytorch", _as_good_as_pytorch)
    with launching.executed(architecture), compat.float32_in_tf32(False):
        yield


def _apply_rounding_once(x: torch.Tensor, affine: Affine) -> torch.Tensor:
    """A prologue's ``x * scale + shift``: the definition rounds the product, what was compiled does not."""
    scale, shift = (one.double().view(1, -1, 1, 1) for one in affine)
    return (x.double() * scale + shift).to(affine.scale.dtype)


def _as_good_as_pytorch(actual, pytorch, exact, roundings: int = 1) -> None:
    """float32 is left to the bound that follows from its number of terms: tests have compared with that before.

    Against PyTorch it loses here: a GPU adds up term by term, PyTorch's libraries for CPUs in blocks.
    """
    if actual.dtype != torch.float32:
        checking.assert_as_good_as_pytorch(actual, pytorch, exact, roundings)


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
