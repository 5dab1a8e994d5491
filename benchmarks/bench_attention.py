"""Speed of attention beside every way torch has of computing the same thing, all timed by turns in one process.

    python benchmarks/bench_attention.py                        # everything, about 15 minutes on a CPU
    python benchmarks/bench_attention.py --only "window|varlen" # cases whose name matches a regular expression
    python benchmarks/bench_attention.py --list                 # the names

A ratio is torch's time / our time, the median over rounds: above 1 we are quicker. Results go to results/<machine>/.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
import warnings

import torch

from harness.cases import Case, all_cases, quick_cases
from harness.dense import dense_implementations
from harness.implementation import OURS, Implementation, disagreement, works
from harness.machine import add_common_arguments, describe, heading, results_folder, save
from harness.report import Row, one_line, table
from harness.targets import check_targets, targets_table
from harness.timing import Provider, time_interleaved
from harness.varlen import varlen_implementations


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_arguments(parser)
    parser.add_argument("--only", metavar="REGEX", help="measure only the cases whose name matches")
    parser.add_argument("--budget", type=float, default=None, help="seconds per case (4; with --quick 0.1)")
    parser.add_argument("--list", action="store_true", help="print the names of the cases and stop")
    return parser.parse_args()


def implementations(case: Case, device: str) -> list[Implementation]:
    """Ours first, then all peers that can compute `case` here."""
    make = varlen_implementations if case.seqlens else dense_implementations
    ours, *peers = make(case, device)
    return [ours, *(peer for peer in peers if works(peer))]


def measure(case: Case, device: str, budget: float) -> tuple[Row, list[str]]:
    """One row, and a sentence for every peer whose output differs from ours."""
    torch.manual_seed(0)
    ours, *peers = implementations(case, device)
    problems = list(filter(None, (disagreement(case, ours, peer) for peer in peers)))
    providers = {each.name: Provider(each.run, each.context) for each in (ours, *peers)}
    rounds = time_interleaved(providers, device, budget)
    milliseconds = {name: 1e3 * provider.median() for name, provider in providers.items()}
    reference = providers.pop(OURS)
    ratios = {name: provider.ratio_to(reference) for name, provider in providers.items()}
    return Row(case, rounds, milliseconds, ratios), problems


def main() -> int:
    """Measure, print, check the targets, save."""
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    warnings.filterwarnings("ignore", category=UserWarning, module="torch")
    cases = quick_cases() if arguments.quick else all_cases()
    cases = [case for case in cases if re.search(arguments.only or "", case.name)]
    if arguments.list or not cases:
        print("\n".join(case.name for case in cases) or f"no case matches {arguments.only!r}; --list shows all")
        return 0 if cases else 2

    started = time.perf_counter()
    info = describe(arguments.device)
    print(heading("Attention beside torch", info))
    budget = arguments.budget if arguments.budget is not None else (0.1 if arguments.quick else 4.0)
    rows, problems = [], []
    for number, case in enumerate(cases, start=1):
        row, found = measure(case, arguments.device, budget)
        rows.append(row)
        problems += found
        print(f"{number:3}/{len(cases)} {one_line(row)}", flush=True)

    outcomes = check_targets(rows, info["instruction_set"]) if arguments.device == "cpu" else []
    summary = "## Targets\n\n" + targets_table(outcomes) + "\n\n" if outcomes else ""
    print(f"\n{summary}{time.perf_counter() - started:.0f} s")
    content = {
        "machine": info,
        "targets": [outcome.as_json() for outcome in outcomes],
        "rows": [row.as_json() for row in rows],
    }
    markdown = heading("Attention beside torch", info) + "\n" + summary + table(rows)
    save(results_folder(arguments, info), "attention", content, markdown)
    for problem in problems:
        print(problem, file=sys.stderr)
    missed = any(outcome.verdict == "missed" for outcome in outcomes)
    return 1 if problems or (arguments.check and missed) else 0


if __name__ == "__main__":
    sys.exit(main())
