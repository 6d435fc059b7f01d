"""Hazards of asynchronous products, in kernels of a few instructions."""

import pytest

from tests.aot.assembly import sass
from tests.aot.wgmma import hazards

LAST = "HGMMA.64x64x16.F32 R24, R4, gdesc[UR4], R24, gsb0"
WAIT = "WARPGROUP.DEPBAR.LE gsb0, 0x0"
ONE_LEFT = "WARPGROUP.DEPBAR.LE gsb0, 0x1"
MOVE = "MOV R6, R9"
OTHER = "HGMMA.64x64x16.F32 R56, gdesc[UR8], R56, gsb0"

SAFE = {
    "waited": [LAST, WAIT, MOVE],
    "another register": [LAST, "MOV R8, R4", "MOV R3, R4"],
    "read only": [LAST, "STS.128 [R4], R4", "ISETP.NE.AND P0, PT, R4, RZ, PT"],
    "from shared memory": ["HGMMA.64x64x16.F32 R24, gdesc[UR4], R24, gsb0", "MOV R4, R9"],
    "the later group may run": [LAST, OTHER, ONE_LEFT, MOVE],
    "a way out": [LAST, "@P0 BRA 0x30", "EXIT", WAIT, MOVE],
    "in a loop": [MOVE, LAST, WAIT, "@P0 BRA 0x0"],
    "its own result": [LAST, "HGMMA.64x64x16.F32 R24, R4, gdesc[UR8], R24, gsb0", WAIT, MOVE],
}
UNSAFE = {
    "never waited": [LAST, MOVE],
    "the last of four": [LAST, "MOV R7, R9", WAIT],
    "two at once": [LAST, "IMAD.WIDE R2, R10, 0x4, R12", "IMAD.WIDE R6, R10, 0x4, R12"],
    "wide load": [LAST, "LDS.128 R4, [R20]"],
    "matrix load": [LAST, "LDSM.16.M88.4 R4, [R20]"],
    "pair before": [LAST, "LDG.E.64 R3, desc[UR8][R10.64]"],
    "after a predicate": [LAST, "LOP3.LUT P0, R5, R9, 0x1, RZ, 0xc0, !PT"],
    "predicated": [LAST, "@!P1 MOV R6, R9"],
    "its own group left": [LAST, ONE_LEFT, MOVE],
    "not closed before the wait": [LAST.removesuffix(", gsb0"), WAIT, MOVE],
    "waited on one way only": [LAST, "@P0 BRA 0x30", WAIT, MOVE],
    "in the next round": [MOVE, LAST, "@P0 BRA 0x0"],
    "integers": ["IGMMA.64x64x32.S8.S8 R24, R4, gdesc[UR4], R24, gsb0", MOVE],
}


def found(lines: list[str]) -> list[str]:
    # A line is "@P0 NAME OPERANDS"; nvdisasm writes its address before it.
    text = "".join(f"        /*{16 * i:04x}*/   {line} ;\n" for i, line in enumerate([*lines, "EXIT"]))
    return hazards(sass(text, [16 * (len(lines) + 1)])[0])


@pytest.mark.parametrize("name", SAFE)
def test_safe(name):
    assert not found(SAFE[name])


@pytest.mark.parametrize("name", UNSAFE)
def test_unsafe(name):
    assert len(found(UNSAFE[name])) == 1
