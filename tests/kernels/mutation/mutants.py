"""Breaks one line of the kernels at a time and says who notices: make -f tests/kernels/Makefile mutants.

Every mutant is compiled and run on a few cases, plainly (wrong numbers, rules of the models, deadlocks), and, if that
lets it pass and it concerns synchronisation, under ThreadSanitizer. What nobody notices must stand in equivalent.py
with a proof that it changes nothing; otherwise a test is missing, or the line is not needed.
"""

import argparse
import concurrent.futures
import functools
import itertools
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from build_tools import cuda_objects
from list_cases import Row, line_of, mutant_table
from mutation.equivalent import EQUIVALENT
from mutation.mutations import CSRC, Mutation, all_mutations

# The kernels of each source in csrc/cuda.
AROUND_BWD = ["cuda/attention/bwd_preprocess.h", "cuda/attention/bwd_postprocess.h"]
KERNELS = {
    "sm80/fwd": ["cuda/sm80/fwd.h"],
    "sm80/bwd": [*AROUND_BWD, "cuda/sm80/bwd.h"],
    "sm80/attn_probs": ["cuda/sm80/attn_probs.h"],
    "sm90/fwd": ["cuda/sm90/fwd.h"],
    "sm90/bwd": [*AROUND_BWD, "cuda/sm90/bwd.h"],
}
PASSES = {"sm80/fwd": "fwd", "sm80/bwd": "bwd", "sm80/attn_probs": "probs", "sm90/fwd": "fwd", "sm90/bwd": "bwd"}
# What both have is tried with the first; where they let a mutant pass, with the other.
COMPUTE_CAPABILITIES = (80, 90)
# Beside these a head_dim of an architecture has nothing of its own. The first has one tile shape; the others, with
# tiles of several shapes and what goes with them, are tried where it lets a mutant pass.
LIKE_OTHERS = {128}
# Files of which the kernels for other head_dims make no use.
HEAD_DIMS_OF = {"cuda/sm90/bwd_keys.h": (64, 96), "cuda/sm90/bwd_columns.h": (256, 192)}
VERDICTS = {0: "-", 1: "wrong result", 3: "model check", 4: "deadlock", 66: "race report", 124: "hangs"}
FLAVOURS = ("plain", "tsan")
NOT_COMPILED = "does not compile"


@dataclass(frozen=True)
class Toolchain:
    """How the Makefile compiles, links and runs."""

    build: Path
    cxx: str
    compile_flags: dict[str, str]
    link_flags: dict[str, str]
    run: dict[str, str]


@dataclass(frozen=True)
class Outcome:
    mutation: Mutation
    verdicts: dict[str, str]

    @property
    def noticed(self) -> bool:
        return any(verdict not in ("", VERDICTS[0]) for verdict in self.verdicts.values())

    @property
    def compiles(self) -> bool:
        return NOT_COMPILED not in self.verdicts.values()


def included(path: str, csrc: Path) -> set[str]:
    """The files of csrc that one of them includes, through any number of others, but for other kernels."""
    found, left, of_kernels = set(), [path], set(itertools.chain(*KERNELS.values()))
    while left:
        current = left.pop()
        if current in found or not (csrc / current).exists():
            continue
        found.add(current)
        names = re.findall(r'#include "([^"]+)"', (csrc / current).read_text())
        left += [name for name in names if name not in of_kernels]
    return found


def head_dims(capability: int) -> list[int]:
    """Those with which mutants are tried."""
    return [d for d in cuda_objects.head_dims(CSRC / f"cuda/sm{capability}") if d not in LIKE_OTHERS]


def head_dim_of(row: Row, capability: int) -> int:
    """Of the kernels that run a case."""
    needed = max(row[0].head_dim, row[0].head_dim_v)
    return min(d for d in cuda_objects.head_dims(CSRC / f"cuda/sm{capability}") if d >= needed)


