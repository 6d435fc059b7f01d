"""This lane compiles the Triton kernels for GPUs that are not there: ``python -m pytest tests/aot [--all]``."""

import os

import pytest

if os.environ.get("TRITON_INTERPRET") == "1":
    raise pytest.UsageError("tests/aot compiles; it needs a process without TRITON_INTERPRET=1")


@pytest.fixture(scope="session")
def compile_all(request: pytest.FixtureRequest) -> bool:
    return request.config.getoption("--all")


@pytest.fixture(scope="session")
def compiler():
    from tests.aot.checks import Compiler

    with Compiler() as shared:
        yield shared
