"""The static report of the CUDA kernels: what it reads from machine code, and what it makes of that."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parent.parent))

from build_tools import cost_model, cuda_objects, measured, sass, static_report
from build_tools.static_report import Kernel, Launch, Report, kernels_of, launch_of, problems

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


# The report.

PTXAS = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN8fwd_sm80I3CfgNS_8FullMaskENS_14ModifiedScoresEE' for 'sm_80'
ptxas info    : Function properties for _ZN8fwd_sm80I3CfgNS_8FullMaskENS_14ModifiedScoresEE
    16 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 16 bytes cumulative stack size, 760 bytes cmem[0]
ptxas info    : Compile time = 134.296 ms
ptxas info    : Compiling entry function '_ZN8fwd_sm80I3CfgNS_10WindowMaskENS_11PlainScoresEE' for 'sm_90a'
ptxas info    : Function properties for _ZN8fwd_sm80I3CfgNS_10WindowMaskENS_11PlainScoresEE
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 200 registers, used 1 barriers
"""
LAUNCHES = [
    Launch("fwd_sm80", "3Cfg", 64, 64, 128, 64, 128, 32768, 4, 2**20, 1, 0, 0, alternates=False),
    Launch("bwd_sm80", "3Cfg", 64, 64, 64, 64, 256, 65536, 8, 5 * 2**18, 1, 0, 0, alternates=False),
]
OBJECT = cuda_objects.Object(Path("fwd_sm80.cu"), ("sm_80",), "bf16", 64)


def test_what_the_compiler_says():
    spilling, clean = kernels_of(OBJECT, PTXAS, LAUNCHES)
    assert (spilling.registers, spilling.spill_bytes, spilling.stack_bytes) == (255, 12, 16)
    assert (spilling.variant, spilling.architecture, spilling.threads) == ("FullMask ModifiedScores", "sm_80", 128)
    assert (clean.registers, clean.spill_bytes, clean.variant) == (200, 0, "WindowMask PlainScores")
    assert spilling.blocks() == {"8.0": 2, "8.6": 2, "8.9": 2}
    assert clean.blocks() == {"9.0": 2}


def test_a_kernel_that_is_unknown():
    with pytest.raises(cuda_objects.ToolError, match=r"launches\.cpp does not print how _ZN9other_one"):
        launch_of("_ZN9other_oneI3CfgE", LAUNCHES)


def test_warnings():
    lines = [
        "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized",
        "ptxas info    : Potential Performance Loss: wgmma.mma_async instructions are serialized",
        "ptxas info    : (C7508) 'setmaxnreg' ignored; unable to determine register count at entry",
        "ptxas info    : setmaxnreg ignored to maintain minimum register requirements",
        "ptxas warning : Stack size for entry function cannot be statically determined",
        'fwd.h(3): warning #177-D: variable "x" was declared but never referenced',
    ]
    assert static_report.warnings_in(PTXAS + "\n".join(lines)) == lines
    assert measured.RESOURCE_USAGE.match("ptxas info    : Compile time = 1.2 ms")


def report_of(costs, warnings=(), hazards=(), doubles=(), overlap=None, **changes):
    fields = {
        "kernel": "fwd_sm80", "source": "fwd_sm80", "element": "bf16", "head_dim": 64, "head_dim_v": 64,
        "block_m": 128, "block_n": 64, "variant": "FullMask", "architecture": "sm_80", "threads": 128,
        "smem_bytes": 1024, "registers": 200, "spill_bytes": 0, "stack_bytes": 0, "symbol": "k",
    }  # fmt: skip
    kernels = [Kernel(**{**fields, **changes})]
    overlaps = [] if overlap is None else [(kernels[0], overlap)]
    return Report("nvcc 13.0", costs, kernels, [], list(warnings), 0, list(hazards), overlaps, list(doubles))


def test_double_precision_is_found():
    doubles = ["DMUL", "DFMA.RP", "DSETP.MAX.AND", "F2F.F32.F64", "I2F.F64.S64", "MUFU.RCP64H"]
    others = ["FMUL", "DEPBAR.LE", "MUFU.EX2", "F2FP.BF16.F32.PACK_AB", "LDG.E.64", "I2F.U32.RP"]
    instructions = [sass.Instruction(0, "", opcode, "R0, R1") for opcode in (*doubles, *others, *doubles)]
    assert sass.in_double_precision(sass.Function("f", "sm_90a", instructions)) == doubles


COSTS = {"kernels": 100, "object_bytes": 1000, "peak_bytes": 2000, "cpu_seconds": 10.0, "relative_time": 50.0}


