"""Every test here needs NVIDIA Triton Inference Server (``make server``) and a Python with a shared library."""

import pytest

from resnet_fast.export.optional import MissingPackageError
from resnet_fast.serving.server import installation, python_library


def pytest_collection_modifyitems(items):
    try:
        installation()
        python_library()
    except MissingPackageError as error:
        for item in items:
            item.add_marker(pytest.mark.skip(reason=str(error)))
