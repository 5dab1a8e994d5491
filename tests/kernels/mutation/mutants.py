"""Mutation testing: breaks one line of the kernels at a time, and checks that a case detects it.

    make mutants                                        every mutant: hours
    make mutants ARGS='--sample 40'                     40 of them
    make mutants ARGS='--only "sm90/fwd.h.*removed"'    those whose name matches
    make mutants ARGS='--sample 40 --limit 600'         as many of 40 as ten minutes allow

Every mutant is compiled and runs a few cases, plainly (wrong results, broken rules, deadlocks) and, if it survives that
and synchronises, under ThreadSanitizer. A mutant that survives both is a missing test or a needless line of code,
unless equivalent.py proves that it changes nothing.
"""

import argparse
import concurrent.futures
import contextlib
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
from list_cases import line_of, mutant_table
from mutation.equivalent import EQUIVALENT
from mutation.mutations import CSRC, Mutation, all_mutations
from sampling import kernel_head_dim, seed_of_sources

FLAVOURS = ("plain", "tsan")
SURVIVED, NOT_COMPILED, NOT_TRIED = "-", "does not compile", "not tried"
# By the exit code of run_case.
VERDICTS = {0: SURVIVED, 1: "wrong result", 3: "broken rule", 4: "deadlock", 66: "data race", 124: "hangs"}
# A mutant that runs for longer, in seconds, may hang: only then is the time of the intact kernels measured.
PATIENCE = 60
# Beside the others, this head_dim has no code of its own.
LIKE_OTHERS = 128


@dataclass(frozen=True)
class Kernels:
    """Those that a mutant is tried with: of one architecture and head_dim, for bfloat16."""

    arch: str
    head_dim: int

    def object(self, source: str, folder: Path) -> Path:
        """Of a source of the architecture, or of one for every problem."""
        is_instance = source.startswith(f"{self.arch}/")
        return folder / (f"{source}.bf16.{self.head_dim}.o" if is_instance else f"{source}.o")


@dataclass(frozen=True)
class Outcome:
    mutation: Mutation
    verdicts: dict[str, str]  # by flavour; empty if it was not tried

    @property
    def tried(self) -> bool:
        return NOT_TRIED not in self.verdicts.values()

    @property
    def survived(self) -> bool:
        return set(self.verdicts.values()) <= {"", SURVIVED}

    @property
    def compiles(self) -> bool:
        return NOT_COMPILED not in self.verdicts.values()


