"""Attention on a GPU beside every way torch has of computing the same thing, all timed by turns in one process.

    make gpu-bench                        # everything
    make gpu-bench SHARD=1/3              # every third case; run again, it goes on where it ended
    make gpu-bench ARGS='--merge'         # the shards' results as one table, with figures
    make gpu-bench ARGS='--only "causal.*d128"'

Forward, backward and both together are timed apart. Results go to benchmarks/results/<gpu>/, or to the folder RESULTS.
Environment: SHARD=i/n (1/1), LIMIT, seconds after which no case is started (330).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
import warnings
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent.parent))

from build_tools import preflight

if __name__ == "__main__" and "--device=cpu" not in sys.argv and preflight.trouble():
    sys.exit(f"gpu-bench: {preflight.trouble()}")

import torch
import torch._functorch.config

from build_tools.shards import Clock, Shard, fingerprint_of
from harness import gpu, gpu_report
from harness.cases import Case
from harness.dense import dense_implementations
from harness.implementation import OURS, Implementation, disagreement, works
from harness.machine import BENCHMARKS, describe, machine_name
from harness.timing import Contestant, race
from harness.varlen import varlen_implementations


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="REGEX", default="", help="measure only the cases whose name matches")
    parser.add_argument("--budget", type=float, default=1.0, help="seconds per case and pass")
    parser.add_argument("--merge", action="store_true", help="measure nothing; join the results of all shards")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a rehearsal with small cases")
    parser.add_argument("--list", action="store_true", help="print the names of the cases and stop")
    return parser.parse_args()


def peers_and_us(case: Case, device: str) -> list[Implementation]:
    """Ours first, then all peers that can compute the case here."""
    torch.compiler.reset()  # FlexAttention compiles for every case, and stops doing so after some
    ours, *peers = (varlen_implementations if case.seqlens else dense_implementations)(case, device)
    if case.seqlen_k > gpu.MATH_LIMIT:
        peers = [peer for peer in peers if "math" not in peer.name and "mask" not in peer.name]
    variants = [*([gpu.deterministic(ours)] if case.backward else []), *gpu.other_kernels(ours)]
    return [ours, *variants, *(peer for peer in peers if works(peer))]


def measure(case: Case, device: str, budget: float) -> dict[str, Any]:
    """One row of results: milliseconds and ratios of every pass, and clocks and power after each."""
    torch.manual_seed(0)
    implementations = peers_and_us(case, device)
    problems = list(filter(None, (disagreement(case, implementations[0], peer) for peer in implementations[1:])))
    row: dict[str, Any] = {"name": case.name, "case": vars(case), "problems": problems, "passes": {}}
    for which in gpu.passes_of(case):
        contestants = {each.name: Contestant(gpu.function_of(each, which), each.context) for each in implementations}
        rounds = race(contestants, device, budget)
        state = gpu.device_state(device, ("sm_clock_mhz", "power_w", "temperature_c"))
        milliseconds = {name: 1e3 * contestant.median() for name, contestant in contestants.items()}
        reference = contestants.pop(OURS)
        row["passes"][which] = {
            "rounds": rounds,
            "milliseconds": {name: float(f"{value:.5g}") for name, value in milliseconds.items()},
            "ratios": {name: round(each.ratio_to(reference), 3) for name, each in contestants.items()},
            "tflops": float(f"{gpu.flops(case, which) / milliseconds[OURS] / 1e9:.4g}"),
            **state,
        }
    return row


def shard_name() -> str:
    """Which part of the cases this run is for."""
    return os.environ.get("SHARD") or "1/1"


def run_shard(arguments: argparse.Namespace, cases: list[Case], folder: Path, info: dict[str, Any]) -> int:
    """Measure what this shard has not measured yet."""
    extension = list((BENCHMARKS.parent / "flash_attn").glob("_C*.so"))
    code = fingerprint_of(extension, str(arguments.budget), info["torch"], info["processor"])
    shard = Shard(shard_name(), folder, code, name="gpu-bench")
    clock = Clock(float(os.environ.get("LIMIT") or 330))
    by_name = {case.name: case for case in cases}
    chosen = shard.choose(list(by_name))
    shard.note({"machine": info})
    for number, name in enumerate(chosen, start=1):
        if clock.is_over():
            print(f"gpu-bench: the time is over with {len(chosen) - number + 1} cases left; run again to go on")
            return 1
        started = time.monotonic()
        row = measure(by_name[name], arguments.device, arguments.budget)
        shard.record(name, "passed", time.monotonic() - started, row=row)
        print(f"{number:3}/{len(chosen)} {gpu_report.one_line(row)}", flush=True)
        if arguments.device == "cuda":
            torch.cuda.empty_cache()
    return 0


def merge(folder: Path) -> int:
    """One JSON file, one table and the figures, from what all shards have left."""
    lines = [json.loads(line) for path in sorted(folder.glob("gpu-bench-*.jsonl")) for line in path.open()]
    machines = [line["machine"] for line in lines if "machine" in line]
    order = {case.name: number for number, case in enumerate(gpu.gpu_cases())}
    rows = {line["row"]["name"]: line["row"] for line in lines if "row" in line}
    if not rows:
        print(f"gpu-bench: no results in {folder}", file=sys.stderr)
        return 1
    ordered = sorted(rows.values(), key=lambda row: order.get(row["name"], len(order)))
    content = {"machine": machines[0], "rows": ordered}
    (folder / "gpu.json").write_text(json.dumps(content, indent=1) + "\n")
    (folder / "gpu.md").write_text(gpu_report.markdown(machines[0], ordered))
    written = ["gpu.json", "gpu.md", *gpu_report.draw(folder, machines[0], ordered)]
    print(f"wrote {', '.join(written)} to {folder}")
    print(gpu_report.summary(ordered))
    for row in ordered:
        for problem in row["problems"]:
            print(problem, file=sys.stderr)
    return int(any(row["problems"] for row in ordered))


def main() -> int:
    """Measure, or merge; a run of all cases in one shard merges by itself."""
    arguments = parse_arguments()
    warnings.filterwarnings("ignore", category=UserWarning, module="torch")
    cases = [case for case in gpu.gpu_cases() if re.search(arguments.only, case.name)]
    if arguments.list or not cases:
        print("\n".join(case.name for case in cases) or f"no case matches {arguments.only!r}; --list shows all")
        return 0 if cases else 2
    if arguments.device == "cpu":
        cases = list(dict.fromkeys(map(gpu.quick, cases)))
    # Compiled backward passes free what they were given; ours is run again and again on the same forward pass.
    torch._functorch.config.donated_buffer = False
    info = {**describe(arguments.device), **gpu.device_state(arguments.device)}
    folder = Path(os.environ.get("RESULTS") or BENCHMARKS / "results" / machine_name(info))
    folder.mkdir(parents=True, exist_ok=True)
    if not arguments.merge:
        print(gpu_report.heading(info))
        status = run_shard(arguments, cases, folder, info)
        if status or shard_name() != "1/1":
            return status
    return merge(folder)


if __name__ == "__main__":
    sys.exit(main())
