"""Each opcode of numbers in registers, in hand-written PTX, against results worked out by hand from the ISA."""

import struct
from fractions import Fraction

import numpy as np
import pytest

from tests.ptx import snippets
from tests.ptx.arithmetic import PURE
from tests.ptx.registers import TYPES

pytestmark = pytest.mark.every

_FORMATS = {"f16": "e", "f32": "f", "f64": "d"}
NAN, INF = float("nan"), float("inf")


def bits(value: float, type_name: str) -> int:
    """How a register holds it. Of the types without a value of their own, a number is its bits already."""
    if type_name in _FORMATS:
        size = struct.pack("<" + _FORMATS[type_name], value)
        return int.from_bytes(size, "little")
    return int(value) % 2 ** (8 * np.dtype(TYPES[type_name]).itemsize) if type_name != "pred" else int(value)


# Opcode: operands of one thread, and the result; then of the next.
RESULTS: dict[str, list[tuple]] = {
    # Integer Arithmetic Instructions
    "add.s32": [(1, 2, 3), (2**31 - 1, 1, -(2**31)), (-1, -1, -2)],
    "add.s64": [(2**40, 5, 2**40 + 5), (2**63 - 1, 1, -(2**63))],
    "sub.s32": [(1, 2, -1), (-(2**31), 1, 2**31 - 1)],
    "sub.s64": [(1, 2**40, 1 - 2**40)],
    "mul.lo.s32": [(-3, 7, -21), (2**30, 4, 0), (65537, 65537, 131073)],
    "mul.lo.s64": [(2**40, 3, 3 * 2**40)],
    "mul.hi.u32": [(2**31, 6, 3), (2**32 - 1, 2**32 - 1, 2**32 - 2)],
    "mul.hi.u16": [(2**15, 6, 3), (2**16 - 1, 2**16 - 1, 2**16 - 2)],
    "mul.wide.s32": [(-3, 7, -21), (2**30, 4, 2**32)],
    "mul.wide.u32": [(2**32 - 1, 2, 2**33 - 2)],
    "mul.wide.u16": [(65535, 2, 131070)],
    "mad.lo.s32": [(-3, 7, 1, -20), (2**30, 4, 9, 9)],
    "mad.lo.s64": [(2**33, 2**33, -1, 2**66 % 2**64 - 1)],
    "mad.wide.s32": [(-3, 7, 2**40, 2**40 - 21)],
    "mad.wide.u32": [(2**32 - 1, 2, 2**40, 2**40 + 2**33 - 2)],
    "mad.wide.u16": [(65535, 2, 1, 131071)],
    "div.s32": [(7, 2, 3), (-7, 2, -3), (7, -2, -3), (-7, -2, 3)],
    "rem.s32": [(7, 2, 1), (-7, 2, -1), (7, -2, 1)],
    "neg.s32": [(5, -5), (-(2**31), -(2**31))],
    "min.s32": [(-1, 1, -1)],
    "min.u32": [(-1, 1, 1)],
    "min.s64": [(-1, 1, -1)],
    "max.s64": [(-1, 1, 1)],
    "bfe.u32": [(0xABCD1234, 8, 8, 0x12), (0xABCD1234, 28, 8, 0xA), (7, 0, 0, 0), (0xABCD1234, 0, 32, 0xABCD1234)],
    "bfe.s32": [
        (0x0000F000, 12, 4, -1),
        (0x00007000, 12, 4, 7),
        (-1, 5, 0, 0),
        (-(2**31), 31, 1, -1),
        (2**30, 30, 9, 1),
    ],
    # Logic and Shift Instructions
    "and.b32": [(0b1100, 0b1010, 0b1000)],
    "or.b32": [(0b1100, 0b1010, 0b1110)],
    "xor.b32": [(0b1100, 0b1010, 0b0110)],
    "not.b32": [(0, -1), (0xFFFF0000, 0xFFFF)],
    "and.b16": [(0xF0F0, 0xFF00, 0xF000)],
    "or.b64": [(2**40, 1, 2**40 + 1)],
    "and.pred": [(1, 1, 1), (1, 0, 0)],
    "or.pred": [(0, 0, 0), (1, 0, 1)],
    "shl.b32": [(3, 4, 48), (3, 31, -(2**31)), (3, 32, 0), (3, 1000, 0)],
    "shl.b64": [(3, 40, 3 * 2**40), (3, 64, 0)],
    "shr.u32": [(-1, 28, 15), (-1, 32, 0)],
    "shr.s32": [(-8, 1, -4), (-8, 40, -1), (8, 40, 0)],
    # Data Movement: prmt. Bytes of a are 0 to 3, those of b are 4 to 7.
    "prmt.b32": [
        (0x33221100, 0x77665544, 0x5410, 0x55441100),
        (0x33221100, 0x77665544, 0x7632, 0x77663322),
        (0x33221100, 0x77665544, 0x3340, 0x33334400),
        (0x80FF7F01, 0, 0xBBB3, 0xFFFFFF80),
        (0x80FF7F01, 0, 0x9991, 0x7F),
    ],
    # Floating Point Instructions
    "add.f32": [
        (1.0, 2.0**-24, 1.0),
        (1.0, 3 * 2.0**-24, 1 + 2.0**-22),
        (INF, -INF, NAN),
        (2.0**-149, 2.0**-149, 2.0**-148),
    ],
    "add.f64": [(1.0, 2.0**-53, 1.0), (0.1, 0.2, 0.30000000000000004)],
    "sub.f32": [(1.0, 2.0**-25, 1.0), (5.0, 7.0, -2.0)],
    "mul.f32": [(3.0, -0.5, -1.5), (2.0**-100, 2.0**-49, 2.0**-149), (0.0, INF, NAN)],
    # (1 + 2^-12)^2 = 1 + 2^-11 + 2^-24: the product would lose its last term, the sum does not.
    "fma.rn.f32": [
        (1 + 2.0**-12, 1 + 2.0**-12, -1.0, 2.0**-11 + 2.0**-24),
        (2.0, 3.0, 4.0, 10.0),
        (0.0, INF, 1.0, NAN),
        # Halfway between two float32 in float64's eyes, and not quite: 1 + 2^-24 + 2^-60.
        (1 + 2.0**-24 * 0, 1.0, 2.0**-24, 1.0),
        (2.0**-30, 2.0**-30, 1 + 2.0**-23, 1 + 2.0**-23),
        (1 + 2.0**-23, 1 + 2.0**-23, 2.0**-24, 1 + 3 * 2.0**-23),
    ],
    "fma.rn.f64": [(1 + 2.0**-30, 1 + 2.0**-30, -1.0, 2.0**-29 + 2.0**-60), (2.0, 3.0, 4.0, 10.0)],
    "div.full.f32": [(1.0, 3.0, np.float32(1) / np.float32(3)), (1.0, 0.0, INF)],
    "div.rn.f64": [(1.0, 3.0, 1 / 3)],
    "neg.f32": [(1.0, -1.0), (0.0, -0.0)],
    "neg.f64": [(1.0, -1.0)],
    "max.f32": [(NAN, 1.0, 1.0), (-0.0, 0.0, 0.0), (1.0, 2.0, 2.0), (NAN, NAN, NAN)],
    "min.f32": [(1.0, NAN, 1.0), (0.0, -0.0, -0.0), (1.0, 2.0, 1.0)],
    "max.NaN.f32": [(NAN, 1.0, NAN), (1.0, NAN, NAN), (-0.0, 0.0, 0.0), (-3.0, -2.0, -2.0)],
    # Half Precision Floating Point Instructions
    "max.NaN.f16": [(NAN, 1.0, NAN), (0.0, -0.0, 0.0), (1.0, 2.0, 2.0)],
    "min.f16": [(NAN, 1.0, 1.0), (1.0, 2.0, 1.0)],
    "max.NaN.bf16": [(0x7FC0, 0x3F80, 0x7FFF), (0x3F80, 0x4000, 0x4000), (0x8000, 0, 0)],
    "max.NaN.bf16x2": [(0x3F807FC0, 0x40003F80, 0x40007FFF), (0x80003F80, 0x00004000, 0x00004000)],
    # Comparison and Selection Instructions: without u, false of a NaN.
    "setp.eq.b32": [(1, 1, 1), (1, 2, 0)],
    "setp.eq.b64": [(2**40, 2**40, 1), (2**40, 0, 0)],
    "setp.ne.b16": [(1, 1, 0), (1, 2, 1)],
    "setp.ne.b32": [(1, 1, 0), (1, 2, 1)],
    "setp.ne.b64": [(2**40, 0, 1)],
    "setp.lt.s32": [(-1, 0, 1), (0, 0, 0)],
    "setp.lt.u32": [(-1, 0, 0), (0, 1, 1)],
    "setp.lt.u64": [(-1, 0, 0), (0, 1, 1)],
    "setp.le.s32": [(0, 0, 1), (1, 0, 0)],
    "setp.le.u64": [(-1, 0, 0), (0, 0, 1)],
    "setp.gt.s32": [(0, -1, 1), (0, 0, 0)],
    "setp.ge.s32": [(0, 0, 1), (-1, 0, 0)],
    "setp.ge.u32": [(-1, 0, 1), (0, 1, 0)],
    "setp.lt.f32": [(1.0, 2.0, 1), (NAN, 2.0, 0)],
    "setp.le.f32": [(2.0, 2.0, 1), (NAN, NAN, 0)],
    "setp.gt.f32": [(2.0, 1.0, 1), (2.0, NAN, 0)],
    "setp.ne.f32": [(1.0, 2.0, 1), (1.0, 1.0, 0), (NAN, 1.0, 0)],
    "setp.gtu.f32": [(1.0, 2.0, 0), (NAN, 1.0, 1)],
    "setp.nan.f32": [(1.0, 2.0, 0), (1.0, NAN, 1)],
    "setp.le.f16": [(1.0, 2.0, 1), (NAN, 1.0, 0)],
    "setp.gtu.f16": [(2.0, 1.0, 1), (NAN, 1.0, 1), (1.0, 2.0, 0)],
    "setp.nan.f16": [(NAN, 1.0, 1), (1.0, 1.0, 0)],
    "selp.b16": [(5, 6, 1, 5), (5, 6, 0, 6)],
    "selp.b32": [(5, 6, 1, 5), (5, 6, 0, 6)],
    "selp.f32": [(0.5, NAN, 1, 0.5), (0.5, NAN, 0, NAN)],
    # cvt. 2049 lies between two float16, 65520 is the first that rounds to infinity.
    "cvt.rn.f16.f32": [
        (2049.0, 0x6800),
        (2051.0, 0x6802),
        (65519.0, 0x7BFF),
        (65520.0, 0x7C00),
        (2.0**-25, 0),
        (NAN, 0x7FFF),
    ],
    "cvt.rn.bf16.f32": [
        (1 + 2.0**-8, 0x3F80),
        (1 + 3 * 2.0**-8, 0x3F82),
        (1 + 2.0**-8 + 2.0**-20, 0x3F81),
        (NAN, 0x7FFF),
    ],
    "cvt.rn.f16x2.f32": [(1.0, -2.0, 0x3C00C000)],
    "cvt.rn.bf16x2.f32": [(1.0, -2.0, 0x3F80C000)],
    "cvt.f32.f16": [(0.333251953125, 0.333251953125), (2.0**-24, 2.0**-24)],
    "cvt.f32.bf16": [(0x3F81, 1 + 2.0**-7), (0xFF80, -INF)],
    "cvt.f64.f32": [(0.1, float(np.float32(0.1)))],
    "cvt.rn.f32.f64": [(1 + 2.0**-24, 1.0), (1 + 3 * 2.0**-24, 1 + 2.0**-22)],
    "cvt.rn.f32.s16": [(-5, -5.0)],
    "cvt.rn.f32.s32": [(2**24 + 1, 2.0**24), (2**24 + 3, 2.0**24 + 4), (-7, -7.0)],
    "cvt.rn.f32.s64": [(2**40 + 1, 2.0**40)],
    "cvt.rn.f64.s32": [(-7, -7.0)],
    "cvt.s64.s32": [(-1, -1), (5, 5)],
    "cvt.u64.u32": [(-1, 2**32 - 1)],
    "cvt.u32.u64": [(2**40 + 3, 3)],
    "cvt.u32.u16": [(65535, 65535)],
    "cvt.u16.u32": [(65537, 1)],
    "cvt.s8.s32": [(0x1FF, 0xFFFF), (0x17F, 0x7F)],  # in a register of 16 bits
}