class Laboratory:
    """Compiles and runs mutants, each in a folder of its own, from a copy of csrc that does not change meanwhile."""

    def __init__(self, build: Path, commands: dict[str, list[str]], limit: float = 1e9):
        self.build = build
        self.end = time.monotonic() + limit
        self.commands = commands  # "compile_plain" and so on
        self.root = build / "mutants"
        self.csrc = self.root / "csrc"
        shutil.rmtree(self.root, ignore_errors=True)
        for folder in ("policy", "cuda"):
            shutil.copytree(CSRC / folder, self.csrc / folder)
        shutil.copy(CSRC / "problem.h", self.csrc)
        self.sources = {  # sm80: [sm80/bwd, sm80/fwd, ...]
            folder.name: sorted(f"{folder.name}/{path.stem}" for path in folder.glob("*.cu"))
            for folder in sorted(self.csrc.glob("cuda/sm*"))
        }
        self.common = sorted(f"attention/{path.stem}" for path in self.csrc.glob("cuda/attention/*.cu"))
        self.kernels = [
            Kernels(arch, head_dim)
            for arch in self.sources
            for head_dim in cuda_objects.head_dims(self.csrc / "cuda" / arch)
            if head_dim != LIKE_OTHERS
        ]
        self.mutations = [mutation for mutation in all_mutations(self.csrc) if self.is_included(mutation.path)]
        rows = [(row, Kernels(f"sm{row[1].compute_capability}", kernel_head_dim(row))) for row in mutant_table()]
        for flavour, kernels in itertools.product(FLAVOURS, self.kernels):
            # Sequences that overlap are written by several blocks: a data race that is no fault of the kernels.
            fitting = [r for r, of in rows if of == kernels and (flavour == "plain" or r[1].check != "invalid_lengths")]
            self.table(flavour, kernels).write_text("".join(f"{line_of(row)}\n" for row in fitting))

    def table(self, flavour: str, kernels: Kernels) -> Path:
        return self.root / f"cases.{flavour}.{kernels.arch}.{kernels.head_dim}.txt"

    def intact(self, flavour: str) -> Path:
        """Where the objects of the intact kernels are."""
        return self.build / flavour / "kernels"

    def sources_with(self, path: str, kernels: Kernels) -> list[str]:
        """The sources of these kernels that include a header, as the compiler has noted."""
        found = []
        for source in (*self.sources[kernels.arch], *self.common):
            noted = kernels.object(source, self.intact("plain")).with_suffix(".d").read_text().split()
            found += [source] if f"csrc/{path}" in noted else []
        return found

    @functools.cache  # noqa: B019 (there is one laboratory)
    def is_included(self, path: str) -> bool:
        """Whether any kernels include a header. No case can detect what becomes of another: it serves the CPU alone."""
        return any(self.sources_with(path, kernels) for kernels in self.kernels)

    def has_code(self, path: str, kernels: Kernels) -> bool:
        """Whether the line numbers of these kernels' objects tell of the file: others only include it."""
        objects = [kernels.object(source, self.intact("plain")) for source in self.sources_with(path, kernels)]
        return any(Path(path).name.encode() in each.read_bytes() for each in objects)

    @functools.cache  # noqa: B019 (there is one laboratory)
    def time_limit(self, flavour: str, kernels: Kernels) -> float:
        """How many seconds a mutant may take before it hangs: several times what the intact kernels take."""
        command = [*self.commands[f"run_{flavour}"], str(self.build / flavour / "run_case"), "--table"]
        start = time.monotonic()
        if self.code_of([*command, str(self.table(flavour, kernels))], self.remaining()):
            raise RuntimeError(f"the intact kernels fail: {' '.join(command)}")
        return 20 + 4 * (time.monotonic() - start)

    def remaining(self) -> float:
        return max(0.0, self.end - time.monotonic())

    def code_of(self, command: list[str | Path], seconds: float) -> int:
        """The exit code. TimeoutExpired if it takes longer."""
        return subprocess.run(command, capture_output=True, timeout=seconds).returncode

    def patient_code_of(self, command: list[str | Path], flavour: str, kernels: Kernels) -> int:
        """The exit code of cases with a mutant, 124 if it hangs."""
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            try:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    return process.wait(min(PATIENCE, self.remaining()))
                limit = self.time_limit(flavour, kernels)
                if limit < self.remaining():
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        return process.wait(limit)
                    return 124
                return process.wait(self.remaining())
            finally:
                process.kill()

    def compiled(self, folder: Path, source: str, flavour: str, kernels: Kernels) -> Path | None:
        """The object of the mutant. None if it does not compile."""
        target = kernels.object(source, folder / flavour)
        if target.exists():
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        folders = itertools.chain(*(("-iquote", str(each)) for each in (folder, "simulator", self.csrc)))
        instance = ["-DFA_ELEMENT=bf16", f"-DFA_HEAD_DIM={kernels.head_dim}", "-w", "-x", "c++"]
        command = [*self.commands[f"compile_{flavour}"], *folders, *instance]
        command += ["-c", str(self.csrc / f"cuda/{source}.cu"), "-o", str(target)]
        return target if self.code_of(command, self.remaining()) == 0 else None

    def verdict(self, mutation: Mutation, folder: Path, flavour: str, kernels: Kernels) -> str:
        """What the cases of these kernels find."""
        broken = self.sources_with(mutation.path, kernels)
        objects = [self.compiled(folder, source, flavour, kernels) for source in broken]
        if not objects or None in objects:
            return NOT_COMPILED if objects else SURVIVED
        intact = self.intact(flavour)
        for arch, sources in self.sources.items():
            others = [source for source in (*sources, *self.common) if source not in broken]
            objects += [Kernels(arch, kernels.head_dim).object(source, intact) for source in others]
        objects = list(dict.fromkeys(objects))
        objects = [path for path in objects if path.exists()]  # not every architecture has every head_dim
        objects += [intact / "backends.o", *intact.glob("sm*/backend.o"), *(intact.parent / "models").glob("*.o")]
        objects += (self.build / "plain/runner").glob("*.o")
        program = folder / f"run_case.{flavour}"
        subprocess.run([*self.commands[f"link_{flavour}"], *objects, "-o", program], check=True)
        is_pass = len(broken) == 1 and broken[0] not in self.common
        passes = ["--pass", Path(broken[0]).name] if is_pass else []
        command = [*self.commands[f"run_{flavour}"], str(program), "--stop", *passes, "--table"]
        command.append(str(self.table(flavour, kernels)))
        return VERDICTS.get(self.patient_code_of(command, flavour, kernels), "crash")

    def first_verdict(self, mutation: Mutation, folder: Path, flavour: str) -> str:
        """Of the first kernels that detect the mutant. Where there is a proof, one head_dim is enough to doubt it."""
        for arch in self.sources:
            tried = [kernels for kernels in self.kernels if kernels.arch == arch]
            tried.sort(key=lambda kernels: not self.has_code(mutation.path, kernels))
            for kernels in tried[:1] if proof_of(mutation) else tried:
                verdict = self.verdict(mutation, folder, flavour, kernels)
                if verdict != SURVIVED:
                    return verdict
        return SURVIVED

    def outcome(self, number: int, mutation: Mutation) -> Outcome:
        folder = self.root / str(number)
        target = folder / mutation.path
        target.parent.mkdir(parents=True)
        target.write_text(mutation.apply((self.csrc / mutation.path).read_text()))
        verdicts = dict.fromkeys(FLAVOURS, "")
        flavours = FLAVOURS if mutation.synchronises else FLAVOURS[:1]
        try:
            for flavour in flavours:
                verdicts[flavour] = self.first_verdict(mutation, folder, flavour)
                if verdicts[flavour] != SURVIVED:
                    break
        except subprocess.TimeoutExpired:  # the limit of this run
            verdicts[flavour] = NOT_TRIED
        shutil.rmtree(folder)
        return Outcome(mutation, verdicts)


