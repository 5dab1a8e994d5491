"""What compiler and machine code say about the CUDA kernels, and what must not be.

    python -m tools.kernel_report                     # compiles what is not up to date, writes docs/kernel_report.md
    python -m tools.kernel_report --check             # writes nothing
    python -m tools.kernel_report fwd_sm90_bf16_64    # prints what it says of these object files alone

The exit status is 1 if a kernel spills registers, if the compiler warns (C75xx fails before), if registers of wgmma are
touched while it is under way or the softmax of a kernel for Hopper does not run beside a product where it should
(wgmma.py), or if a kernel computes in double precision, which is slow on most GPUs.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from build_tools import cuda_archs, cuda_objects
from build_tools.cuda_objects import ROOT, ToolError
from build_tools.run_nvcc import warnings_in
from tools import sass, wgmma

REPORT = ROOT / "docs" / "kernel_report.md"
# What share of a loop's exponentials is computed while a product of wgmma is under way.
LEAST_OVERLAP = 0.7
VARIANTS = (
    "",
    *(f"{mask}Mask {score}Score" for score in ("Plain", "Modified") for mask in ("Full", "Window")),
    "RangeMask ModifiedScore",
)

HEAD = "| kernel, head_dim: queries x keys | code | registers | products | EX2 | fp32 | all | beside products |"

ENTRY = re.compile(
    r"Compiling entry function '(?P<symbol>\S+)' for '(?P<architecture>\S+)'\n"
    r"(?:.*\n)??"
    r"\s+(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads\n"
    r".*Used (?P<registers>\d+) registers"
)
# A mangled name: the kernel, the element type, and a struct of numbers (tl <type> <values> E).
SYMBOL = re.compile(
    r"_ZN10flash_attn\d+(?P<kernel>[a-z]\w*?)INS_\d+\w+?INS_\d+(?P<element>[a-z]+\d+)EXtlNS_\d+(?P<shape>[A-Za-z]\w*?)E"
    r"(?P<values>(?:L[a-z]\d+E)*)E"
)

INTRODUCTION = """# Report on the CUDA kernels

What compiler and machine code say, written by `make report`, checked in continuous integration by `make report
ARGS=--check`. Commit it with a change to a kernel: its diff shows what the change does to the code.

A row is a kernel with one shape of tiles, queries x keys, for one architecture. Where variants differ, their order is
full mask, window; then, with softcap, ALiBi or dropout, full mask, window, key ranges. After a stroke: float16, where
it differs from bfloat16. Registers of fwd_sm90 and bwd_sm90 are those at launch, 168 with two consumers, 128 with
three; then the warpgroup that loads gives some back, and consumers have 240 or 160.

The next columns count instructions of the main loop as they stand in the code, those for special cases among them:
tensor products (HMMA, HGMMA), exponentials (MUFU.EX2), fp32 (FFMA, FMUL, FADD), all. The main loop is the smallest of
the loops with most tensor products; with wgmma, of the innermost that have any. A loop within it counts once.

