"""Memory, barriers and asynchronous copies, on hand-written PTX: what is right passes, each mistake is named."""

import numpy as np
import pytest

from tests.ptx import snippets
from tests.ptx.parse import PtxError, parse

pytestmark = pytest.mark.every

_ADDRESS = """
    mul.wide.u32 %rd10, %r1, 4;
    add.s64 %rd11, %rd1, %rd10;
    add.s64 %rd12, %rd2, %rd10;
    mov.b32 %r2, memory;
    shl.b32 %r3, %r1, 2;
    add.s32 %r4, %r2, %r3;
"""


def _numbers(count: int) -> np.ndarray:
    return np.arange(1, count + 1, dtype=np.uint32)


def _refused(match: str, body: str, *arrays: np.ndarray, **options) -> None:
    with pytest.raises(PtxError, match=match):
        snippets.run(body, *arrays, **options)


# Each thread's number to shared memory; then that of the thread 32 further.
_STORE = _ADDRESS + "ld.global.b32 %r5, [%rd11]; st.shared.b32 [%r4], %r5;"
_EXCHANGE = """
    xor.b32 %r6, %r3, 128;
    add.s32 %r6, %r2, %r6;
    ld.shared.b32 %r7, [%r6];
    st.global.b32 [%rd12], %r7;
"""
# The same by a copy.
_COPY = _ADDRESS + "cp.async.ca.shared.global [%r4], [%rd11], 0x4; cp.async.commit_group;"


def test_exchange_between_warps():
    x, y = _numbers(64), np.zeros(64, np.uint32)
    snippets.run(_STORE + "bar.sync 0;" + _EXCHANGE, x, y, threads=64)
    assert np.array_equal(y, np.roll(x, 32))


def test_a_race_names_both_instructions():
    x, y = _numbers(64), np.zeros(64, np.uint32)
    with pytest.raises(PtxError) as error:
        snippets.run(_STORE + _EXCHANGE, x, y, threads=64)
    assert "ld.shared.b32 %r7, [%r6]" in str(error.value)
    assert "st.shared.b32 [%r4], %r5" in str(error.value)
    assert "thread 0 of program" in str(error.value)


def test_a_write_after_another_warps_read_is_a_race():
    body = _STORE + "bar.sync 0;" + _EXCHANGE + "{} st.shared.b32 [%r4], %r7;"
    arrays = _numbers(64), np.zeros(64, np.uint32)
    snippets.run(body.format("bar.sync 0;"), *arrays, threads=64)
    _refused(r"writes what another warp touched.*ld\.shared", body.format(""), *arrays, threads=64)


def test_a_warp_needs_no_barrier():
    x, y = _numbers(32), np.zeros(32, np.uint32)
    snippets.run(_STORE + _EXCHANGE.replace("128", "4"), x, y)
    assert np.array_equal(y, x[np.arange(32) ^ 1])


def test_shared_memory_that_nothing_was_written_to():
    body = _ADDRESS + "ld.shared.b32 %r7, [%r4];"
    _refused("which nothing was written to", body, _numbers(32), _numbers(32))
    _refused(
        r"shared address 0x40: which nothing",
        _STORE.replace("st.shared", "@%p1 st.shared").replace("ld.global", "setp.lt.u32 %p1, %r1, 16; ld.global")
        + "ld.shared.b32 %r7, [%r4];",
        _numbers(32),
        _numbers(32),
    )


def test_outside_of_shared_memory_and_misaligned():
    _refused("outside the program's 64 bytes", _STORE, _numbers(32), _numbers(32), shared=64)
    _refused("not a multiple of its size, 4", _STORE.replace("[%r4]", "[%r4+2]"), _numbers(32), _numbers(32))


def test_outside_of_a_tensor_and_misaligned():
    _refused("thread 31 of program .* is in no tensor", _STORE, _numbers(31), _numbers(32))
    body = _ADDRESS + "ld.global.b32 %r5, [%rd11+{}];"
    _refused("is not a multiple of its size", body.format(2), _numbers(40), _numbers(32))
    _refused("is in no tensor", _ADDRESS + "st.global.b32 [%rd12+4], %r1;", _numbers(32), _numbers(32))


