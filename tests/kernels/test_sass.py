"""Short texts of machine code as `cuobjdump -sass` prints it."""

import pytest

from kdav_fast.kernels.sass import parse, report

HOPPER = """
	code for sm_90a
		Function : gradient_kernel
        /*0000*/                   LDC R1, c[0x0][0x28] ;                  /* 0x00000a00ff017b82 */
                                                                           /* 0x000e300000000800 */
        /*0050*/                   LDG.E R2, desc[UR12][R2.64] ;           /* 0x0000000c02027981 */
        /*0060*/              @!P1 BRA 0x120 ;                             /* 0x0000000c00449947 */
        /*0070*/              @P0  LDG.E.128 R4, desc[UR12][R8.64] ;       /* 0x0000000c02027981 */
        /*0080*/             @!UP0 LDGSTS.E.BYPASS.128 [R3], desc[UR4][R6.64] ;
        /*0090*/                   LDG.E.U16.CONSTANT R9, desc[UR12][R2.64] ;
        /*00a0*/                   HGMMA.64x256x16.F32.BF16 R24, gdesc[UR8], R24, gsb0 ;
        /*00b0*/                   HGMMA.64x16x16.F32.BF16 R24, R4, gdesc[UR8], R24 ;
        /*00c0*/                   HGMMA.64x256x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*00d0*/              @!P0 BRA 0x70 ;                              /* 0xfffffff400bc8947 */
        /*00e0*/                   STG.E.64 desc[UR12][R2.64], R4 ;
        /*00f0*/                   LDG.E.64 R2, desc[UR12][R2.64] ;
        /*0100*/                   EXIT ;
        /*0110*/                   BRA 0x110;                              /* 0xfffffffc00fc7947 */
        /*0120*/                   NOP;
"""


def test_loads_by_width_and_place():
    found = report(HOPPER)
    assert found.loads == {"LDG.128": 1, "LDG.16": 1, "LDG.32": 1, "LDG.64": 1, "LDGSTS.128": 1}
    assert (found.narrow, found.narrow_in_loops) == (1, 1)


def test_matrix_instructions_by_shape():
    assert report(HOPPER).matrix == {"HGMMA.64x16x16": 1, "HGMMA.64x256x16": 2}


@pytest.mark.parametrize(
    ("line", "matrix", "loads"),
    [
        ("/*0010*/ HMMA.16816.F32.BF16 R4, R8, R12, R4 ;", {"HMMA.16816": 1}, {}),
        ("/*0010*/ UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR8], tmem[UR10], idesc[UR11], UP0 ;", {"UTCHMMA": 1}, {}),
        ("/*0010*/ UTMALDG.2D [UR8], [UR4] ;", {}, {"UTMALDG": 1}),
        ("/*0010*/ LDG.E.ENL2.256 R8, R4, desc[UR4][R2.64] ;", {}, {"LDG.256": 1}),
        ("/*0010*/ LDS.128 R4, [R2] ;", {}, {}),
        ("/*0010*/ IMAD R3, R4, UR4, RZ ;", {}, {}),
    ],
)  # fmt: skip
def test_other_generations(line, matrix, loads):
    found = report(line)
    assert (found.matrix, found.loads) == (matrix, loads)


def test_branches():
    found = parse(HOPPER)
    assert [one.target for one in found if one.target is not None] == [0x120, 0x70, 0x110]
    assert parse("no code") == []
