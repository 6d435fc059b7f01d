"""Convolutions on the stub, in a process of their own: ``python -m tests.driver.calls FOLDER`` prints what is wrong.

Everything of Triton's and of ours is as users have it. Of each case, a first call decides and Triton launches; a second
one with other images, scale and shift is the prepared one; and a third, which has forgotten what was prepared, is
Triton's again. What the stub was given in the second and in the third has to be the same, byte by byte, and has to be
what the binary's own description says of its parameters.

Prints JSON: by group, and in it by name, a list of texts; of the cases they are complaints.
"""

import contextlib
import ctypes
import json
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    from tests.driver import gpu
    from tests.driver.stub import Stub

    stub = Stub(Path(sys.argv[1]))
    gpus = gpu.install(stub)  # before resnet_fast is imported

import torch
from triton.runtime import JITFunction
from triton.runtime.driver import driver

from resnet_fast import ops
from resnet_fast.kernels.triton import descriptor, device, forward, prepared, tiles
from resnet_fast.kernels.triton.problem import conv_problem
from resnet_fast.kernels.triton.tuning import planner
from resnet_fast.utils import compat
from tests.driver.cases import CASES, SM80, SM90, Case
from tests.driver.stub import Launch, Ordering

# --- cases -----------------------------------------------------------------------------------------------------------


