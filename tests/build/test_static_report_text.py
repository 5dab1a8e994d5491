"""What the static report says of kernels, when it complains, and its tables: build_tools/static_report.py."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2]))

from build_tools import cost_model, cuda_objects, measured, sass, static_report
from build_tools.static_report import Kernel, Launch, Report, kernels_of, launch_of, problems

PTXAS = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN8fwd_sm80I3CfgNS_1VINS_8FullMaskENS_13ModifiedScoreIfEEE' for 'sm_80'
ptxas info    : Function properties for _ZN8fwd_sm80I3CfgNS_1VINS_8FullMaskENS_13ModifiedScoreIfEEE
    16 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 16 bytes cumulative stack size, 760 bytes cmem[0]
ptxas info    : Compile time = 134.296 ms
ptxas info    : Compiling entry function '_ZN8fwd_sm80I3CfgNS_1VINS_10WindowMaskENS_10PlainScoreIfEEE' for 'sm_90a'
ptxas info    : Function properties for _ZN8fwd_sm80I3CfgNS_1VINS_10WindowMaskENS_10PlainScoreIfEEE
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 200 registers, used 1 barriers
""".replace("I3Cfg", "INS_1CINS_4bf16EXtlNS_1SELi64ELi0EEEEE")
# As g++ has it; nvcc writes zeros at its end too.
CONFIG = "N10flash_attn1CINS_4bf16EXtlNS_1SELi64EEEEE"
LAUNCHES = [
    Launch("fwd_sm80", CONFIG, 64, 64, 128, 64, 128, 32768, 4, 2**20, 1, 0, 0, alternates=False),
    Launch("bwd_sm80", CONFIG, 64, 64, 64, 64, 256, 65536, 8, 5 * 2**18, 1, 0, 0, alternates=False),
]
OBJECT = cuda_objects.Object(Path("fwd_sm80.cu"), ("sm_80",), "bf16", 64)


def test_what_the_compiler_says():
    spilling, clean = kernels_of(OBJECT, PTXAS, LAUNCHES)
    assert (spilling.registers, spilling.spill_bytes, spilling.stack_bytes) == (255, 12, 16)
    assert (spilling.variant, spilling.architecture, spilling.threads) == ("FullMask ModifiedScore", "sm_80", 128)
    assert (clean.registers, clean.spill_bytes, clean.variant) == (200, 0, "WindowMask PlainScore")
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
    spared = {"kernel": "bwd_sm90", "variant": "FullMask PlainScore"}
    assert problems(report_of(COSTS, overlap=0.1, **spared), committed) == []
    for changes in ({"head_dim": 192}, {"variant": "FullMask ModifiedScore"}, {"kernel": "fwd_sm90"}):
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
    report = report_of(COSTS, overlap=0.75, kernel="fwd_sm90", source="fwd_sm90", variant="WindowMask PlainScore")
    (kernel,) = report.kernels
    report.overlaps.append((replace(kernel, element="fp16"), 0.8))
    report.overlaps.append((replace(kernel, variant="FullMask ModifiedScore"), 1.0))
    report.overlaps.append((replace(kernel, kernel="bwd_sm90", source="bwd_sm90", variant="FullMask PlainScore"), 0.1))
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
        own = replace(kernel, **of_hopper, variant=f"{mask}Mask PlainScore")
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
        rows += report_of(COSTS, kernel="bwd_postprocess", source=source).kernels
    text = static_report.report_tables.registers_table(rows)
    assert [text.count(f"| bwd_postprocess of {source} 64: 128 x 64, ") for source in ("bwd_sm80", "bwd_sm90")] == [
        1,
        1,
    ]


def test_launches_know_every_tile(tmp_path):
    """The program that prints them compiles, against the host models of the simulator."""
    found = static_report.launches(tmp_path)
    kernels = {"fwd_sm80", "bwd_sm80", "fwd_sm90", "bwd_sm90", "bwd_preprocess", "bwd_postprocess", "attn_probs_sm80"}
    assert {each.kernel for each in found} == kernels
    for name in ("fwd_sm80", "bwd_sm80", "attn_probs_sm80", "fwd_sm90", "bwd_sm90"):
        own = {each.head_dim for each in found if each.kernel == name}
        assert own == set(cuda_objects.head_dims(cuda_objects.SOURCES / name.rpartition("_")[2]))
    for name in ("fwd_sm90", "bwd_sm90"):
        own = [each for each in found if each.kernel == name]
        assert all(each.warps == each.threads // 32 - 4 and each.filled_bytes > 0 for each in own)
    assert len({(each.kernel, each.config) for each in found}) == len(found)
    assert all(each.threads % 32 == 0 and each.threads > 0 for each in found)
