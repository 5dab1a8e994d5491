"""The static report as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from build_tools import cost_model

if TYPE_CHECKING:
    from build_tools.static_report import Kernel, Report

LOOP_KEYS = ("element", "head_dim", "head_dim_v", "block_m", "block_n", "variant", "architecture", "threads")
PLAIN, PLAIN_WINDOW = "FullMask PlainScore", "WindowMask PlainScore"

INTRODUCTION = """# Static report of the CUDA kernels

What compiler and machine code say, without a GPU: written by `make report`, and compared in continuous integration by
`make report ARGS=--check`, which fails on any spilled register, on any instruction in double precision, where a
register of wgmma is touched between its issue and the wait for it (`build_tools/wgmma_hazards.py`), and where less than
70% of the exponentials of a loop are computed while a product is under way.
`static_report.json` beside this has every number.
"""

REGISTERS = """## Registers and occupancy

Registers per thread of the variants of a kernel: full mask, window; then, with softcap, ALiBi or dropout, full mask,
window. bfloat16, and after a stroke float16 where it differs. Spills: bytes, all variants together. Blocks: how many
are resident on one multiprocessor of that compute capability, by registers, threads and shared memory, for the variant
with most registers; "-" where the tile is too large for the device, which then takes the smaller one.

Of fwd_sm90 and bwd_sm90 the number is what every thread has at launch: 168 with two consumers, 128 with three. Then the
warpgroup that loads gives registers back, and consumers have 240 or 160.
"""

LOOPS = """## Main loops

Instructions of one warp in one pass of the main loop as it usually goes: the way through the loop with most tensor
instructions that loads the next tile, with nothing to mask and no pages; of fwd_sm90 and bwd_sm90, those of a warp of a
consumer. bfloat16, full mask, plain scores. LDL and STL are accesses to local memory, and should not appear.
"""

CYCLES = """## Predicted cycles

What each unit of a multiprocessor needs for one pass of the main loop of one block, were it alone: multiply-adds of
mma.sync, exponentials, fp32 and integer products, other integer work and comparisons, shared memory, instructions
issued, and sums of dQ in global memory. The rates, and where they come from, are in `build_tools/cost_model.py`. On
sm_90a, mma.sync reaches 63% of the peak of the tensor units; the rest takes wgmma, which the next section has.

The last two columns are the share of time in which the tensor units work (at the rate of mma.sync): at most, if all
units work side by side and the slowest decides; and if tensor products, exponentials, the busier of fp32 and integers,
and shared memory follow one another. Latencies and loads from global memory are left out. None of this is measured.
"""

HOPPER = """## Predicted cycles of the kernels for Hopper

The same for one pass of the main loop of fwd_sm90 and bwd_sm90, all consumers together, with and without a window,
plain scores, bfloat16: a tile of keys for all queries of the block, or a tile of queries for all its keys. Tensor:
wgmma, at 2048 multiply-adds per clock. Shared memory, at 128 bytes per clock: the operands that wgmma reads (for
m64nNk16 32 N bytes of B, and 2048 of A unless that is in registers), what threads read (each for itself, though several
may get the same number) and write, the tiles that TMA writes, and dQ, which it reads.

The three columns before the last are TFLOP/s on an H200, **by the model, not measured**: 788, which large products of
bf16 matrices were seen to reach there, times the share of time in which the tensor units work. At most: the slowest
unit decides. Tensor and exp2: these two do not overlap, all else does. One by one: as above. The last column is what
the tile costs by hand, without loops, addresses and masks: tensor, exp2, issue, shared memory.
"""

OVERLAP = """## Softmax beside products

Of the exponentials (MUFU.EX2) in a loop with products of wgmma, the share that is computed while a product is under
way, in the loop of a kernel where it is least, and for the type of elements that has less. Plain scores, full mask and
window; then the same with softcap, ALiBi or dropout. The backward pass up to head_dim 128 with plain scores computes
them between products: the other way was slower on an H200 (experiment 1 in `benchmarks/results/nvidia-h200`).
"""

# Cycles per tile for (kernel, head_dim, head_dim_v, queries, keys): tensor, exp2, issue, shared memory.
BY_HAND = {
    ("fwd_sm90", 64, 64, 192, 128): "1536, 1536, 960, 1216",
    ("fwd_sm90", 128, 128, 128, 128): "2048, 1024, 704, 1792",
    ("fwd_sm90", 192, 128, 128, 128): "2560, 1024, 704, 2304",
    ("fwd_sm90", 256, 256, 128, 80): "2560, 640, 616, 2432",
    ("bwd_sm90", 64, 64, 128, 128): "2560, 1024, 700, 2560",
    ("bwd_sm90", 128, 128, 64, 128): "2560, 512, 380, 2688",
}
UNIT_NAMES = dict(zip(cost_model.UNITS, ["tensor", "exp2", "fp32", "integer", "smem", "issue", "dQ sums"], strict=True))


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table; all but the first column are aligned to the right."""
    lines = ["| " + " | ".join(head) + " |", "|---" + "|---:" * (len(head) - 1) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(map(str, row)) + " |" for row in rows)]) + "\n"


def costs_table(report: Report) -> str:
    """What compiling all kernels costs, and the sum of spills."""
    costs = report.costs
    products = f"{report.wgmma_products}, {len(report.hazards)}"
    rows = [
        ("compiler", report.compiler),
        ("kernels, counted once per architecture", costs["kernels"]),
        ("bytes of registers spilled", sum(each.spill_bytes for each in report.kernels)),
        ("wgmma instructions, of both types, and how many of their registers are touched too early", products),
        ("smallest share of EX2 between the waits of wgmma", overlap_text(report.least_overlap())),
        ("kernels with instructions in double precision", len({line.partition(": ")[0] for line in report.doubles})),
        ("object files", f"{costs['object_bytes'] / 1e6:.1f} MB"),
        ("largest process", f"{costs['peak_bytes'] / 1e6:.0f} MB"),
        ("processor time", f"{costs['cpu_seconds']:.0f} s"),
        ("the same, relative to calibration.cu", f"{costs['relative_time']:.0f}"),
    ]
    return table(["", ""], rows)


