"""The parser of assembly, on kernels so short that their loops can be counted by hand."""

import pytest

from tests.aot.assembly import AMD, NVIDIA, Instruction, Loop, amdgcn, is_a, main_loop, natural_loops, sass

# One loop, of 0x30 to 0xa0: two copies of 16 bytes, two products. Before it a copy, behind it a load of 4 bytes.
ROLLED = """
	.headerflags	@"EF_CUDA_SM80 EF_CUDA_PTX_SM(EF_CUDA_SM80)"
		Function : conv_kernel
        /*0000*/                   MOV R1, c[0x0][0x28] ;                            /* 0x00000a0000017a02 */
                                                                                     /* 0x000fe40000000f00 */
        /*0010*/                   LDGSTS.E.BYPASS.128 [R4], [R2.64], P1 ;           /* 0x0000000002047fae */
        /*0020*/                   LDGDEPBAR ;                                       /* 0x00000000000079af */
        /*0030*/                   LDGSTS.E.BYPASS.128 [R4+0x1000], [R2.64], P1 ;    /* 0x0010000002047fae */
        /*0040*/                   LDGSTS.E.BYPASS.LTC128B.128 [R5], [R6.64] ;       /* 0x0000000006057fae */
        /*0050*/                   LDSM.16.M88.4 R8, [R4] ;                          /* 0x000000000408783b */
        /*0060*/                   HMMA.16816.F32 R16, R8, R10, R16 ;                /* 0x0000000a0810723c */
        /*0070*/                   HMMA.16816.F32 R20, R8, R12, R20 ;                /* 0x0000000c0814723c */
        /*0080*/                   NOP ;                                             /* 0x0000000000007918 */
        /*0090*/                   ISETP.NE.AND P0, PT, R0, RZ, PT ;                 /* 0x000000ff0000720c */
        /*00a0*/               @P0 BRA 0x30 ;                                        /* 0xffffff8000000947 */
        /*00b0*/                   LDG.E R9, [R2.64] ;                               /* 0x0000000402097981 */
        /*00c0*/                   STG.E.128 [R2.64], R16 ;                          /* 0x0000001002007986 */
        /*00d0*/                   EXIT ;                                            /* 0x000000000000794d */
        /*00e0*/                   BRA 0xe0;                                         /* 0xfffffff000007947 */
        /*00f0*/                   NOP;                                              /* 0x0000000000007918 */
"""

# wgmma, without a loop: from 0x20 to 0x60. The scale is loaded between the products.
UNROLLED = """
        /*0000*/                   LDGSTS.E.BYPASS.128 [R4], [R2.64] ;
        /*0010*/                   LDGSTS.E.BYPASS.128 [R4+0x800], [R2.64+0x80] ;
        /*0020*/                   HGMMA.64x128x16.F32 R24, gdesc[UR4], !UPT ;
        /*0030*/                   LDG.E R88, desc[UR8][R6.64] ;
        /*0040*/                   WARPGROUP.ARRIVE ;
        /*0050*/                   NOP ;
        /*0060*/                   HGMMA.64x128x16.F32 R24, gdesc[UR8], R24, gsb0 ;
        /*0070*/                   LDG.E.U16 R89, desc[UR8][R6.64+0x2] ;
        /*0080*/                   EXIT ;
"""

# A persistent kernel: the loop over tiles, 0x10 to 0xa0, holds the loop over channels, 0x20 to 0x60. That waits for a
# barrier; to wait longer it goes behind the end, 0xc0 to 0xe0, and comes back into its middle. Tensor descriptors.
NESTED = """
        /*0000*/                   S2R R0, SR_CTAID.X ;
        /*0010*/                   IMAD R2, R0, 0x80, RZ ;
        /*0020*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R5 ;
        /*0030*/              @!P0 BRA 0xc0 ;
        /*0040*/                   UTCHMMA gdesc[UR6], gdesc[UR8], tmem[UR10], tmem[UR12], idesc[UR13], UP0 ;
        /*0050*/                   UTMALDG.2D [UR16], [UR20] ;
        /*0060*/                   BRA.U UP1, 0x20 ;
        /*0070*/                   LDG.E R7, desc[UR8][R6.64] ;
        /*0080*/                   FFMA R8, R8, R9, R7 ;
        /*0090*/                   STG.E desc[UR8][R2.64], R8 ;
        /*00a0*/               @P2 BRA 0x10 ;
        /*00b0*/                   EXIT ;
        /*00c0*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R5 ;
        /*00d0*/              @!P0 BRA 0xc0 ;
        /*00e0*/                   BRA 0x40 ;
"""

