"""This lane compiles the Triton kernels for GPUs that are not there: ``python -m pytest tests/aot``."""

import os

import pytest

if os.environ.get("TRITON_INTERPRET") == "1":
    raise pytest.UsageError("tests/aot compiles; it needs a process without TRITON_INTERPRET=1")
