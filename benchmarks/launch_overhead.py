"""Microseconds that a convolution on a GPU costs the host: ``python -m benchmarks.launch_overhead``.

Needs no GPU, and says nothing of one. The kernels are compiled for sm_90, and every launch goes through Triton's driver
and its launcher, down to a stub of NVIDIA's driver that takes the parameters and starts nothing (``tests/driver``). So
what is timed is all that happens on the host, but for what the CUDA driver and PyTorch's allocator take. Per layer:

    launch    what Triton's own path takes, ``kernel[grid](...)``, of a launch that is planned
    decided   what every call took without prepared calls: check, plan, Triton's own path
    prepared  the op from its second call on, entered from Python
    op        the same through ``torch.ops.resnet_fast.conv_bn_act``: PyTorch's dispatcher comes on top

Of many short batches of calls the median counts, and the least, in brackets, shows how busy the machine was.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from tests.driver import gpu
from tests.driver.stub import Stub

if __name__ == "__main__":
    _folder = tempfile.TemporaryDirectory()
    stub = Stub(Path(_folder.name))
    gpu.install(stub)  # before resnet_fast is imported

import torch

from resnet_fast import ops
from resnet_fast.bench.machine import describe, load
from resnet_fast.kernels.triton import forward, operands, prepared, tiles
from resnet_fast.kernels.triton.problem import conv_problem
from resnet_fast.utils import compat
from tests.fake_gpu import on_gpu

_CALLS = 50  # a batch is shorter than a slice of the scheduler's time
_DECIDED_CALLS = 10
_BATCHES = 400

LAYERS = {
    "1x1 64->256 +residual +relu": (64, 256, 1, True, "pointers"),
    "1x1 256->64 +relu": (256, 64, 1, False, "pointers"),
    "3x3 64->64 +relu": (64, 64, 3, False, "pointers"),
    "1x1 256->64 +relu, descriptors": (256, 64, 1, False, "descriptors"),
}


class Time(NamedTuple):
    """Microseconds of a call."""

    median: float
    least: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="also write the result to FILE")
    options = parser.parse_args()
    before = load()
    operands.allocate = _allocate
    results = {}
    stub.quiet(True)
    with torch.no_grad():
        for name, layer in LAYERS.items():
            if layer[-1] == "pointers" or compat.has_descriptors():
                results[name] = measure(*layer)
    paths = ("launch", "decided", "prepared", "op")
    print(f"{'microseconds a call':30}" + "".join(f"{path:>17}" for path in paths))
    for name, times in results.items():
        each = (f"{times[path].median:.1f} ({times[path].least:.1f})" for path in paths)
        print(f"{name:30}" + "".join(f"{one:>17}" for one in each))
    busy = {"load_before": before, "load_after": load(), "load_average": os.getloadavg()[0]}
    print(f"{describe().get('cpu', platform.processor())}; {busy}")
    if options.json:
        found = {name: {path: time._asdict() for path, time in times.items()} for name, times in results.items()}
        with open(options.json, "w") as file:
            json.dump({"machine": describe(), **busy, "microseconds": found}, file, indent=1)


def _allocate(x: torch.Tensor, shape: tuple[int, ...], dtype: Any = None) -> torch.Tensor:
    """An output as the caching allocator would give it: what PyTorch's of the CPU does takes about as long."""
    return torch.empty(shape, dtype=dtype or x.dtype, memory_format=torch.channels_last)


def measure(c: int, k: int, kernel: int, residual: bool, kind: str) -> dict[str, Time]:
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
    window = ((1, 1), (kernel // 2, kernel // 2), (1, 1), 1)
    shape = conv_problem(tensors[0].shape, tensors[1].shape, *window, "half", residual)
    tiles.override("sm_90", {shape: tiles.pick("sm_90", *shape[:7])._replace(parts=1, kernel=kind)})
    arguments: Any = (*tensors, *map(list, window[:3]), 1, True)
    plan = forward.plan_conv_bn_act(*tensors, *window, True, "sm_90")
    times = {"launch": microseconds(plan.start, _DECIDED_CALLS)}
    with (
        mock.patch.dict(ops.dispatch.PREPARED, clear=True),
        mock.patch.multiple(prepared, keep=lambda *arguments: None, launches_of=lambda *arguments: None),
    ):
        times["decided"] = microseconds(lambda: ops.inference._conv_bn_act(*arguments), _DECIDED_CALLS)
    ops.inference._conv_bn_act(*arguments)
    assert prepared.run(*arguments) is not None
    times["prepared"] = microseconds(lambda: ops.inference._conv_bn_act(*arguments), _CALLS)
    times["op"] = microseconds(lambda: torch.ops.resnet_fast.conv_bn_act(*arguments), _CALLS)
    return times


def microseconds(work: Callable[[], Any], calls: int) -> Time:
    found = []
    for _ in range(_BATCHES):
        start = time.perf_counter()
        for _ in range(calls):
            work()
        found.append((time.perf_counter() - start) / calls * 1e6)
    return Time(statistics.median(found), min(found))


if __name__ == "__main__":
    main()