# Two loops that multiply, 0x00 to 0x20 and 0x30 to 0x80, and one that sums. The first has a narrow copy; the second is
# left by a call that does not return, as on sm_80.
TWO_LOOPS = """
        /*0000*/                   IMMA.16832.S8.S8 R4, R8.ROW, R10.COL, R4 ;
        /*0010*/                   LDGSTS.E [R4], [R2.64] ;
        /*0020*/               @P0 BRA 0x0 ;
        /*0030*/                   LDG.E.128 R4, [R2.64] ;
        /*0040*/                   IMMA.16832.S8.S8 R4, R8.ROW, R10.COL, R4 ;
        /*0050*/                   IMMA.16832.S8.S8 R8, R8.ROW, R10.COL, R8 ;
        /*0060*/                   IADD3 R2, R2, 0x10, RZ ;
        /*0070*/              @!P1 CALL.REL.NOINC 0x90 ;
        /*0080*/                   BRA 0x30 ;
        /*0090*/                   LDG.E R5, [R2.64] ;
        /*00a0*/                   FADD R6, R6, R5 ;
        /*00b0*/               @P0 BRA 0x90 ;
        /*00c0*/                   EXIT ;
"""

# Specialised warps: an indirect jump to those that load (0x20 to 0x30) or to those that multiply (0x50 to 0x60).
SPECIALISED = """
        /*0000*/                   LDG.E R5, desc[UR4][R2.64] ;
        /*0010*/                   BRXU UR4 -0x20 ;
        /*0020*/                   UTMALDG.2D [UR16], [UR20] ;
        /*0030*/               @P0 BRA 0x20 ;
        /*0040*/                   EXIT ;
        /*0050*/                   UTCQMMA gdesc[UR6], gdesc[UR8], tmem[UR10], tmem[UR12], idesc[UR13], UP0 ;
        /*0060*/                   BRA.U UP0, 0x50 ;
        /*0070*/                   EXIT ;
"""

# One loop, .LBB0_1 to the branch back: 6 instructions. Half of its copies are too narrow.
AMD_ROLLED = """
	.text
conv_kernel:                            ; @conv_kernel
; %bb.0:
	s_load_dwordx4 s[0:3], s[4:5], 0x0
	v_mov_b32_e32 v1, 0
	s_cbranch_scc1 .LBB0_3
.LBB0_1:                                ; =>This Inner Loop Header: Depth=1
	buffer_load_dwordx4 v[2:5], v1, s[0:3], 0 offen
	buffer_load_dword v6, s[0:3], 0 offen lds
	v_mfma_f32_32x32x8_f16 a[0:15], v[2:3], v[4:5], a[0:15]
	v_mfma_f32_32x32x8_f16 a[0:15], v[2:3], v[4:5], a[0:15] ; comment
	s_add_i32 s6, s6, -1
	s_cbranch_scc0 .LBB0_1
; %bb.2:
	global_load_ushort v1, v2, s[0:1]
.LBB0_3:
	s_endpgm
	.section	.rodata,"a",@progbits
	.amdhsa_next_free_vgpr 64
    .vgpr_count:     64
"""


def nvidia(text: str) -> list[Instruction]:
    (code,) = sass(text, [16 * text.count(";")])
    return code


