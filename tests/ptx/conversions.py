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


def _magnitudes_e4m3() -> np.ndarray:
    """Of the codes 0 to 0x7e (Alternate Floating-Point Data Formats): 4 bits of exponent, of bias 7, 3 of fraction."""
    exponent, fraction = np.divmod(np.arange(0x7F), 8)
    return np.where(exponent == 0, fraction * 2.0**-9, (1 + fraction / 8) * 2.0 ** (exponent - 7))


_E4M3 = _magnitudes_e4m3()
_E4M3_NAN = 0x7F  # there is no infinity
_E4M3_BETWEEN = (_E4M3[1:] + _E4M3[:-1]) / 2
_E4M3_VALUES = np.concatenate([_E4M3, [np.nan], -_E4M3, [np.nan]]).astype(np.float32)


def widen_e4m3(bits: np.ndarray) -> np.ndarray:
    """e4m3, in bytes, to f32."""
    return _E4M3_VALUES[bits]


def narrow_e4m3(values: np.ndarray) -> np.ndarray:
    """f32 to e4m3 (.rn.satfinite), as bytes: ties to the even code, what is too large to the largest number."""
    size = np.abs(values.astype(np.float64))
    code = np.searchsorted(_E4M3_BETWEEN, size)
    tie = (code < len(_E4M3_BETWEEN)) & (_E4M3_BETWEEN[np.minimum(code, len(_E4M3_BETWEEN) - 1)] == size)
    code = code + (tie & (code % 2 == 1)) + 0x80 * np.signbit(values)
    return np.where(np.isnan(values), _E4M3_NAN, code).astype(np.uint8)


def _pair_of_e4m3(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (narrow_e4m3(a).astype(np.uint16) << np.uint16(8)) | narrow_e4m3(b)


def _halves_of_e4m3(pair: np.ndarray) -> np.ndarray:
    high, low = (narrow_f16(widen_e4m3(one)) for one in (pair >> np.uint16(8), pair & np.uint16(0xFF)))
    return (high.astype(np.uint32) << np.uint32(16)) | low


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
PURE["cvt.rn.satfinite.e4m3x2.f32"] = Pure(("f32", "f32"), "b16", _pair_of_e4m3)
PURE["cvt.rn.f16x2.e4m3x2"] = Pure(("b16",), "b32", _halves_of_e4m3)