@pytest.mark.parametrize("opcode", RESULTS)
def test_opcode(opcode):
    pure = PURE[opcode]
    *operands, expected = (
        [bits(v, t) for v in column] for t, column in zip((*pure.sources, pure.result), zip(*RESULTS[opcode]))
    )
    if pure.result == "s8":
        expected = [row[-1] for row in RESULTS[opcode]]
    actual = snippets.apply(opcode, pure.sources, pure.result, operands)
    if pure.result in _FORMATS:  # of NaN, the only one that there is
        canonical = {"f16": 0x7FFF, "f32": 0x7FFFFFFF, "f64": 0x7FF8000000000000}[pure.result]
        free = opcode.startswith(("selp", "neg"))
        expected = [canonical if row[-1] != row[-1] and not free else e for row, e in zip(RESULTS[opcode], expected)]
    assert [hex(one) for one in actual] == [hex(one) for one in expected]


def test_a_product_and_a_sum_are_rounded_once():
    """Against exact fractions, on numbers whose sums cancel or lie near the middle of two others."""
    random = np.random.default_rng(0)
    a, b = random.standard_normal((2, 512)).astype(np.float32)
    c = np.where(random.random(512) < 0.5, -a * b, random.standard_normal(512) * 2.0 ** random.integers(-40, 40, 512))
    c = c.astype(np.float32)
    actual = PURE["fma.rn.f32"].function(a, b, c).reshape(-1)
    for x, y, z, made in zip(*(v.astype(np.float64).tolist() for v in (a, b, c, actual))):
        exact = Fraction(x) * Fraction(y) + Fraction(z)
        near = [float(np.nextafter(np.float32(made), np.float32(d))) for d in (-np.inf, np.inf)]
        assert all(abs(Fraction(made) - exact) <= abs(Fraction(other) - exact) for other in near)
