"""The report on the CUDA kernels: what it reads from machine code and the compiler, and what it complains of."""

from dataclasses import replace

import pytest

from build_tools import run_nvcc
from build_tools.cuda_objects import ToolError
from tools import kernel_report, sass
from tools.kernel_report import Kernel

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


def head_of(function, loop):
    return function.blocks[min(loop)][0].address


def test_loops():
    function = functions()[0]
    assert {head_of(function, loop) for loop in function.loops} == {0x20, 0x50, 0xF0}
    assert head_of(function, function.main_loop) == 0x20
    assert function.count(function.main_loop, "LDGSTS", "HMMA") == 4
    assert function.count(function.main_loop, "") == 14


def test_loops_of_other_kinds():
    _, no_loop, uniform_branch = functions()
    assert no_loop.main_loop is None
    assert uniform_branch.count(uniform_branch.main_loop, "") == 3


# Like fwd_sm90: products before the loop over tiles and after it, all within a loop over rounds; in the inner loop a
# wait.
WGMMA = """
	code for sm_90a
		Function : consumer
        /*0000*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], RZ, !UPT ;
        /*0010*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24, gsb0 ;
        /*0020*/                   HGMMA.64x64x16.F32.BF16 R88, R152, gdesc[UR4].tnspB, R88, gsb0 ;
        /*0030*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R3 ;
        /*0040*/              @!P0 BRA 0x30 ;
        /*0070*/               @P2 BRA 0x10 ;
        /*0080*/                   HGMMA.64x64x16.F32.BF16 R88, R152, gdesc[UR4].tnspB, R88, gsb0 ;
        /*0090*/                   HGMMA.64x64x16.F32.BF16 R88, R152, gdesc[UR4].tnspB, R88, gsb0 ;
        /*00a0*/               @P3 BRA 0x0 ;
        /*00b0*/                   EXIT ;
"""


def test_main_loop_of_wgmma():
    """The innermost loop with products, though others have more."""
    (function,) = sass.parse(WGMMA.splitlines())
    assert function.has_wgmma
    assert not any(each.has_wgmma for each in functions())
    assert head_of(function, function.main_loop) == 0x10
    assert function.count(function.main_loop, *sass.TENSOR) == 2


def test_a_loop_that_asks_all_warps_for_nonfinite_values_is_not_the_main_loop():
    """With wgmma: it computes rare tiles again."""
    other = WGMMA.replace("EXIT ;", "BAR.RED.OR.DEFER R1, R2, R3 ;\n        /*00c0*/               @P1 BRA 0x90 ;")
    (function,) = sass.parse(f"{other}        /*00d0*/                   EXIT ;\n".splitlines())
    assert len(function.innermost(sass.TENSOR)) == 1
    assert head_of(function, function.main_loop) == 0x10


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


def test_a_loop_of_products_within_the_main_loop():
    (function,) = sass.parse(NESTED.splitlines())
    assert head_of(function, function.main_loop) == 0
    assert function.count(function.main_loop, "HMMA") == 2


def test_a_call_that_is_a_jump():
    """Part of the loop that it jumps back into."""
    code = NESTED.replace("@P1 BRA 0x0", "@P1 CALL.REL.NOINC 0x60").replace(
        "EXIT ;", "EXIT ;\n        /*0060*/                   BRA 0x0 ;"
    )
    (function,) = sass.parse(code.splitlines())
    assert head_of(function, function.main_loop) == 0
    assert function.count(function.main_loop, "") == 6


def test_double_precision_is_found():
    doubles = ["DMUL", "DFMA.RP", "DSETP.MAX.AND", "F2F.F32.F64", "I2F.F64.S64", "MUFU.RCP64H"]
    others = ["FMUL", "DEPBAR.LE", "MUFU.EX2", "F2FP.BF16.F32.PACK_AB", "LDG.E.64", "I2F.U32.RP"]
    instructions = [sass.Instruction(0, "", opcode, "R0, R1") for opcode in (*doubles, *others, *doubles)]
    assert sass.Function("f", "sm_90a", instructions).in_double_precision() == doubles


# What the compiler says.


def symbol(arch, values, mask, score):
    shape = f"INS_13FwdConfigSm{arch}INS_4bf16EXtlNS_12FwdShapeSm{arch}E{values}EEEE"
    return f"_ZN10flash_attn8fwd_sm{arch}{shape}NS_16AttentionVariantINS_{mask}ENS_{score}IfEEEEEvNS_9FwdParamsE"


SPILLING = symbol(80, "Li64ELi128ELi32ELi4ELb0E", "8FullMask", "13ModifiedScore")
CLEAN = symbol(90, "Li192ELi128ELi128ELi96ELi2E", "10WindowMask", "10PlainScore")
PTXAS = f"""ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '{SPILLING}' for 'sm_80'
ptxas info    : Function properties for {SPILLING}
    16 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 16 bytes cumulative stack size, 760 bytes cmem[0]
ptxas info    : Compile time = 134.296 ms
ptxas info    : Compiling entry function '{CLEAN}' for 'sm_90a'
ptxas info    : Function properties for {CLEAN}
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 200 registers, used 1 barriers
"""
# Of the loop 1 of 2 exponentials is beside the product, whose accumulators are read too early.
CODE = """
	code for sm_80
		Function : NAME_80
        /*0000*/                   HMMA.16816.F32.BF16 R20, R100, R22, R88 ;
        /*0010*/                   DMUL R2, R2, R2 ;
        /*0020*/               @P0 BRA 0x0 ;
        /*0030*/                   EXIT ;
	code for sm_90a
		Function : NAME_90
        /*0000*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], RZ, !UPT, gsb0 ;
        /*0010*/                   MUFU.EX2 R3, R3 ;
        /*0020*/                   FADD R3, R24, R3 ;
        /*0030*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0040*/                   MUFU.EX2 R3, R3 ;
        /*0050*/               @P0 BRA 0x0 ;
        /*0060*/                   EXIT ;
""".replace("NAME_80", SPILLING).replace("NAME_90", CLEAN)


