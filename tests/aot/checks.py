"""What must hold for every launch that is compiled: each check is a function of the launch and of what came out."""

import itertools
import os
import re
from collections.abc import Callable, Hashable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
from typing import NamedTuple, Optional

from resnet_fast.kernels.triton import tiles
from resnet_fast.kernels.triton.cost_model.gpus import GPUS, Gpu
from tests.aot.exceptions import excused
from tests.aot.layers import Item
from tests.aot.offline import Compiled, CompilerCrash, Worker, lanes, multiplies

_SCHEDULERS = 4  # of a multiprocessor; each has a quarter of the registers
_RESERVED = 1024  # bytes of shared memory that CUDA takes for itself in every program
_TENSOR_MEMORY = 512  # columns of a multiprocessor's tensor memory (PTX ISA, tcgen05)
_THREADS = 1024  # of a program
_WGMMA_ROWS = 64  # of one product (PTX ISA, wgmma.mma_async)
_GRID = (2**31 - 1, 65535, 65535)

# The instruction that the products of a precision become, by the beginning of the architecture's name. "sm_" is
# mma.sync's; GeForce Blackwell has no other either. sm_90's is wgmma's, sm_100's is tcgen05's, whose dtype is in a
# register. Whole names; the shape of the tile is left open.
_UNITS = {
    "sm_90": {
        "fp16": r"HGMMA\.64x\d+x16\.F32",
        "bf16": r"HGMMA\.64x\d+x16\.F32\.BF16",
        "tf32": r"HGMMA\.64x\d+x8\.F32\.TF32",
        "int8": r"IGMMA\.64x\d+x32\.S8\.S8",
        "fp8": r"QGMMA\.64x\d+x32\.F32\.E[45]M[32]\.E[45]M[32]",
    },
    "sm_10": {"fp16": "UTCHMMA.*", "bf16": "UTCHMMA.*", "tf32": "UTCHMMA.*", "int8": "UTCIMMA.*", "fp8": "UTCQMMA.*"},
    "sm_": {
        "fp16": r"HMMA\.16816\.F32",
        "bf16": r"HMMA\.16816\.F32\.BF16",
        "tf32": r"HMMA\.168[84]\.F32\.TF32",
        "int8": r"IMMA\.16832\.S8\.S8\.SAT",
        "fp8": r"QMMA\.16832\.F32\.E[45]M[32]\.E[45]M[32]",
    },
    "gfx9": {
        "fp16": r"v_mfma_f32_(\d+x)+\d+_?f16",
        "bf16": r"v_mfma_f32_(\d+x)+\d+_?bf16(_1k)?",
        "ieee": r"v_mfma_f32_(\d+x)+\d+_?f32",
        "int8": r"v_mfma_i32_\w+i8",
        "fp8": r"v_mfma_(scale_)?f32_\w+_(fp8|bf8|f8f6f4)\w*",
    },
    "gfx1": {"fp16": r"v_wmma_f32_\w+_f16", "bf16": r"v_wmma_f32_\w+_bf16", "int8": r"v_wmma_i32_\w+_iu8"},
}


class Result(NamedTuple):
    item: Item
    compiled: Optional[Compiled]  # None: the compiler crashed


class Compiler:
    """Compiles many launches, some on each processor at a time and each binary once; a crash is a result."""

    _TOGETHER = 8  # launches, which share one start of the disassembler

    def __init__(self) -> None:
        self._workers = [Worker() for _ in os.sched_getaffinity(0)]
        self._threads = ThreadPoolExecutor(len(self._workers))
        self._idle: SimpleQueue[Worker] = SimpleQueue()
        for worker in self._workers:
            self._idle.put(worker)
        self._made: dict[Hashable, tuple[Future[list[Optional[Compiled]]], int]] = {}

    def __enter__(self) -> "Compiler":
        return self

    def __exit__(self, *exception: object) -> None:
        self._threads.shutdown(cancel_futures=True)
        for worker in self._workers:
            worker.__exit__(*exception)

    def start(self, launches: Iterable[Item]) -> None:
        """Compile in the background, in this order."""
        new = {one.binary(): one for one in launches if one.binary() not in self._made}
        for _, same_architecture in itertools.groupby(new.values(), lambda one: one.architecture):
            rest = list(same_architecture)
            while rest:
                chunk, rest = rest[: self._TOGETHER], rest[self._TOGETHER :]
                future = self._threads.submit(self._compile, chunk)
                self._made |= {one.binary(): (future, i) for i, one in enumerate(chunk)}

    def results(self, launches: Iterable[Item]) -> list[Result]:
        launches = list(launches)
        self.start(launches)
        made = (self._made[one.binary()] for one in launches)
        return [Result(one, future.result()[i]) for one, (future, i) in zip(launches, made)]

    def _compile(self, chunk: list[Item]) -> list[Optional[Compiled]]:
        worker = self._idle.get()
        try:
            return self._compile_with(worker, chunk)
        finally:
            self._idle.put(worker)

    def _compile_with(self, worker: Worker, chunk: list[Item]) -> list[Optional[Compiled]]:
        try:
            return list(worker.compile([one.launch for one in chunk], chunk[0].architecture))
        except CompilerCrash:
            if len(chunk) == 1:
                return [None]
            return [made for one in chunk for made in self._compile_with(worker, [one])]


