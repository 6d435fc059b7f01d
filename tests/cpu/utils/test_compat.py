"""The names of PyTorch that our code uses are there, in the release and the build that is installed."""

import ast
import ctypes
import types

import pytest
import torch

from resnet_fast import ops, quantised
from resnet_fast.utils import compat
from tests.cpu.test_imports import FILES, ROOT

REGISTERED = ops, quantised  # importing them gives torch.ops.resnet_fast its names


def _chains(tree: ast.AST) -> set[tuple[str, ...]]:
    """``("cuda", "is_available")`` for every ``torch.cuda.is_available``."""
    found = set()
    for node in ast.walk(tree):
        names = []
        while isinstance(node, ast.Attribute):
            names.append(node.attr)
            node = node.value
        if names and isinstance(node, ast.Name) and node.id == "torch":
            found.add(tuple(reversed(names)))
    return found


def _missing(chain: tuple[str, ...]) -> bool:
    """Whether a module or a class on the way lacks the next name; what other objects have is theirs to say."""
    owner = torch
    for name in chain:
        if not isinstance(owner, (types.ModuleType, type)):
            return False
        if not hasattr(owner, name):
            return True
        owner = getattr(owner, name)
    return False


def test_a_missing_name_is_found():
    chains = _chains(ast.parse("torch._C._cuda_getDriverVersion()\ntorch.cuda.Event().record()"))
    assert {chain for chain in chains if _missing(chain)} == {("_C", "_cuda_getDriverVersion")}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_names_exist(path):
    """Those too that only a machine with a GPU would come to."""
    if path.name == "compat.py":
        pytest.skip("asks for the names before it uses them")
    assert not {".".join(chain) for chain in _chains(ast.parse(path.read_text())) if _missing(chain)}


@pytest.mark.skipif(not torch.version.cuda, reason="this PyTorch is built without CUDA")
def test_what_is_asked_of_a_gpu():
    for name in ("name", "multi_processor_count", "gcnArchName"):
        assert hasattr(torch._C._CudaDeviceProperties, name)


def test_cuda_driver(monkeypatch):
    """The function of the driver's library that tells is called as its manual says."""

    class Library:
        def __init__(self, name):
            assert "cuda" in name

        @staticmethod
        def cuDriverGetVersion(version):
            version._obj.value = 13020
            return 0

    monkeypatch.setattr(ctypes, "CDLL", Library)
    compat.cuda_driver.cache_clear()
    assert compat.cuda_driver() == 13020
    compat.cuda_driver.cache_clear()


@pytest.mark.parametrize("wanted", [True, False])
def test_float32_in_tf32(wanted):
    before = compat.convolutions_in_tf32(), compat.products_in_tf32()
    with compat.float32_in_tf32(wanted):
        assert (compat.convolutions_in_tf32(), compat.products_in_tf32()) == (wanted, wanted)
    assert (compat.convolutions_in_tf32(), compat.products_in_tf32()) == before


@pytest.mark.parametrize("question", [compat.has_fused_onednn, compat.onednn_adds_flat])
def test_onednn_is_asked_in_float32_on_the_cpu(question):
    """Whatever the process makes new tensors of when it first asks, for the answer is kept."""
    expected = question()
    try:
        for default in (lambda: torch.set_default_dtype(torch.float64), lambda: torch.set_default_device("meta")):
            question.cache_clear()
            default()
            assert question() == expected
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
        question.cache_clear()
