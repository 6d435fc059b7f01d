"""What must hold for every launch that is compiled: each check is a function of the launch and of what came out."""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import NamedTuple, Optional

from resnet_fast.kernels.triton import tiles
from tests.aot.layers import Launch
from tests.aot.offline import Compiled, CompilerCrash, Worker, lanes

# Bytes of shared memory that one program may use, from the CUDA programming guide and AMD's CDNA 3 and 4 manuals. The
# tiles of sm_80 also serve sm_86, sm_89 and sm_120, which have 101376 instead of 166912.
SHARED_MEMORY = {"sm_80": 101376, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536, "gfx950": 163840}
REGISTERS = {"sm": 65536, "gfx": 4 * 512 * 64}  # of a multiprocessor; of the 4 SIMDs of a compute unit, 64 lanes wide


class Result(NamedTuple):
    launch: Launch
    compiled: Optional[Compiled]  # None: the compiler crashed


class Compiler:
    """Compiles many launches, one on each processor at a time; a crash is a result."""

    def __init__(self) -> None:
        self._workers = [Worker() for _ in os.sched_getaffinity(0)]

    def __enter__(self) -> "Compiler":
        return self

    def __exit__(self, *exception: object) -> None:
        for worker in self._workers:
            worker.__exit__(*exception)

    def results(self, launches: Iterable[Launch]) -> list[Result]:
        idle: SimpleQueue[Worker] = SimpleQueue()
        for worker in self._workers:
            idle.put(worker)

        def compiled(one: Launch) -> Result:
            worker = idle.get()
            try:
                return Result(one, worker.compile(one.plan, one.architecture))
            except CompilerCrash:
                return Result(one, None)
            finally:
                idle.put(worker)

        with ThreadPoolExecutor(len(self._workers)) as threads:
            return list(threads.map(compiled, launches))


def offenders(results: list[Result], wrong: Callable[[Launch, Compiled], bool]) -> list[str]:
    """The launches for which ``wrong`` holds, readable."""
    return [
        f"{item.name} {item.plan.kernel.__name__} {item.plan.constants}: {compiled}"
        for item, compiled in results
        if compiled is not None and wrong(item, compiled)
    ]


def spills(_: Launch, made: Compiled) -> bool:
    return made.spilled > 0 or made.local_accesses > 0


def too_large(item: Launch, made: Compiled) -> bool:
    """For a multiprocessor."""
    registers = REGISTERS["gfx" if item.architecture.startswith("gfx") else "sm"]
    return (
        made.shared > SHARED_MEMORY[tiles.nearest(item.architecture)]
        or made.registers * made.warps * lanes(item.architecture) > registers
    )


def wrong_units(item: Launch, made: Compiled) -> bool:
    """Tensor cores where there is no matrix product, or none where there is, in a precision that they have."""
    constants = item.plan.constants
    product = "BK" in constants or "BP" in constants
    # The Gram kernel does not go through TF32.
    exact = item.precision == "ieee" or (item.precision == "tf32" and "BP" in constants)
    return (made.tensor_core > 0) != (product and (not exact or item.architecture.startswith("gfx")))


def narrow(item: Launch, made: Compiled) -> bool:
    """A load of single halves, or a copy of the image or the weight to shared memory of less than 16 bytes."""
    constants = item.plan.constants
    item_size = {"fp16": 2, "bf16": 2, "int8": 1, "fp8": 1}.get(item.precision, 4)
    if constants.get("C", constants.get("K", 16)) * item_size % 16 != 0:
        return False
    if "BK" in constants and constants["BN"] * constants["BK"] * item_size < 16 * made.warps * lanes(item.architecture):
        return False  # less than 16 bytes for each thread
    # A prologue's scale and shift are a few numbers for each thread.
    copies = 0 if constants.get("PROLOGUE") else made.narrow_copies
    return made.wide_loads == 0 or copies > 0 or made.tiny_loads > 0
