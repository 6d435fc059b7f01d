"""Imports go downwards: ops know tensors, graph knows modules, network knows whole models, the rest knows users."""

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

import resnet_fast

ROOT = Path(__file__).parents[2]
LAYERS = [
    {"utils"},
    {"kernels"},
    {"ops"},
    {"graph"},
    {"network"},
    {"accelerated", "explanation", "layer_precisions", "exactness", "tuning", "cuda_graph", "quantised", "verify"},
    {"models", "dynamo"},
    {"export", "finetune"},
    {"int8"},
    {"bench"},
    {"serving"},
    {"cli"},
    {"benchmarks"},
]
"""From the bottom up: folders, and files of the package itself. docs/architecture.md draws them."""
FLOOR = {name: floor for floor, names in enumerate(LAYERS) for name in names}
LONGEST = 400  # lines
FILES = [path for folder in ("resnet_fast", "kernels", "benchmarks") for path in sorted((ROOT / folder).rglob("*.py"))]
FILES = [path for path in FILES if "resnet_fast/kernels" not in path.as_posix()]  # the link to kernels/


def _name(path: Path) -> str:
    """The module that a file is."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = ("resnet_fast", *parts) if parts[0] == "kernels" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {_name(path): path for path in FILES}


def _imported(path: Path) -> Iterator[str]:
    """The modules of ours that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom) and node.module in MODULES:
            for alias in node.names:
                inside = f"{node.module}.{alias.name}"
                if node.module == "resnet_fast" and alias.name in resnet_fast.__all__:
                    inside = f"resnet_fast.{resnet_fast._ELSEWHERE.get(alias.name, 'models.resnet')}"
                yield inside if inside in MODULES else node.module


def _floor(module: str) -> int:
    package, _, rest = module.partition(".")
    return FLOOR[(rest if package == "resnet_fast" else package).partition(".")[0]]


def test_every_file_is_on_a_floor():
    assert {_floor(module) for module in MODULES if module != "resnet_fast"} == set(range(len(LAYERS)))


@pytest.mark.parametrize("module", [name for name in MODULES if name != "resnet_fast" and "__main__" not in name])
def test_imports_go_downwards(module):
    """But for those of ``__main__``, which hands over to the command line."""
    upwards = {
        other for other in _imported(MODULES[module]) if other != "resnet_fast" and _floor(other) > _floor(module)
    }
    assert not upwards


def test_no_circle_among_files():
    """A package's ``__init__`` only offers what its files have."""
    graph = {
        module: {other for other in _imported(path) if MODULES[other].name != "__init__.py"}
        for module, path in MODULES.items()
        if path.name not in ("__init__.py", "__main__.py")
    }
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError with the circle


@pytest.mark.parametrize("path", [path for path in FILES if path.name != "__init__.py"], ids=_name)
def test_files_are_short(path):
    assert len(path.read_text().splitlines()) <= LONGEST