@pytest.mark.parametrize(
    ("text", "loop"),
    [
        (ROLLED, Loop(instructions=7, products=2, rolled=True, wide_loads=2, narrow_loads=0)),
        (UNROLLED, Loop(instructions=4, products=2, rolled=False, wide_loads=2, narrow_loads=1)),
        (NESTED, Loop(instructions=8, products=1, rolled=True, wide_loads=1, narrow_loads=0)),
        (TWO_LOOPS, Loop(instructions=9, products=3, rolled=True, wide_loads=1, narrow_loads=1)),
        (SPECIALISED, Loop(instructions=2, products=1, rolled=True, wide_loads=1, narrow_loads=0)),
    ],
    ids=["rolled", "unrolled", "nested", "two loops", "specialised"],
)
def test_main_loop(text, loop):
    assert main_loop(nvidia(text), NVIDIA, NVIDIA.tensor_core) == loop


def test_main_loop_without_tensor_cores():
    """Float32's products are multiply-adds; a kernel without a product is all loop."""
    code = nvidia(NESTED)
    assert main_loop(code, NVIDIA, NVIDIA.multiply_add) == Loop(13, 1, True, 1, 1)
    without = nvidia(TWO_LOOPS.replace("IMMA", "IMAD"))
    assert main_loop(without, NVIDIA, NVIDIA.tensor_core) == Loop(13, 0, False, 1, 2)


def test_amd_main_loop():
    code = amdgcn(AMD_ROLLED)
    assert [one.name for one in code][-3:] == ["s_cbranch_scc0", "global_load_ushort", "s_endpgm"]
    assert main_loop(code, AMD, AMD.tensor_core) == Loop(6, 2, True, wide_loads=1, narrow_loads=1)
    unrolled = amdgcn(AMD_ROLLED.replace("s_cbranch_scc0 .LBB0_1", "s_nop 0"))
    assert main_loop(unrolled, AMD, AMD.tensor_core) == Loop(2, 2, False, wide_loads=1, narrow_loads=1)


def test_loops_share_no_header():
    """Two ways back to one header are one loop."""
    code = [
        Instruction("a", ""),
        Instruction("b", "", target=0),
        Instruction("c", ""),
        Instruction("d", "", target=0),
        Instruction("e", "", goes_on=False),
    ]
    assert natural_loops(code) == [{0, 1, 2, 3}]
    assert natural_loops([*code[:3], Instruction("d", "", target=2), code[4]]) == [{0, 1}, {2, 3}]


def test_loops_are_natural_ones():
    """The way back from behind the end leads into the middle of a loop, and makes no loop of its own."""
    waiting, channels, tiles = sorted(natural_loops(nvidia(NESTED)), key=len)
    assert waiting == {12, 13}
    assert channels == {2, 3, 4, 5, 6, 12, 13, 14}
    assert tiles == channels | {1, 7, 8, 9, 10}


def test_a_call_leaves_a_loop():
    code = nvidia("""
        /*0000*/                   MOV R1, R2 ;
        /*0010*/                   HMMA.16816.F32 R16, R8, R10, R16 ;
        /*0020*/              @!P3 CALL.REL.NOINC 0x40 ;
        /*0030*/                   BRA 0x10 ;
        /*0040*/                   FADD R6, R6, R5 ;
        /*0050*/               @P1 BRA 0x0 ;
        /*0060*/                   EXIT ;
    """)
    assert natural_loops(code) == [{1, 2, 3}, {0, 1, 2, 3, 4, 5}]


def test_what_goes_on_to_the_next_instruction():
    code = nvidia("""
        /*0000*/               @P0 EXIT ;
        /*0010*/                   BRA.U UP1, 0x0 ;
        /*0020*/                   BRA P2, 0x0 ;
        /*0030*/              @!P0 BRA 0x0 ;
        /*0040*/             @!UP0 CALL.REL.NOINC 0x0 ;
        /*0050*/                   BRA 0x0 ;
        /*0060*/                   BRXU UR4 -0x20 ;
        /*0070*/                   EXIT ;
    """)
    assert [one.goes_on for one in code] == [True] * 5 + [False] * 3
    assert [one.target for one in code] == [None, 0, 0, 0, 0, 0, None, None]


