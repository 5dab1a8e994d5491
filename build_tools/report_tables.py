"""The static report as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from build_tools import cost_model

if TYPE_CHECKING:
    from build_tools.static_report import Kernel, Report

LOOP_KEYS = ("element", "head_dim", "block_m", "block_n", "variant", "architecture", "threads")
PLAIN = "FullMask PlainScores"

INTRODUCTION = """# Static report of the CUDA kernels

What compiler and machine code say, without a GPU: written by `make report`, and compared in continuous integration by
`make report ARGS=--check`, which fails on any spilled register. `static_report.json` beside this has every number.
"""

REGISTERS = """## Registers and occupancy

Registers per thread of the variants of a kernel: full mask, window; then, with softcap, ALiBi or dropout, full mask,
window. bfloat16, and after a stroke float16 where it differs. Spills: bytes, all variants together. Blocks: how many
are resident on one multiprocessor of that compute capability, by registers, threads and shared memory, for the variant
with most registers; "-" where the tile is too large for the device, which then takes the smaller one.
"""

LOOPS = """## Main loops

Instructions of one warp in one pass of the main loop as it usually goes: the way through the loop with most tensor
instructions that loads the next tile, with nothing to mask and no pages. bfloat16, full mask, plain scores. LDL and STL
are accesses to local memory, and should not appear.
"""

CYCLES = """## Predicted cycles

What each unit of a multiprocessor needs for one pass of the main loop of one block, were it alone: multiply-adds of
mma.sync, exponentials, fp32 and integer products, other integer work and comparisons, shared memory, instructions
issued, and sums of dQ in global memory. The rates, and where they come from, are in `build_tools/cost_model.py`. On
sm_90a, mma.sync reaches 63% of the peak of the tensor units; the rest takes wgmma.

The last two columns are the share of time in which the tensor units work (at the rate of mma.sync): at most, if all
units work side by side and the slowest decides; and if tensor products, exponentials, the busier of fp32 and integers,
and shared memory follow one another. Latencies and loads from global memory are left out. None of this is measured.
"""


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table; all but the first column are aligned to the right."""
    lines = ["| " + " | ".join(head) + " |", "|---" + "|---:" * (len(head) - 1) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(map(str, row)) + " |" for row in rows)]) + "\n"


def costs_table(report: Report) -> str:
    """What compiling all kernels costs, and the sum of spills."""
    costs = report.costs
    rows = [
        ("compiler", report.compiler),
        ("kernels, counted once per architecture", costs["kernels"]),
        ("bytes of registers spilled", sum(each.spill_bytes for each in report.kernels)),
        ("object files", f"{costs['object_bytes'] / 1e6:.1f} MB"),
        ("largest process", f"{costs['peak_bytes'] / 1e6:.0f} MB"),
        ("processor time", f"{costs['cpu_seconds']:.0f} s"),
        ("the same, relative to calibration.cu", f"{costs['relative_time']:.0f}"),
    ]
    return table(["", ""], rows)


def title(kernel: Kernel) -> str:
    """Kernel and tile, without the variant."""
    return f"{kernel.kernel} {kernel.head_dim}: {kernel.block_m} x {kernel.block_n}, {kernel.threads} threads"


def registers_table(kernels: Sequence[Kernel]) -> str:
    """One row per kernel and shape of tiles."""
    architectures = list(dict.fromkeys(each.architecture for each in kernels))
    devices = list(dict.fromkeys(name for each in kernels for name in each.blocks()))
    head = ["kernel, head_dim: queries x keys", "shared memory"]
    head += [f"{architecture}" for architecture in architectures] + ["spills"] + [f"blocks, {name}" for name in devices]
    rows = []
    for name in dict.fromkeys(map(title, kernels)):
        own = [each for each in kernels if title(each) == name]
        blocks = {device: min(e.blocks()[device] for e in own if device in e.blocks()) for device in devices}
        cells: list[object] = [name, own[0].smem_bytes]
        cells += [registers([each for each in own if each.architecture == a]) for a in architectures]
        cells.append(sum(each.spill_bytes for each in own))
        rows.append([*cells, *(blocks[device] or "-" for device in devices)])
    return table(head, rows)


def registers(kernels: Sequence[Kernel]) -> str:
    """The registers of all variants, in their order."""
    variants: dict[str, list[int]] = {}
    for each in kernels:
        variants.setdefault(each.variant, []).append(each.registers)
    order = sorted(variants, key=lambda variant: ("Modified" in variant, "Window" in variant))
    return ", ".join("/".join(map(str, dict.fromkeys(variants[variant]))) for variant in order)


def loops_table(loops: Sequence[dict[str, Any]]) -> str:
    """Instruction counts of main loops."""
    groups = {
        "HMMA": ("HMMA",),
        "MUFU": ("MUFU",),
        "FFMA, FMUL, FADD": ("FFMA", "FMUL", "FADD"),
        "LDSM": ("LDSM",),
        "LDS, STS": ("LDS", "STS"),
        "LDGSTS": ("LDGSTS",),
        "RED": ("RED", "REDG"),
        "BAR": ("BAR",),
        "LDL, STL": ("LDL", "STL"),
    }
    rows = []
    for each in loops:
        counts = each["instructions"]
        cells = [sum(counts.get(name, 0) for name in names) for names in groups.values()]
        rows.append([title(each["kernel"]), each["kernel"].architecture, *cells, sum(counts.values())])
    return table(["kernel, head_dim: queries x keys", "architecture", *groups, "all"], rows)


def cycles_table(loops: Sequence[dict[str, Any]]) -> str:
    """Cycles per unit, and what that makes of the tensor units."""
    names = dict(zip(cost_model.UNITS, ["tensor", "exp2", "fp32", "integer", "smem", "issue", "dQ sums"], strict=True))
    rows = []
    for each in loops:
        binding, most, least = cost_model.utilisation(each["cycles"])
        cells = [f"{each['cycles'][unit]:.0f}" for unit in names]
        kernel = each["kernel"]
        rows.append([title(kernel), kernel.architecture, *cells, names[binding], f"{most:.0%}", f"{least:.0%}"])
    head = ["kernel, head_dim: queries x keys", "architecture", *names.values(), "slowest", "at most", "one by one"]
    return table(head, rows)


def markdown(report: Report) -> str:
    """The whole document."""
    plain = [each for each in report.loops if each["kernel"].variant == PLAIN]
    parts = [
        INTRODUCTION,
        costs_table(report),
        REGISTERS,
        registers_table(report.kernels),
        LOOPS,
        loops_table(plain),
        CYCLES,
        cycles_table(plain),
    ]
    return "\n".join(parts)