def proof_of(mutation: Mutation) -> str | None:
    return EQUIVALENT.get(mutation.path, {}).get(mutation.label)


def summary(outcomes: list[Outcome]) -> tuple[str, bool]:
    """Counts, and whether every mutant that was tried was detected or has a proof."""
    tried = [o for o in outcomes if o.tried]
    compiled = [o for o in tried if o.compiles]
    survivors = [o.mutation for o in compiled if o.survived]
    open_ones = [m.name for m in survivors if not proof_of(m)]
    refuted = [o.mutation.name for o in compiled if not o.survived and proof_of(o.mutation)]
    detected, proven = len(compiled) - len(survivors), len(survivors) - len(open_ones)
    counted = f"{detected} detected, {proven} proven equivalent, {len(open_ones)} not detected"
    lines = [f"{len(compiled)} mutants: {counted}; {len(tried) - len(compiled)} more do not compile"]
    if len(tried) < len(outcomes):
        lines.append(f"the time was too short for {len(outcomes) - len(tried)} more")
    for flavour in FLAVOURS:
        counts = Counter(o.verdicts[flavour] for o in compiled if o.verdicts[flavour] not in ("", SURVIVED))
        lines.append(f"{flavour}: " + ", ".join(f"{count} {verdict}" for verdict, count in counts.most_common()))
    lines += [f"not detected: {name}" for name in open_ones]
    lines += [f"detected, although equivalent.py has a proof: {name}" for name in refuted]
    return "\n".join(lines), bool(compiled) and not open_ones and not refuted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", type=Path, required=True, help="build/sim")
    for kind, flavour in itertools.product(("compile", "link", "run"), FLAVOURS):
        parser.add_argument(f"--{kind}-{flavour}", type=shlex.split, required=True, help="command")
    parser.add_argument("--only", default="", help="mutants whose name matches this regular expression")
    parser.add_argument("--sample", type=int, help="how many of them")
    parser.add_argument("--limit", type=float, default=1e9, help="seconds, after which no more mutants are tried")
    parser.add_argument("--seed", type=int, default=seed_of_sources(), help="which of them (by the sources)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    laboratory = Laboratory(arguments.build.resolve(), vars(arguments), arguments.limit)
    chosen = [m for m in laboratory.mutations if re.search(arguments.only, m.name)]
    if arguments.sample and arguments.sample < len(chosen):
        sys.stdout.write(f"seed {arguments.seed}: replay with --seed {arguments.seed}\n")
        chosen = random.Random(arguments.seed).sample(chosen, arguments.sample)
    start, outcomes = time.monotonic(), []
    with concurrent.futures.ThreadPoolExecutor(arguments.jobs) as pool:
        for outcome in pool.map(laboratory.outcome, range(len(chosen)), chosen):
            outcomes.append(outcome)
            sys.stdout.write(f"{outcome.mutation.name}: {outcome.verdicts['plain']} {outcome.verdicts['tsan']}\n")
            sys.stdout.flush()
    text, good = summary(outcomes)
    sys.stdout.write(f"{text}\n{time.monotonic() - start:.0f} s\n")
    sys.exit(not good)


if __name__ == "__main__":
    main()
