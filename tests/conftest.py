"""What holds for every lane."""

import os
import tempfile

import pytest
import torch

# Choices of algorithms that the user has measured would make the tests see other kernels on every machine.
_cache = tempfile.TemporaryDirectory(prefix="resnet_fast-tests-")
os.environ["RESNET_FAST_CACHE"] = _cache.name


@pytest.fixture
def one_thread():
    """On a busy machine, two threads cost small shapes a hundred times more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
