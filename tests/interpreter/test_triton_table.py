"""The table of ops: a kernel in a file of its own and one row are an op."""

import importlib
import types

import pytest
import torch

from resnet_fast.kernels.contract import Case
from resnet_fast.kernels.triton import table
from tests.interpreter.cases import each_dtype, nhwc

DEFINITION = types.SimpleNamespace(double=lambda x: 2 * x)


@pytest.fixture
def double(monkeypatch):
    """The op of tests/toy_kernel.py."""
    monkeypatch.setitem(table.OPS, "double", table.Row(DEFINITION, "tests.toy_kernel"))
    return table.double


@each_dtype
def test_a_row_makes_an_op(double, dtype, guarded):
    x = nhwc(torch.randn(2, 17, 7, 9)).to(dtype)
    y = double(x)
    assert torch.equal(y, 2 * x)
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_empty_images_go_to_the_definition(double, monkeypatch):
    monkeypatch.setattr(DEFINITION, "double", lambda x: "the definition")
    assert double(torch.empty(0, 3, 5, 5)) == "the definition"


def test_what_a_row_covers(double, monkeypatch):
    case = Case("double", "cpu", torch.float32, 8, 8)
    assert table.supports(case) is None
    assert "float64" in table.supports(case._replace(dtype=torch.float64))
    assert "no kernel for triple" in table.supports(case._replace(op="triple"))
    narrow = table.OPS["double"]._replace(refusal=lambda case: "too wide" if case.in_channels > 8 else None)
    monkeypatch.setitem(table.OPS, "double", narrow)
    assert table.supports(case) is None
    assert table.supports(case._replace(in_channels=9)) == "too wide"


def test_without_a_row_there_is_no_op():
    with pytest.raises(AttributeError, match="double"):
        _ = table.double


@pytest.mark.parametrize("op", table.OPS)
def test_every_row_has_a_definition_and_a_kernel(op):
    row = table.OPS[op]
    assert callable(getattr(row.definition, op))
    file = importlib.import_module(row.file, table.__package__)
    assert callable(getattr(file, op, None) or getattr(file, f"plan_{op}"))
