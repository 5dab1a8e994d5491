"""The static report of the CUDA kernels: what it reads from machine code, and what it makes of that."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2]))

from build_tools import cost_model, cuda_objects, sass, static_report
from build_tools.static_report import Launch

# A loop from 0x20 to 0xd0 around one that loads pages (0x50 to 0x60), with a branch past it to direct loads (0x80), and
# a special case (0xb0) that is usually skipped.
SASS = """
	code for sm_80
		Function : kernel_a
	.headerflags	@"EF_CUDA_SM80"
        /*0000*/                   IMAD.MOV.U32 R1, RZ, RZ, c[0x0][0x28] ;      /* 0x00000a00ff017624 */
                                                                                /* 0x000fe400078e00ff */
        /*0010*/              @!P2 EXIT ;                                       /* 0x000000000000794d */
        /*0020*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0030*/                   BSSY B0, 0x90 ;
        /*0040*/              @!P1 BRA 0x80 ;
        /*0050*/                   LDGSTS.E.BYPASS.128.ZFILL [R9], [R4.64], P2 ;
        /*0060*/               @P3 BRA 0x50 ;
        /*0070*/                   BSYNC B0 ;
        /*0080*/                   LDGSTS.E.BYPASS.128.ZFILL [R9], [R4.64], P2 ;
        /*0084*/                   LDGSTS.E.BYPASS.128.ZFILL [R9], [R4.64], P2 ;
        /*0088*/                   BSYNC B0 ;
        /*0090*/                   LDSM.16.M88.4 R100, [R196] ;
        /*00a0*/               @P0 BRA 0xc0 ;
        /*00b0*/                   FMUL.FTZ R3, R3, R4 ;
        /*00c0*/                   HMMA.16816.F32.BF16 R20, R100.reuse, R22, R88 ;
        /*00d0*/              @!P4 BRA 0x20 ;
        /*00e0*/                   EXIT ;
        /*00f0*/                   BRA 0xf0;
		Function : kernel_b
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   EXIT ;
	code for sm_90a
		Function : kernel_a
        /*0000*/                   UIADD3 UR4, UR4, 0x1, URZ ;
        /*0010*/                   HMMA.16816.F32.BF16 R20, R100, R22, R88 ;
        /*0020*/                   BRA.U UP0, 0x0 ;
        /*0030*/                   EXIT ;
"""


def functions():
    return list(sass.parse(SASS.splitlines()))


def test_functions_are_told_apart():
    assert [(f.architecture, f.name) for f in functions()] == [
        ("sm_80", "kernel_a"),
        ("sm_80", "kernel_b"),
        ("sm_90a", "kernel_a"),
    ]
    first = functions()[0].instructions
    assert first[1] == sass.Instruction(0x10, "!P2", "EXIT", "")
    assert first[5].name == "LDGSTS"
    assert first[4].target == 0x80


def test_loops():
    function = functions()[0]
    heads = {function.blocks[loop.head].instructions[0].address for loop in function.loops}
    assert heads == {0x20, 0x50, 0xF0}
    assert function.blocks[function.main_loop.head].instructions[0].address == 0x20


def test_usual_pass():
    """Most copies, so not by way of the pages; then the shortest, so without the special case."""
    passed = functions()[0].usual_pass()
    assert passed == {
        "BAR.SYNC.DEFER_BLOCKING": 1,
        "BSSY": 1,
        "BRA": 3,
        "LDGSTS.E.BYPASS.128.ZFILL": 2,
        "BSYNC": 1,
        "LDSM.16.M88.4": 1,
        "HMMA.16816.F32.BF16": 1,
    }


def test_loops_of_other_kinds():
    _, no_loop, uniform_branch = functions()
    assert no_loop.main_loop is None
    assert not no_loop.usual_pass()
    assert sum(uniform_branch.usual_pass().values()) == 3


# Like fwd_sm90: products before the loop over tiles and after it, all within a loop over rounds; in the inner loop a
# wait, and a special case that copies.
WGMMA = """
	code for sm_90a
		Function : consumer
        /*0000*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], RZ, !UPT ;
        /*0010*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24, gsb0 ;
        /*0020*/                   HGMMA.64x64x16.F32.BF16 R88, R152, gdesc[UR4].tnspB, R88, gsb0 ;
        /*0030*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R3 ;
        /*0040*/              @!P0 BRA 0x30 ;
        /*0050*/              @!P1 BRA 0x70 ;
        /*0060*/                   LDGSTS.E.BYPASS.128.ZFILL [R9], [R4.64], P2 ;
        /*0070*/               @P2 BRA 0x10 ;
        /*0080*/                   HGMMA.64x64x16.F32.BF16 R88, R152, gdesc[UR4].tnspB, R88, gsb0 ;
        /*0090*/                   HGMMA.64x64x16.F32.BF16 R88, R152, gdesc[UR4].tnspB, R88, gsb0 ;
        /*00a0*/               @P3 BRA 0x0 ;
        /*00b0*/                   EXIT ;