class Workshop:
    """Compiles and runs mutants, each in a folder of its own, from a copy of csrc that nobody edits meanwhile."""

    def __init__(self, tools: Toolchain):
        self.tools = tools
        self.root = tools.build / "mutants"
        self.csrc = self.root / "csrc"
        shutil.rmtree(self.root, ignore_errors=True)
        for folder in ("policy", "cuda"):
            shutil.copytree(CSRC / folder, self.csrc / folder)
        shutil.copy(CSRC / "problem.h", self.csrc)
        self.mutations = all_mutations(self.csrc)
        for flavour, capability in itertools.product(FLAVOURS, COMPUTE_CAPABILITIES):
            # Sequences that overlap are written by several blocks: a race that is no fault of kernels.
            rows = [row for row in mutant_table() if flavour == "plain" or row[1].check != "hostile"]
            rows = [row for row in rows if row[1].compute_capability == capability]
            for head_dim in head_dims(capability):
                lines = [line_of(row) for row in rows if head_dim_of(row, capability) == head_dim]
                self.table(flavour, head_dim, capability).write_text("".join(f"{line}\n" for line in lines))

    @functools.cache  # noqa: B019 (there is one workshop)
    def patience(self, flavour: str, head_dim: int, capability: int) -> float:
        """How many seconds a mutant may take before it hangs: several times what the intact kernels take."""
        program = self.tools.build / flavour / "run_case"
        command = [*shlex.split(self.tools.run[flavour]), str(program), "--table"]
        start = time.monotonic()
        subprocess.run([*command, str(self.table(flavour, head_dim, capability))], capture_output=True, check=True)
        return 20 + 4 * (time.monotonic() - start)

    def table(self, flavour: str, head_dim: int, capability: int) -> Path:
        return self.root / f"cases.{flavour}.{head_dim}.sm{capability}.txt"

    def sources_with(self, path: str, head_dim: int, capability: int) -> list[str]:
        """The sources in csrc/cuda that a header is part of."""
        sources = [s for s, kernels in KERNELS.items() if any(path in included(k, self.csrc) for k in kernels)]
        return [s for s in sources if s.startswith(f"sm{capability}") and self.object(s, "plain", head_dim).exists()]

    def object(self, source: str, flavour: str, head_dim: int) -> Path:
        """Of the intact source. Not every kernel has every head_dim."""
        return self.tools.build / flavour / f"kernels/{source}.bf16.{head_dim}.o"

    def verdict(self, mutation: Mutation, folder: Path, flavour: str, head_dim: int, capability: int) -> str:
        """What the mutant comes to in one flavour of the build."""
        broken = self.sources_with(mutation.path, head_dim, capability)
        if not broken:
            return VERDICTS[0]
        objects = []
        for source in broken:
            target = folder / f"{source}.{flavour}.{head_dim}.o"
            if not target.exists() and not self.compiles(folder, source, flavour, head_dim, target):
                return NOT_COMPILED
            objects.append(target)
        build = self.tools.build / flavour
        intact = [self.object(s, flavour, head_dim) for s in KERNELS if s not in broken]
        objects += [path for path in intact if path.exists()]
        objects += [build / "kernels/backends.o", *sorted((build / "kernels").glob("sm*/backend.o"))]
        objects += sorted((build / "models").glob("*.o"))
        runner = sorted((self.tools.build / "plain/runner").glob("*.o"))
        program = folder / f"run_case.{flavour}"
        link = [self.tools.cxx, *shlex.split(self.tools.link_flags[flavour]), *map(str, [*objects, *runner])]
        subprocess.run([*link, "-o", str(program)], check=True)
        passes = ["--pass", PASSES[broken[0]]] if len(broken) == 1 else []
        command = [*shlex.split(self.tools.run[flavour]), str(program), "--stop", *passes, "--table"]
        command.append(str(self.table(flavour, head_dim, capability)))
        try:
            limit = self.patience(flavour, head_dim, capability)
            code = subprocess.run(command, capture_output=True, timeout=limit).returncode
        except subprocess.TimeoutExpired:
            code = 124
        return VERDICTS.get(code, "crash")

    def compiles(self, folder: Path, source: str, flavour: str, head_dim: int, target: Path) -> bool:
        instance = [
            f"-I{folder}",
            "-Isimulator",
            f"-I{self.csrc}",
            "-DFA_ELEMENT=bf16",
            f"-DFA_HEAD_DIM={head_dim}",
            "-w",
        ]
        target.parent.mkdir(exist_ok=True)
        flags = shlex.split(self.tools.compile_flags[flavour])
        what = ["-x", "c++", "-c", str(self.csrc / f"cuda/{source}.cu"), "-o", str(target)]
        return subprocess.run([self.tools.cxx, *instance, *flags, *what], capture_output=True).returncode == 0

    def worst(self, mutation: Mutation, folder: Path, flavour: str) -> str:
        """The verdict of the first kernels that notice. Where there is a proof, one head_dim is enough to doubt it."""
        for capability in COMPUTE_CAPABILITIES:
            tried = HEAD_DIMS_OF.get(mutation.path, head_dims(capability))
            for head_dim in tried[:1] if proof_of(mutation, self.mutations) else tried:
                verdict = self.verdict(mutation, folder, flavour, head_dim, capability)
                if verdict != VERDICTS[0]:
                    return verdict
        return VERDICTS[0]

    def outcome(self, number: int, mutation: Mutation) -> Outcome:
        folder = self.root / str(number)
        shutil.rmtree(folder, ignore_errors=True)
        target = folder / mutation.path
        target.parent.mkdir(parents=True)
        target.write_text(mutation.apply((self.csrc / mutation.path).read_text()))
        verdicts = {"plain": self.worst(mutation, folder, "plain"), "tsan": ""}
        if mutation.synchronises and verdicts["plain"] == VERDICTS[0]:
            verdicts["tsan"] = self.worst(mutation, folder, "tsan")
        shutil.rmtree(folder)
        return Outcome(mutation, verdicts)