def test_several_kernels_at_once():
    """They lie one behind the other, and so do the addresses of their branches."""
    second = """
        /*0100*/                   HMMA.16816.F32 R16, R8, R10, R16 ;
        /*0110*/               @P0 BRA 0x100 ;
        /*0120*/                   EXIT ;
    """
    kernels = sass(ROLLED + second, [0x100, 0x30])
    assert [len(one) for one in kernels] == [16, 3]
    assert [one.target for one in kernels[1]] == [None, 0, None]
    with pytest.raises(AssertionError, match="19 instructions"):
        sass(ROLLED + second, [0x100, 0x40])
    with pytest.raises(AssertionError, match="out of the kernel"):
        sass(ROLLED + second.replace("BRA 0x100", "BRA 0x30"), [0x100, 0x30])


@pytest.mark.parametrize(
    ("dialect", "text", "kinds"),
    [
        (NVIDIA, "HMMA.16816.F32.BF16 R4, R8, R10, R4", {"tensor_core"}),
        (NVIDIA, "IGMMA.64x128x32.S8.S8 R24, gdesc[UR4], R24", {"tensor_core"}),
        (NVIDIA, "UTCQMMA gdesc[UR4], gdesc[UR6], tmem[UR8]", {"tensor_core"}),
        (NVIDIA, "FFMA2 R4, R4.F32x2.HI_LO, R6.F32x2.HI_LO", {"multiply_add"}),
        (NVIDIA, "LDG.E.128.CONSTANT R4, desc[UR4][R2.64]", {"load", "wide"}),
        (NVIDIA, "LDG.E.ENL2.256 R4, R8, desc[UR4][R2.64]", {"load", "wide"}),
        (NVIDIA, "LDG.E.U16 R4, desc[UR4][R2.64]", {"load", "tiny"}),
        (NVIDIA, "LDG.E.64 R4, desc[UR4][R2.64]", {"load"}),
        (NVIDIA, "LDGSTS.E.BYPASS.LTC128B.128 [R4], desc[UR4][R2.64]", {"load", "wide", "copy"}),
        (NVIDIA, "LDGSTS.E.LTC128B [R4], desc[UR4][R2.64]", {"load", "copy"}),
        (NVIDIA, "LDGDEPBAR ", set()),
        (NVIDIA, "UTMALDG.4D.IM2COL [UR8], [UR4]", {"load", "wide"}),
        (NVIDIA, "STL.64 [R1], R4", {"local"}),
        (NVIDIA, "LDS.128 R4, [R2]", set()),
        (AMD, "v_mfma_f32_32x32x8_f16 a[0:15], v[2:3], v[4:5], a[0:15]", {"tensor_core"}),
        (AMD, "v_wmma_f32_16x16x16_f16 v[0:7], v[8:15], v[16:23], v[0:7]", {"tensor_core"}),
        (AMD, "v_fmac_f32_e32 v1, v2, v3", {"multiply_add"}),
        (AMD, "v_pk_fma_f32 v[0:1], v[2:3], v[4:5], v[0:1]", {"multiply_add"}),
        (AMD, "global_load_dwordx4 v[0:3], v[4:5], off", {"load", "wide"}),
        (AMD, "buffer_load_dwordx2 v[0:1], v2, s[0:3], 0 offen", {"load"}),
        (AMD, "buffer_load_dwordx4 v2, s[0:3], 0 offen lds", {"load", "wide", "copy"}),
        (AMD, "global_load_lds_dword v[0:1], off", {"load", "copy"}),
        (AMD, "buffer_load_ushort v2, v1, s[0:3], 0 offen", {"load", "tiny"}),
        (AMD, "global_load_short_d16_hi v2, v[4:5], off", {"load", "tiny"}),
        (AMD, "scratch_store_dwordx4 off, v[0:3], s32", {"local"}),
        (AMD, "s_load_dwordx4 s[0:3], s[4:5], 0x0", set()),
    ],
)
def test_kinds_of_instructions(dialect, text, kinds):
    name, _, operands = text.partition(" ")
    found = {kind for kind in dialect._fields if is_a(getattr(dialect, kind), Instruction(name, operands))}
    # These are kinds of loads.
    assert (found if "load" in found else found - {"wide", "copy", "tiny"}) == kinds