def overlap_text(share: float | None) -> str:
    """A share of exponentials."""
    return "-" if share is None else f"{share:.0%}"


def title(kernel: Kernel) -> str:
    """Kernel and tile, without the variant."""
    head_dims = f"{kernel.head_dim}" + (f"/{kernel.head_dim_v}" if kernel.head_dim_v != kernel.head_dim else "")
    # What runs before and after the backward pass of either kind.
    of = "" if kernel.kernel == kernel.source else f" of {kernel.source}"
    return f"{kernel.kernel}{of} {head_dims}: {kernel.block_m} x {kernel.block_n}, {kernel.threads} threads"


def uses_wgmma(loop: dict[str, Any]) -> bool:
    """Whether a main loop is one of the kernels for Hopper."""
    return "HGMMA" in loop["instructions"]


def registers_table(kernels: Sequence[Kernel]) -> str:
    """One row per kernel and shape of tiles."""
    architectures = list(dict.fromkeys(each.architecture for each in kernels))
    devices = list(dict.fromkeys(name for each in kernels for name in each.blocks()))
    head = ["kernel, head_dim: queries x keys", "shared memory"]
    head += [f"{architecture}" for architecture in architectures] + ["spills"] + [f"blocks, {name}" for name in devices]
    rows = []
    for name in dict.fromkeys(map(title, kernels)):
        own = [each for each in kernels if title(each) == name]
        blocks = {
            device: min((e.blocks().get(device, 0) for e in own if device in e.blocks()), default=0)
            for device in devices
        }
        cells: list[object] = [name, own[0].smem_bytes]
        cells += [registers([each for each in own if each.architecture == a]) or "-" for a in architectures]
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
        "HGMMA": ("HGMMA",),
        "MUFU": ("MUFU",),
        "FFMA, FMUL, FADD": ("FFMA", "FMUL", "FADD"),
        "LDSM, STSM": ("LDSM", "STSM"),
        "LDS, STS": ("LDS", "STS"),
        "LDGSTS": ("LDGSTS",),
        "RED": ("RED", "REDG"),
        "BAR": ("BAR",),
        "SYNCS": ("SYNCS",),
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
    rows = []
    for each in loops:
        binding, most, least = cost_model.utilisation(each["cycles"])
        cells = [f"{each['cycles'][unit]:.0f}" for unit in UNIT_NAMES]
        kernel = each["kernel"]
        rows.append([title(kernel), kernel.architecture, *cells, UNIT_NAMES[binding], f"{most:.0%}", f"{least:.0%}"])
    head = ["kernel, head_dim: queries x keys", "architecture", *UNIT_NAMES.values()]
    return table([*head, "slowest", "at most", "one by one"], rows)


def hopper_table(loops: Sequence[dict[str, Any]]) -> str:
    """Cycles per unit of the kernels for Hopper, and what that makes of an H200."""
    rows = []
    for each in loops:
        kernel, cycles = each["kernel"], each["cycles"]
        binding, most, least = cost_model.utilisation(cycles)
        some = cycles["tensor"] / max(cycles["tensor"] + cycles["mufu"], cycles[binding])
        rows.append(
            [
                title(kernel),
                "window" if kernel.variant == PLAIN_WINDOW else "full",
                *(f"{cycles[unit]:.0f}" for unit in UNIT_NAMES),
                UNIT_NAMES[binding],
                *(f"{cost_model.H200_TFLOPS * share:.0f}" for share in (most, some, least)),
                BY_HAND.get((kernel.kernel, kernel.head_dim, kernel.head_dim_v, kernel.block_m, kernel.block_n), "-"),
            ]
        )
    head = ["kernel, head_dim: queries x keys", "mask", *UNIT_NAMES.values(), "slowest"]
    return table([*head, "at most", "tensor and exp2", "one by one", "by hand"], rows)


def overlap_table(overlaps: Sequence[tuple[Kernel, float]]) -> str:
    """One row per kernel and shape of tiles."""
    variants = [f"{mask} {scores}" for scores in ("PlainScore", "ModifiedScore") for mask in ("FullMask", "WindowMask")]
    least: dict[str, dict[str, float]] = {}
    for kernel, share in overlaps:
        row = least.setdefault(title(kernel), {})
        row[kernel.variant] = min(share, row.get(kernel.variant, 1.0))
    rows = [[name, *(overlap_text(row.get(variant)) for variant in variants)] for name, row in least.items()]
    head = ["full", "window", "modified, full", "modified, window"]
    return table(["kernel, head_dim: queries x keys", *head], rows)


def markdown(report: Report) -> str:
    """The whole document."""
    plain = [each for each in report.loops if each["kernel"].variant == PLAIN]
    hopper = [each for each in report.loops if uses_wgmma(each) and each["kernel"].variant in (PLAIN, PLAIN_WINDOW)]
    parts = [
        INTRODUCTION,
        costs_table(report),
        REGISTERS,
        registers_table(report.kernels),
        LOOPS,
        loops_table(plain),
        CYCLES,
        cycles_table([each for each in plain if not uses_wgmma(each)]),
        HOPPER,
        hopper_table(hopper),
        OVERLAP,
        overlap_table(report.overlaps),
    ]
    return "\n".join(parts)