def operands(case: Case, weight: Any = None) -> tuple:
    """Of a call; with other images, scale and shift each time."""
    pads = case.kernel // 2

    def image(channels: int, size: int) -> Any:
        x = torch.randn(2, channels, size, size).to(case.dtype).contiguous(memory_format=torch.channels_last)
        return gpu.on_gpu(x, case.device)

    def vector() -> Any:
        return gpu.on_gpu(torch.rand(case.k) + 0.5, case.device)

    if weight is None:
        weight = torch.randn(case.k, case.c // case.groups, case.kernel, case.kernel)
        weight = gpu.on_gpu(weight.to(case.dtype), case.device)
    residual = image(case.k, 8 // case.stride) if case.residual else None
    window = ((case.stride,) * 2, (pads, pads), (1, 1), case.groups, True)
    return image(case.c, 8), weight, vector(), vector(), residual, *window


def complaints(case: Case) -> Iterator[str]:
    """What is wrong with the case's calls."""
    first = operands(case)
    with compat.float32_in_tf32(case.tf32), chosen(case, first):
        ops.inference._conv_bn_act(*first)
        stub.taken()
        second = operands(case, first[1])
        gpu.memory.again()
        if prepared.run(*second) is None:
            yield "was not prepared"
        ours = launches()
        prepared._kept.clear()
        gpu.memory.again()
        ops.inference._conv_bn_act(*second)
        tritons = launches()
    if tuple(one.name for one in ours) != case.kernels:
        yield f"kernels: {[one.name for one in ours]}"
    for mine, its in zip(ours, tritons, strict=True):
        yield from differences(mine, its)
        yield from faults(mine)


@contextlib.contextmanager
def chosen(case: Case, arguments: tuple) -> Iterator[None]:
    """With the tile that the case is for, or with the candidate, as if it had been measured."""
    x, weight, *_, stride, padding, dilation, groups, relu = arguments
    architecture = device.architecture(x.device)
    precision = device.precision_of(case.dtype, architecture)
    window = (stride, padding, dilation, groups)
    if case.tile is not None:
        shape = conv_problem(x.shape, weight.shape, *window, precision, case.residual)
        tiles.override(architecture, {shape: case.tile})
    if case.choice is not None:
        kernel = weight.shape[2:]
        problem = planner.Problem(
            architecture, case.dtype, precision, *x.shape, case.k, kernel, *window, case.residual, relu
        )
        _, *others = planner.candidates(problem).values()  # without the table's
        fitting = [one.name for one in others if one.tile is None or one.tile[-2:] == ("pointers", 1)]
        name = next(one for one in fitting if one.startswith(case.choice))
        planner.keep(case.device, {problem.key(): name})
    try:
        yield
    finally:
        tiles.override(architecture, {})


def launches() -> list[Launch]:
    return [one for one in stub.taken() if isinstance(one, Launch)]


# --- checks ----------------------------------------------------------------------------------------------------------


def differences(mine: Launch, its: Launch) -> Iterator[str]:
    for what, one, other in zip(Launch._fields, mine, its):
        if what == "parameters":
            for i, (a, b) in enumerate(zip(one, other)):
                if a != b:
                    yield f"{mine.name}: parameter {i}: {a.hex()}, of Triton's launch {b.hex()}"
        elif one != other:
            yield f"{mine.name}: {what}: {one!r}, of Triton's launch {other!r}"


def faults(one: Launch) -> Iterator[str]:
    """Where a launch is not what its binary was compiled for, which the driver does not know."""
    binary = compiled(one.function)
    metadata = binary.metadata
    if (one.threads, one.shared) != (32 * metadata.num_warps, metadata.shared):
        yield f"{one.name}: {one.threads} threads, {one.shared} bytes of shared memory"
    values = iter(one.parameters)
    for number, (name, kind) in enumerate(binary.src.signature.items()):
        if kind == "constexpr":
            continue
        aligned = ["tt.divisibility", 16] in binary.src.attrs.get((number,), [])
        for size in sizes(kind):
            value = next(values)
            if len(value) != size:
                yield f"{one.name}: {name} has {len(value)} bytes, {kind} takes {size}"
            if size > 8:  # a tensor map, which the stub has checked
                continue
            word = int.from_bytes(value, "little")
            if kind.startswith("*") and not word:
                yield f"{one.name}: {name} points nowhere"
            if aligned and word % 16:
                yield f"{one.name}: {name} is {word:#x}, 16 does not divide it"
    if any(map(any, values)):
        yield f"{one.name}: memory that the kernel does not ask for"


_BYTES = {"i1": 1, "i32": 4, "fp32": 4, "i64": 8}


def sizes(kind: str) -> list[int]:
    """Bytes of what an argument of that type becomes."""
    if kind.startswith("tensordesc"):  # the map, and for each dimension its size and stride
        rank = kind.count(",") + 1
        return [128, *[4] * rank, *[8] * rank]
    return [8 if kind.startswith("*") else _BYTES[kind]]


def compiled(function: int) -> Any:
    """The binary of the driver's handle."""
    for name, module in list(sys.modules.items()):
        if name.startswith("resnet_fast.kernels.triton"):
            for kernel in vars(module).values():
                if isinstance(kernel, JITFunction):
                    for binaries, *_ in kernel.device_caches.values():
                        for one in binaries.values():
                            if one.function == function:
                                return one
    raise LookupError(function)


# --- what must be noticed --------------------------------------------------------------------------------------------


def swapped() -> list[str]:
    """Of calls that give scale and shift to each other."""
    before = prepared._SCALE, prepared._SHIFT
    prepared._SCALE, prepared._SHIFT = before[::-1]
    try:
        return list(complaints(CASES["3x3"]))
    finally:
        prepared._SCALE, prepared._SHIFT = before


def unaligned() -> list[str]:
    """Of a call whose image begins between multiples of 16 bytes, if the prepared call did not look."""
    case = CASES["3x3"]
    first = operands(case)
    before, prepared._ALIGNMENT = prepared._ALIGNMENT, 0
    try:
        ops.inference._conv_bn_act(*first)
        stub.taken()
        x = first[0]
        memory = torch.zeros(x.numel() + 4, dtype=x.dtype)[4:]
        image = gpu.on_gpu(memory.view(2, 8, 8, 64).permute(0, 3, 1, 2))
        prepared.run(image, *first[1:])
        return [text for one in launches() for text in faults(one)]
    finally:
        prepared._ALIGNMENT = before


def refusals() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Launches with one thing wrong, by name."""
    arguments = operands(CASES["3x3"])
    plan = forward.plan_conv_bn_act(*arguments, "sm_90")
    (launch,), (binary,) = plan.launches, plan.start()
    stub.taken()
    given = dict(zip(launch.kernel.arg_names, launch.args)) | launch.constants
    values = [given[name] for name in launch.kernel.arg_names]
    function, metadata, grid = binary.function, binary.packed_metadata, (*launch.grid, 1, 1)[:3]
    warps, ctas, shared, *rest = metadata

    def start(**changed: Any) -> None:
        now = {"grid": grid, "stream": 0, "function": function, "metadata": metadata, "values": values} | changed
        binary.run(*now["grid"], now["stream"], now["function"], now["metadata"], None, None, None, *now["values"])

    def elsewhere(work: Callable[[], Any]) -> None:
        with torch.cuda.device(SM80):
            work()

    with torch.cuda.device(SM80):
        foreign = stub.make("cuStreamCreate", 0)
    start()  # nothing is wrong
    yield "threads", lambda: start(metadata=(2 * warps, ctas, shared, *rest))
    yield "shared memory", lambda: start(metadata=(warps, ctas, 300000, *rest))
    yield "grid", lambda: start(grid=(1, 65536, 1))
    yield "no such stream", lambda: start(stream=12345)
    yield "another device's stream", lambda: start(stream=foreign)
    yield "no such function", lambda: start(function=12345)
    yield "another device's function", lambda: elsewhere(start)
    yield "a pointer to nothing", lambda: start(values=[16, *values[1:]])
    yield "a tensor of nowhere", lambda: start(values=[torch.empty(1).as_subclass(Nowhere), *values[1:]])
    utils = driver.active.utils
    load = (binary.metadata.name, binary.asm["cubin"], binary.metadata.shared, SM80)
    yield "another architecture", lambda: elsewhere(lambda: utils.load_binary(*load))
    yield "no binary", lambda: utils.load_binary("conv_kernel", b"\0" * 128, 0, SM90)
    if compat.has_descriptors():
        yield "unaligned tensor map", lambda: encode(8, (64, 64))
        yield "stride of a tensor map", lambda: encode(16, (64, 60))
        yield "box of a tensor map", lambda: encode(16, (512, 64), (512, 64))


def refused(start: Callable[[], Any]) -> list[str]:
    try:
        start()
    except Exception as error:
        return [f"{type(error).__name__}: {error}"]
    return []


class Nowhere(torch.Tensor):
    def data_ptr(self) -> int:
        return 16


def encode(address: int, shape: tuple[int, int], box: tuple[int, int] = (64, 64)) -> Any:
    """A tensor map of an image in float16, by Triton's utilities."""
    utils = driver.active.utils
    fill = getattr(utils, "fill_tma_descriptor_tiled", None) or utils.fill_tma_descriptor  # its name up to 3.7
    return fill(address, 3, 2, 6, box, shape, (shape[1], 1), 0)


def large() -> Iterator[str]:
    """Of images that kernels with descriptors take: those whose tensor map says that they are small.

    Triton clears a bit of the map of a small image, by what a driver up to 13.1 has wrong; see libcuda.c.
    """
    weight = torch.empty(64, 1, 1, 64, dtype=torch.float16, device="meta")
    tile = tiles.Tile(64, 64, 64, 4, 4, False, "descriptors")
    for batch in (15, 16, 17, 32, 33, 64):
        x = torch.empty(batch, 64, 1024, 1024, dtype=torch.float16, device="meta", memory_format=torch.channels_last)
        if descriptor.refusal(tile, "sm_90", "half", x, weight, (1, 1), 1, False) is None:
            made = encode(16, (batch * 1024 * 1024, 64))
            words = ctypes.string_at(id(made), type(made).__basicsize__)
            flags = int.from_bytes(words[words.index(b"tnsormap") + 8 :][:8], "little")
            if not flags:
                yield f"{x.numel() * 2 / 2**30} GiB"


def streams() -> list[str]:
    """What the streams of a first call and of others do, one after the other."""
    one, other = (stub.make("cuStreamCreate", 0) for _ in range(2))
    letters, found = {one: "A", other: "B"}, []
    arguments = operands(CASES["3x3"])
    events: dict[int, str] = {}
    for gpus.stream in (one, one, other, other):
        ops.inference._conv_bn_act(*arguments)
        for step in stub.taken():
            letter = letters[step.stream]
            if not isinstance(step, Ordering):
                found.append(f"{letter} launches")
            elif step.kind == "recorded":
                events[step.event] = letter
            else:
                found.append(f"{letter} waits for {events[step.event]}")
    gpus.stream = 0
    return found


# --- all -------------------------------------------------------------------------------------------------------------


def said(work: Callable[[], Any]) -> list[str]:
    """What it gives, or the error that it ends in."""
    try:
        return list(work())
    except Exception:
        return [traceback.format_exc()]
    finally:
        stub.taken()
        prepared._kept.clear()


def main() -> None:
    with torch.no_grad():
        found = {
            "cases": {name: said(lambda: complaints(one)) for name, one in CASES.items() if not one.refused()},  # noqa: B023
            "noticed": {"swapped": said(swapped), "unaligned": said(unaligned)},
            "refusals": {name: said(lambda: refused(start)) for name, start in refusals()},  # noqa: B023
            "machine": {"": said(lambda: [planner.machine(SM90)])},
            "streams": {"": said(streams)},
            "large": {"": said(large) if compat.has_descriptors() else []},
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
