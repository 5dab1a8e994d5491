"""What compiler and machine code say about the CUDA kernels: registers, spills, occupancy, instructions, cycles.

    python -m build_tools.static_report            # compiles what is not up to date, writes docs/static_report.*
    python -m build_tools.static_report --check    # changes nothing; exit status 1 if something has got worse
    python -m build_tools.static_report fwd_sm90_bf16_64 bwd_sm90_bf16_64    # prints what it says of these alone

--check fails if a kernel spills registers on any architecture, if the compiler warns, if registers of wgmma are touched
while it is under way (wgmma_hazards.py), if the softmax of a kernel for Hopper does not run beside a product where it
should, if a kernel computes in double precision, which is slow on most GPUs, if a kernel does not fit onto a
multiprocessor, or if the number of kernels, the size of the object files, the memory that
compiling takes or the time, relative to that of calibration.cu, have grown by a quarter over what the committed report
says. Where it is the time, all is compiled a second time, to see
whether the machine was merely busy.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from build_tools import (
    compile_costs,
    cost_model,
    cuda_archs,
    cuda_objects,
    mangled,
    measured,
    report_tables,
    sass,
    wgmma_hazards,
)
from build_tools.cuda_objects import ROOT, ToolError

REPORT = ROOT / "docs" / "static_report"
# Those of a build. A report that is written compiles all anew, in one go, so that their times can be compared.
FOLDER = cuda_objects.FOLDER
FOLDER_OF_SOME = ROOT / "build" / "report_of_some"

ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\S+)' for '(?P<architecture>\S+)'\n"
    r"(?:.*\n)??"
    r"\s+(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads\n"
    r".*Used (?P<registers>\d+) registers"
)
# What share of a loop's exponentials is computed while a product of wgmma is under way.
LEAST_OVERLAP = 0.7


@dataclass(frozen=True)
class Launch:
    """How a kernel with one shape of tiles is launched, as launches.cpp prints it."""

    kernel: str
    config: str
    head_dim: int
    head_dim_v: int
    block_m: int
    block_n: int
    threads: int
    smem_bytes: int
    warps: int
    products: int
    parts: int
    filled_bytes: int
    reduced_bytes: int
    alternates: bool


@dataclass(frozen=True)
class Kernel:
    """One kernel for one architecture."""

    kernel: str
    source: str  # the file that launches it, without the suffix
    element: str
    head_dim: int
    head_dim_v: int
    block_m: int
    block_n: int
    variant: str  # the mask and the scores: "FullMask PlainScore"
    architecture: str
    threads: int
    smem_bytes: int
    registers: int
    spill_bytes: int
    stack_bytes: int
    symbol: str

    @property
    def should_overlap(self) -> bool:
        """Whether its softmax is to run beside a product of the same warps.

        Not where it was measured to be slower: the backward pass up to head_dim 128, plain scores, on an H200
        (benchmarks/results/nvidia-h200, experiment 1).
        """
        return not (self.kernel == "bwd_sm90" and self.head_dim <= 128 and self.variant.endswith("PlainScore"))

    @property
    def name(self) -> str:
        """In sentences."""
        return f"{self.kernel} {self.element} head_dim {self.head_dim} {self.block_m}x{self.block_n} {self.variant}"

    @property
    def place(self) -> tuple[Any, ...]:
        """Where it stands in tables."""
        tile = (self.block_m, self.block_n, self.threads)
        return (
            self.kernel,
            self.source,
            self.head_dim,
            self.head_dim_v,
            *tile,
            self.architecture,
            self.variant,
            self.element,
        )

    def blocks(self) -> dict[str, int]:
        """How many of its blocks fit onto the multiprocessors that run this code."""
        return {
            each.name: each.blocks_that_fit(self.threads, self.registers, self.smem_bytes)
            for each in cost_model.MULTIPROCESSORS
            if self.architecture.startswith(f"sm_{each.name.partition('.')[0]}")
        }


def launches(folder: Path) -> list[Launch]:
    """Every kernel and tile shape that is launched."""
    program = folder / "launches"
    includes = [f"-I{ROOT / 'simulator'}", f"-I{ROOT / 'csrc'}"]
    source = ROOT / "build_tools" / "launches.cpp"
    compiler = os.environ.get("CXX") or "g++"
    subprocess.run([*compiler.split(), "-std=c++20", *includes, str(source), "-o", str(program)], check=True)
    lines = subprocess.run([str(program)], capture_output=True, text=True, check=True).stdout.splitlines()
    return [Launch(**json.loads(line)) for line in dict.fromkeys(lines)]


def launch_of(symbol: str, known: list[Launch]) -> Launch:
    """The launch that a kernel's mangled name belongs to."""
    config = mangled.config_of(symbol)
    for each in known:
        if f"{len(each.kernel)}{each.kernel}I" in symbol and mangled.config_of(each.config) == config:
            return each
    raise ToolError(f"build_tools/launches.cpp does not print how {symbol} is launched")


