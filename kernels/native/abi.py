"""The interface of the compiled kernels, as ctypes sees it: ``src/abi.h``, which says what things mean."""

import ctypes

ABI = 5

FLOAT32, BFLOAT16, INT8 = range(3)
CONV, MAX_POOL, AVG_POOL, ADD, TO_NHWC, TO_NCHW, QUANTISE, DEQUANTISE = range(8)
ALGORITHMS = ("gemm", "winograd2", "winograd4", "grouped", "direct", "winograd_stem")
"""By their number in the interface."""

_int = ctypes.c_int32
_SIZES = "n h w c p q k r s stride_h stride_w pad_h pad_w dilation_h dilation_w groups relu pool"


def check_sizes(*sizes: int) -> None:
    """Raise OverflowError where one does not fit into 32 bits."""
    for size in sizes:
        if not -(2**31) <= size < 2**31:
            raise OverflowError(f"the native kernels count in 32 bits, and a size is {size}")


class Shape(ctypes.Structure):
    """``rf_shape``. OverflowError for a number that it cannot hold, which ctypes would cut."""

    _fields_ = [("dtype", _int), *((name, _int) for name in _SIZES.split())]

    def __init__(self, *values: int, **named: int) -> None:
        check_sizes(*values, *named.values())
        super().__init__(*values, **named)


class Weight(ctypes.Structure):
    """``rf_weight``."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        *((stride, ctypes.c_int64) for stride in ("group", "k", "c", "r", "s")),
        ("is_double", _int),
        ("reserved", _int),
    ]


class Pieces(ctypes.Structure):
    """``rf_pieces``."""

    _fields_ = [("data", ctypes.c_void_p), ("stride", ctypes.c_int64), ("count", _int), ("bytes", _int)]


class Ref(ctypes.Structure):
    """``rf_ref``: bytes from the start of a buffer; buffer -1 is none."""

    _fields_ = [("buffer", _int), ("reserved", _int), ("offset", ctypes.c_int64)]


class Op(ctypes.Structure):
    """``rf_op``."""

    _fields_ = [
        ("kind", _int),
        ("algorithm", _int),
        ("shape", Shape),
        ("y_dtype", _int),
        ("packed", ctypes.c_void_p),
        ("shift", ctypes.c_void_p),
        ("x", Ref),
        ("residual", Ref),
        ("y", Ref),
        ("x_scale", ctypes.c_void_p),
        ("x_shift", ctypes.c_void_p),
        *((name, _int) for name in ("y_h", "y_w", "step_h", "step_w")),
        ("scale", ctypes.c_void_p),
        ("factor", ctypes.c_float),
        ("reserved", _int),
    ]


ACTIVATING = ("gemm", "winograd2", "winograd4")
"""Algorithms that read their input through a prologue."""
SPREADING = ("gemm",)
"""Algorithms that write every so many pixels of an image."""

NOWHERE = Ref(-1, 0, 0)

TAIL, TAIL_POOL, STATISTICS, GATE, TAIL_POOL_BACKWARD, BN_BACKWARD = range(6)
MOST_SUMS = 3
_PASS_SIZES = "kind n h w c relu"
_OPERANDS = "x residual gate y residual_y scale shift residual_scale residual_shift mean residual_mean slope result"


class Pass(ctypes.Structure):
    """``rf_pass``."""

    _fields_ = [
        *((name, _int) for name in _PASS_SIZES.split()),
        *((name, ctypes.c_void_p) for name in _OPERANDS.split()),
        ("sums", ctypes.c_void_p * MOST_SUMS),
    ]


def declare(library: ctypes.CDLL) -> None:
    """Give the functions of ``library`` their types."""
    shape = ctypes.POINTER(Shape)
    library.rf_variant_name.restype = ctypes.c_char_p
    library.rf_supports.argtypes = [shape, ctypes.c_int]
    library.rf_products.argtypes = [shape, ctypes.c_int]
    library.rf_products.restype = ctypes.c_int64
    library.rf_packed_bytes.argtypes = [shape, ctypes.c_int]
    library.rf_packed_bytes.restype = ctypes.c_int64
    library.rf_pack.argtypes = [shape, ctypes.c_int, ctypes.POINTER(Weight), ctypes.c_void_p, ctypes.c_int]
    library.rf_pack.restype = None
    pointers, seconds = ctypes.POINTER(ctypes.c_void_p), ctypes.POINTER(ctypes.c_double)
    library.rf_run.argtypes = [ctypes.POINTER(Op), ctypes.c_int, pointers, ctypes.c_int, seconds]
    library.rf_run.restype = None
    library.rf_run_pass.argtypes = [ctypes.POINTER(Pass), ctypes.c_int]
    library.rf_run_pass.restype = None
    library.rf_digest.argtypes = [ctypes.POINTER(Pieces), ctypes.c_int, ctypes.c_int]
    library.rf_digest.restype = ctypes.c_uint64
    library.rf_peak.argtypes = [ctypes.c_int]
    library.rf_peak.restype = ctypes.c_double
    pointer = ctypes.c_void_p
    library.rf_wgrad_supports.argtypes = [shape, ctypes.c_int]
    library.rf_wgrad.argtypes = [shape, ctypes.c_int, *[pointer] * 5, ctypes.c_int]
    library.rf_wgrad.restype = None
    library.rf_gram.argtypes = [shape, *[pointer] * 5, ctypes.c_int]
    library.rf_gram.restype = None
