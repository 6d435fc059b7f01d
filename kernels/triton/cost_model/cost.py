"""How long a tile takes, by a static model, and whether it fits its GPU at all.

The model is not calibrated: nothing in it was measured on a GPU. It is made of what the makers say (gpus.py), of what
the compiler makes of the kernels (``Code``), and of the assumptions below. It is good for putting tiles in an order
where no GPU is at hand, not for predicting a time.

A convolution is a product of ``[rows, taps * channels]`` with ``[taps * channels, columns]``. One program makes a tile
of the result in steps of ``reduction`` elements of the inner dimension. Per step, a multiprocessor is busy with

    mma     rows * columns * reduction multiplications, at the rate of its tensor cores
    issue   the instructions of all warps, one a cycle on each of the four schedulers
    shared  bytes copied to shared memory and read from there by the tensor cores, 128 a cycle
    l2      bytes of both operands that come from the second-level cache

and the slowest of these is what the step takes, if enough programs share the multiprocessor, and a tenth of the others,
for nothing overlaps perfectly. Where warps are specialised, the finishing of a tile is one more of them. A program that
runs alone also waits at a barrier in every step, and for its loads, which take a latency and are asked for ``stages -
1`` steps ahead. To that come the filling of the pipeline and the finishing of the tile, which other programs hide as
well. The launch takes as long as the multiprocessor with the most programs, so that a last wave that is nearly empty
counts in full; and it takes as long as memory needs for the bytes that must move, if that is longer.

How often a product reads shared memory depends on the instruction. wgmma (sm_90) and tcgen05 (sm_100) read their
operands from there, 64 and 128 rows at a time; mma (other NVIDIA) and mfma (AMD) read them into the registers of every
warp that needs them.
"""

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from resnet_fast.kernels.triton.cost_model.gpus import Gpu
from resnet_fast.kernels.triton.cost_model.tile import Tile

KINDS = ("1x1", "rxs", "strided", "grouped", "stem")
"""Of convolutions: gemm.py's; and conv.py's with stride 1, with another stride, with groups, with few channels."""

# Assumptions. Bytes a cycle and multiprocessor: shared memory's is documented; of L2 the A100 white paper gives 5120
# bytes a cycle for 108 multiprocessors, which is taken for all data-centre GPUs, and a third of it for GeForce cards.
_SHARED_BANDWIDTH = 128.0
_L2_BANDWIDTH = 5120 / 108
_GEFORCE = ("sm_86", "sm_89", "sm_120")
_LATENCY = 800.0  # cycles from asking memory for a tile to having it in shared memory
_BARRIER = 50.0  # cycles in which the warps of a program wait for each other, in every step
_START = 500.0  # cycles from a program's start to its first load
_LAUNCH = 2e-6  # seconds from one kernel of a CUDA graph to the next
_OVERLAP_LOSS = 0.1  # share of what overlaps with something longer that is not hidden
_FINISH = 6.0  # instructions for each number of a finished tile: scale, shift, ReLU, conversion, store
_FINISH_MORE = 4.0  # for its residual, or its statistics
_RESERVED = 1024  # bytes of shared memory that NVIDIA's driver takes for every program
_SCHEDULERS = 4
_MOST_PROGRAMS = 32  # on one multiprocessor
_TENSOR_MEMORY = 512  # columns, of sm_100's accumulators

_BYTES = {"half": 2, "tf32": 4, "ieee": 4}


class Problem(NamedTuple):
    """``groups`` products of ``[rows, taps * channels] @ [taps * channels, columns]``, and what is asked beside.

    kind: one of KINDS. precision: "half", "tf32" or "ieee". prologue: x goes through batch norm and ReLU on its way in.
    statistics: the result's are left in a workspace.
    """

    precision: str
    rows: int
    columns: int
    channels: int
    groups: int
    kind: str
    taps: int = 1
    residual: bool = False
    prologue: bool = False
    statistics: bool = False

    @property
    def inner(self) -> int:
        """Elements of the inner dimension."""
        return self.taps * self.channels

    @property
    def family(self) -> str:
        """The family of kernels, on which depends what the compiler makes of a tile."""
        return "gemm" if self.kind == "1x1" else "conv"


class Code(NamedTuple):
    """The compiler's output for an architecture, in short: instructions that a warp issues per step of the main loop.

    step: whatever the tile. x, w: for each 16 bytes that a thread copies of the image, of the weight. product: for each
    of the tensor cores' instructions, as ``products`` counts them. prologue: for each element of the image that a
    thread holds. registers, registers_accumulator: of a thread, in all and for each of its accumulators.
    """

    step: float
    x: float
    w: float
    product: float
    prologue: float
    registers: float
    registers_accumulator: float