def kernels_of(built: cuda_objects.Object, output: str, known: list[Launch]) -> list[Kernel]:
    """What ptxas said about the kernels of one object file."""
    found = []
    for match in ENTRY.finditer(output):
        launch = launch_of(match["name"], known)
        found.append(
            Kernel(
                launch.kernel,
                built.kernel,
                built.element,
                launch.head_dim,
                launch.head_dim_v,
                launch.block_m,
                launch.block_n,
                mangled.variant_of(match["name"]),
                match["architecture"],
                launch.threads,
                launch.smem_bytes,
                int(match["registers"]),
                int(match["stores"]) + int(match["loads"]),
                int(match["stack"]),
                match["name"],
            )
        )
    if len(found) != output.count("Compiling entry function"):
        raise ToolError(f"{built.name}: the output of ptxas -v does not look as expected")
    return found


def warnings_in(output: str) -> list[str]:
    """What the compiler printed besides the use of resources."""
    return [line for line in output.splitlines() if not measured.RESOURCE_USAGE.match(line)]


def disassembler() -> str:
    """cuobjdump: from the package of that name, from PATH, or from the toolkit."""
    home = cuda_objects.cuda_home()
    site = Path(sysconfig.get_path("purelib")) / "nvidia"
    folders = [*map(str, site.glob("cu*/bin")), os.environ.get("PATH", ""), str(home / "bin") if home else ""]
    found = shutil.which("cuobjdump", path=os.pathsep.join(folders))
    if found is None:
        raise ToolError("there is no cuobjdump; run pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
    return found


def disassemble(tool: str, path: Path) -> list[sass.Function]:
    """The machine code in an object file."""
    environment = {**os.environ, "PATH": os.pathsep.join([str(Path(tool).parent), os.environ.get("PATH", "")])}
    text = subprocess.run(
        [tool, "--dump-sass", str(path)], capture_output=True, text=True, check=True, env=environment
    ).stdout
    return list(sass.parse(text.splitlines()))


def main_loops(functions: list[sass.Function], kernels: list[Kernel], known: list[Launch]) -> list[dict[str, Any]]:
    """One pass of the main loop of every kernel in an object file that has one: instructions, and cycles per unit."""
    by_symbol = {(each.symbol, each.architecture): each for each in kernels}
    found = []
    for function in functions:
        kernel = by_symbol[function.name, function.architecture]
        launch = launch_of(function.name, known)
        passed = average_pass(function, launch)
        if passed:
            check_products(launch, passed, function)
            by_tma = launch.filled_bytes, launch.reduced_bytes
            cycles = cost_model.cycles(passed, launch.warps, kernel.architecture, *by_tma)
            names: dict[str, float] = {}
            for opcode, times in passed.items():
                name = opcode.partition(".")[0]
                names[name] = names.get(name, 0) + times
            counts = {name: round(times) for name, times in names.items()}
            found.append({"kernel": kernel, "instructions": counts, "cycles": cycles})
    return found


def overlaps_of(functions: list[sass.Function], kernels: list[Kernel]) -> list[tuple[Kernel, float]]:
    """The kernels of an object file with products and exponentials in a loop, and their share of overlap."""
    by_symbol = {(each.symbol, each.architecture): each for each in kernels}
    shares = [(by_symbol[each.name, each.architecture], wgmma_hazards.overlap(each)) for each in functions]
    return [(kernel, share) for kernel, share in shares if share is not None]


def average_pass(function: sass.Function, launch: Launch) -> dict[str, float]:
    """What a warp executes in one pass of the main loop, or in the mean of two between which it alternates."""
    passes = [function.usual_pass(launch.parts)]
    if launch.alternates:
        passes.append(function.usual_pass(launch.parts, fewest_products=True))
    kinds = sorted({kind for each in passes for kind in each})
    return {kind: sum(each[kind] for each in passes) / len(passes) for kind in kinds}


def check_products(launch: Launch, passed: Mapping[str, float], function: sass.Function) -> None:
    """The pass that was found multiplies as much as a tile takes; if not, it is not the one that was meant."""
    work = cost_model.work(passed)
    found = (work["tensor"] + work["wgmma"]) * launch.warps
    if found != launch.products:
        what = f"{function.architecture} {function.name}: one pass of the main loop"
        raise ToolError(f"{what} was read as {found:.0f} multiply-adds, and has {launch.products}")


@dataclass(frozen=True)
class Report:
    """All that is known."""

    compiler: str
    costs: dict[str, float]
    kernels: list[Kernel]
    loops: list[dict[str, Any]]
    warnings: list[str]
    wgmma_products: int  # instructions
    hazards: list[str]  # registers of theirs that are touched too early
    overlaps: list[tuple[Kernel, float]]  # wgmma_hazards.overlap, of every kernel that has such a loop
    doubles: list[str]  # instructions in double precision

    def least_overlap(self) -> float | None:
        """Of the kernels that should; None: there are none."""
        return min((share for kernel, share in self.overlaps if kernel.should_overlap), default=None)

    def as_json(self) -> str:
        """One line per kernel and loop."""

        def lines(rows: list[dict[str, Any]]) -> str:
            return "[\n" + ",\n".join("  " + json.dumps(row) for row in rows) + "\n ]"

        kernels = [{**asdict(each), "blocks": each.blocks()} for each in self.kernels]
        for row in kernels:
            del row["symbol"]
        loops = [
            {
                "kernel": each["kernel"].kernel,
                **{key: getattr(each["kernel"], key) for key in report_tables.LOOP_KEYS},
                "instructions": each["instructions"],
                "cycles": {unit: round(value, 1) for unit, value in each["cycles"].items()},
            }
            for each in self.loops
        ]
        head = {"compiler": self.compiler, "costs": self.costs, "wgmma_products": self.wgmma_products}
        return f'{json.dumps(head, indent=1)[:-2]},\n "kernels": {lines(kernels)},\n "loops": {lines(loops)}\n}}\n'


def gather(folder: Path, names: Sequence[str] = (), committed: dict[str, Any] | None = None) -> Report:
    """Compile, and read all there is, or the object files of these names.

    With names, or the committed report, only what is not up to date is compiled. With the committed report, more time
    than that allows has to be needed twice.
    """
    home = cuda_objects.cuda_home()
    if home is None:
        raise ToolError("there is no nvcc; put it on PATH, or set CUDA_HOME")
    tool = disassembler()
    wanted = [each for each in cuda_objects.objects(cuda_archs.parse(cuda_archs.DEFAULT)) if each.element]
    wanted = [each for each in wanted if not names or each.name in names]
    if not wanted:
        raise ToolError(f"no object file with kernels is called {' or '.join(names)}")
    if not names and committed is None:
        compile_costs.remove(wanted, folder)
    compiled = compile_costs.compile_all(home, wanted, folder)
    if committed and compile_costs.growth(compiled.costs(), committed["costs"], ["relative_time"]):
        print("compiling took long; once more, to see whether the machine was busy", flush=True)
        compiled = compile_costs.compile_again(home, compiled)
    known = launches(folder)
    kernels, loops, warnings, products, hazards, overlaps, doubles = [], [], [], 0, [], [], []
    for each, log in zip(wanted, compiled.logs, strict=True):
        own = kernels_of(each, log["output"], known)
        kernels += own
        warnings += [f"{each.name}: {line}" for line in warnings_in(log["output"])]
        # The other element type has the same instructions, if perhaps in other registers.
        is_first, is_for_hopper = each.element == cuda_objects.ELEMENTS[0], each.kernel.endswith("_sm90")
        functions = disassemble(tool, each.path(folder)) if is_first or is_for_hopper else []
        loops += main_loops(functions, own, known) if is_first else []
        products += sum(instruction.name == "HGMMA" for f in functions for instruction in f.instructions)
        hazards += [f"{each.name} {f.name}: {line}" for f in functions for line in wgmma_hazards.find(f)]
        overlaps += overlaps_of(functions, own)
        doubles += [f"{each.name} {f.name}: {opcode}" for f in functions for opcode in sass.in_double_precision(f)]
    kernels.sort(key=lambda each: each.place)
    loops.sort(key=lambda each: each["kernel"].place)
    compiler = f"nvcc {cuda_objects.cuda_version(cuda_objects.nvcc_of(home))}"
    costs = {"kernels": len(kernels), **compiled.costs()}
    overlaps.sort(key=lambda each: each[0].place)
    return Report(compiler, costs, kernels, loops, warnings, products, hazards, overlaps, doubles)


def problems(report: Report, committed: dict[str, Any] | None) -> list[str]:
    """What must not be, a sentence each; with the committed report, growth too."""
    found = [f"the compiler warns: {line}" for line in report.warnings]
    found += [f"wgmma: {line}" for line in report.hazards]
    found += [f"double precision: {line}" for line in report.doubles]
    for each in report.kernels:
        if each.spill_bytes:
            found.append(f"{each.name} spills {each.spill_bytes} bytes on {each.architecture}")
        if not any(each.blocks().values()):
            found.append(f"{each.name} fits onto no multiprocessor of {each.architecture}")
    for each, share in report.overlaps:
        if each.should_overlap and share < LEAST_OVERLAP:
            found.append(
                f"{each.name} computes {share:.0%} of its exponentials beside products, not {LEAST_OVERLAP:.0%}"
            )
    if committed is None:
        return found
    return found + compile_costs.growth(report.costs, committed["costs"])


def main() -> int:
    """Write the report, or compare with it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the committed report instead of writing it")
    parser.add_argument("names", nargs="*", help="print the report of these object files, such as fwd_sm80_bf16_64")
    arguments = parser.parse_args()
    names = arguments.names
    target = REPORT.with_suffix(".json")
    committed = json.loads(target.read_text()) if arguments.check and not names else None
    try:
        report = gather(FOLDER_OF_SOME if names else FOLDER, names, committed)
    except ToolError as error:
        sys.exit(str(error))
    print(report_tables.markdown(report) if names else report_tables.costs_table(report))
    if not (arguments.check or names):
        target.write_text(report.as_json())
        REPORT.with_suffix(".md").write_text(report_tables.markdown(report))
        print(f"wrote {REPORT}.json and {REPORT}.md")
    # What some kernels cost says nothing about growth.
    found = problems(report, committed)
    for sentence in found:
        print(sentence, file=sys.stderr)
    return 1 if found and (arguments.check or names) else 0


if __name__ == "__main__":
    sys.exit(main())
