"""Microseconds of Python that a convolution on a GPU costs the host: ``python -m benchmarks.launch_overhead``.

Needs no GPU. The kernels are compiled for sm_90, and every launch goes through Triton's code down to its C launcher,
which is replaced by a C function that does nothing (``tests/fake_gpu.py``). So what is timed is all that happens on the
host, but for what the CUDA driver and its allocator take. Per layer and path:

    decided   what every call took without prepared calls: check, plan, Triton's own path
    prepared  the op from its second call on, entered from Python
    op        the same through ``torch.ops.resnet_fast.conv_bn_act``: PyTorch's dispatcher comes on top

The least of many short batches counts, so that a busy machine shows as little as possible; how busy it was is printed.
"""

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from typing import Any

import torch

from resnet_fast import ops
from resnet_fast.bench.machine import describe, load
from resnet_fast.kernels.triton import prepared
from resnet_fast.kernels.triton.tuning import planner
from tests import fake_gpu
from tests.fake_gpu import on_gpu

_CALLS = 50  # a batch is shorter than a slice of the scheduler's time
_DECIDED_CALLS = 10
_BATCHES = 400

LAYERS = {
    "1x1 64->256 +residual +relu": (64, 256, 1, True),
    "1x1 256->64 +relu": (256, 64, 1, False),
    "3x3 64->64 +relu": (64, 64, 3, False),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="also write the result to FILE")
    options = parser.parse_args()
    planner.machine = lambda index: "a fake GPU"  # type: ignore[assignment]
    before = load()
    results = {}
    with fake_gpu.installed() as gpu, torch.no_grad():
        gpu.utils.launch = "".format  # takes anything, does nothing, and is written in C
        for name, layer in LAYERS.items():
            results[name] = measure(*layer)
    print(f"{'layer':30} {'decided':>8} {'prepared':>8} {'op':>8}   microseconds a call")
    for name, times in results.items():
        print(f"{name:30} " + " ".join(f"{times[path]:8.2f}" for path in ("decided", "prepared", "op")))
    busy = {"load_before": before, "load_after": load(), "load_average": os.getloadavg()[0]}
    print(f"{describe().get('cpu', platform.processor())}; {busy}")
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"machine": describe(), **busy, "microseconds": results}, file, indent=1)


def measure(c: int, k: int, kernel: int, residual: bool) -> dict[str, float]:
    """One image of 56x56 in float16."""

    def image(channels: int) -> torch.Tensor:
        return on_gpu(
            torch.zeros(1, channels, 56, 56, dtype=torch.float16).contiguous(memory_format=torch.channels_last)
        )

    tensors = (
        image(c),
        on_gpu(torch.zeros(k, c, kernel, kernel, dtype=torch.float16)),
        on_gpu(torch.zeros(k)),
        on_gpu(torch.zeros(k)),
        image(k) if residual else None,
    )
    padding = [kernel // 2, kernel // 2]
    arguments: Any = (*tensors, [1, 1], padding, [1, 1], 1, True)
    # Without the look at prepared calls this is what the op did; OnGpu is seen through by is_cuda alone.
    decided = ops.inference._conv_bn_act
    run, prepared.run = prepared.run, lambda *arguments: None
    keep, prepared.keep = prepared.keep, lambda *arguments: None
    launches_of, prepared.launches_of = prepared.launches_of, lambda *arguments: None
    try:
        times = {"decided": microseconds(lambda: decided(*arguments), _DECIDED_CALLS)}
    finally:
        prepared.run, prepared.keep, prepared.launches_of = run, keep, launches_of
    ops.inference._conv_bn_act(*arguments)
    times["prepared"] = microseconds(lambda: ops.inference._conv_bn_act(*arguments), _CALLS)
    times["op"] = microseconds(lambda: torch.ops.resnet_fast.conv_bn_act(*arguments), _CALLS)
    return times


def microseconds(work: Callable[[], Any], calls: int) -> float:
    best = float("inf")
    for _ in range(_BATCHES):
        start = time.perf_counter()
        for _ in range(calls):
            work()
        best = min(best, time.perf_counter() - start)
    return best / calls * 1e6


if __name__ == "__main__":
    main()
