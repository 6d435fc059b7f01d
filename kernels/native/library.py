"""The compiled kernels, through ctypes (which releases the GIL during a call). ``abi.py`` has their interface.

The library is one file beside this one, made by ``setup.py`` where there is a C++ compiler. It is linked to the
OpenMP runtime by the name that torch ships its own under: torch is imported first, so both share one pool of threads.
"""

import contextlib
import ctypes
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, Optional

import torch  # before the library is loaded: see above

from resnet_fast.kernels.native import abi
from resnet_fast.kernels.native.abi import ALGORITHMS, Op, Pass, Pieces, Shape, Weight

LIBRARY = Path(__file__).with_name("_native.so")

_library: Optional[ctypes.CDLL] = None
_reason: Optional[str] = None


def unavailable() -> Optional[str]:
    """Why the compiled kernels cannot be used, or None. Loads them at the first call.

    Raises:
        ValueError: ``RESNET_FAST_ISA`` names no compiled variant that this CPU runs.
    """
    global _library, _reason
    if _library is None and _reason is None:
        if not LIBRARY.exists():
            _reason = "the compiled kernels are not there: the package was installed without a C++ compiler"
            return _reason
        try:
            library = ctypes.CDLL(str(LIBRARY))
        except OSError as error:
            _reason = f"the compiled kernels cannot be loaded: {error}"
            return _reason
        if library.rf_abi() != abi.ABI:
            found = library.rf_abi()
            _reason = f"the compiled kernels have interface {found}, expected {abi.ABI}: install the package again"
            return _reason
        abi.declare(library)
        wanted = os.environ.get("RESNET_FAST_ISA")
        if wanted:
            _select(library, wanted, f"RESNET_FAST_ISA is {wanted!r}, expected one that this CPU runs:")
        _library = library
    return _reason


def _select(library: ctypes.CDLL, wanted: str, complaint: str) -> None:
    usable = _usable(library)
    if wanted not in usable:
        raise ValueError(f"{complaint} {', '.join(usable)}")
    library.rf_select_variant(_variant_names(library).index(wanted))


def _usable(library: ctypes.CDLL) -> list[str]:
    return [name for i, name in enumerate(_variant_names(library)) if library.rf_variant_usable(i)]


def _variant_names(library: ctypes.CDLL) -> list[str]:
    return [library.rf_variant_name(i).decode() for i in range(library.rf_variants())]


def _loaded() -> ctypes.CDLL:
    reason = unavailable()
    if _library is None:
        raise RuntimeError(reason)
    return _library


def usable_variants() -> list[str]:
    """The instruction sets that the kernels are compiled for and this CPU runs, slowest first."""
    return _usable(_loaded())


def variant() -> str:
    """The instruction set in use."""
    library = _loaded()
    return _variant_names(library)[library.rf_selected_variant()]


def select(variant: str) -> None:
    """Use another of ``usable_variants()`` from now on, for tests. Packs are for one of them: ``packing.clear_all``.

    Raises:
        ValueError: this CPU does not run it, or there is none of that name.
    """
    _select(_loaded(), variant, f"variant is {variant!r}, expected one of")


def supports(shape: Shape, algorithm: str) -> bool:
    return bool(_loaded().rf_supports(shape, ALGORITHMS.index(algorithm)))


def products(shape: Shape, algorithm: str) -> int:
    """How many multiply-adds each input channel has with each output channel of its group."""
    return _loaded().rf_products(shape, ALGORITHMS.index(algorithm))


def packed_bytes(shape: Shape, algorithm: str) -> int:
    """How long the weights of ``shape`` are in the layout that the algorithm reads."""
    return _loaded().rf_packed_bytes(shape, ALGORITHMS.index(algorithm))


def pack(
    shape: Shape,
    algorithm: str,
    weight: torch.Tensor,
    scale: Optional[torch.Tensor] = None,
    backward: bool = False,
    threads: int = 1,
    out: Optional[torch.Tensor] = None,
) -> torch.Tensor:
    """The weights of ``shape`` as the algorithm reads them: bytes, in ``out`` if that is given and is long enough.

    ``weight`` is ``[K, C/groups, R, S]`` in any layout and floating-point dtype, to be multiplied, in float64, by
    ``scale [K]``. With ``backward`` the shape is that of the convolution that takes a gradient from K channels back to
    C, and reads the taps from the last one to the first.
    """
    number = ALGORITHMS.index(algorithm)
    size = packed_bytes(shape, algorithm)
    packed = out if out is not None and out.numel() >= size else torch.empty(size, dtype=torch.uint8, device="cpu")
    if weight.dtype not in (torch.float32, torch.float64):
        weight = weight.float()
    scale = None if scale is None else scale.to(torch.float64).contiguous()
    view = weight_view(weight, shape.groups, backward)
    view.scale = None if scale is None else scale.data_ptr()
    _loaded().rf_pack(shape, number, view, packed.data_ptr(), threads)
    return packed


