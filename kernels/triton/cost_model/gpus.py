"""What the makers say of the GPUs that the kernels are built for: rates and sizes, for models of time. Not measured.

Sources: NVIDIA's A100, H100, H200 and B200 data sheets, the Ampere GA102, Ada AD102 and RTX Blackwell white papers, the
table of technical specifications in the CUDA programming guide; AMD's MI300X and MI355X data sheets and the CDNA 3 and
CDNA 4 ISA manuals. Rates are dense, at boost clock, and of products that are summed in float32 (GeForce cards do those
at half the rate that their advertisements give).
"""

from typing import NamedTuple, Optional

_KIB, _MIB = 1024, 1024**2


class Gpu(NamedTuple):
    """One GPU.

    architecture: "sm_90". multiprocessors: compute units on AMD. clock: GHz. bandwidth: of its memory, GB/s. l2: bytes
    of its last cache. half, tf32, float32, fp8, int8: 10^12 operations a second, a multiplication and an addition being
    two; half is float16 and bfloat16. None: it has no such instruction. Per multiprocessor: shared_memory, bytes;
    registers, of 32 bits; threads. program_shared_memory: bytes that one program may use.
    """

    name: str
    architecture: str
    multiprocessors: int
    clock: float
    bandwidth: float
    l2: int
    half: float
    tf32: Optional[float]
    float32: float
    fp8: Optional[float]
    int8: float
    shared_memory: int
    program_shared_memory: int
    registers: int = 65536
    threads: int = 2048


GPUS: dict[str, Gpu] = {
    "a100": Gpu(
        "NVIDIA A100 SXM 80 GB", "sm_80", 108, 1.41, 2039, 40 * _MIB, 312, 156, 19.5, None, 624, 164 * _KIB, 166912
    ),
    "rtx3090": Gpu(
        "NVIDIA GeForce RTX 3090", "sm_86", 82, 1.695, 936, 6 * _MIB, 71, 35.6, 35.6, None, 284, 100 * _KIB, 101376,
        threads=1536,
    ),
    "rtx4090": Gpu(
        "NVIDIA GeForce RTX 4090", "sm_89", 128, 2.52, 1008, 72 * _MIB, 165.2, 82.6, 82.6, 330.3, 660.6, 100 * _KIB,
        101376, threads=1536,
    ),
    "h100": Gpu(
        "NVIDIA H100 SXM", "sm_90", 132, 1.83, 3352, 50 * _MIB, 989.4, 494.7, 66.9, 1978.9, 1978.9, 228 * _KIB, 232448
    ),
    "h200": Gpu(
        "NVIDIA H200 SXM", "sm_90", 132, 1.83, 4800, 50 * _MIB, 989.4, 494.7, 66.9, 1978.9, 1978.9, 228 * _KIB, 232448
    ),
    "b200": Gpu(
        "NVIDIA B200", "sm_100", 148, 1.85, 8000, 126 * _MIB, 2250, 1125, 75, 4500, 4500, 228 * _KIB, 232448
    ),
    "rtx5090": Gpu(
        "NVIDIA GeForce RTX 5090", "sm_120", 170, 2.407, 1792, 96 * _MIB, 209.5, 104.8, 104.8, 419, 838, 100 * _KIB,
        101376, threads=1536,
    ),
    "mi300x": Gpu(
        "AMD Instinct MI300X", "gfx942", 304, 2.1, 5300, 256 * _MIB, 1307.4, 653.7, 163.4, 2614.9, 2614.9, 64 * _KIB,
        65536, registers=4 * 512 * 64,
    ),
    "mi355x": Gpu(
        "AMD Instinct MI355X", "gfx950", 256, 2.4, 8000, 256 * _MIB, 2516.6, None, 157.3, 5033.2, 5033.2, 160 * _KIB,
        163840, registers=4 * 512 * 64,
    ),
}  # fmt: skip
"""By the short name that commands take; for each architecture, the first is the one that its tiles are made for."""
