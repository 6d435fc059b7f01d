"""Compile a launch for a GPU that is not there, and read what came out.

Triton asks its active driver only for the target, so a driver that answers with any target lets the real just-in-time
path run up to the binary: the same specialisation on argument values and alignment, the same options. Tensors on
PyTorch's ``meta`` device have shapes and dtypes, and an address of 0, which counts as aligned, as an allocator's
addresses are.

What a device would report when it loads the binary (registers, stack) is read from the binary with the tools that
come with Triton.
"""

import importlib
import multiprocessing
import re
import subprocess
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple, Optional

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from resnet_fast.kernels.triton.launch import Plan

_CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
_TENSOR_CORE = (
    *("HGMMA", "HMMA", "UTCHMMA"),  # sm_90's wgmma, mma.sync, sm_100's tcgen05
    *("IGMMA", "IMMA", "UTCIMMA"),  # the same of int8
    *("QGMMA", "QMMA", "UTCQMMA"),  # of fp8
)

_TINY = re.compile(r"\.[US](8|16)\b")

# One instruction of SASS: "/*0120*/  @P0 LDG.E.128 R4, [R2] ;"
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,6}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9][\w.]*)", re.MULTILINE)


class Compiled(NamedTuple):
    """What the compiler made of one launch."""

    registers: int
    spilled: int  # bytes of stack per thread
    local_accesses: int  # loads and stores of spilled or indexed local memory
    shared: int  # bytes
    warps: int
    tensor_core: int  # instructions
    wide_loads: int  # 16-byte loads from global memory
    narrow_loads: int  # all others, those of scale and shift among them
    narrow_copies: int  # of these, copies to shared memory
    tiny_loads: int  # of these, loads of 1 or 2 bytes
    instructions: int


def lanes(architecture: str) -> int:
    """Threads per warp: 32, but 64 on AMD's data-centre GPUs."""
    return 64 if architecture.startswith("gfx9") else 32


class _Driver:
    """As much of a driver as compiling asks for."""

    def __init__(self, architecture: str) -> None:
        if architecture.startswith("gfx"):
            self._target = GPUTarget("hip", architecture, lanes(architecture))
        else:
            self._target = GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> str:
        return str(self._target)  # the just-in-time cache is per device: one for each target

    def get_current_stream(self, device: Any = None) -> int:
        return 0


class CompilerCrash(Exception):
    """The compiler took its process down with it."""


class Worker:
    """Compiles in one process of its own, since LLVM may abort a process (seen with tcgen05); then it starts another.

    A kernel does not travel to the process as an object, but as the name of its module and its own.
    """

    def __init__(self) -> None:
        self._pool: Optional[ProcessPoolExecutor] = None

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop()

    def compile(self, plan: Plan, architecture: str) -> Compiled:
        if self._pool is None:
            self._pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
        function = plan.kernel.fn
        try:
            return self._pool.submit(
                _compile_named, function.__module__, function.__name__, plan._replace(kernel=None), architecture
            ).result()
        except BrokenProcessPool:
            self._stop()
            raise CompilerCrash(f"the compiler crashed on {function.__name__} for {architecture}") from None

    def _stop(self) -> None:
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None


def _compile_named(module: str, name: str, plan: Plan, architecture: str) -> Compiled:
    return compile_plan(plan._replace(kernel=getattr(importlib.import_module(module), name)), architecture)


def compile_plan(plan: Plan, architecture: str) -> Compiled:
    """Compile ``plan``, whose tensors are on the meta device, for ``"sm_90"`` or ``"gfx942"``."""
    driver.set_active(_Driver(architecture))
    kernel = plan.kernel.warmup(*plan.args, grid=plan.grid, **plan.constants)
    return _read_amd(kernel) if architecture.startswith("gfx") else _read_nvidia(kernel)


def _read_nvidia(kernel: Any) -> Compiled:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _run("-res-usage", file.name)
        sass = _run("-sass", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    names = _INSTRUCTION.findall(sass)
    opcodes = Counter(name.split(".")[0] for name in names)
    loads = [name for name in names if name.startswith(("LDG.", "LDGSTS."))]
    wide = sum(".128" in name for name in loads)
    return Compiled(
        registers=int(found[1]),
        spilled=int(found[2]),
        local_accesses=opcodes["LDL"] + opcodes["STL"],
        shared=kernel.metadata.shared,
        warps=kernel.metadata.num_warps,
        tensor_core=sum(opcodes[name] for name in _TENSOR_CORE),
        wide_loads=wide,
        narrow_loads=len(loads) - wide,
        narrow_copies=sum(name.startswith("LDGSTS.") and ".128" not in name for name in loads),
        tiny_loads=sum(bool(_TINY.search(name)) for name in loads),
        instructions=len(names),
    )


def _run(option: str, path: str) -> str:
    done = subprocess.run([_CUOBJDUMP, option, path], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def _read_amd(kernel: Any) -> Compiled:
    assembly = kernel.asm["amdgcn"]

    def number(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", assembly)
        assert found, name
        return int(found[1])

    loads = re.findall(r"^\s+((?:buffer|global)_load_\w+)", assembly, re.MULTILINE)
    wide = sum(name.endswith("dwordx4") for name in loads)
    return Compiled(
        registers=number("vgpr_count"),
        # Vector registers spill to memory, the private segment. Scalar ones spill to lanes of a vector register, which
        # costs a move; they are not counted (gfx950 does so in float32).
        spilled=number("private_segment_fixed_size") + number("vgpr_spill_count"),
        local_accesses=len(re.findall(r"^\s+scratch_(?:load|store)", assembly, re.MULTILINE)),
        shared=kernel.metadata.shared,
        warps=kernel.metadata.num_warps,
        tensor_core=len(re.findall(r"^\s+v_(?:mfma|wmma)", assembly, re.MULTILINE)),
        wide_loads=wide,
        narrow_loads=len(loads) - wide,
        narrow_copies=sum("_lds_" in name and "dwordx4" not in name for name in loads),
        tiny_loads=sum(bool(re.search("byte|short", name)) for name in loads),
        instructions=len(re.findall(r"^\s+[a-z]\w+_\w+", assembly, re.MULTILINE)),
    )
