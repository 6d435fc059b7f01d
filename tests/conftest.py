"""What holds for every lane."""

import ctypes
import gc
import os
import tempfile

import pytest
import torch

# Choices of algorithms that the user has measured would make the tests see other kernels on every machine.
_cache = tempfile.TemporaryDirectory(prefix="resnet_fast-tests-")
os.environ["RESNET_FAST_CACHE"] = _cache.name


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--all", action="store_true", help="tests/aot, tests/ptx: all that ships, not a few that stand for all"
    )


@pytest.fixture
def one_thread():
    """On a busy machine, two threads cost small shapes a hundred times more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True, scope="module")
def memory_given_back():
    """After each file: kernels/native/memory.py lets glibc keep what is freed, gigabytes after a large batch."""
    yield
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(ctypes.c_size_t(0))
