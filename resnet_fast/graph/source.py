"""A graph as a Python function."""

import linecache
from collections.abc import Callable
from itertools import count

from torch import fx

_serial = count()


def compile_graph(graph: fx.Graph, name: str) -> tuple[Callable, str]:
    code = graph.python_code("self")
    filename = f"<resnet_fast {name} {next(_serial)}>"
    namespace = dict(code.globals)
    exec(compile(code.src, filename, "exec"), namespace)
    # Tracebacks and debuggers show the lines, as they do for torch.fx.
    linecache.cache[filename] = (len(code.src), None, code.src.splitlines(keepends=True), filename)
    return namespace["forward"], code.src