def proof_of(mutation: Mutation, mutations: list[Mutation]) -> str | None:
    """Where several places of a file are broken alike, they are counted."""
    alike = [m for m in mutations if (m.path, m.what) == (mutation.path, mutation.what)]
    return EQUIVALENT.get((mutation.path, mutation.what, alike.index(mutation)))


def summary(outcomes: list[Outcome], mutations: list[Mutation]) -> tuple[str, bool]:
    """Counts, and whether every mutant was noticed or is proven to be harmless."""
    compiled = [o for o in outcomes if o.compiles]
    missed = [o.mutation for o in compiled if not o.noticed]
    open_ones = [m.name for m in missed if not proof_of(m, mutations)]
    stale = [o.mutation.name for o in compiled if o.noticed and proof_of(o.mutation, mutations)]
    noticed, proven = len(compiled) - len(missed), len(missed) - len(open_ones)
    counted = f"{noticed} noticed, {proven} proven equivalent, {len(open_ones)} not noticed"
    lines = [f"{len(compiled)} mutants: {counted}; {len(outcomes) - len(compiled)} more do not compile"]
    for flavour in FLAVOURS:
        counts = Counter(o.verdicts[flavour] for o in compiled if o.verdicts[flavour] not in ("", "-"))
        lines.append(f"{flavour}: " + ", ".join(f"{count} {verdict}" for verdict, count in counts.most_common()))
    lines += [f"not noticed: {name}" for name in open_ones]
    lines += [f"noticed, although equivalent.py has a proof that it is harmless: {name}" for name in stale]
    return "\n".join(lines), not open_ones and not stale


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", type=Path, required=True)
    parser.add_argument("--cxx", default="g++")
    for flavour in FLAVOURS:
        for kind in ("compile", "link", "run"):
            parser.add_argument(f"--{kind}-{flavour}", default="")
    parser.add_argument("--only", default="", help="mutants whose name this pattern matches")
    parser.add_argument("--sample", type=int, help="as many, chosen by --seed")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    kinds = [{f: getattr(arguments, f"{kind}_{f}") for f in FLAVOURS} for kind in ("compile", "link", "run")]
    workshop = Workshop(Toolchain(arguments.build.resolve(), arguments.cxx, *kinds))
    mutations = workshop.mutations
    chosen = [m for m in mutations if re.search(arguments.only, m.name)]
    if arguments.sample:
        chosen = random.Random(arguments.seed).sample(chosen, min(arguments.sample, len(chosen)))
    start, outcomes = time.monotonic(), []
    with concurrent.futures.ThreadPoolExecutor(arguments.jobs) as pool:
        for outcome in pool.map(workshop.outcome, range(len(chosen)), chosen):
            outcomes.append(outcome)
            sys.stdout.write(f"{outcome.mutation.name}: {outcome.verdicts['plain']} {outcome.verdicts['tsan']}\n")
            sys.stdout.flush()
    text, good = summary(outcomes, mutations)
    sys.stdout.write(f"{text}\n{time.monotonic() - start:.0f} s\n")
    sys.exit(not good)


if __name__ == "__main__":
    main()
