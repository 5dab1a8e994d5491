"""Registers of wgmma that machine code touches too early, and softmax beside products: tools/wgmma.py."""

import pytest

from tools import sass, wgmma

# A loop: S = Q K^T into R24 to R31, then O += P V into R40 to R47 with P in R8 to R11, as the forward pass has them.
CODE = """
CS2R R40, SRZ
LOOP
WARPGROUP.ARRIVE
HGMMA.64x16x16.F32.BF16 R24, gdesc[UR8], RZ, !UPT, gsb0
HGMMA.64x16x16.F32.BF16 R40, R8, gdesc[UR16].tnspB, R40, gsb0
WARPGROUP.DEPBAR.LE gsb0, 0x1
FMUL R3, R24, R2
WARPGROUP.DEPBAR.LE gsb0, 0x0
FMUL R40, R40, R3
F2FP.BF16.F32.PACK_AB R8, R24, R25
@P0 BRA LOOP
STS.128 [R4], R40
EXIT
"""


def function_of(*changes: tuple[str, str]) -> sass.Function:
    """The code with some lines replaced."""
    lines = CODE.strip().splitlines()
    for old, new in changes:
        assert old in lines
        place = lines.index(old)
        lines[place : place + 1] = new.splitlines()
    code, labels = [], {}
    for line in lines:
        if line.isupper() and line in ("LOOP", "PAST"):
            labels[line] = len(code) * 16
        else:
            code.append(line)
    text = ["code for sm_90a", "Function : kernel"]
    for number, line in enumerate(code):
        for label, address in labels.items():
            line = line.replace(f"BRA {label}", f"BRA {address:#x}")
        text.append(f"/*{16 * number:04x}*/ {line} ;")
    (function,) = sass.parse(text)
    return function


def hazards(*changes: tuple[str, str]) -> list[str]:
    return list(wgmma.find(function_of(*changes)))


def test_waits_before_every_access():
    assert hazards() == []


FIRST_WAIT, LAST_WAIT = "WARPGROUP.DEPBAR.LE gsb0, 0x1", "WARPGROUP.DEPBAR.LE gsb0, 0x0"
SCALE, RESCALE, PACK = "FMUL R3, R24, R2", "FMUL R40, R40, R3", "F2FP.BF16.F32.PACK_AB R8, R24, R25"


@pytest.mark.parametrize(
    ("old", "new", "instruction", "register"),
    [
        (FIRST_WAIT, "WARPGROUP.DEPBAR.LE gsb0, 0x2", SCALE, 24),
        (LAST_WAIT, "NOP", RESCALE, 40),
        # An operand that is overwritten while it is read, all of it or the last register.
        (SCALE, f"{SCALE}\nMOV R8, R3", "MOV R8, R3", 8),
        (SCALE, f"{SCALE}\nLDS.128 R8, [R4]", "LDS.128 R8, [R4]", 8),
        (SCALE, f"{SCALE}\nCS2R R10, SRZ", "CS2R R10, SRZ", 10),
        (SCALE, f"{SCALE}\nLDSM.16.M88.4 R5, [R4]", "LDSM.16.M88.4 R5, [R4]", 8),
        (SCALE, f"{SCALE}\nIMAD.WIDE R10, R3, R4, R6", "IMAD.WIDE R10, R3, R4, R6", 10),
        (SCALE, f"{SCALE}\nF2F.F64.F32 R10, R3", "F2F.F64.F32 R10, R3", 10),
        (SCALE, f"{SCALE}\nSHFL.BFLY PT, R11, R3, 0x1, 0x1f", "SHFL.BFLY PT, R11, R3, 0x1, 0x1f", 11),
        # Accumulators that are read or written, also by what writes no register, and as an address.
        (SCALE, f"{SCALE}\nSTS.64 [R4], R46", "STS.64 [R4], R46", 46),
        (SCALE, f"{SCALE}\nSTG.E [R46.64], R3", "STG.E [R46.64], R3", 46),
        (SCALE, f"{SCALE}\nISETP.GE.AND P1, PT, R47, R3, PT", "ISETP.GE.AND P1, PT, R47, R3, PT", 47),
        (SCALE, f"{SCALE}\nBAR.SYNC.DEFER_BLOCKING R45, 0x80", "BAR.SYNC.DEFER_BLOCKING R45, 0x80", 45),
        # The operand of a product may not come from one that is under way.
        (
            "HGMMA.64x16x16.F32.BF16 R40, R8, gdesc[UR16].tnspB, R40, gsb0",
            "HGMMA.64x16x16.F32.BF16 R40, R28, gdesc[UR16].tnspB, R40, gsb0",
            "HGMMA.64x16x16.F32.BF16 R40, R28, gdesc[UR16].tnspB, R40, gsb0",
            28,
        ),
        # On one of two ways.
        (LAST_WAIT, f"@P1 BRA PAST\n{LAST_WAIT}\nPAST", RESCALE, 40),
    ],
)
def test_what_is_touched_too_early(old, new, instruction, register):
    found = hazards((old, new))
    assert any(line.startswith(f"{instruction} at ") and f": R{register} is in flight" in line for line in found), found


def test_what_may_be_done_meanwhile():
    """Operands are read, addresses are single registers, and uniform registers are others."""
    allowed = [
        "MOV R3, R8",
        "LDS R3, [R4+0x28]",
        "LDG.E.64 R6, desc[UR40][R4.64]",
        "R2UR UR8, R12",
        "FADD R48, R32, R39",
    ]
    assert hazards((SCALE, "\n".join([SCALE, *allowed]))) == []


def test_a_group_that_the_loop_leaves_open_is_noticed_in_its_next_turn():
    """The wait at its end covers one group too few for the operand that is packed next."""
    assert hazards((LAST_WAIT, FIRST_WAIT))


def test_products_that_nothing_leads_to():
    found = hazards(("EXIT", "EXIT\nHGMMA.64x16x16.F32.BF16 R24, gdesc[UR8], RZ, !UPT, gsb0"))
    assert [line.partition(": ")[2] for line in found] == ["no way that leads here was found"]


@pytest.mark.parametrize("new", ["WARPGROUP.DEPBAR.LE sb3", "HGMMA.64x16x16.F32.BF16 [R24]"])
def test_what_is_not_understood_is_an_error(new):
    with pytest.raises(ValueError, match="not understood"):
        hazards((LAST_WAIT, new))


EX2 = "MUFU.EX2 R3, R3"


@pytest.mark.parametrize(
    ("beside", "after", "share"),
    [(4, 0, 1.0), (3, 1, 0.75), (0, 2, 0.0)],
)
def test_exponentials_beside_products(beside, after, share):
    changes = [(SCALE, "\n".join([SCALE, *[EX2] * beside])), (RESCALE, "\n".join([RESCALE, *[EX2] * after]))]
    assert wgmma.overlap(function_of(*changes)) == share
    # Outside of the loop they do not count.
    assert wgmma.overlap(function_of(*changes, ("CS2R R40, SRZ", f"CS2R R40, SRZ\n{EX2}"))) == share


def test_exponentials_before_the_first_product_of_a_loop_are_beside_that_of_the_turn_before():
    arrive = "WARPGROUP.ARRIVE"
    assert wgmma.overlap(function_of((arrive, f"{EX2}\n{arrive}"))) == 0.0
    assert wgmma.overlap(function_of((arrive, f"{EX2}\n{arrive}"), (LAST_WAIT, FIRST_WAIT))) == 1.0


def test_no_overlap_without_exponentials():
    assert wgmma.overlap(function_of()) is None