"""


def test_loops_of_wgmma():
    """The innermost loop with products, though others have more; of ways through it the shortest, not what copies."""
    (function,) = sass.parse(WGMMA.splitlines())
    assert function.has_wgmma
    assert not any(each.has_wgmma for each in functions())
    assert function.blocks[function.main_loop.head].instructions[0].address == 0x10
    assert function.usual_pass() == {
        "HGMMA.64x128x16.F32.BF16.SS": 1,
        "HGMMA.64x64x16.F32.BF16.RS": 1,
        "SYNCS.PHASECHK.TRANS64.TRYWAIT": 1,
        "BRA": 3,
    }


NESTED = """
	code for sm_80
		Function : parts
        /*0000*/                   HMMA.16816.F32.BF16 R20, R100, R22, R88 ;
        /*0010*/                   LDSM.16.M88.4 R100, [R196] ;
        /*0020*/                   HMMA.16816.F32.BF16 R20, R100, R22, R88 ;
        /*0030*/               @P0 BRA 0x10 ;
        /*0040*/               @P1 BRA 0x0 ;
        /*0050*/                   EXIT ;
"""


def test_parts():
    """A loop of products within the main loop."""
    (function,) = sass.parse(NESTED.splitlines())
    assert function.usual_pass(3) == {"HMMA.16816.F32.BF16": 4, "LDSM.16.M88.4": 3, "BRA": 4}


# A product that warps compute in every other pass.
ALTERNATING = """
	code for sm_90a
		Function : alternating
        /*0000*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24, gsb0 ;
        /*0010*/              @!P1 BRA 0x40 ;
        /*0020*/                   HGMMA.64x32x16.F32.BF16 R88, gdesc[UR8], RZ, !UPT ;
        /*0030*/                   STS.128 [R5], R88 ;
        /*0040*/               @P2 BRA 0x0 ;
        /*0050*/                   EXIT ;
