"""Every test here needs the compiled kernels, and leaves the best instruction set and the threads as they were."""

import pytest
import torch

from resnet_fast.kernels.native import library


def pytest_collection_modifyitems(items):
    reason = library.unavailable()
    for item in items:
        if reason and "works_without" not in item.name:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _variants() -> list[str]:
    return ["none"] if library.unavailable() else library.usable_variants()


@pytest.fixture(params=_variants())
def variant(request):
    """Each instruction set that this CPU runs."""
    before = library.variant()
    library.select(request.param)
    yield request.param
    library.select(before)
