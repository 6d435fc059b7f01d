"""ldmatrix and mma.sync on hand-written PTX: the layout of each fragment is written out again, lane by lane."""

import numpy as np
import pytest

from tests.ptx import snippets

pytestmark = pytest.mark.every

_LANES = range(32)


def _fragments(matrix: np.ndarray, places) -> np.ndarray:
    """[lanes, numbers of a fragment]; ``places(lane, i)`` is the row and column of the lane's i-th number."""
    count = matrix.size // 32
    return np.array([[matrix[places(lane, i)] for i in range(count)] for lane in _LANES], matrix.dtype)


def _products(a: np.ndarray, b: np.ndarray, c: np.ndarray, opcode: str) -> np.ndarray:
    """``a @ b + c`` of one warp, from and to fragments: [lanes, bytes of 4, 2 and 4 registers]."""
    a, b = (np.ascontiguousarray(one).view(np.uint32) for one in (a, b))
    d = np.zeros_like(c)
    body = f"""
        mul.wide.u32 %rd10, %r1, 16;
        mul.wide.u32 %rd9, %r1, 8;
        add.s64 %rd11, %rd1, %rd10;
        add.s64 %rd12, %rd2, %rd9;
        add.s64 %rd13, %rd3, %rd10;
        add.s64 %rd14, %rd4, %rd10;
        ld.global.v4.b32 {{%r2, %r3, %r4, %r5}}, [%rd11];
        ld.global.v2.b32 {{%r6, %r7}}, [%rd12];
        ld.global.v4.b32 {{%r8, %r9, %r10, %r11}}, [%rd13];
        {opcode} {{%r8, %r9, %r10, %r11}}, {{%r2, %r3, %r4, %r5}}, {{%r6, %r7}}, {{%r8, %r9, %r10, %r11}};
        st.global.v4.b32 [%rd14], {{%r8, %r9, %r10, %r11}};
    """
    snippets.run(body, a, b, c, d)
    return d


def _c_places(lane: int, i: int) -> tuple[int, int]:
    """c and d of all shapes: c0 and c1 in row groupID, c2 and c3 in row groupID + 8."""
    return lane // 4 + 8 * (i // 2), lane % 4 * 2 + i % 2


def _check(a, b, a_places, b_places, opcode, number=np.float32, encode=lambda x: x) -> None:
    c = np.arange(128, dtype=number).reshape(16, 8)
    given = [_fragments(encode(a), a_places), _fragments(encode(b), b_places), _fragments(c, _c_places)]
    expected = a.astype(np.float64) @ b.astype(np.float64) + c
    assert np.array_equal(_products(*given, opcode), _fragments(expected.astype(number), _c_places))


def _random(rows: int, columns: int, seed: int) -> np.ndarray:
    """Small integers, whose products and sums are exact in every type."""
    return np.random.default_rng(seed).integers(-8, 8, (rows, columns)).astype(np.float32)


