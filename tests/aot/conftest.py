"""This lane compiles the Triton kernels for GPUs that are not there: ``python -m pytest tests/aot [--all]``."""

import os

import pytest

if os.environ.get("TRITON_INTERPRET") == "1":
    raise pytest.UsageError("tests/aot compiles; it needs a process without TRITON_INTERPRET=1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--all", action="store_true", help="tests/aot: every binary that ships, not a few that stand for all"
    )


@pytest.fixture(scope="session")
def compile_all(request: pytest.FixtureRequest) -> bool:
    return request.config.getoption("--all", default=False)


@pytest.fixture(scope="session")
def compiler():
    from tests.aot.checks import Compiler

    with Compiler() as shared:
        yield shared
