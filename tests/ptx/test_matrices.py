"""ldmatrix and mma.sync on hand-written PTX: the layout of each fragment is written out again, lane by lane."""

import numpy as np
import pytest

from tests.ptx import snippets
from tests.ptx.parse import PtxError

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


_WGMMA = """
    mul.wide.u32 %rd10, %r1, 16;
    add.s64 %rd11, %rd1, %rd10;
    shl.b32 %r2, %r1, 4;
    mov.b32 %r3, memory;
    add.s32 %r2, %r2, %r3;
    {copies}
    {fence}
    bar.sync 0;
    mov.b64 %rd5, {a};
    mov.b64 %rd6, {b};
    mov.pred %p1, 0;
    wgmma.fence.sync.aligned;
    wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16
        {{%r10, %r11, %r12, %r13}}, %rd5, %rd6, %p1, 1, 1, 0, {transposed};
    wgmma.commit_group.sync.aligned;
    {wait}
    mul.wide.u32 %rd10, %r1, 16;
    add.s64 %rd12, %rd2, %rd10;
    st.global.v4.b32 [%rd12], {{%r10, %r11, %r12, %r13}};
"""


def _descriptor(offset: int, leading: int, stride: int) -> int:
    """Matrix Descriptor Format: swizzled over 128 bytes."""
    return 1 << 62 | stride >> 4 << 32 | leading >> 4 << 16 | (1024 + offset) >> 4


def _swizzled(rows: np.ndarray, at: int, memory: np.ndarray) -> None:
    """Rows of 128 bytes: the 16 bytes at place i of row r lie at place i ^ (r % 8)."""
    for r, row in enumerate(rows):
        pieces = row.reshape(8, -1)
        for i in range(8):
            start = at + r * 128 + 16 * (i ^ r % 8)
            memory[start : start + 16] = pieces[i].view(np.uint8)


def _warpgroup(
    transposed: bool, step: int = 0, fence="fence.proxy.async.shared::cta;", wait="wgmma.wait_group.sync.aligned 0;"
):
    """A product of 64 rows and 8 columns, 16 deep: what comes out, and what should."""
    a, b = _random(64, 64, 0).astype(np.float16), _random(8, 64, 1).astype(np.float16)
    memory, d = np.zeros(16384, np.uint8), np.zeros((128, 4), np.float32)
    _swizzled(a, 0, memory)
    if transposed:  # 16 rows of 64, of which 8 are the columns of the product
        wide = np.zeros((16, 64), np.float16)
        wide[:, :8] = b.T[16 * step : 16 * step + 16]
        _swizzled(wide, 8192, memory)
        right = _descriptor(8192, 1024, 1024)
    else:
        _swizzled(b, 8192, memory)
        right = _descriptor(8192 + 32 * step, 16, 1024)
    four = "{%r4, %r5, %r6, %r7}"
    copies = "".join(
        f"ld.global.v4.b32 {four}, [%rd11+{2048 * i}]; st.shared.v4.b32 [%r2+{2048 * i}], {four};" for i in range(8)
    )
    body = _WGMMA.format(
        copies=copies, fence=fence, wait=wait, a=_descriptor(32 * step, 16, 1024), b=right, transposed=int(transposed)
    )
    snippets.run(body, memory, d, threads=128, shared=16384)
    depth = slice(16 * step, 16 * step + 16)
    exact = a[:, depth].astype(np.float32) @ b[:, depth].T.astype(np.float32)
    # Lane (g, t) of warp w: rows 16 w + g and, from the third register on, + 8; columns 2 t and 2 t + 1.
    places = [(16 * w + lane // 4, lane % 4 * 2) for w in range(4) for lane in _LANES]
    expected = [[exact[r, c], exact[r, c + 1], exact[r + 8, c], exact[r + 8, c + 1]] for r, c in places]
    return d, np.array(expected)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("step", [0, 1, 3])
def test_wgmma(step, transposed):
    made, expected = _warpgroup(transposed, step)
    assert np.array_equal(made, expected)


def test_wgmma_takes_a_fence_and_a_wait():
    with pytest.raises(PtxError, match="written after the last fence"):
        _warpgroup(False, fence="")
    with pytest.raises(PtxError, match="belongs to a product that was not waited for"):
        _warpgroup(False, wait="")
    with pytest.raises(PtxError, match="which a product under way, or an mbarrier, has"):
        _warpgroup(False, wait="bar.sync 0; st.shared.b32 [%r2], %r1;")