@pytest.mark.parametrize("type_name", ["f16", "bf16"])
def test_m16n8k16(type_name):
    """ai: row groupID for i 0, 1, 4, 5, else groupID + 8; column 2 threadID + i % 2, from i = 4 on 8 more.

    bi: row 2 threadID + i % 2, from i = 2 on 8 more; column groupID.
    """
    encode = {"f16": lambda x: x.astype(np.float16), "bf16": lambda x: (x.view(np.uint32) >> 16).astype(np.uint16)}
    _check(
        _random(16, 16, 0), _random(16, 8, 1),
        lambda lane, i: (lane // 4 + (0 if i in (0, 1, 4, 5) else 8), lane % 4 * 2 + i % 2 + (0 if i < 4 else 8)),
        lambda lane, i: (lane % 4 * 2 + i % 2 + (0 if i < 2 else 8), lane // 4),
        f"mma.sync.aligned.m16n8k16.row.col.f32.{type_name}.{type_name}.f32",
        encode=encode[type_name],
    )  # fmt: skip


_K8 = "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32"


def _tf32_a(lane: int, i: int) -> tuple[int, int]:
    """Row groupID for a0 and a2, else groupID + 8; column threadID for a0 and a1, else threadID + 4."""
    return lane // 4 + (0 if i in (0, 2) else 8), lane % 4 + (0 if i < 2 else 4)


def _tf32_b(lane: int, i: int) -> tuple[int, int]:
    return lane % 4 + 4 * i, lane // 4


def test_m16n8k8():
    _check(_random(16, 8, 0), _random(8, 8, 1), _tf32_a, _tf32_b, _K8)


def test_tf32_is_truncated():
    """1 + 2^-10 is a tf32; of 1 + 2^-10 + 2^-11, which is none, the last bit is not seen."""
    a = np.full((16, 8), 1 + 2.0**-10, np.float32)
    b = np.eye(8, dtype=np.float32)
    c = np.zeros((16, 8), np.float32)
    given = _fragments(b, _tf32_b), _fragments(c, _c_places)
    for more in (0.0, 2.0**-11, 2.0**-23):
        made = _products(_fragments(a + np.float32(more), _tf32_a), *given, _K8)
        assert (made == 1 + 2.0**-10).all()


def test_m16n8k32_of_int8():
    """ai: row groupID for i of 0 to 3 and 8 to 11; column 4 threadID + i % 4, from i = 8 on 16 more. Saturates."""
    _check(
        _random(16, 32, 0).astype(np.int8), _random(32, 8, 1).astype(np.int8),
        lambda lane, i: (lane // 4 + (0 if i // 4 % 2 == 0 else 8), lane % 4 * 4 + i % 4 + (0 if i < 8 else 16)),
        lambda lane, i: (lane % 4 * 4 + i % 4 + (0 if i < 4 else 16), lane // 4),
        "mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.s8.s32",
        number=np.int32,
    )  # fmt: skip
    a, b = np.full((32, 16), 127, np.int8), np.full((32, 8), 127, np.int8)
    c = np.full((32, 4), 2**31 - 5, np.int32)
    opcode = "mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.s8.s32"
    assert (_products(a, b, c, opcode) == 2**31 - 1).all()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_ldmatrix(count, transposed):
    """Rows of 16 bytes at addresses that lanes give, last row first. Lane l gets row l / 4, columns from 2 (l % 4)."""
    x = np.arange(count * 64, dtype=np.uint16).reshape(count * 8, 8)
    y = np.zeros((count, 32), np.uint32)
    made = ", ".join(f"%r{10 + i}" for i in range(count))
    body = f"""
        setp.lt.u32 %p1, %r1, {count * 8};
        mul.wide.u32 %rd10, %r1, 16;
        add.s64 %rd11, %rd1, %rd10;
        @%p1 ld.global.v4.b32 {{%r2, %r3, %r4, %r5}}, [%rd11];
        sub.s32 %r6, {count * 8 - 1}, %r1;
        shl.b32 %r6, %r6, 4;
        mov.b32 %r7, memory;
        add.s32 %r6, %r7, %r6;
        @%p1 st.shared.v4.b32 [%r6], {{%r2, %r3, %r4, %r5}};
        bar.warp.sync -1;
        ldmatrix.sync.aligned.m8n8.x{count}{".trans" if transposed else ""}.shared.b16 {{{made}}}, [%r6];
        mul.wide.u32 %rd12, %r1, 4;
        add.s64 %rd13, %rd2, %rd12;
        {" ".join(f"st.global.b32 [%rd13+{128 * i}], %r{10 + i};" for i in range(count))}
    """
    snippets.run(body, x, y)
    for i in range(count):
        matrix = x[8 * i : 8 * i + 8].T if transposed else x[8 * i : 8 * i + 8]
        expected = [[matrix[lane // 4, lane % 4 * 2 + j] for j in range(2)] for lane in _LANES]
        assert np.array_equal(y[i].view(np.uint16).reshape(32, 2), expected)