@pytest.mark.parametrize(
    ("wait", "refused"), [("cp.async.wait_group 0;", False), ("", True), ("cp.async.wait_group 1;", True)]
)
def test_a_copy_has_arrived_when_it_was_waited_for(wait, refused):
    x, y = _numbers(64), np.zeros(64, np.uint32)
    body = _COPY + wait + "bar.sync 0;" + _EXCHANGE
    if refused:
        _refused("which an asynchronous copy is on its way to", body, x, y, threads=64)
    else:
        snippets.run(body, x, y, threads=64)
        assert np.array_equal(y, np.roll(x, 32))


def test_what_was_waited_for_is_there_for_others_after_a_barrier():
    body = _COPY + "cp.async.wait_group 0;" + _EXCHANGE
    _refused(r"reads what another warp touched.*cp\.async", body, _numbers(64), _numbers(64), threads=64)


def test_a_warp_waits_for_its_own_copies():
    read = "ld.shared.b32 %r7, [%r4]; st.global.b32 [%rd12], %r7;"
    snippets.run(_COPY + "cp.async.wait_group 0;" + read, _numbers(32), _numbers(32))
    _refused("which an asynchronous copy is on its way to", _COPY + read, _numbers(32), _numbers(32))


def test_a_copy_onto_a_copy():
    again = "cp.async.ca.shared.global [%r4], [%rd11], 0x4;"
    _refused("which an asynchronous copy is on its way to", _COPY + again, _numbers(32), _numbers(32))


def test_groups_arrive_in_their_order():
    """Of two copies in groups of their own, the first has arrived while the last may still be on its way."""
    second = "cp.async.ca.shared.global [%r4+256], [%rd11], 0x4; cp.async.commit_group; cp.async.wait_group 1;"
    x, y = _numbers(64), np.zeros(64, np.uint32)
    snippets.run(_COPY + second + "bar.sync 0;" + _EXCHANGE, x, y, threads=64)
    assert np.array_equal(y, np.roll(x, 32))
    late = _EXCHANGE.replace("[%r6]", "[%r6+256]")
    _refused("on its way", _COPY + second + "bar.sync 0;" + late, x, y, threads=64)


def test_a_copy_of_nothing_writes_zeros_and_reads_no_address():
    x, y = _numbers(16), np.full(32, 9, np.uint32)
    body = (
        _ADDRESS
        + """
        setp.lt.u32 %p1, %r1, 16;
        selp.b32 %r8, 4, 0, %p1;
        cp.async.ca.shared.global [%r4], [%rd11], 0x4, %r8;
        cp.async.commit_group;
        cp.async.wait_group 0;
        ld.shared.b32 %r7, [%r4];
        st.global.b32 [%rd12], %r7;
    """
    )
    snippets.run(body, x, y)
    assert np.array_equal(y, np.concatenate([x, np.zeros(16, np.uint32)]))


def test_vectors_of_numbers():
    x, y = _numbers(128), np.zeros(128, np.uint32)
    body = """
        mul.wide.u32 %rd10, %r1, 16;
        add.s64 %rd11, %rd1, %rd10;
        add.s64 %rd12, %rd2, %rd10;
        ld.global.v4.b32 {%r2, %r3, %r4, %r5}, [%rd11];
        mov.b32 %r6, memory;
        shl.b32 %r7, %r1, 4;
        add.s32 %r6, %r6, %r7;
        st.shared.v4.b32 [%r6], {%r5, %r4, %r3, %r2};
        ld.shared.v2.b32 {%r8, %r9}, [%r6];
        ld.shared.b16 %r10, [%r6+8];
        ld.shared.b64 %rd9, [%r6+8];
        mov.b64 {_, %r11}, %rd9;
        st.global.v4.b32 [%rd12], {%r8, %r9, %r10, %r11};
    """
    snippets.run(body, x, y)
    assert np.array_equal(y.reshape(-1, 4), x.reshape(-1, 4)[:, ::-1])


