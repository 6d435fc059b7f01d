"""Launches of our plans, compiled by Triton for a GPU that is not there and executed by the machine."""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, Union
from unittest import mock

import numpy as np
import torch
from triton.backends.nvidia import driver as nvidia
from triton.runtime.driver import driver

from resnet_fast.kernels.triton import device, operands
from resnet_fast.kernels.triton.plan import OPTIONS, Launch, Plan
from tests.aot import offline
from tests.ptx import machine, tensor_maps
from tests.ptx.parse import Instruction, Kernel, PtxError, parse
from tests.ptx.tensor_maps import TensorMap
from tests.ptx.tensors import Tensors

disagreements: list[Instruction] = []
"""Stores whose result was chance, in its last places (see shared.py)."""

_LANES = 16384  # threads that are executed together: more of them cost memory, fewer time


class Code:
    """PTX, parsed, with what each instruction does."""

    def __init__(self, text: str) -> None:
        self.kernel: Kernel = parse(text)
        self.steps = machine.steps(self.kernel)


@functools.lru_cache(maxsize=64)
def code(text: str) -> Code:
    return Code(text)


def _bits(argument: Any, size: int) -> Union[int, TensorMap]:
    """As Triton's launcher hands it over: a float as float32."""
    if isinstance(argument, TensorMap):
        return argument
    if isinstance(argument, torch.Tensor):
        return argument.data_ptr()
    if isinstance(argument, float):
        return int(np.float32(argument).view(np.uint32))
    return int(argument) % 2 ** (8 * size)


def execute(made: Code, grid: tuple[int, ...], arguments: list[Any], shared: int, tensors: list[torch.Tensor]) -> None:
    """All programs of the grid. arguments: tensors, tensor maps and numbers, as the kernel's parameters have them."""
    kernel = made.kernel
    if len(arguments) != len(kernel.parameters):
        raise PtxError(f"{len(arguments)} arguments for {len(kernel.parameters)} parameters of {kernel.name}")
    bits = {parameter.name: _bits(one, parameter.size) for parameter, one in zip(kernel.parameters, arguments)}
    grid = (*grid, 1, 1)[:3]
    x, y, z = (np.arange(size) for size in grid)
    # In the order of a grid, the first axis first.
    programs = np.stack(np.meshgrid(x, y, z, indexing="ij"), -1).transpose(2, 1, 0, 3).reshape(-1, 3)
    memory, together = Tensors(tensors), max(_LANES // kernel.threads, 1)
    for first in range(0, len(programs), together):
        some = programs[first : first + together]
        running = machine.Machine(kernel, some, grid, bits, memory, shared)
        running.run(made.steps, kernel.instructions)
        disagreements.extend(running.shared.disagreements)


def execute_launch(launch: Launch, change=lambda text: text) -> None:
    """A launch whose tensors are this process's, with what Triton makes of it, or with a changed text."""
    compiled = launch.kernel.warmup(*launch.args, grid=launch.grid, **launch.constants, **OPTIONS)
    # The parameters are the arguments that are no constants, and the addresses of two scratch memories, of no bytes.
    named, tensors = dict(zip(launch.kernel.arg_names, launch.args)), []
    given = [(named[name], kind) for name, kind in compiled.src.signature.items() if kind != "constexpr"]
    described, arguments = iter(getattr(compiled.metadata, "tensordesc_meta", None) or ()), []
    for argument, kind in given:
        if kind.startswith("tensordesc"):
            tensors.append(argument.base)
            arguments.extend(_described(argument, next(described)))
        else:
            tensors.extend([argument] if isinstance(argument, torch.Tensor) else [])
            arguments.append(argument)
    if compiled.metadata.global_scratch_size or compiled.metadata.profile_scratch_size:
        raise PtxError(f"{compiled.metadata.name} asks for scratch memory")
    execute(code(change(compiled.asm["ptx"])), launch.grid, [*arguments, 0, 0], compiled.metadata.shared, tensors)


def _described(descriptor: Any, metadata: dict[str, Any]) -> list[Any]:
    """What Triton's launcher makes of a tensor descriptor: the tensor map, then shape and strides."""
    make = nvidia.make_tensordesc_arg
    return make(*(descriptor, metadata, None)[: len(inspect.signature(make).parameters)])


def encoder(encode: Callable[..., TensorMap]) -> SimpleNamespace:
    """As Triton's driver has it, by the name that it has from Triton 3.7 on and by the one before."""
    return SimpleNamespace(fill_tma_descriptor_tiled=encode, fill_tma_descriptor=encode)


class _Driver(offline._Driver):
    utils = encoder(tensor_maps.encode)


def _start(plan: Plan) -> list[Any]:
    for one in plan.launches:
        execute_launch(one)
    return [None] * len(plan.launches)


def _poisoned(allocate):
    """Outputs start as NaN, or as 85, so that what was never written shows."""

    def made(*arguments: Any, **options: Any) -> torch.Tensor:
        tensor = allocate(*arguments, **options)
        return tensor.fill_(torch.nan if tensor.is_floating_point() else 85)

    return made


@contextlib.contextmanager
def executed(architecture: str) -> Iterator[None]:
    """Plans are compiled for the architecture and executed here, on tensors of the CPU."""
    before = dict(vars(driver))
    driver.set_active(_Driver(architecture))
    try:
        with (
            mock.patch.object(device, "architecture", return_value=architecture),
            mock.patch.object(Plan, "start", _start),
            mock.patch.object(operands, "allocate", _poisoned(operands.allocate)),
            mock.patch.object(operands, "allocate_floats", _poisoned(operands.allocate_floats)),
            mock.patch.object(operands, "allocate_bytes", _poisoned(operands.allocate_bytes)),
        ):
            yield
    finally:
        vars(driver).update(before)