def test_problems():
    committed = {"costs": COSTS}
    assert problems(report_of(COSTS), committed) == []
    assert problems(report_of({**COSTS, "kernels": 125, "cpu_seconds": 1000.0}), committed) == []
    assert problems(report_of(COSTS, spill_bytes=8), committed) == [
        "fwd_sm80 bf16 head_dim 64 128x64 FullMask spills 8 bytes on sm_80"
    ]
    assert problems(report_of(COSTS, smem_bytes=200_000), committed) == [
        "fwd_sm80 bf16 head_dim 64 128x64 FullMask fits onto no multiprocessor of sm_80"
    ]
    assert problems(report_of(COSTS, warnings=["odd"]), committed) == ["the compiler warns: odd"]
    assert problems(report_of(COSTS, hazards=["R3"]), committed) == ["wgmma: R3"]
    assert problems(report_of(COSTS, doubles=["DMUL"]), committed) == ["double precision: DMUL"]
    assert problems(report_of(COSTS, overlap=0.7), committed) == []
    assert problems(report_of(COSTS, overlap=0.69), committed) == [
        "fwd_sm80 bf16 head_dim 64 128x64 FullMask computes 69% of its exponentials beside products, not 70%"
    ]
    spared = {"kernel": "bwd_sm90", "variant": "FullMask PlainScores"}
    assert problems(report_of(COSTS, overlap=0.1, **spared), committed) == []
    for changes in ({"head_dim": 192}, {"variant": "FullMask ModifiedScores"}, {"kernel": "fwd_sm90"}):
        assert len(problems(report_of(COSTS, overlap=0.1, **spared | changes), committed)) == 1
    assert problems(report_of({**COSTS, "kernels": 1000}, warnings=["odd"]), None) == ["the compiler warns: odd"]
    for key in ("kernels", "object_bytes", "peak_bytes", "relative_time"):
        (found,) = problems(report_of({**COSTS, key: 1.3 * COSTS[key]}), committed)
        assert found.startswith(f"{key} has grown from {COSTS[key]} to ")


def test_report_files():
    report = report_of(COSTS)
    assert json.loads(report.as_json())["costs"] == COSTS
    assert json.loads(report.as_json())["kernels"][0]["blocks"] == {"8.0": 2, "8.6": 2, "8.9": 2}
    text = static_report.report_tables.markdown(report)
    assert "| fwd_sm80 64: 128 x 64, 128 threads | 1024 | 200 | 0 | 2 | 2 | 2 |" in text


def test_table_of_overlaps():
    report = report_of(COSTS, overlap=0.75, kernel="fwd_sm90", source="fwd_sm90", variant="WindowMask PlainScores")
    (kernel,) = report.kernels
    report.overlaps.append((replace(kernel, element="fp16"), 0.8))
    report.overlaps.append((replace(kernel, variant="FullMask ModifiedScores"), 1.0))
    report.overlaps.append((replace(kernel, kernel="bwd_sm90", source="bwd_sm90", variant="FullMask PlainScores"), 0.1))
    text = static_report.report_tables.markdown(report)
    assert "| smallest share of EX2 between the waits of wgmma | 75% |" in text
    assert "| fwd_sm90 64: 128 x 64, 128 threads | - | 75% | 100% | - |" in text
    assert "| bwd_sm90 64: 128 x 64, 128 threads | 10% | - | - | - |" in text


def test_tables_of_hopper():
    """A main loop of wgmma has a table of its own, also with a window."""
    report = report_of(COSTS)
    (kernel,) = report.kernels
    of_hopper = {
        "kernel": "fwd_sm90",
        "source": "fwd_sm90",
        "head_dim": 192,
        "head_dim_v": 128,
        "block_n": 128,
        "architecture": "sm_90a",
    }
    cycles = dict.fromkeys(cost_model.UNITS, 0.0) | {"tensor": 2560.0, "mufu": 1056.0, "smem": 3200.0}
    for mask in ("Full", "Window"):
        own = replace(kernel, **of_hopper, variant=f"{mask}Mask PlainScores")
        loop = {"kernel": own, "instructions": {"HGMMA": 20}, "cycles": cycles}
        report.loops.append(loop)
    report.loops.append({**loop, "kernel": kernel, "instructions": {"HMMA": 20}})
    text = static_report.report_tables.markdown(report)
    before, _, hopper = text.partition("## Predicted cycles of the kernels for Hopper")
    name, numbers = "fwd_sm90 192/128: 128 x 128, 128 threads", "2560 | 1056 | 0 | 0 | 3200 | 0 | 0 | smem | 630 | 558"
    assert [line for line in hopper.splitlines() if line.startswith("| fwd_")] == [
        f"| {name} | {mask} | {numbers} | 296 | 2560, 1024, 704, 2304 |" for mask in ("full", "window")
    ]
    _, loops, predicted = before.split("\n## ")[1:]
    assert loops.count(f"| {name} | sm_90a | 0 | 20 | 0 |") == 1
    assert "fwd_sm90" not in predicted
    assert len(json.loads(report.as_json())["loops"]) == 3


def test_kernels_that_two_sources_launch_are_told_apart():
    rows = []
    for source in ("bwd_sm80", "bwd_sm90"):
        rows += report_of(COSTS, kernel="bwd_finish", source=source).kernels
    text = static_report.report_tables.registers_table(rows)
    assert [text.count(f"| bwd_finish of {source} 64: 128 x 64, ") for source in ("bwd_sm80", "bwd_sm90")] == [1, 1]


def test_launches_know_every_tile(tmp_path):
    """The program that prints them compiles, against the host models of the simulator."""
    found = static_report.launches(tmp_path)
    assert {each.head_dim for each in found} == set(cuda_objects.HEAD_DIMS)
    kernels = {"fwd_sm80", "bwd_sm80", "fwd_sm90", "bwd_sm90", "bwd_preprocess", "bwd_finish", "attn_probs_sm80"}
    assert {each.kernel for each in found} == kernels
    for name in ("fwd_sm90", "bwd_sm90"):
        own = [each for each in found if each.kernel == name]
        assert {each.head_dim for each in own} == set(cuda_objects.HEAD_DIMS)
        assert all(each.warps == each.threads // 32 - 4 and each.filled_bytes > 0 for each in own)
    assert len({(each.kernel, each.config) for each in found}) == len(found)
    assert all(each.threads % 32 == 0 and each.threads > 0 for each in found)
