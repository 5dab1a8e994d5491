"""Attention on a GPU beside every way torch has of computing the same thing, all timed by turns in one process.

    make gpu-bench                        # everything
    make gpu-bench SHARD=1/3              # every third case; run again, it goes on where it ended
    make gpu-bench ARGS='--merge'         # measure nothing: table and figures of what is there
    make gpu-bench ARGS='--only "causal.*d128"'

Forward and backward are timed apart. FlexAttention compiles for many seconds per case, so it comes in a second stage,
again beside ours, when everything else is done. Results go to benchmarks/results/<gpu>/, or to the folder RESULTS; the
table and the figures there are of all shards, and are made anew at the end of every run.
Environment: SHARD=i/n (1/1); LIMIT, seconds after which no case is started (330); COMMIT, where there is no git.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import re
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent.parent))

from build_tools import preflight

if __name__ == "__main__" and "--device=cpu" not in sys.argv:
    unavailable_reason = preflight.unavailable_reason() or preflight.build_unavailable_reason()
    if unavailable_reason:
        sys.exit(f"gpu-bench: {unavailable_reason}")

import torch
import torch._functorch.config

from build_tools import shards
from harness import gpu, gpu_figures, gpu_report, results
from harness.cases import Case
from harness.failures import device_is_lost, reason
from harness.gpu_race import measure
from harness.implementation import PASSES
from harness.machine import BENCHMARKS, describe, machine_name
from harness.monitor import Monitor, device_state

# What decides what is measured; the rest of the harness may change without making results worthless.
MEASURING = ("cases", "dense", "flex", "gpu", "gpu_race", "implementation", "timing", "varlen")
SECONDS_PER_CASE = {1: 120.0, 2: 240.0}  # after which it counts as hung; the second stage compiles


@dataclass(frozen=True)
class Race:
    """A case and who takes part: 1, everybody but FlexAttention; 2, FlexAttention."""

    case: Case
    stage: int

    @property
    def name(self) -> str:
        """What its results are filed under."""
        return self.case.name + (", flex" if self.stage == 2 else "")


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="REGEX", default="", help="measure only the cases whose name matches")
    parser.add_argument("--budget", type=float, default=0.3, help="seconds per case and pass (0.3)")
    parser.add_argument("--both", action="store_true", help="time forward and backward in one, too")
    parser.add_argument("--stage", type=int, choices=(1, 2), help="1: all but FlexAttention; 2: FlexAttention alone")
    parser.add_argument("--merge", action="store_true", help="measure nothing; join the results of all shards")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a rehearsal with small cases")
    parser.add_argument("--list", action="store_true", help="print the names of the cases and stop")
    return parser.parse_args(argv)


def all_races(device: str) -> list[Race]:
    """In the order of their value; a second stage only where FlexAttention has a backward pass."""
    cases = gpu.gpu_cases()
    if device == "cpu":
        return [Race(case, 1) for case in dict.fromkeys(map(gpu.quick, cases))]
    second = [Race(case, 2) for case in cases if not case.seqlens and not case.dropout_p]
    return [*(Race(case, 1) for case in cases), *second]


def wanted(races: Sequence[Race], arguments: argparse.Namespace) -> list[Race]:
    """Those that the command line chooses."""
    return [
        race for race in races if re.search(arguments.only, race.case.name) and arguments.stage in (None, race.stage)
    ]


def passes(arguments: argparse.Namespace) -> tuple[str, ...]:
    """What is timed."""
    return PASSES if arguments.both else PASSES[:2]


def fingerprint(arguments: argparse.Namespace, info: dict[str, Any]) -> str:
    """Changes with everything that results depend on."""
    settings = (str(arguments.budget), *passes(arguments), info["torch"], info["processor"])
    return shards.code_fingerprint(*settings, paths=[BENCHMARKS / "harness" / f"{name}.py" for name in MEASURING])


class Run:
    """One process: a share of the races, its file, and what is made of all files."""

    def __init__(self, arguments: argparse.Namespace, folder: Path, info: dict[str, Any]):
        self.arguments, self.folder, self.device = arguments, folder, arguments.device
        self.order = [race.name for race in all_races(self.device)]
        self.races = {race.name: race for race in wanted(all_races(self.device), arguments)}
        self.code = fingerprint(arguments, info)
        self.shard = shards.Shard(os.environ.get("SHARD") or "1/1", folder, self.code, name=results.NAME)
        self.shard.note({"machine": info, "at": round(time.time(), 3)})

    def go(self, clock: shards.Clock, monitor: Monitor) -> int:
        """Run what has not been run yet; returns how many races are left."""
        chosen = self.shard.choose(list(self.races))
        for number, name in enumerate(chosen, start=1):
            if clock.is_over():
                left = len(chosen) - number + 1
                print(f"gpu-bench: the time is over with {left} races left; run again to go on")
                return left
            line = self.run(self.races[name], monitor)
            print(f"{number:3}/{len(chosen)} {line}", flush=True)
            write(self.folder, self.order, self.code)
        return 0

    def run(self, race: Race, monitor: Monitor) -> str:
        """Measure a case and record what became of it; returns a line that tells it."""
        started = time.monotonic()
        self.shard.start(race.name, SECONDS_PER_CASE[race.stage])
        try:
            row = measure(race.case, race.stage, passes(self.arguments), self.device, self.arguments.budget, monitor)
        except Exception as error:  # noqa: BLE001 (one case must not cost the others)
            lost = device_is_lost(error)
            outcome = shards.CRASHED if lost else shards.FAILED
            self.shard.record(race.name, outcome, time.monotonic() - started, text=reason(error))
            if lost:
                self.leave(race, error, monitor)
            line = f"{race.name}: FAILED: {reason(error)}"
        else:
            self.shard.record(race.name, shards.PASSED, time.monotonic() - started, row=row)
            line = gpu_report.one_line(row) + (", FlexAttention" if race.stage == 2 else "")
        if self.device == "cuda":
            gc.collect()
            torch.cuda.empty_cache()
        return line

    def leave(self, race: Race, error: Exception, monitor: Monitor) -> None:
        """End the process at once, as an orderly end would wait for the device; supervise.py starts another."""
        print(f"gpu-bench: {race.name} has crashed the device: {reason(error)}; run again to go on", file=sys.stderr)
        monitor.stop()
        write(self.folder, self.order, self.code)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(shards.DEVICE_LOST)


def write(folder: Path, order: list[str], code: str = "") -> results.Results | None:
    """The JSON file and the table of what all shards have left; None if that is nothing."""
    found = results.collect(folder, order, code)
    if found is None or not (found.rows or found.failed):
        return None
    content = {"machine": found.machine, "rows": found.rows, "failed": found.failed, "left": found.left}
    (folder / "gpu.json").write_text(json.dumps(content, indent=1) + "\n")
    (folder / "gpu.md").write_text(gpu_report.markdown(found))
    return found


def merge(folder: Path, order: list[str], code: str = "") -> int:
    """Table, figures and a summary; exit status 1 if something is wrong, or there is nothing."""
    found = write(folder, order, code)
    if found is None:
        print(f"gpu-bench: no results in {folder}", file=sys.stderr)
        return 1
    written = ["gpu.json", "gpu.md", *gpu_figures.draw(folder, found.machine, found.rows)]
    print(f"wrote {', '.join(written)} to {folder}\n{gpu_report.summary(found.rows)}")
    problems = [problem for row in found.rows for problem in row["problems"]]
    problems += [f"failed: {name}: {why}" for name, why in found.failed.items()]
    for problem in problems:
        print(problem, file=sys.stderr)
    return int(bool(problems))


def machine(device: str) -> dict[str, Any]:
    """Everything about where and what this is."""
    info = {**describe(device), **device_state(device), "kernels": gpu.kernels(device)}
    return {**info, "commit": os.environ.get("COMMIT") or info["commit"]}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and merge."""
    arguments = parse_arguments(argv)
    warnings.filterwarnings("ignore", category=UserWarning, module="torch")
    races = all_races(arguments.device)
    chosen = wanted(races, arguments)
    if arguments.list or not chosen:
        print("\n".join(race.name for race in chosen) or f"no case matches {arguments.only!r}; --list shows all")
        return 0 if chosen else 2
    # Compiled backward passes free what they were given; ours is run again and again on the same forward pass.
    torch._functorch.config.donated_buffer = False
    info = machine(arguments.device)
    folder = Path(os.environ.get("RESULTS") or BENCHMARKS / "results" / machine_name(info))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        if arguments.merge:
            return merge(folder, [race.name for race in races])
        results.refuse_mixture(folder, info["processor"])
        run = Run(arguments, folder, info)
    except ValueError as error:
        sys.exit(f"gpu-bench: {error}")
    print(gpu_report.heading(info))
    with Monitor(arguments.device) as monitor:
        left = run.go(shards.Clock(float(os.environ.get("LIMIT") or 330)), monitor)
    return merge(folder, run.order, run.code) or int(left > 0)


if __name__ == "__main__":
    sys.exit(main())
