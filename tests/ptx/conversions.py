"""Data Movement and Conversion Instructions: cvt. Adds its opcodes to ``arithmetic.PURE``."""

from collections.abc import Callable

import numpy as np

from tests.ptx.arithmetic import PURE, Pure
from tests.ptx.registers import TYPES

_CANONICAL_NAN = 0x7FFF  # of f16 and bf16


def widen_bf16(bits: np.ndarray) -> np.ndarray:
    """bf16 to f32: the upper half of the same bits."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def narrow_bf16(values: np.ndarray) -> np.ndarray:
    """f32 to bf16 (.rn): to the nearest, ties to even."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint16(_CANONICAL_NAN), rounded.astype(np.uint16))


def narrow_f16(values: np.ndarray) -> np.ndarray:
    """f32 to f16 (.rn), as bits."""
    return np.where(np.isnan(values), np.uint16(_CANONICAL_NAN), values.astype(np.float16).view(np.uint16))


def _pair(narrow: Callable[[np.ndarray], np.ndarray]) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """Of two f32, the first becomes the upper half."""
    return lambda a, b: (narrow(a).astype(np.uint32) << np.uint32(16)) | narrow(b)


def _cast(type_name: str) -> Callable[[np.ndarray], np.ndarray]:
    """Between integers: sign or zeros in new bits, or the low bits. To floating point: to the nearest, ties to even."""
    dtype = TYPES[type_name]
    return lambda a: a.astype(dtype)


_INTEGERS = ("s8", "u8", "s16", "u16", "s32", "u32", "s64", "u64")

for _source in _INTEGERS:
    for _result in _INTEGERS:
        if _source != _result:
            PURE[f"cvt.{_result}.{_source}"] = Pure((_source,), _result, _cast(_result))
    for _result in ("f32", "f64"):
        PURE[f"cvt.rn.{_result}.{_source}"] = Pure((_source,), _result, _cast(_result))


def _larger_bf16(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """max.NaN.bf16 (Half Precision Floating Point Instructions): as of the same numbers in f32."""
    return narrow_bf16(PURE["max.NaN.f32"].function(widen_bf16(a), widen_bf16(b)))


for _comparison in ("eq", "ne", "lt", "le", "gt", "ge", "equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan"):
    _wide = PURE[f"setp.{_comparison}.f32"].function
    PURE[f"setp.{_comparison}.bf16"] = Pure(
        ("bf16", "bf16"), "pred", lambda a, b, wide=_wide: wide(widen_bf16(a), widen_bf16(b))
    )
PURE["max.NaN.bf16"] = Pure(("bf16", "bf16"), "bf16", _larger_bf16)
PURE["cvt.f32.f16"] = Pure(("f16",), "f32", _cast("f32"))
PURE["cvt.f64.f32"] = Pure(("f32",), "f64", _cast("f64"))
PURE["cvt.rn.f32.f64"] = Pure(("f64",), "f32", _cast("f32"))
PURE["cvt.f32.bf16"] = Pure(("bf16",), "f32", widen_bf16)
PURE["cvt.rn.f16.f32"] = Pure(("f32",), "b16", narrow_f16)
PURE["cvt.rn.bf16.f32"] = Pure(("f32",), "b16", narrow_bf16)
PURE["cvt.rn.f16x2.f32"] = Pure(("f32", "f32"), "b32", _pair(narrow_f16))
PURE["cvt.rn.bf16x2.f32"] = Pure(("f32", "f32"), "b32", _pair(narrow_bf16))
