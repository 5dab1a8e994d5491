"""All that a GPU can tell about the kernels within LIMIT seconds (560), the most telling first: make gpu-first.

Every step is a process of its own and ends when its time is over: what hangs or crashes costs that step alone. What it
prints is in the folder RESULTS (build/gpu-first), in a file of its name; summary.txt there is a page about all of them.
START is when LIMIT began to count, in seconds since 1970. With --rehearse: what can be run without a GPU.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 560.0
QUERIES = "name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,memory.total,clocks_event_reasons.active"
SIM_GPU = os.environ.get("SIM_GPU", "90a")  # of the tests of single instructions
PRIMITIVES = ROOT / f"build/sim/device/test_primitives-{SIM_GPU}"
# Single instructions, in the order in which one builds on another.
GROUPS = ("memory", "warp", "numbers", "wgmma", "rows", "tiles", "sm90")
PASSED, FAILED, TIME_OVER, NO_TIME = "passed", "failed", "time over", "no time"


@dataclass(frozen=True)
class Step:
    """A command, and how many seconds of 560 it may take. One with all of them has not failed when they are over."""

    name: str
    command: Sequence[str]
    seconds: float
    reserve: float = 0.0  # of the seconds that are left, for the steps after it


def steps(device: str) -> list[Step]:
    """All of them, in their order."""
    pytest = [sys.executable, "-m", "pytest", "-q", f"--device={device}"]
    bench = [sys.executable, "benchmarks/bench.py", "--device", device, "--stage"]
    facts = Step("facts", [sys.executable, "-m", "tools.gpu_facts"], 20)
    tests = ["make", "--no-print-directory", "gpu-test", f"PYTHON={sys.executable}", "PREBUILT=1"]
    benches = [Step("bench-stage-1", [*bench, "1"], 90), Step("bench-stage-2", [*bench, "2"], 60)]
    if device == "cpu":
        first = Step("first-cases", [*pytest, "tests/attention/test_first.py"], 60)
        return [facts, first, benches[0], Step("tests", [*pytest, "tests/attention"], 560)]
    compile_primitives = ["make", "-s", "-f", "simulator/Makefile", "primitives-device", f"SIM_GPU={SIM_GPU}"]
    return [
        Step("driver", ["nvidia-smi", f"--query-gpu={QUERIES}", "--format=csv"], 10),
        facts,
        *([] if PRIMITIVES.exists() else [Step("compile-primitives", compile_primitives, 60)]),
        *(Step(f"primitives-{group}", [str(PRIMITIVES), group], 12) for group in GROUPS),
        Step("first-cases", [*tests, "ARGS=tests/attention/test_first.py"], 60),
        *benches,
        Step("tests", [*tests, "ARGS=-m 'not sanitizer'"], 560, reserve=60),
        Step("sanitizer", [*tests, "ARGS=-m sanitizer"], 60),
    ]


def run(step: Step, log: Path, seconds: float) -> str:
    """What becomes of a step. When its time is over, all that it has started is interrupted, and then killed."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    environment |= {"LIMIT": str(max(int(seconds) - 8, 1)), "RESULTS": str(log.parent)}  # for the steps that read them
    environment.pop("MAKEFLAGS", None)  # in which make hands on the LIMIT of all steps
    with log.open("w") as output:
        try:
            process = subprocess.Popen(
                step.command, env=environment, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
        except OSError as error:
            output.write(f"{error}\n")
            return FAILED
        try:
            return PASSED if process.wait(timeout=seconds) == 0 else FAILED
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGINT)  # pytest then says how far it has come
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=3)
            return TIME_OVER
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def run_all(chosen: Sequence[Step], folder: Path, end: float, scale: float) -> bool:
    """Every step, and the summary after each; whether none has failed. scale: of the seconds of all steps."""
    pages, all_well = [], True
    for step in chosen:
        log, started = folder / f"{step.name}.log", time.time()
        seconds = min(step.seconds * scale, end - started - step.reserve * scale)
        outcome = run(step, log, seconds) if seconds > 1 else NO_TIME
        lines = log.read_text(errors="replace").splitlines() if outcome != NO_TIME else []
        shown = [f"    {line[:160]}" for line in lines[-10:]]
        pages.append("\n".join([f"{step.name}: {outcome}, {time.time() - started:.0f} s", *shown]))
        (folder / "summary.txt").write_text("\n".join(pages) + "\n")
        print(pages[-1], flush=True)
        all_well &= outcome != FAILED and (outcome != TIME_OVER or step.seconds >= LIMIT)
    return all_well


def main() -> int:
    """Run all steps; the exit status is 1 if one has failed, or not ended in its time."""
    limit = float(os.environ.get("LIMIT") or LIMIT)
    end = float(os.environ.get("START") or time.time()) + limit
    folder = Path(os.environ.get("RESULTS") or ROOT / "build" / "gpu-first").resolve()
    folder.mkdir(parents=True, exist_ok=True)
    return int(not run_all(steps("cpu" if "--rehearse" in sys.argv else "cuda"), folder, end, limit / LIMIT))


if __name__ == "__main__":
    sys.exit(main())
