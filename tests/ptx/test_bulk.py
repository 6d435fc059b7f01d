"""The copy engine and mbarriers, on hand-written PTX: what is right passes, each mistake is named."""

from typing import Optional

import numpy as np
import pytest

from tests.ptx import snippets
from tests.ptx.parse import PtxError
from tests.ptx.tensor_maps import TensorMap, encode

pytestmark = pytest.mark.every

_BARRIER = 3072  # where the mbarrier lies
_HEAD = f"""
    mov.b32 %r2, map_0;
    cvt.u64.u32 %rd3, %r2;
    cvta.param.u64 %rd4, %rd3;
    mov.b32 %r3, memory;
    add.s32 %r4, %r3, {_BARRIER};
    setp.eq.b32 %p1, %r1, 0;
"""
_INIT = "@%p1 mbarrier.init.shared::cta.b64 [%r4], 1; bar.sync 0;"
_EXPECT = "@%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r4], {};"
_COPY = "@%p1 cp.async.bulk.tensor.{}d.shared::cta.global.mbarrier::complete_tx::bytes [%r3], [%rd4, {{{}}}], [%r4];"
_WAIT = """
{{
    .reg .pred complete;
    waitLoop:
    mbarrier.try_wait.parity.shared::cta.b64 complete, [%r4], {};
    @!complete bra.uni waitLoop;
}}
"""
_END = "bar.sync 0; @%p1 mbarrier.inval.shared::cta.b64 [%r4];"
# All threads bring 16 bytes each of what arrived, as it lies there, to the last tensor.
_OUT = """
    shl.b32 %r5, %r1, 4;
    add.s32 %r6, %r3, %r5;
    ld.shared.v4.b32 {%r8, %r9, %r10, %r11}, [%r6];
    mul.wide.u32 %rd5, %r1, 16;
    add.s64 %rd6, %rd2, %rd5;
    st.global.v4.b32 [%rd6], {%r8, %r9, %r10, %r11};
"""
_KINDS = {"uint8": 0, "float16": 6, "float32": 7}