"""


def test_alternating_passes():
    (function,) = sass.parse(ALTERNATING.splitlines())
    both = {"HGMMA.64x64x16.F32.BF16.SS": 1, "BRA": 2}
    assert function.usual_pass() == {**both, "HGMMA.64x32x16.F32.BF16.SS": 1, "STS.128": 1}
    assert function.usual_pass(fewest_products=True) == both
    products = 2 * 64 * (64 + 32 // 2) * 16  # of two warpgroups
    launch = Launch("alternating", "3Cfg", 16, 16, 64, 64, 256, 0, 8, products, 1, 0, 0, alternates=True)
    passed = static_report.average_pass(function, launch)
    assert passed == {**both, "HGMMA.64x32x16.F32.BF16.SS": 0.5, "STS.128": 0.5}
    static_report.check_products(launch, passed, function)


def test_a_pass_that_is_not_the_right_one():
    (function,) = sass.parse(NESTED.splitlines())
    launch = Launch("parts", "3Cfg", 16, 16, 16, 8, 32, 0, 1, 8192, 3, 0, 0, alternates=False)
    static_report.check_products(launch, function.usual_pass(3), function)
    with pytest.raises(cuda_objects.ToolError, match=r"parts: one pass .* read as 4096 multiply-adds, and has 8192"):
        static_report.check_products(launch, function.usual_pass(1), function)


# Costs.


@pytest.mark.parametrize(
    ("name", "threads", "registers", "smem_bytes", "blocks"),
    [
        ("8.0", 128, 255, 0, 2),  # 255 registers are 256, 8 warps of them are all there are
        ("8.0", 128, 128, 0, 4),
        ("8.0", 128, 129, 0, 3),
        ("8.0", 256, 32, 0, 8),  # 2048 threads
        ("8.6", 256, 32, 0, 6),  # 1536 threads
        ("8.0", 32, 16, 0, 32),
        ("8.0", 128, 32, 81 * 1024, 2),  # with 1 KB of the system's each
        ("8.0", 128, 32, 82 * 1024, 1),
        ("8.6", 128, 32, 99 * 1024, 1),
        ("8.6", 128, 32, 100 * 1024, 0),
        ("9.0", 128, 32, 227 * 1024, 1),
        ("9.0", 128, 32, 113 * 1024, 2),
    ],
)
def test_occupancy(name, threads, registers, smem_bytes, blocks):
    device = next(each for each in cost_model.MULTIPROCESSORS if each.name == name)
    assert device.blocks_that_fit(threads, registers, smem_bytes) == blocks


def test_work_of_instructions():
    passed = {
        "HMMA.16816.F32.BF16": 2, "HMMA.1688.F32": 1, "MUFU.EX2": 3, "FFMA.FTZ": 5, "IMAD.MOV.U32": 7, "FMNMX": 11,
        "LDSM.16.MT88.4": 1, "LDS": 1, "LDS.128": 1, "STS.64": 1, "LDGSTS.E.BYPASS.128.ZFILL": 1,
        "RED.E.ADD.F32.FTZ.RN.STRONG.GPU": 1, "REDG.E.ADD.F32x4.FTZ.RN.STRONG.GPU": 1, "BRA": 13,
    }  # fmt: skip
    assert cost_model.work(passed) == {
        "tensor": 2 * 2048 + 1024,
        "mufu": 3 * 32,
        "fp32": 5 * 32,
        "integer_multiply": 7 * 32,
        "alu": 11 * 32,
        "smem": 512 + 128 + 512 + 256 + 512,
        "reduction": 128 + 512,
        "issue": sum(passed.values()),
        "wgmma": 0,
    }


def test_work_of_wgmma():
    """Four warps share a product: 64 x N x 16, B of 32 N bytes, A of 2048 if it is in shared memory."""
    work = cost_model.work({"HGMMA.64x128x16.F32.BF16.SS": 4, "HGMMA.64x96x16.F32.RS": 4})
    assert (work["tensor"], work["wgmma"]) == (0, 64 * 128 * 16 + 64 * 96 * 16)
    assert work["smem"] == 2048 + 32 * 128 + 32 * 96
    for kind in ("HGMMA.64x128x16.F32.BF16", "HGMMA.64x128x32.F32.E4M3.E4M3.SS"):
        with pytest.raises(ValueError, match=f"{kind}: no shape"):
            cost_model.work({kind: 1})


def test_cycles_of_a_tile_of_wgmma():
    """128 x 128 keys at head_dim 128: what the tile costs by hand, with the tiles that TMA brings."""
    passed = {"HGMMA.64x128x16.F32.BF16.SS": 8, "HGMMA.64x128x16.F32.BF16.RS": 8, "MUFU.EX2": 64}
    cycles = cost_model.cycles(passed, 8, "sm_90a", filled_bytes=65536)
    assert (cycles["tensor"], cycles["mufu"], cycles["smem"], cycles["reduction"]) == (2048, 1024, 1792, 0)
    with_sums = cost_model.cycles(passed, 8, "sm_90a", 65536, 32768)
    assert (with_sums["smem"], with_sums["reduction"]) == (1792 + 256, 2048)
    assert cost_model.utilisation(cycles)[:2] == ("tensor", 1.0)


def test_cycles():
    passed = {"HMMA.16816.F32.BF16": 64, "MUFU.EX2": 16, "FFMA": 8, "IMAD": 8, "LDSM.16.M88.4": 4}
    on_ampere = cost_model.cycles(passed, 4, "sm_80")
    expected = {"tensor": 512, "mufu": 128, "fp32": 32, "alu": 0, "smem": 64, "issue": 100, "reduction": 0}
    assert on_ampere == expected
    assert cost_model.cycles(passed, 4, "sm_90a")["fp32"] == 8 + 16
    binding, most, least = cost_model.utilisation(on_ampere)
    assert (binding, most) == ("tensor", 1.0)
    assert least == pytest.approx(512 / (512 + 128 + 32 + 64))
