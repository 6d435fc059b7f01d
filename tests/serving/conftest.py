"""Every test here needs NVIDIA Triton Inference Server (``make server``) and a Python with a shared library."""

import pytest

from resnet_fast.serving.server import installation, python_library
from resnet_fast.utils.optional import MissingPackageError
from tests.serving import served


def pytest_collection_modifyitems(items):
    try:
        installation()
        python_library()
    except MissingPackageError as error:
        for item in items:
            item.add_marker(pytest.mark.skip(reason=str(error)))


@pytest.fixture(scope="session")
def repository(tmp_path_factory):
    """Its folder, and the models in it by name. A test that changes a file there puts it back."""
    folder = tmp_path_factory.mktemp("serving") / "models"
    return folder, served.write(folder)