def _map(x: np.ndarray, box: tuple[int, ...], swizzle: int = 0) -> TensorMap:
    strides = [one // x.itemsize for one in x.strides]
    return encode(x.ctypes.data, swizzle, x.itemsize, _KINDS[x.dtype.name], box, x.shape, strides, 0)


def _aligned(*shape: int, dtype=np.float32) -> np.ndarray:
    """No number twice; at an address that is a multiple of 16."""
    memory = np.zeros(int(np.prod(shape)) * np.dtype(dtype).itemsize + 16, np.uint8)
    start = -memory.ctypes.data % 16
    made = memory[start : len(memory) - 16 + start].view(dtype).reshape(shape)
    made[:] = np.arange(1, made.size + 1).reshape(shape)
    return made


def _copied(
    x: np.ndarray,
    box: tuple[int, ...],
    corner: tuple[int, ...],
    swizzle: int = 0,
    init: str = _INIT,
    expect: Optional[str] = None,
    wait: str = _WAIT.format(0),
    end: str = _END,
    threads: int = 0,
    more: str = "",
) -> np.ndarray:
    """What lies in shared memory after a box was copied there, row after row."""
    size = int(np.prod(box)) * x.itemsize
    y = np.zeros(size // 4, np.uint32)
    copy = _COPY.format(len(box), ", ".join(str(one) for one in corner[::-1]))
    body = _HEAD + init + (expect or _EXPECT.format(size)) + copy + more + wait + _OUT + end
    snippets.run(body, x, y, threads=threads or size // 16, maps=[_map(x, box, swizzle)])
    return y.view(x.dtype).reshape(box)


def _refused(match: str, *arguments, **options) -> None:
    with pytest.raises(PtxError, match=match):
        _copied(*arguments, **options)


X, BOX = _aligned(9, 32), (4, 32)


@pytest.mark.parametrize(
    ("shape", "box", "corner"),
    [
        ((9, 32), (4, 32), (3, 0)),
        ((9, 32), (4, 8), (2, 4)),
        ((9, 32), (4, 8), (7, 28)),  # beyond the last row and column
        ((9, 32), (4, 8), (-3, -5)),
        ((9, 32), (4, 8), (20, 0)),  # all of it outside
        ((5, 24), (8, 8), (0, 17)),
        ((64,), (32,), (40,)),
        ((3, 4, 8), (2, 2, 8), (2, -1, 0)),
        ((2, 5, 6, 8), (2, 2, 4, 8), (1, 4, -1, 0)),
        ((2, 2, 3, 4, 8), (1, 2, 2, 2, 8), (1, 1, -1, 3, 4)),
    ],
)
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_box(shape, box, corner, dtype):
    x = _aligned(*shape, dtype=dtype)
    expected = np.zeros(box, dtype)
    for at in np.ndindex(*box):
        place = tuple(i + j for i, j in zip(corner, at))
        if all(0 <= i < size for i, size in zip(place, shape)):
            expected[at] = x[place]
    assert np.array_equal(_copied(x, box, corner), expected)


@pytest.mark.parametrize("swizzle", [1, 2, 3])
def test_swizzles(swizzle):
    """Over 128 bytes the 16 bytes at place i of row r lie at place i ^ (r % 8); over 64, where two rows share those 128
    bytes, at i ^ (r / 2 % 4); over 32 at i ^ (r / 4 % 2).
    """
    row = 16 << swizzle
    x = _aligned(20, row // 4)
    made = _copied(x, (16, row // 4), (2, 0), swizzle).reshape(16, -1, 4)
    for r in range(16):
        flipped = {1: r // 4 % 2, 2: r // 2 % 4, 3: r % 8}[swizzle]
        for i in range(row // 16):
            assert np.array_equal(made[r, i ^ flipped], x[2 + r].reshape(-1, 4)[i])


def test_a_copy_has_arrived_when_its_phase_was_waited_for():
    assert np.array_equal(_copied(X, BOX, (0, 0)), X[:4])
    _refused("which an asynchronous copy is on its way to", X, BOX, (0, 0), wait="bar.sync 0;", end="")
    # Of the other parity is the phase before the first one, which counts as over.
    _refused("which an asynchronous copy is on its way to", X, BOX, (0, 0), wait=_WAIT.format(1))


@pytest.mark.parametrize("size", [256, 511, 1024])
def test_a_phase_that_expects_other_bytes(size):
    _refused(rf"expects {size} bytes, 512 are copied", X, BOX, (0, 0), expect=_EXPECT.format(size))


def test_arrivals():
    expect = _EXPECT.format(512)
    _refused("waits for 1 arrivals", X, BOX, (0, 0), init=_INIT.replace(", 1;", ", 2;"))
    _refused("whose phase has all of its arrivals", X, BOX, (0, 0), expect=expect + expect)
    twice = _copied(X, BOX, (0, 0), init=_INIT.replace(", 1;", ", 2;"), expect=expect + _EXPECT.format(0))
    assert np.array_equal(twice, X[:4])


def test_phases_follow_each_other():
    """The second copy, to the same place, has to be waited for by the second phase's parity."""
    again = _EXPECT.format(512) + _COPY.format(2, "0, 5")
    made = _copied(X, BOX, (0, 0), wait=_WAIT.format(0) + "bar.sync 0;" + again + _WAIT.format(1))
    assert np.array_equal(made, X[5:])
    _refused("on its way", X, BOX, (0, 0), wait=_WAIT.format(0) + "bar.sync 0;" + again + _WAIT.format(0))
    # Nobody waited for the first.
    _refused("which an asynchronous copy is on its way to", X, BOX, (0, 0), more=_COPY.format(2, "0, 5"))


def test_an_mbarrier_is_there_for_others_after_a_barrier():
    x = _aligned(9, 64)
    _copied(x, (4, 64), (0, 0), threads=64)
    init = _INIT.replace("bar.sync 0;", "")
    _refused(r"reads what another warp touched.*mbarrier\.init", x, (4, 64), (0, 0), init=init, threads=64)
    end = _END.replace("bar.sync 0;", "")
    _refused(r"writes what another warp touched.*try_wait", x, (4, 64), (0, 0), end=end, threads=64)
    _refused("which nothing was written to", X, BOX, (0, 0), init="")
    _refused("no mbarrier lies there", X, BOX, (0, 0), init="@%p1 st.shared.b64 [%r4], 0; bar.sync 0;")
    _refused("or an mbarrier, has", X, BOX, (0, 0), init=_INIT + _INIT)
    _refused("or an mbarrier, has", X, BOX, (0, 0), more="@%p1 st.shared.b32 [%r4], 7;")


def test_copies_that_nobody_waited_for():
    body = _HEAD + _INIT + _EXPECT.format(512) + _COPY.format(2, "0, 0")
    for end, match in (("", "a program ends with a bulk copy"), (_END, "a copy is on its way to complete on it")):
        with pytest.raises(PtxError, match=match):
            snippets.run(body + end, X, X, maps=[_map(X, BOX)])


def test_the_copy_engine_sees_what_threads_wrote_after_a_fence():
    write = _INIT + "@%p1 st.shared.b32 [%r3+64], 7; {} bar.sync 0;"
    made = _copied(X, BOX, (0, 0), init=write.format("fence.proxy.async.shared::cta;"))
    assert np.array_equal(made, X[:4])
    _refused(r"written after the last fence\.proxy", X, BOX, (0, 0), init=write.format(""))


def test_a_copy_onto_what_a_warp_reads():
    x = _aligned(9, 64)
    read = _INIT + "st.shared.b32 [%r3], 7; bar.sync 0; fence.proxy.async.shared::cta; ld.shared.b32 %r12, [%r3]; {}"
    read = read.replace("st.shared", "@%p1 st.shared")
    _copied(x, (4, 64), (0, 0), threads=64, init=read.format("bar.sync 0;"))
    _refused("writes what another warp touched", x, (4, 64), (0, 0), threads=64, init=read.format(""))


def test_where_a_copy_goes_and_what_it_is_given():
    head = _HEAD + _INIT + _EXPECT.format(512)
    for change, match in [
        (("[%r3]", "[%r3+64]"), "not a multiple of 128"),
        (("%rd4", "%rd3"), "no tensor map of 2 dimensions"),
        (("2d", "3d"), "unknown"),
        (("{0, 0}", "{0, 0, 0}"), "unknown"),
        (("shared::cta", "shared::all"), "unknown"),
    ]:
        with pytest.raises(PtxError, match=match):
            snippets.run(head + _COPY.format(2, "0, 0").replace(*change), X, X, maps=[_map(X, BOX)])


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"swizzle": 4}, "not a tensor map"),
        ({"swizzle": 1}, "not a tensor map"),  # rows of 128 bytes
        ({"block": (512, 32)}, "not a tensor map"),
        ({"block": (4, 2)}, "not a tensor map"),
        ({"block": (4, 8), "swizzle": 3}, "unknown: rows of 32 bytes"),
        ({"shape": (0, 32)}, "not a tensor map"),
        ({"strides": (33, 1)}, "not a tensor map"),
        ({"strides": (16, 1)}, "not a tensor map"),
        ({"address": X.ctypes.data + 4}, "not a tensor map"),
        ({"padding": 1}, "unknown"),
        ({"item": 2}, "unknown"),
        ({"kind": 12}, "unknown"),
    ],
)
def test_what_is_no_tensor_map(change, match):
    right = {"address": X.ctypes.data, "swizzle": 3, "item": 4, "kind": 7, "block": BOX, "shape": (9, 32)}
    right |= {"strides": (32, 1), "padding": 0}
    encode(**right)
    with pytest.raises(PtxError, match=match):
        encode(**{**right, **change})


def test_one_lane_of_a_warp_is_elected():
    y = np.zeros(64, np.uint32)
    body = """
        mul.wide.u32 %rd10, %r1, 4;
        add.s64 %rd11, %rd1, %rd10;
        elect.sync %r2|%p1, -1;
        @%p1 st.global.b32 [%rd11], %r2;
    """
    snippets.run(body, y, threads=64)
    for warp in y.reshape(2, 32):
        (lane,) = np.flatnonzero(warp)
        assert warp[lane] == lane
