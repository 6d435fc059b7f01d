"""What instructions make of numbers in registers. Each entry of ``PURE`` is one opcode with all its modifiers.

float32 without .ftz keeps subnormals, as NumPy does. Where the ISA allows an error (div.full), the result here is the
nearest one.
"""

import operator
from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from tests.ptx.parse import PtxError


class Pure(NamedTuple):
    """Types of operands and result, and the function of arrays of these types."""

    sources: tuple[str, ...]
    result: str
    function: Callable[..., np.ndarray]


PURE: dict[str, Pure] = {}

_INTEGERS = ("s16", "u16", "s32", "u32", "s64", "u64")
_WIDER = {"s16": "s32", "u16": "u32", "s32": "s64", "u32": "u64"}


def _bits(value: np.ndarray) -> np.ndarray:
    return value.view(f"u{value.dtype.itemsize}")


def _nan(value: np.ndarray, where: np.ndarray) -> np.ndarray:
    return np.where(where, value.dtype.type(np.nan), value)


# --- Integer Arithmetic Instructions: add, sub, mul, mad, div, rem, neg, min, max, bfe --------------------------------


def _divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """div: towards zero."""
    _check_divisor(b)
    return ((a - np.fmod(a, b)) // b).astype(a.dtype)


def _remainder(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """rem: with the dividend's sign."""
    _check_divisor(b)
    return np.fmod(a, b).astype(a.dtype)


def _check_divisor(b: np.ndarray) -> None:
    if (b == 0).any():
        raise PtxError("an integer divided by zero has no specified result")


def _high(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """mul.hi of 16 and of 32 bits."""
    wide = np.int64 if a.dtype.kind == "i" else np.uint64
    return ((a.astype(wide) * b.astype(wide)) >> wide(8 * a.dtype.itemsize)).astype(a.dtype)


def _wide_product(result: str) -> Callable[..., np.ndarray]:
    dtype = np.dtype({"s": "i", "u": "u"}[result[0]] + str(int(result[1:]) // 8))

    def product(a: np.ndarray, b: np.ndarray, c: np.ndarray = np.zeros((1, 1), dtype)) -> np.ndarray:  # noqa: B008
        return a.astype(dtype) * b.astype(dtype) + c

    return product


for _t in _INTEGERS:
    PURE[f"add.{_t}"] = Pure((_t, _t), _t, np.add)
    PURE[f"sub.{_t}"] = Pure((_t, _t), _t, np.subtract)
    PURE[f"mul.lo.{_t}"] = Pure((_t, _t), _t, np.multiply)
    PURE[f"mad.lo.{_t}"] = Pure((_t, _t, _t), _t, lambda a, b, c: a * b + c)
    PURE[f"div.{_t}"] = Pure((_t, _t), _t, _divide)
    PURE[f"rem.{_t}"] = Pure((_t, _t), _t, _remainder)
    PURE[f"min.{_t}"] = Pure((_t, _t), _t, np.minimum)
    PURE[f"max.{_t}"] = Pure((_t, _t), _t, np.maximum)
    if _t[0] == "s":
        PURE[f"neg.{_t}"] = Pure((_t,), _t, np.negative)
for _t, _w in _WIDER.items():
    PURE[f"mul.wide.{_t}"] = Pure((_t, _t), _w, _wide_product(_w))
    PURE[f"mad.wide.{_t}"] = Pure((_t, _t, _w), _w, _wide_product(_w))
for _t in ("s16", "u16", "s32", "u32"):
    PURE[f"mul.hi.{_t}"] = Pure((_t, _t), _t, _high)


def _extract(a: np.ndarray, position: np.ndarray, length: np.ndarray) -> np.ndarray:
    """bfe of 32 bits: beyond the upper end lies the sign, or zeros."""
    position, length = (one.astype(np.int64) & 0xFF for one in (position, length))
    field = a.astype(np.int64) >> np.minimum(position, 63)
    kept = np.minimum(length, 64)
    if a.dtype.kind == "u":
        field = np.where(kept >= 64, field, field & ((np.int64(1) << np.minimum(kept, 62)) - 1))
    else:
        shift = np.minimum(64 - kept, 63)
        field = np.where(kept == 0, 0, (field << shift) >> shift)
    return field.astype(a.dtype)


for _t in ("s32", "u32"):
    PURE[f"bfe.{_t}"] = Pure((_t, "u32", "u32"), _t, _extract)


# --- Logic and Shift Instructions: and, or, xor, not, shl, shr --------------------------------------------------------


def _left(a: np.ndarray, by: np.ndarray) -> np.ndarray:
    """shl: all bits are gone from the register's width on."""
    size = 8 * a.dtype.itemsize
    return np.where(by >= size, a.dtype.type(0), a << np.minimum(by, size - 1).astype(a.dtype))


def _right(a: np.ndarray, by: np.ndarray) -> np.ndarray:
    """shr: signs, or zeros, come in; nothing else is left from the register's width on."""
    size = 8 * a.dtype.itemsize
    shifted = a >> np.minimum(by, size - 1).astype(a.dtype)
    return np.where(by >= size, a.dtype.type(0), shifted) if a.dtype.kind == "u" else shifted


for _t in ("pred", "b16", "b32", "b64"):
    PURE[f"and.{_t}"] = Pure((_t, _t), _t, np.bitwise_and)
    PURE[f"or.{_t}"] = Pure((_t, _t), _t, np.bitwise_or)
    PURE[f"xor.{_t}"] = Pure((_t, _t), _t, np.bitwise_xor)
    PURE[f"not.{_t}"] = Pure((_t,), _t, np.invert)
for _t in ("16", "32", "64"):
    PURE[f"shl.b{_t}"] = Pure((f"b{_t}", "u32"), f"b{_t}", _left)
    for _s in "us":
        PURE[f"shr.{_s}{_t}"] = Pure((f"{_s}{_t}", "u32"), f"{_s}{_t}", _right)


def _permute(a: np.ndarray, b: np.ndarray, selection: np.ndarray) -> np.ndarray:
    """Data Movement: prmt, in its generic mode: a nibble chooses a byte of {b, a}, with its top bit that one's sign."""
    both = (b.astype(np.uint64) << np.uint64(32)) | a
    made = np.zeros((1, 1), np.uint32)
    for i in range(4):
        nibble = (selection >> np.uint32(4 * i)) & np.uint32(15)
        byte = (both >> ((nibble & np.uint32(7)).astype(np.uint64) * np.uint64(8))).astype(np.uint32) & np.uint32(255)
        byte = np.where(nibble & np.uint32(8), (byte >> np.uint32(7)) * np.uint32(255), byte)
        made = made | (byte << np.uint32(8 * i))
    return made


PURE["prmt.b32"] = Pure(("b32", "b32", "b32"), "b32", _permute)


# --- Floating Point Instructions: add, sub, mul, fma, div, neg, abs, min, max, sqrt -----------------------------------


def canonical(function: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    """Whatever NaN NumPy makes becomes the only one that hardware makes."""

    def made(*operands: np.ndarray) -> np.ndarray:
        value = function(*operands)
        return np.where(np.isnan(value), NAN[value.dtype.itemsize].view(value.dtype), value)

    return made


NAN = {2: np.full((1, 1), 0x7FFF, np.uint16), 4: np.full((1, 1), 0x7FFFFFFF, np.uint32)}
NAN[8] = np.full((1, 1), 0x7FF8000000000000, np.uint64)


def _smaller(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """min: the other one of a NaN; -0 is less than +0."""
    return np.where(a == b, (_bits(a) | _bits(b)).view(a.dtype), np.fmin(a, b))


def _larger(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """max: the other one of a NaN; +0 is more than -0."""
    return np.where(a == b, (_bits(a) & _bits(b)).view(a.dtype), np.fmax(a, b))


def _spreading(function: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    """min.NaN and max.NaN: NaN of a NaN."""
    return canonical(lambda a, b: _nan(function(a, b), np.isnan(a) | np.isnan(b)))


def _flip_sign(a: np.ndarray) -> np.ndarray:
    bits = _bits(a)
    return (bits ^ bits.dtype.type(1 << (8 * bits.dtype.itemsize - 1))).view(a.dtype)


def _fused_32(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """fma.rn.f32: rounded once.

    The product is exact in float64. The sum is rounded to odd there: an inexact one gets an odd last bit, so that it
    lies on the right side of whatever float32 rounds at (Boldo and Melquiond, 2008).
    """
    product = a.astype(np.float64) * b
    wide = c.astype(np.float64)
    total = product + wide
    part = total - product
    error = (product - (total - part)) + (wide - part)
    inexact = (error != 0) & np.isfinite(total) & np.isfinite(error)
    if inexact.any():
        bits = total.view(np.int64)
        step = np.where((error > 0) == (total > 0), 1, -1)
        total = (bits + np.where(inexact & (bits & 1 == 0), step, 0)).view(np.float64)
    return total.astype(np.float32)


def _fused_64(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """fma.rn.f64, number by number: only sums of a few channels need it."""
    a, b, c = np.broadcast_arrays(a, b, c)
    made = a * b + c
    flat = made.reshape(-1)
    for i, (x, y, z) in enumerate(zip(a.reshape(-1).tolist(), b.reshape(-1).tolist(), c.reshape(-1).tolist())):
        if np.isfinite(flat[i]) and flat[i] != 0:
            flat[i] = float(Fraction(x) * Fraction(y) + Fraction(z))
    return flat.reshape(made.shape)


for _t in ("f32", "f64"):
    for _rounding in ("", "rn."):
        PURE[f"add.{_rounding}{_t}"] = Pure((_t, _t), _t, canonical(np.add))
        PURE[f"sub.{_rounding}{_t}"] = Pure((_t, _t), _t, canonical(np.subtract))
        PURE[f"mul.{_rounding}{_t}"] = Pure((_t, _t), _t, canonical(np.multiply))
    PURE[f"div.rn.{_t}"] = Pure((_t, _t), _t, canonical(np.divide))
    PURE[f"sqrt.rn.{_t}"] = Pure((_t,), _t, canonical(np.sqrt))
    PURE[f"neg.{_t}"] = Pure((_t,), _t, _flip_sign)
    PURE[f"abs.{_t}"] = Pure((_t,), _t, np.abs)
PURE["fma.rn.f32"] = Pure(("f32",) * 3, "f32", canonical(_fused_32))
PURE["fma.rn.f64"] = Pure(("f64",) * 3, "f64", canonical(_fused_64))
PURE["div.full.f32"] = Pure(("f32", "f32"), "f32", canonical(np.divide))
for _t in ("f16", "f32", "f64"):
    PURE[f"min.{_t}"] = Pure((_t, _t), _t, canonical(_smaller))
    PURE[f"max.{_t}"] = Pure((_t, _t), _t, canonical(_larger))
for _t in ("f16", "f32"):
    PURE[f"min.NaN.{_t}"] = Pure((_t, _t), _t, _spreading(_smaller))
    PURE[f"max.NaN.{_t}"] = Pure((_t, _t), _t, _spreading(_larger))


# --- Comparison and Selection Instructions: setp, selp ----------------------------------------------------------------

_ORDERED = {"eq": operator.eq, "lt": operator.lt, "le": operator.le, "gt": operator.gt, "ge": operator.ge}


def _unordered(function: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    """As ltu: true of a NaN."""
    return lambda a, b: function(a, b) | np.isnan(a) | np.isnan(b)


def _differs(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """ne: false of a NaN."""
    return (a < b) | (a > b)


for _name, _function in _ORDERED.items():
    for _t in _INTEGERS:
        PURE[f"setp.{_name}.{_t}"] = Pure((_t, _t), "pred", _function)
    for _t in ("f16", "f32", "f64"):
        PURE[f"setp.{_name}.{_t}"] = Pure((_t, _t), "pred", _function)
        PURE[f"setp.{_name}u.{_t}"] = Pure((_t, _t), "pred", _unordered(_function))
for _t in (*_INTEGERS, "b16", "b32", "b64"):
    PURE[f"setp.eq.{_t}"] = Pure((_t, _t), "pred", operator.eq)
    PURE[f"setp.ne.{_t}"] = Pure((_t, _t), "pred", operator.ne)
for _t in ("f16", "f32", "f64"):
    PURE[f"setp.ne.{_t}"] = Pure((_t, _t), "pred", _differs)
    PURE[f"setp.neu.{_t}"] = Pure((_t, _t), "pred", operator.ne)
    PURE[f"setp.nan.{_t}"] = Pure((_t, _t), "pred", lambda a, b: np.isnan(a) | np.isnan(b))
    PURE[f"setp.num.{_t}"] = Pure((_t, _t), "pred", lambda a, b: ~(np.isnan(a) | np.isnan(b)))
for _t in ("b16", "b32", "b64", "s32", "u32", "s64", "u64", "f32", "f64"):
    PURE[f"selp.{_t}"] = Pure((_t, _t, "pred"), _t, lambda a, b, chosen: np.where(chosen, a, b))