class Cost(NamedTuple):
    """Cycles of the GPU's clock, of which the first six are what each resource would take alone, for the whole launch.

    latency: waiting and finishing that nothing hides. violations: the limits that the tile breaks, see ``violations``.
    programs, waves: of the launch. occupancy: programs that share a multiprocessor.
    """

    cycles: float
    mma: float
    issue: float
    shared: float
    l2: float
    memory: float
    latency: float
    launch: float
    programs: int
    occupancy: int
    waves: float
    violations: tuple[str, ...]

    @property
    def bound(self) -> str:
        """The resource that takes longest."""
        return max(("mma", "issue", "shared", "l2", "memory", "latency"), key=lambda name: getattr(self, name))

    def microseconds(self, gpu: Gpu) -> float:
        return self.cycles / gpu.clock / 1e3


def served(problem: Problem, tile: Tile) -> Tile:
    """The tile as forward.py launches it, which has a simpler kernel or fewer parts where there is no choice.

    Descriptors serve inference at stride 1 without groups, of pixels that are multiples of 16 bytes (descriptor.py),
    and are not cut in parts.
    """
    kernel, parts = tile.kernel, parts_of(_steps(problem, tile), tile.parts)
    training = problem.prologue or problem.statistics
    whole_pixels = problem.channels * _BYTES[problem.precision] % 16 == 0
    if problem.kind not in ("1x1", "rxs") or training or problem.precision == "ieee" or not whole_pixels:
        kernel = "pointers"
    if training or kernel != "pointers":
        parts = 1
    return tile._replace(kernel=kernel, parts=parts)