def test_bytes():
    x, y = np.arange(64, dtype=np.uint16), np.zeros(32, np.uint32)
    body = (
        _ADDRESS
        + """
        ld.global.b32 %r5, [%rd11];
        st.shared.b32 [%r4], %r5;
        ld.shared.b8 %rs1, [%r4];
        ld.shared.v2.b8 {%rs2, %rs3}, [%r4+2];
        mov.b32 %r6, {%rs1, %rs2};
        st.global.b32 [%rd12], %r6;
    """
    )
    snippets.run(body, x, y)
    assert np.array_equal(y.view(np.uint16), x % 256)


def test_shuffles():
    x, y = _numbers(64), np.zeros(64, np.uint32)
    body = _ADDRESS + "ld.global.b32 %r5, [%rd11]; {} st.global.b32 [%rd12], %r6;"
    snippets.run(body.format("shfl.sync.bfly.b32 %r6, %r5, 5, 31, -1;"), x, y, threads=64)
    assert np.array_equal(y, x[np.arange(64) ^ 5])
    snippets.run(body.format("and.b32 %r7, %r1, 1; shfl.sync.idx.b32 %r6, %r5, %r7, 31, -1;"), x, y, threads=64)
    assert np.array_equal(y, x[np.arange(64) // 32 * 32 + np.arange(64) % 2])


def test_programs_part_and_threads_do_not():
    """Program i adds 1 to its number i times; threads of one program that part are refused."""
    y = np.zeros(4, np.uint32)
    body = """
        mov.u32 %r2, %ctaid.x;
        mul.wide.u32 %rd10, %r2, 4;
        add.s64 %rd11, %rd1, %rd10;
        mov.b32 %r3, 0;
        setp.eq.b32 %p1, %r2, 0;
        @%p1 bra $END;
        $LOOP:
        add.s32 %r3, %r3, 10;
        add.s32 %r2, %r2, -1;
        setp.ne.b32 %p2, %r2, 0;
        @%p2 bra $LOOP;
        $END:
        setp.eq.b32 %p3, %r1, 0;
        @%p3 st.global.b32 [%rd11], %r3;
    """
    snippets.run(body, y, grid=(4,))
    assert y.tolist() == [0, 10, 20, 30]
    _refused("threads of one program part", body.replace("%p1, %r2, 0", "%p1, %r1, 0"), y, grid=(4,))


def test_each_axis_of_the_grid():
    y = np.zeros(24, np.uint32)
    body = """
        mov.u32 %r2, %ctaid.x; mov.u32 %r3, %ctaid.y; mov.u32 %r4, %ctaid.z;
        mov.u32 %r5, %nctaid.x; mov.u32 %r6, %nctaid.y;
        mad.lo.s32 %r7, %r4, %r6, %r3;
        mad.lo.s32 %r8, %r7, %r5, %r2;
        mul.wide.u32 %rd10, %r8, 4;
        add.s64 %rd11, %rd1, %rd10;
        st.global.b32 [%rd11], %r8;
    """
    snippets.run(body, y, grid=(2, 3, 4))
    assert np.array_equal(y, np.arange(24))


@pytest.mark.parametrize(
    "line",
    [
        "add.sat.s32 %r2, %r1, %r1;",
        "frobnicate.b32 %r2, %r1;",
        "ld.global.nc.b32 %r2, [%rd1];",
        "bar.sync 1;",
        "mov.u32 %r2, %clock;",
        "shfl.sync.bfly.b32 %r2, %r1, 1, 15, -1;",
        "add.s32 %r2, %r1, %r9;",  # which was never written
        "add.s64 %rd3, %r1, %rd1;",
        "cp.async.cg.shared.global [%r1], [%rd1], 0x4;",
        "mma.sync.aligned.m16n8k4.row.col.f32.tf32.tf32.f32 {%r1}, {%r1}, {%r1}, {%r1};",
        "div.s32 %r2, %r1, %r1;",  # by 0, of the first thread
    ],
)
def test_what_is_not_known_is_refused(line):
    _refused("line \\d+: " + line.split(" ")[0].replace(".", r"\."), line, _numbers(32))


def test_a_module_of_two_kernels_is_refused():
    with pytest.raises(PtxError, match="0 kernels"):
        parse(".version 8.8\n.target sm_80\n")