The last column is the share of the exponentials, in a loop with products of wgmma, that is computed while a product is
under way; of several loops, where it is least. At least 70% must be, but in the backward pass up to head_dim 128 with
plain scores: there the other way was slower on an H200 (experiment 1 in `benchmarks/results/nvidia-h200`).
"""


@dataclass(frozen=True)
class Kernel:
    """One kernel for one architecture."""

    name: str
    source: str  # the file that launches it, without the suffix
    element: str
    tile: tuple[int, ...]  # head_dim, head_dim_v, queries, keys
    variant: str  # the mask and the scores: "FullMask PlainScore"
    architecture: str
    registers: int
    spill_bytes: int
    stack_bytes: int
    loop: tuple[int, ...] = ()  # instructions of the main loop, in groups
    overlap: float | None = None  # wgmma.overlap
    faults: tuple[str, ...] = ()  # in its machine code

    @property
    def title(self) -> str:
        """Kernel and tile, without the variant."""
        head_dim, head_dim_v, rows, columns = self.tile
        # What runs before and after the backward pass of either kind.
        of = "" if self.name == self.source else f" of {self.source}"
        head_dims = str(head_dim) if head_dim_v == head_dim else f"{head_dim}/{head_dim_v}"
        return f"{self.name}{of} {head_dims}: {rows} x {columns}"

    def columns(self) -> list[str]:
        """In the table."""
        counts = [str(count) for count in self.loop] or ["-"] * 4
        return [str(self.registers), *counts, "-" if self.overlap is None else f"{self.overlap:.0%}"]

    @property
    def should_overlap(self) -> bool:
        """Whether its softmax is to run beside a product of the same warps: not where that was slower."""
        return not (self.name == "bwd_sm90" and self.tile[0] <= 128 and self.variant.endswith("PlainScore"))

    def problems(self) -> Iterator[str]:
        """What must not be, a sentence each."""
        name = f"{self.title}, {self.element} {self.variant}, {self.architecture}"
        if self.spill_bytes:
            yield f"{name}: spills {self.spill_bytes} bytes"
        if self.overlap is not None and self.overlap < LEAST_OVERLAP and self.should_overlap:
            yield f"{name}: {self.overlap:.0%} of the exponentials run beside products, not {LEAST_OVERLAP:.0%}"
        yield from (f"{name}: {fault}" for fault in self.faults)


def kernel_of(source: str, usage: re.Match[str], function: sass.Function) -> Kernel:
    """A kernel, from what ptxas says of it and from its machine code."""
    match = SYMBOL.match(function.name)
    if match is None:
        raise ToolError(f"{function.name}: no element type and tile shape in the name of this kernel")
    values = tuple(int(value) for value in re.findall(r"L[a-z](\d+)E", match["values"]))
    # The first fields of the shapes in csrc/cuda/sm*/config.h. Only forward kernels for Hopper tell head_dim_v apart.
    tile = values[:4] if match["shape"] == "FwdShapeSm90" else (values[0], *values[:3])
    loop, groups = function.main_loop, (sass.TENSOR, [wgmma.EXPONENTIAL], ["FFMA", "FMUL", "FADD"], [""])
    faults = [f"wgmma: {line}" for line in wgmma.find(function)]
    faults += [f"{opcode} is of double precision" for opcode in function.in_double_precision()]
    variant = " ".join(re.findall(r"NS_\d+([A-Z][A-Za-z]*(?:Mask|Score))(?:E|If)", function.name))
    counts = tuple(function.count(loop, *group) for group in groups) if loop else ()
    registers, stores, loads, stack = (int(text) for text in usage.group("registers", "stores", "loads", "stack"))
    about = (match["kernel"], source, match["element"], tile, variant, function.architecture)
    return Kernel(*about, registers, stores + loads, stack, counts, wgmma.overlap(function), tuple(faults))


def kernels_of(source: str, output: str, functions: Iterable[sass.Function]) -> list[Kernel]:
    """The kernels of one object file, from what the compiler printed and from the machine code."""
    usages = {(match["symbol"], match["architecture"]): match for match in ENTRY.finditer(output)}
    by_name = {(each.name, each.architecture): each for each in functions}
    if len(usages) != output.count("Compiling entry function") or usages.keys() != by_name.keys():
        raise ToolError(f"{source}: ptxas -v and cuobjdump do not tell of the same kernels in the way expected")
    return [kernel_of(source, usage, by_name[key]) for key, usage in usages.items()]


def disassemble(path: Path) -> list[sass.Function]:
    """The machine code in an object file, by cuobjdump: from the package of that name, or from PATH."""
    packaged = map(str, (Path(sysconfig.get_path("purelib")) / "nvidia").glob("cu*/bin"))
    search = os.pathsep.join([*packaged, os.environ.get("PATH", "")])  # for nvdisasm, too, which it calls
    tool = shutil.which("cuobjdump", path=search)
    if tool is None:
        raise ToolError("there is no cuobjdump; run pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
    command, environment = [tool, "--dump-sass", str(path)], {**os.environ, "PATH": search}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return list(sass.parse(done.stdout.splitlines()))


def row(kernels: Sequence[Kernel]) -> str:
    """What the variants of a kernel have, in their order; once, if it is the same."""
    by_variant = [[each.columns() for each in kernels if each.variant == variant] for variant in VARIANTS]
    cells = [kernels[0].title, kernels[0].architecture]
    for column in range(len(kernels[0].columns())):
        texts = ["/".join(dict.fromkeys(own[column] for own in variant)) for variant in by_variant if variant]
        cells.append(texts[0] if len(set(texts)) == 1 else ", ".join(texts))
    return f"| {' | '.join(cells)} |"


def markdown(compiler: str, kernels: Sequence[Kernel]) -> str:
    """The whole document."""
    lines = [HEAD, "|---" * 2 + "|---:" * (HEAD.count("|") - 3) + "|"]
    kernels = sorted(kernels, key=lambda each: (each.name, each.source, each.tile, each.architecture, each.element))
    for place in dict.fromkeys((each.title, each.architecture) for each in kernels):
        lines.append(row([each for each in kernels if (each.title, each.architecture) == place]))
    shares = [each.overlap for each in kernels if each.overlap is not None and each.should_overlap]
    facts = [
        f"{compiler}, {len(kernels)} kernels, counted once per architecture and element type",
        f"{sum(each.spill_bytes for each in kernels)} bytes of registers spilled",
        f"{max(each.stack_bytes for each in kernels)} bytes in the largest stack frame",
        f"{sum(len(each.faults) for each in kernels)} faults in the code: early access to registers of wgmma, doubles",
        f"{min(shares, default=1.0):.0%} of the exponentials, at the least, beside products where they should be",
    ]
    return "\n".join([INTRODUCTION, *(f"- {fact}" for fact in facts), "", *lines]) + "\n"


def gather(names: Sequence[str]) -> tuple[str, list[Kernel], list[str]]:
    """Compile what is not up to date, all or the object files of these names: compiler, kernels, and warnings."""
    home = cuda_objects.cuda_home()
    if home is None:
        raise ToolError("there is no nvcc; put it on PATH, or set CUDA_HOME")
    known = cuda_objects.objects(cuda_archs.parse(cuda_archs.DEFAULT))
    wanted = [each for each in known if each.element and (not names or each.name in names)]
    if not wanted:
        raise ToolError(f"no object file with kernels is called {' or '.join(names)}")
    kernels, warnings, paths = [], [], cuda_objects.build(home, wanted)
    with ThreadPoolExecutor(cuda_objects.jobs()) as pool:
        for each, path, functions in zip(wanted, paths, pool.map(disassemble, paths), strict=True):
            output = path.with_suffix(".log").read_text()
            warnings += [f"{each.name}: the compiler warns: {line}" for line in warnings_in(output)]
            kernels += kernels_of(each.kernel, output, functions)
    return f"nvcc {cuda_objects.cuda_version(cuda_objects.nvcc_of(home))}", kernels, warnings


def main() -> int:
    """Write, print or check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("names", nargs="*")
    arguments = parser.parse_args()
    try:
        compiler, kernels, problems = gather(arguments.names)
    except ToolError as error:
        sys.exit(str(error))
    text = markdown(compiler, kernels)
    if arguments.names:
        print(text.removeprefix(INTRODUCTION))
    elif not arguments.check:
        REPORT.write_text(text)
        print(f"wrote {REPORT}")
    problems += [sentence for each in kernels for sentence in each.problems()]
    print(*problems, f"{len(kernels)} kernels, {len(problems)} problems", sep="\n")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