def offenders(results: list[Result], wrong: Callable[[Item, Compiled], bool]) -> list[str]:
    """The launches for which ``wrong`` holds, readable, without those that exceptions.py excuses."""
    return [
        f"{item.name} on {item.architecture}: {item.entry()}: {compiled}"
        for item, compiled in results
        if compiled is not None and wrong(item, compiled) and not excused(wrong.__name__, item)
    ]


def faults(results: list[Result]) -> list[str]:
    """All that the compiler crashed on, and all that a check finds fault with."""
    crashed = [f"{item.name} on {item.architecture}: the compiler crashed" for item, made in results if made is None]
    return crashed + [
        one for check in (spills, too_large, wrong_units, narrow, races) for one in offenders(results, check)
    ]


def spills(_: Item, made: Compiled) -> bool:
    return made.spilled > 0 or made.local_accesses > 0


def races(_: Item, made: Compiled) -> bool:
    """Registers are written that an asynchronous product may still read."""
    return bool(made.hazards)


def too_large(item: Item, made: Compiled) -> bool:
    """No multiprocessor can hold the program, or a grid cannot have so many."""
    return (
        made.shared > shared_memory(item.architecture)
        or made.tensor_memory > _TENSOR_MEMORY
        or made.warps * lanes(item.architecture) > _THREADS
        or resident_programs(item.architecture, made) < 1
        or any(size > limit for size, limit in zip(item.launch.grid, _GRID))
    )


def shared_memory(architecture: str) -> int:
    """Bytes that a program may use, on each of the GPUs that take the same tiles."""
    tiled = tiles.nearest(architecture)
    return min(gpu.program_shared_memory for gpu in GPUS.values() if tiles.nearest(gpu.architecture) == tiled)


def resident_programs(architecture: str, made: Compiled) -> int:
    """How many programs share a multiprocessor, as far as its registers, threads and shared memory go."""
    gpu = _gpu(architecture)
    width = lanes(architecture)
    registers = gpu.registers // (_SCHEDULERS * width)  # of a lane; warps get multiples of 8
    warps = _SCHEDULERS * (registers // (-(-made.registers // 8) * 8))
    reserved = _RESERVED if architecture.startswith("sm_") else 0
    return min(
        warps // made.warps, gpu.threads // (width * made.warps), gpu.shared_memory // max(made.shared + reserved, 1)
    )


def _gpu(architecture: str) -> Gpu:
    """A GPU of the architecture, or else of the one whose tiles it takes."""
    names = [gpu.architecture for gpu in GPUS.values()]
    name = architecture if architecture in names else tiles.nearest(architecture)
    return next(gpu for gpu in GPUS.values() if gpu.architecture == name)


def wrong_units(item: Item, made: Compiled) -> bool:
    """Another tensor-core instruction than the expected one, or none; or one where there is nothing to multiply."""
    expected = expected_unit(item)
    if expected is None:
        return bool(made.units)
    return not made.units or not all(re.fullmatch(expected, name) for name in made.units)


def expected_unit(item: Item) -> Optional[str]:
    """A pattern of its name. None: there is no product, or no tensor core for full-precision float32."""
    # The Gram kernel does not go through TF32.
    precision = "ieee" if item.precision == "tf32" and "BP" in item.launch.constants else item.precision
    if not multiplies(item.launch):
        return None
    family = next(name for name in _UNITS if item.architecture.startswith(name))
    if family == "sm_90" and item.launch.constants.get("FLIP") and item.launch.constants["BN"] < _WGMMA_ROWS:
        family = "sm_"  # the other way round its columns are the rows
    assert precision == "ieee" or precision in _UNITS[family], f"no {precision} on {item.architecture}"
    return _UNITS[family].get(precision)


def narrow(item: Item, made: Compiled) -> bool:
    """A main loop that loads the image or the weight less than 16 bytes at a time, though all threads find as much.

    Unrolled, it may have the narrow loads of what comes after it among its own, the scale and the shift; then only
    copies to shared memory are looked at. A kernel without products is all loop. In a kernel with tensor descriptors,
    the copy engine has to bring both, and no thread anything to shared memory.
    """
    constants = item.launch.constants
    if any(hasattr(value, "block_shape") for value in item.launch.args):
        return made.descriptor_loads < 2 or made.thread_copies > 0
    item_size = {"fp16": 2, "bf16": 2, "int8": 1, "fp8": 1}.get(item.precision, 4)
    if constants.get("C", constants.get("K", 16)) * item_size % 16 != 0:
        return False
    if made.tiny_loads > 0:
        return True
    operands = [constants[name] * constants["BK"] * item_size for name in ("BM", "BN") if "BK" in constants]
    enough = 16 * made.warps * lanes(item.architecture)
    if made.loop.wide_loads == 0:
        return not operands or max(operands) >= enough
    if operands and min(operands) < enough:
        return False
    if constants.get("PROLOGUE") or "BL" in constants:
        return False  # its scale and shift, or those of a chain's first convolution, are a few numbers for each thread
    return (made.loop.narrow_loads if made.loop.rolled else made.narrow_copies) > 0
