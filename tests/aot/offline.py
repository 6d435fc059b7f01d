"""Compile a launch for a GPU that is not there, and read what came out.

Triton asks its active driver only for the target, so a driver that answers with any target lets the real just-in-time
path run up to the binary: the same specialisation on argument values and alignment, the same options. Tensors on
PyTorch's ``meta`` device have shapes and dtypes, and an address of 0, which counts as aligned, as an allocator's
addresses are.

What a device would report when it loads the binary (registers, stack) is read from the binary with the tools that
come with Triton. NVIDIA's disassembler takes longer to start than Triton to compile a small kernel, and reads one file
a time: so the code of many kernels goes to it as one, without the files around it.
"""

import functools
import importlib
import multiprocessing
import re
import struct
import subprocess
import tempfile
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple, Optional

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from resnet_fast.kernels.triton.plan import OPTIONS, Launch
from tests.aot.assembly import AMD, NVIDIA, Dialect, Instruction, Loop, amdgcn, is_a, main_loop, sass
from tests.aot.wgmma import hazards

_TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


class Compiled(NamedTuple):
    """What the compiler made of one launch."""

    registers: int
    spilled: int  # bytes of stack per thread
    local_accesses: int  # loads and stores of spilled or indexed local memory
    shared: int  # bytes
    tensor_memory: int  # columns, of sm_100
    warps: int
    tensor_core: int  # instructions
    units: frozenset[str]  # their names, with all modifiers
    wide_loads: int  # loads from global memory of 16 bytes or more
    narrow_loads: int  # all others, those of scale and shift among them
    narrow_copies: int  # of these, copies to shared memory
    tiny_loads: int  # of these, loads of 1 or 2 bytes
    instructions: int
    descriptor_loads: int  # by the copy engine, through tensor descriptors
    thread_copies: int  # to shared memory, without it
    loop: Loop
    hazards: tuple[str, ...]  # of asynchronous products, see wgmma.py


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

    def compile(self, launches: list[Launch], architecture: str) -> list[Compiled]:
        if self._pool is None:
            self._pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
        names = [(one.kernel.fn.__module__, one.kernel.fn.__name__) for one in launches]
        try:
            return self._pool.submit(
                _compile_named, names, [launch._replace(kernel=None) for launch in launches], architecture
            ).result()
        except BrokenProcessPool:
            self._stop()
            raise CompilerCrash(f"the compiler crashed on one of {names} for {architecture}") from None

    def _stop(self) -> None:
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None


def _compile_named(names: list[tuple[str, str]], launches: list[Launch], architecture: str) -> list[Compiled]:
    kernels = [getattr(importlib.import_module(module), name) for module, name in names]
    return compile_launches([one._replace(kernel=kernel) for one, kernel in zip(launches, kernels)], architecture)


def compile_launches(launches: list[Launch], architecture: str) -> list[Compiled]:
    """Compile ``launches``, whose tensors are on the meta device, for ``"sm_90"`` or ``"gfx942"``."""
    driver.set_active(_Driver(architecture))
    made = []
    for launch in launches:
        made.append(launch.kernel.warmup(*launch.args, grid=launch.grid, **launch.constants, **OPTIONS))
        # The just-in-time compiler would keep all that it ever made, with its assembly at every stage: megabytes each.
        for kernels, *_ in launch.kernel.device_caches.values():
            kernels.clear()
    read = _read_amd if architecture.startswith("gfx") else functools.partial(_read_nvidia, architecture)
    return read(made, [multiplies(launch) for launch in launches])


def multiplies(launch: Launch) -> bool:
    """Whether the kernel is a matrix product: over blocks of channels, or of pixels."""
    return "BK" in launch.constants or "BP" in launch.constants


def _read_nvidia(architecture: str, kernels: list[Any], products: list[bool]) -> list[Compiled]:
    code = [_text_section(kernel.asm["cubin"]) for kernel in kernels]
    # From sm_90 on there are instructions that only the very architecture has, not its successors ("a").
    name = architecture.upper().replace("_", "") + ("a" if int(architecture.removeprefix("sm_")) >= 90 else "")
    text = _run("nvdisasm", "--binary", name, content=b"".join(code))
    each = sass(text, [len(one) for one in code])
    made = []
    for kernel, one, product in zip(kernels, each, products):
        usage = _run("cuobjdump", "-res-usage", content=kernel.asm["cubin"])
        found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
        assert found, usage
        made.append(_describe(kernel, one, NVIDIA, int(found[1]), int(found[2]), product))
    return made


def _run(tool: str, *options: str, content: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(content)
        file.flush()
        done = subprocess.run([_TOOLS / tool, *options, file.name], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def _text_section(cubin: bytes) -> bytes:
    """The kernel's instructions: the section ".text.<name>" of an ELF file (System V ABI, chapter 4)."""
    (table,) = struct.unpack_from("<Q", cubin, 40)
    size, count, names = struct.unpack_from("<HHH", cubin, 58)
    # Of each section: the offset of its name among the names; type, flags, address; its own offset and size.
    sections = [struct.unpack_from("<IIQQQQ", cubin, table + i * size) for i in range(count)]
    found = [one for one in sections if cubin.startswith(b".text.", sections[names][4] + one[0])]
    assert len(found) == 1, f"{len(found)} functions in one binary"
    *_, offset, length = found[0]
    return cubin[offset : offset + length]


def _read_amd(kernels: list[Any], products: list[bool]) -> list[Compiled]:
    made = []
    for kernel, product in zip(kernels, products):
        assembly = kernel.asm["amdgcn"]

        def number(name: str, assembly: str = assembly) -> int:
            found = re.search(rf"\.{name}:\s+(\d+)", assembly)
            assert found, name
            return int(found[1])

        # Vector registers spill to memory, the private segment. Scalar ones spill to lanes of a vector register, which
        # costs a move; they are not counted, nor is a segment that they were given and that nothing accesses.
        code = amdgcn(assembly)
        segment = number("private_segment_fixed_size") if any(is_a(AMD.local, one) for one in code) else 0
        made.append(_describe(kernel, code, AMD, number("vgpr_count"), segment + number("vgpr_spill_count"), product))
    return made


def _describe(
    kernel: Any, code: list[Instruction], dialect: Dialect, registers: int, spilled: int, product: bool
) -> Compiled:
    def of(kind: re.Pattern) -> list[Instruction]:
        return [one for one in code if is_a(kind, one)]

    tensor_core, loads = of(dialect.tensor_core), of(dialect.load)
    wide = sum(is_a(dialect.wide, one) for one in loads)
    counted = dialect.tensor_core if tensor_core or not product else dialect.multiply_add
    return Compiled(
        registers=registers,
        spilled=spilled,
        local_accesses=len(of(dialect.local)),
        shared=kernel.metadata.shared,
        tensor_memory=getattr(kernel.metadata, "tmem_size", 0),
        warps=kernel.metadata.num_warps,
        tensor_core=len(tensor_core),
        units=frozenset(one.name for one in tensor_core),
        wide_loads=wide,
        narrow_loads=len(loads) - wide,
        narrow_copies=sum(is_a(dialect.copy, one) and not is_a(dialect.wide, one) for one in loads),
        tiny_loads=sum(is_a(dialect.tiny, one) for one in loads),
        instructions=len(code),
        descriptor_loads=sum(one.name.startswith("UTMALDG") for one in code),
        thread_copies=len(of(dialect.copy)),
        loop=main_loop(code, dialect, counted),
        hazards=tuple(hazards(code)),
    )