def _steps(problem: Problem, tile: Tile) -> int:
    """Of the main loop, over taps and channels."""
    return problem.taps * -(-problem.channels // tile.reduction)


def parts_of(steps: int, wanted: int) -> int:
    """Into how many equal parts (but for the last) so many steps are cut when so many are wanted."""
    return -(-steps // -(-steps // min(wanted, steps)))


def predict(gpu: Gpu, problem: Problem, tile: Tile, codes: Mapping[str, Code]) -> Cost:
    """The model's opinion. codes: by kernel family, of the GPU's architecture."""
    code = codes[problem.family]
    tile = served(problem, tile)
    size = _BYTES[problem.precision]
    row_tiles, column_tiles = -(-problem.rows // tile.rows), -(-problem.columns // tile.columns)
    programs = problem.groups * row_tiles * column_tiles * tile.parts
    steps = -(-_steps(problem, tile) // tile.parts)

    specialised = tile.kernel == "specialised"
    issuing = 2 if specialised else tile.warps  # one warp copies, one multiplies, and the others finish tiles
    per_step = {
        "mma": _mma(gpu, problem.precision, tile),
        "issue": instructions(gpu, problem, tile, code) * issuing * _issue_cycles(gpu) / _SCHEDULERS,
        "shared": _shared_bytes(gpu, problem, tile, size) / _SHARED_BANDWIDTH,
        "l2": (tile.rows + tile.columns) * tile.reduction * size / _l2_bandwidth(gpu),
    }
    numbers = tile.rows * tile.columns / (tile.warps * _lanes(gpu))  # of a thread
    more = problem.residual + 2 * problem.statistics
    finish = numbers * (_FINISH + more * _FINISH_MORE) * tile.warps * _issue_cycles(gpu) / _SCHEDULERS

    occupancy = max(1, _occupancy(gpu, problem, tile, code))
    most = -(-programs // gpu.multiprocessors)
    step = _together(per_step.values())
    busy = most * (_together((steps * step, finish)) if specialised else steps * step + finish)
    # A step's operands are under way while those of ``stages - 1`` steps before it are used.
    loading = (_LATENCY + per_step["l2"]) / max(1, tile.stages - 1)
    if specialised:  # nobody waits for all warps
        alone = _together((steps * max(step, loading), finish))
    else:
        alone = steps * max(step + _BARRIER, loading) + finish
    waiting = _START + _LATENCY * (2 if more else 1)
    if tile.kernel != "pointers":  # loads of the next tile go on while one is finished
        chain = waiting + -(-most // occupancy) * alone
    else:
        chain = -(-most // occupancy) * (waiting + alone)
    on_chip = max(busy, chain)
    memory = _memory_bytes(problem, tile, size) / (gpu.bandwidth / gpu.clock)
    launch = _LAUNCH * gpu.clock * 1e9 * (2 if tile.parts > 1 else 1)
    return Cost(
        cycles=_together((on_chip, memory)) + launch,
        **{name: cycles * most * steps for name, cycles in per_step.items()},
        memory=memory,
        latency=on_chip - most * steps * step,
        launch=launch,
        programs=programs,
        occupancy=occupancy,
        waves=programs / (gpu.multiprocessors * occupancy),
        violations=violations(gpu, problem, tile, code),
    )


def _together(cycles: Iterable[float]) -> float:
    """Of resources that are busy at the same time."""
    cycles = list(cycles)
    return max(cycles) + _OVERLAP_LOSS * (sum(cycles) - max(cycles))


def violations(gpu: Gpu, problem: Problem, tile: Tile, code: Code) -> tuple[str, ...]:
    """Names of the limits that a program breaks: "shared memory", "registers", "tensor memory", "threads".

    An estimate, from formulas; the compiler has the last word (tests/aot).
    """
    threads = tile.warps * _lanes(gpu)
    registers = register_count(gpu, tile, code)
    found = {
        "shared memory": shared_memory(gpu, problem.precision, tile) > gpu.program_shared_memory,
        "registers": registers > _most_registers(gpu) or registers * threads > gpu.registers,
        "tensor memory": _unit(gpu) == "tcgen05" and _tensor_memory(tile) > _TENSOR_MEMORY,
        "threads": threads > 1024,
    }
    return tuple(name for name, broken in found.items() if broken)


def shared_memory(gpu: Gpu, precision: str, tile: Tile) -> int:
    """Bytes that a program takes. Tensor cores that read shared memory hold on to one more stage than those that do
    not."""
    operands = (tile.rows + tile.columns) * tile.reduction * _BYTES[precision]
    held = (
        tile.stages if _unit(gpu) in ("wgmma", "tcgen05") and not _scalar(gpu, precision) else max(1, tile.stages - 1)
    )
    # The finished tile changes its layout there, from that of the tensor cores to that of memory.
    return max(held * operands, tile.rows * tile.columns * _BYTES[precision] // (2 if tile.split else 1))


def register_count(gpu: Gpu, tile: Tile, code: Code) -> int:
    """Registers of a thread."""
    accumulators = tile.rows * tile.columns / (tile.warps * _lanes(gpu))
    return math.ceil(code.registers + code.registers_accumulator * accumulators)


def instructions(gpu: Gpu, problem: Problem, tile: Tile, code: Code) -> float:
    """Instructions that each warp issues in a step of the main loop."""
    threads = tile.warps * _lanes(gpu)
    size = _BYTES[problem.precision]
    x = tile.rows * tile.reduction / threads
    w = tile.columns * tile.reduction / threads
    issued = code.step + code.product * products(gpu, problem.precision, tile)
    if _scalar(gpu, problem.precision):
        # A thread multiplies m by n numbers, which it reads from shared memory four at a time.
        accumulators = tile.rows * tile.columns // threads
        m = 1 << (accumulators.bit_length() // 2)
        issued = code.step + tile.reduction * (accumulators + (m + accumulators / m) / 4)
    if tile.kernel == "pointers":  # else copies of whole tiles, by one thread
        issued += code.x * x * size / 16 + code.w * w * size / 16
    return issued + (code.prologue * x if problem.prologue else 0.0)


def products(gpu: Gpu, precision: str, tile: Tile) -> float:
    """Of a step, in instructions of each warp: wgmma and tcgen05 take 64 or 128 rows and up to 256 columns, mma 16 and
    8, mfma 32 and 32; 32 bytes of the inner dimension."""
    depth = tile.reduction * _BYTES[precision] / 32
    unit = _unit(gpu)
    if unit == "wgmma":
        return depth * (tile.rows / 64) * math.ceil(tile.columns / 256) / (tile.warps / 4)
    if unit == "tcgen05":
        return depth * math.ceil(tile.rows / 128) * math.ceil(tile.columns / 256)
    rows, columns = (32, 32) if unit == "mfma" else (16, 8)
    return depth * (tile.rows / rows) * (tile.columns / columns) / tile.warps


def _mma(gpu: Gpu, precision: str, tile: Tile) -> float:
    """Cycles of one step."""
    rate = {"half": gpu.half, "tf32": gpu.tf32, "ieee": gpu.float32}[precision]
    assert rate is not None, f"{gpu.name} has no {precision}"
    each = rate * 1e12 / 2 / (gpu.multiprocessors * gpu.clock * 1e9)  # multiplications a cycle
    # Of tcgen05's 128 lanes, 64 rows use half.
    rows = max(128, tile.rows) if _unit(gpu) == "tcgen05" and not _scalar(gpu, precision) else tile.rows
    return rows * tile.columns * tile.reduction / each


def _l2_bandwidth(gpu: Gpu) -> float:
    return _L2_BANDWIDTH / (3 if gpu.architecture in _GEFORCE else 1)


def _shared_bytes(gpu: Gpu, problem: Problem, tile: Tile, size: int) -> float:
    """Bytes of a step to and from shared memory."""
    x, w = tile.rows * tile.reduction * size, tile.columns * tile.reduction * size
    unit = "mma" if _scalar(gpu, problem.precision) else _unit(gpu)
    written, read = x + w, 0.0
    if unit == "wgmma":
        along_rows = min(max(1, tile.warps // 4), max(1, tile.rows // 64))
        x_reads, read = max(1, tile.warps // 4) / along_rows, w * max(1, tile.rows // 64)
    elif unit == "tcgen05":
        x_reads, read = 1.0, w * max(1, tile.rows // 128)
    else:
        along_rows, along_columns = _warps(tile, (32, 32) if unit == "mfma" else (16, 8))
        x_reads, read = along_columns, w * along_rows
    if problem.prologue:  # out to registers and back
        written += x
        read += x
    return written + read + x_reads * x


def _warps(tile: Tile, shape: tuple[int, int]) -> tuple[int, int]:
    """How many warps stand side by side along the rows and the columns, each on a share that is nearly square."""
    rows = columns = 1
    while rows * columns < tile.warps:
        more_rows = tile.rows / shape[0] / rows >= tile.columns / (2 * shape[1]) / columns
        if more_rows and rows < tile.rows / shape[0]:
            rows *= 2
        else:
            columns *= 2
    return rows, columns


def _memory_bytes(problem: Problem, tile: Tile, size: int) -> float:
    """Bytes that must move: each pixel that is needed, the weight and the result once; a split's sums twice."""
    # A strided 1x1 skips pixels, a larger kernel needs them all.
    pixels = problem.rows * (4 if problem.kind in ("strided", "stem") and problem.taps > 1 else 1)
    results = problem.rows * problem.columns * problem.groups
    inputs = pixels * problem.channels if problem.kind != "stem" else pixels * 4
    weight = problem.inner * problem.columns
    moved = (inputs + weight) * problem.groups + results * (2 if problem.residual else 1)
    return moved * size + (2 * 4 * tile.parts * results if tile.parts > 1 else 0)


def _occupancy(gpu: Gpu, problem: Problem, tile: Tile, code: Code) -> int:
    """Programs that share a multiprocessor; 0 if not one fits."""
    threads = tile.warps * _lanes(gpu)
    shared = shared_memory(gpu, problem.precision, tile) + (0 if _amd(gpu) else _RESERVED)
    # The file is handed out in units of 8 registers a thread.
    registers = min(-(-register_count(gpu, tile, code) // 8) * 8, _most_registers(gpu))
    limits = [gpu.shared_memory // shared, gpu.registers // (registers * threads), gpu.threads // threads]
    if tile.kernel == "specialised":
        limits.append(1)  # with its warps for copies and products, it takes all registers
    if _unit(gpu) == "tcgen05":
        limits.append(_TENSOR_MEMORY // _tensor_memory(tile))
    return min(*limits, _MOST_PROGRAMS)


def _tensor_memory(tile: Tile) -> int:
    """Columns, which are handed out in powers of two from 32 on."""
    return max(32, tile.columns * max(1, tile.rows // 128))


def _unit(gpu: Gpu) -> str:
    """The instruction for products."""
    if _amd(gpu):
        return "mfma"
    return {"sm_90": "wgmma", "sm_100": "tcgen05"}.get(gpu.architecture, "mma")


def _scalar(gpu: Gpu, precision: str) -> bool:
    """No tensor cores: NVIDIA's have no full float32."""
    return precision == "ieee" and not _amd(gpu)


def _amd(gpu: Gpu) -> bool:
    return gpu.architecture.startswith("gfx")


def _lanes(gpu: Gpu) -> int:
    return 64 if _amd(gpu) else 32


def _issue_cycles(gpu: Gpu) -> int:
    """AMD's SIMD units are 16 lanes wide and take four cycles for a wave's instruction."""
    return 4 if _amd(gpu) else 1


def _most_registers(gpu: Gpu) -> int:
    return 512 if _amd(gpu) else 255