def kernels(output=PTXAS, code=CODE):
    return kernel_report.kernels_of("fwd_sm80", output, sass.parse(code.splitlines()))


def test_kernels_of_an_object_file():
    spilling, clean = kernels()
    assert (spilling.registers, spilling.spill_bytes, spilling.stack_bytes, spilling.loop) == (
        255,
        12,
        16,
        (1, 0, 0, 3),
    )
    assert (spilling.name, spilling.element, spilling.variant) == ("fwd_sm80", "bf16", "FullMask ModifiedScore")
    assert (spilling.title, spilling.architecture) == ("fwd_sm80 64: 128 x 32", "sm_80")
    assert (clean.registers, clean.spill_bytes, clean.loop, clean.overlap) == (200, 0, (1, 2, 1, 6), 0.5)
    assert (clean.title, clean.variant) == ("fwd_sm90 of fwd_sm80 192/128: 128 x 96", "WindowMask PlainScore")


def test_problems():
    spilling, clean = kernels()
    name = "fwd_sm80 64: 128 x 32, bf16 FullMask ModifiedScore, sm_80"
    assert list(spilling.problems()) == [f"{name}: spills 12 bytes", f"{name}: DMUL is of double precision"]
    slow, early = clean.problems()
    assert slow.endswith(", sm_90a: 50% of the exponentials run beside products, not 70%")
    assert ", sm_90a: wgmma: FADD R3, R24, R3 at 0x20: R24 is in flight" in early
    assert not list(replace(clean, overlap=0.7, faults=()).problems())
    assert len(list(replace(clean, overlap=0.69, faults=()).problems())) == 1
    spared = replace(clean, name="bwd_sm90", tile=(128, 128, 64, 128), faults=())
    assert not list(spared.problems())
    assert list(replace(spared, tile=(192, 192, 64, 96)).problems())
    assert list(replace(spared, variant="FullMask ModifiedScore").problems())


@pytest.mark.parametrize(
    ("output", "code"), [(PTXAS.replace("Used 200", "Uses 200"), CODE), (PTXAS, CODE.partition("\tcode for sm_90a")[0])]
)
def test_what_does_not_look_as_expected(output, code):
    with pytest.raises(ToolError, match="do not tell of the same kernels"):
        kernels(output, code)


def test_a_kernel_without_a_shape():
    with pytest.raises(ToolError, match="other_one: no element type and tile shape in the name"):
        kernels(PTXAS.replace(CLEAN, "other_one"), CODE.replace(CLEAN, "other_one"))


def test_warnings():
    lines = [
        "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized",
        "ptxas info    : Potential Performance Loss: wgmma.mma_async instructions are serialized",
        "ptxas info    : (C7508) 'setmaxnreg' ignored; unable to determine register count at entry",
        "ptxas info    : setmaxnreg ignored to maintain minimum register requirements",
        "ptxas warning : Stack size for entry function cannot be statically determined",
        'fwd.h(3): warning #177-D: variable "x" was declared but never referenced',
    ]
    assert run_nvcc.warnings_in(PTXAS + "\n".join(lines)) == lines


# The table.

KERNEL = Kernel("fwd_sm90", "fwd_sm90", "bf16", (64, 64, 128, 128), "FullMask PlainScore", "sm_90a", 168, 0, 0)


def rows(*kernels):
    text = kernel_report.markdown("nvcc 13.0", kernels)
    return [line for line in text.splitlines() if line.startswith(("| fwd", "| bwd"))], text


def test_variants_share_a_row():
    """In their order, once if they agree; after a stroke the other element type."""
    full = replace(KERNEL, loop=(12, 66, 164, 426), overlap=0.75)
    window = replace(full, variant="WindowMask PlainScore", registers=160, overlap=0.8, stack_bytes=8)
    modified = replace(full, variant="FullMask ModifiedScore", overlap=None)
    fp16 = replace(window, element="fp16", loop=(12, 66, 164, 427))
    found, text = rows(modified, fp16, window, full)
    numbers = "168, 160, 168 | 12 | 66 | 164 | 426, 426/427, 426 | 75%, 80%, -"
    assert found == [f"| fwd_sm90 64: 128 x 128 | sm_90a | {numbers} |"]
    assert "- nvcc 13.0, 4 kernels" in text
    assert "- 8 bytes in the largest stack frame" in text
    assert "- 75% of the exponentials, at the least" in text


def test_kernels_that_two_sources_launch_are_told_apart():
    found, _ = rows(*(replace(KERNEL, name="bwd_postprocess", source=f"bwd_sm{arch}") for arch in (80, 90)))
    assert found == [
        f"| bwd_postprocess of bwd_sm{arch} 64: 128 x 128 | sm_90a | 168 | - | - | - | - | - |" for arch in (80, 90)
    ]
