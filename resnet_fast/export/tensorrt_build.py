"""Parses and builds in a process of its own, for tensorrt.py: one request as JSON on stdin, one answer on stdout.

A script, not a module of the package: it starts in a fraction of a second, because it imports neither PyTorch nor
resnet_fast.
"""

import json
import os
import sys
import time
from typing import Any

NO_GPU = "cudaError 35"
"""What TensorRT logs as an error on a machine without a GPU driver, before it goes on without one."""


def main() -> None:
    # Not from this folder, where one of our files would hide a package of its name, such as tensorrt.
    sys.path[:] = [folder for folder in sys.path if folder != os.path.dirname(os.path.abspath(__file__))]
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the library prints is no part of the answer
    json.dump(build(**json.load(sys.stdin)), answer)
    answer.close()


def build(path: str, shapes: dict[str, list[list[int]]]) -> dict[str, Any]:
    """Parse ``path`` and build an engine for ``shapes``: minimum, optimum and maximum by input.

    Returns what was made, with the layers as TensorRT lists them, or ``{"error": text}``.
    """
    import tensorrt_rtx_libs  # noqa: F401, I001  # loads the library that the bindings link to
    import tensorrt_rtx_bindings as trt

    messages: list[str] = []
    errors: list[str] = []

    class Log(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, text: str) -> None:
            if severity <= trt.ILogger.ERROR:
                errors.append(text)
            elif text.startswith("Layers:"):
                messages.append(text)

    log = Log()
    builder = trt.Builder(log)
    typed = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(typed)
    parser = trt.OnnxParser(network, log)
    version = trt.__version__
    if not parser.parse_from_file(path):
        refusals = [refusal(parser.get_error(index)) for index in range(parser.num_errors)]
        return {"version": version, "step": "parse", "error": "\n".join(refusals) or telling(errors)}
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if shapes:
        profile = builder.create_optimization_profile()
        for name, (smallest, best, largest) in shapes.items():
            profile.set_shape(name, smallest, best, largest)
        config.add_optimization_profile(profile)
    start = time.perf_counter()
    engine = builder.build_serialized_network(network, config)
    seconds = time.perf_counter() - start
    if engine is None:
        return {"version": version, "step": "build", "error": telling(errors)}
    return {"version": version, "size": engine.nbytes, "seconds": seconds, "layers": "\n".join(messages)}


def refusal(error: Any) -> str:
    """Return what the parser says about one node."""
    text = telling(error.desc().splitlines())
    return f"node {error.node_name()!r} ({error.node_operator()}): {text}" if error.node_name() else text


def telling(lines: list[str]) -> str:
    return "\n".join(line for line in lines if NO_GPU not in line)


if __name__ == "__main__":
    main()