def weight_view(weight: torch.Tensor, groups: int, backward: bool = False) -> Weight:
    """Where the elements of a float32 or float64 weight are, without a scale; ``backward`` as for ``pack``."""
    k, _, r, s = weight.shape
    k_stride, c_stride, r_stride, s_stride = weight.stride()
    group, data, is_double = k // groups * k_stride, weight.data_ptr(), weight.dtype == torch.float64
    if not backward:
        return Weight(data, None, group, k_stride, c_stride, r_stride, s_stride, is_double, 0)
    data += ((r - 1) * r_stride + (s - 1) * s_stride) * weight.element_size()
    return Weight(data, None, group, c_stride, k_stride, -r_stride, -s_stride, is_double, 0)


def peak(threads: int) -> float:
    """Floating-point operations per second of multiply-adds on registers: what no kernel can exceed. Takes 0.1 s."""
    return _loaded().rf_peak(threads)


Vectors = Optional[tuple[torch.Tensor, torch.Tensor]]  # a prologue's scale and shift, or none


def wgrad_supports(shape: Shape, algorithm: str) -> bool:
    """Whether ``wgrad`` does."""
    return bool(_loaded().rf_wgrad_supports(shape, ALGORITHMS.index(algorithm)))


def wgrad(
    shape: Shape, algorithm: str, dy: torch.Tensor, x: torch.Tensor, prologue: Vectors, dw: torch.Tensor, threads: int
) -> None:
    """Write the gradient of a convolution's weight to ``dw``. All are float32, and NHWC or KRSC in memory."""
    pointers = (dy.data_ptr(), x.data_ptr(), *_addresses(prologue), dw.data_ptr())
    _loaded().rf_wgrad(shape, ALGORITHMS.index(algorithm), *pointers, threads)


def gram(
    shape: Shape, x: torch.Tensor, prologue: Vectors, mean: torch.Tensor, covariance: torch.Tensor, threads: int
) -> None:
    """Write the mean and covariance of the input pixels that a 1x1 convolution reads. All are float32, ``x`` NHWC."""
    pointers = (x.data_ptr(), *_addresses(prologue), mean.data_ptr(), covariance.data_ptr())
    _loaded().rf_gram(shape, *pointers, threads)


def _addresses(vectors: Vectors) -> tuple[Optional[int], Optional[int]]:
    return (None, None) if vectors is None else (vectors[0].data_ptr(), vectors[1].data_ptr())


def digest(pieces: "ctypes.Array[Pieces]", threads: int) -> int:
    """One number for the bytes of all pieces. Their memory must be readable."""
    return _loaded().rf_digest(pieces, len(pieces), threads)


class Timing(NamedTuple):
    """An operation that ran."""

    kind: int
    shape: Shape
    algorithm: str  # of a convolution
    seconds: float


_recorder: Optional[list[Timing]] = None


def run(ops: "ctypes.Array[Op]", count: int, buffers: "ctypes.Array[ctypes.c_void_p]", threads: int) -> None:
    """Run ``count`` operations, in order, on ``threads`` threads of torch's pool."""
    if _recorder is None:
        _loaded().rf_run(ops, count, buffers, threads, None)
        return
    seconds = (ctypes.c_double * count)()
    _loaded().rf_run(ops, count, buffers, threads, seconds)
    for op, second in zip(ops, seconds):
        _recorder.append(Timing(op.kind, Shape.from_buffer_copy(op.shape), ALGORITHMS[op.algorithm], second))


def run_pass(over: Pass, threads: int) -> None:
    """One of training's passes over whole images."""
    _loaded().rf_run_pass(over, threads)


def run_other(convolve: Callable[[], torch.Tensor], shape: Callable[[], Shape], algorithm: str) -> torch.Tensor:
    """The result of a convolution that is not the library's, recorded beside its own. ``shape`` is asked only then."""
    if _recorder is None:
        return convolve()
    start = time.perf_counter()
    y = convolve()
    seconds = time.perf_counter() - start
    _recorder.append(Timing(abi.CONV, shape(), algorithm, seconds))
    return y


@contextlib.contextmanager
def recorded() -> Iterator[list[Timing]]:
    """Within it, every operation that any thread runs is timed and noted."""
    global _recorder
    _recorder = []
    try:
        yield _recorder
    finally:
        _recorder = None
