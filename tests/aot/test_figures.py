"""The figures of ``docs/kernels.md`` are what the compiler makes of the kernels; ``figures.py`` prints them."""

import re

import pytest
import triton

from tests.aot import figures

RELEASE = "3.8.0"


def test_the_page_has_a_place_for_every_family():
    page = figures.PAGE.read_text()
    assert re.findall(r"<!-- figures: (\w+) -->\n\|", page) == list(figures.FAMILIES)
    assert f"Triton {RELEASE}" in page


@pytest.mark.parametrize("family", figures.FAMILIES)
def test_the_page_has_the_figures(compile_all, family):
    if not compile_all:
        pytest.skip("needs --all")
    if triton.__version__ != RELEASE:
        pytest.skip(f"the page's figures are Triton {RELEASE}'s")
    assert figures.table(family) in figures.PAGE.read_text(), f"python -m tests.aot.figures {family} --write"
