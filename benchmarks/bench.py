"""Attention beside every way torch has of computing the same thing, on a CPU or a GPU, timed by turns in one process.

    python benchmarks/bench.py                                # everything; run again, it goes on where it ended
    python benchmarks/bench.py --only 'window|varlen'         # cases whose name matches a regular expression
    python benchmarks/bench.py --quick                        # every kind of case, small, to see that all runs
    python benchmarks/bench.py --build before=path/to/_C_torch2_13.so   # beside another build of ours
    python benchmarks/bench.py decode                         # a few new queries against a cache
    python benchmarks/bench.py memory                         # peak memory against sequence length
    python benchmarks/bench.py overhead                       # what a tiny call costs
    python benchmarks/bench.py llama                          # a training step in transformers, which it needs

A ratio is a provider's time / ours, the median over rounds: above 1 ours is quicker. FlexAttention compiles for many
seconds per case, so it is measured in a second stage, again beside ours, when everything else is done.
Environment: RESULTS, a folder (benchmarks/results/<machine>); LIMIT, seconds after which no case is started (330 on a
GPU, 0 only reports); COMMIT, where there is no git.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from types import ModuleType

import torch
import torch._functorch.config

from harness import decode, decode_providers, decode_report, llama_step, memory, overhead, plots, report
from harness.cases import PASSES, Case, cases_for
from harness.failures import device_is_lost, reason, unavailable_reason
from harness.machine import describe, results_folder
from harness.measure import PROVIDERS, measure
from harness.monitor import Monitor
from harness.ours import other_build
from harness.provider import Problem, Provider, make_problem
from harness.results import Results, fingerprint
from harness.targets import missed

DEFAULT_PASSES = {"cpu": ("forward", "both"), "cuda": ("forward", "backward")}
QUICK_BUDGET = 0.02
LIMIT = 330.0
LONGEST = {1: 120.0, 2: 240.0}  # seconds after which a case on a GPU counts as hung; the second stage compiles
DEVICE_LOST = 70  # exit status


@dataclass(frozen=True)
class Suite:
    """Cases that are measured, kept and shown together."""

    cases_for: Callable[[str, bool], list[Case]]
    data: Callable[[Case], Problem]
    providers: Sequence[Provider]
    other_build: Callable[[str, Path], Provider]
    report: ModuleType
    budget: dict[str, float]  # seconds per case and pass


SUITES = {
    "attention": Suite(cases_for, make_problem, PROVIDERS, other_build, report, {"cpu": 4.0, "cuda": 0.3}),
    "decode": Suite(
        decode.cases_for,
        decode.make_problem,
        decode_providers.PROVIDERS,
        decode_providers.other_build,
        decode_report,
        {"cpu": 2.0, "cuda": 0.2},
    ),
}
OTHERS = {"memory": memory.main, "overhead": overhead.main, "llama": llama_step.main}


@dataclass(frozen=True)
class Job:
    """A case and whose turn it is: 1, everybody but FlexAttention; 2, FlexAttention."""

    case: Case
    stage: int

    @property
    def name(self) -> str:
        """What its results are filed under."""
        return self.case.name + (", flex" if self.stage == 2 else "")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=(*SUITES, *OTHERS), default="attention")
    default = "cpu" if unavailable_reason("cuda") else "cuda"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads for all providers")
    parser.add_argument("--quick", action="store_true", help="small and few, to see that everything runs")
    parser.add_argument("--check", action="store_true", help="exit with 1 when a target is missed")
    parser.add_argument("--budget", type=float, help="seconds per case and pass")
    parser.add_argument("--only", metavar="REGEX", default="", help="measure only the cases whose name matches")
    parser.add_argument("--list", action="store_true", help="print the names of the cases and stop")
    parser.add_argument("--again", action="store_true", help="measure anew what has been measured")
    parser.add_argument("--passes", type=_passes, help=f"some of {','.join(PASSES)}")
    parser.add_argument("--stage", type=int, choices=(1, 2), help="1: all but FlexAttention; 2: FlexAttention alone")
    parser.add_argument("--build", metavar="NAME=PATH", type=_build, action="append", default=[])
    return parser.parse_args(argv)


def _passes(text: str) -> tuple[str, ...]:
    found = tuple(text.split(","))
    if not set(found) <= set(PASSES):
        raise argparse.ArgumentTypeError(f"expected some of {','.join(PASSES)}, got {text}")
    return found


def _build(text: str) -> tuple[str, Path]:
    name, _, path = text.partition("=")
    if not (name.isidentifier() and Path(path).is_file()):
        raise argparse.ArgumentTypeError(f"expected NAME=PATH with the path of a library, got {text}")
    return name, Path(path).resolve()


def all_jobs(cases: Sequence[Case], providers: Sequence[Provider]) -> list[Job]:
    """In the order of their value."""
    second = [case for case in cases if any(each.stage == 2 and each.takes_part(case, 2) for each in providers)]
    return [*(Job(case, 1) for case in cases), *(Job(case, 2) for case in second)]


class Run:
    """One process: the jobs that are wanted, and the results."""

    def __init__(self, arguments: argparse.Namespace):
        self.arguments, device = arguments, arguments.device
        self.suite = suite = SUITES[arguments.what]
        self.providers = [*suite.providers, *(suite.other_build(name, path) for name, path in arguments.build)]
        jobs = all_jobs(suite.cases_for(device, arguments.quick), self.providers)
        self.jobs = {
            job.name: job
            for job in jobs
            if re.search(arguments.only, job.case.name) and arguments.stage in (None, job.stage)
        }
        self.order = [job.name for job in jobs]
        self.passes = arguments.passes or DEFAULT_PASSES[device]
        self.budget = arguments.budget or (QUICK_BUDGET if arguments.quick else suite.budget[device])

    def open_results(self) -> Results:
        """With what earlier runs of the same code have left. ValueError if that is of another processor."""
        info = describe(self.arguments.device)
        names, paths = zip(*self.arguments.build, strict=True) if self.arguments.build else ((), ())
        settings = [str(self.budget), *self.passes, *names, info["torch"], info["processor"]]
        code = fingerprint(settings, paths)
        return Results(results_folder(info), info, code, self.order, self.arguments.quick, self.arguments.what)

    def go(self, results: Results, monitor: Monitor) -> int:
        """Measure what has not been measured yet; returns how many jobs are left."""
        limit = os.environ.get("LIMIT") or (LIMIT if self.arguments.device == "cuda" else "inf")
        end = monotonic() + float(limit)
        todo = list(self.jobs) if self.arguments.again else results.todo(self.jobs)
        for number, name in enumerate(todo):
            if monotonic() > end:
                print(f"bench: the time is over with {len(todo) - number} cases left; run again to go on")
                return len(todo) - number
            print(f"{number + 1:3}/{len(todo)} {self.measure(self.jobs[name], results, monitor)}", flush=True)
        return 0

    def measure(self, job: Job, results: Results, monitor: Monitor) -> str:
        """Record what became of a case; returns a line that tells it."""
        for known in (results.rows, results.failed, results.crashed):
            known.pop(job.name, None)
        results.running = job.name
        results.save()
        on_gpu, lost = self.arguments.device == "cuda", False
        if on_gpu:
            faulthandler.dump_traceback_later(LONGEST[job.stage] + 20 * self.budget, exit=True)
        try:
            row = measure(job.case, job.stage, self.providers, self.passes, self.budget, monitor, self.suite.data)
            results.rows[job.name] = row
            line = self.suite.report.one_line(row) + (", FlexAttention" if job.stage == 2 else "")
        except Exception as error:  # noqa: BLE001 (one case must not cost the others)
            lost = device_is_lost(error)
            (results.crashed if lost else results.failed)[job.name] = reason(error)
            line = f"{job.name}: FAILED: {reason(error)}"
        finally:
            faulthandler.cancel_dump_traceback_later()
            results.running = ""
            self.write(results)
        if lost:  # an orderly end would wait for the device
            print(f"bench: the device is lost: {line}; run again to go on", file=sys.stderr, flush=True)
            os._exit(DEVICE_LOST)
        if on_gpu:
            gc.collect()
            torch.cuda.empty_cache()
        return line

    def write(self, results: Results) -> None:
        """The JSON file and the table."""
        results.save()
        (results.folder / f"{results.stem}.md").write_text(self.suite.report.markdown(results))


def in_turns(arguments: argparse.Namespace) -> int:
    """Measure, draw, tell; exit status 1 if something is wrong or left."""
    run = Run(arguments)
    if arguments.list or not run.jobs:
        print("\n".join(run.jobs) or f"no case matches {arguments.only!r}; --list shows all")
        return 0 if run.jobs else 2
    # Compiled backward passes free what they were given; ours is run again and again on the same forward pass.
    torch._functorch.config.donated_buffer = False
    try:
        results = run.open_results()
    except ValueError as error:
        sys.exit(f"bench: {error}")
    print(report.heading(run.suite.report.TITLE, results.machine))
    with Monitor(arguments.device) as monitor:
        left = run.go(results, monitor)
    run.write(results)
    rows, machine, is_attention = results.joined(), results.machine, arguments.what == "attention"
    figures = plots.draw(results.folder, results.prefix, machine, rows) if is_attention else []
    print(f"\n{run.suite.report.closing(rows, machine)}\n")
    print(f"wrote {', '.join([f'{results.stem}.json', f'{results.stem}.md', *figures])} to {results.folder}")
    problems = [problem for row in rows for problem in row["problems"]]
    problems += [f"failed: {name}: {why}" for name, why in {**results.failed, **results.crashed}.items()]
    for problem in problems:
        print(problem, file=sys.stderr)
    return int(bool(problems or left or (arguments.check and is_attention and missed(rows, machine))))


def main(argv: Sequence[str] | None = None) -> int:
    """What the command line asks for."""
    arguments = parse_arguments(argv)
    if not arguments.list and (why := unavailable_reason(arguments.device)):
        sys.exit(f"bench: {why}")
    torch.set_num_threads(arguments.threads)
    warnings.filterwarnings("ignore", category=UserWarning, module="torch")
    return OTHERS.get(arguments.what, in_turns)(arguments)


if __name__ == "__main__":
    sys.exit(main())
