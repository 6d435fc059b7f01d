"""Every test here needs the compiled kernels, and leaves the best instruction set and the threads as they were."""

import pytest

from resnet_fast.kernels import packing
from resnet_fast.kernels.native import library


def pytest_collection_modifyitems(items):
    reason = library.unavailable()
    for item in items:
        if reason and "works_without" not in item.name:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def always_one_thread(one_thread):
    """Unless a test asks for more."""


def _variants() -> list[str]:
    return ["none"] if library.unavailable() else library.usable_variants()


@pytest.fixture(params=_variants())
def variant(request):
    """Each instruction set that this CPU runs."""
    before = library.variant()
    library.select(request.param)
    packing.clear_all()
    yield request.param
    library.select(before)
    packing.clear_all()
