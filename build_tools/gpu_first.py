"""All that a GPU can tell about the kernels within LIMIT seconds (560), the most telling first: make gpu-first.

    python -m build_tools.gpu_first              # run all steps
    python -m build_tools.gpu_first --rehearse   # the same without a GPU, as far as that goes
    python -m build_tools.gpu_first --pack       # compile beforehand what nvcc compiles: build/gpu-first.tgz

Every step is a process of its own and ends when its time is over: what hangs or crashes costs that step alone. What it
printed, and what became of it, is in the folder RESULTS (build/gpu-first) at once, a page of it all in summary.txt.

Environment: LIMIT; START, when it began to count, in seconds since 1970 (now); JOBS, processes that share the tests.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from build_tools import cuda_objects, prebuilt, shards
from build_tools.cuda_objects import ROOT

LIMIT = 560.0
LARGEST_PACK = 40e6  # bytes
PRIMITIVES = ROOT / "build" / "sim" / "device" / "test_primitives-90a"
# Single instructions, in the order in which one builds on another.
GROUPS = ("memory", "warp", "numbers", "wgmma", "rows", "tiles", "sm90")
TELLING = {"cuda": r"dense bf16 (full|causal) b\d+ n(1024|4096|16384) h\d+ d(64|128|256)$", "cpu": "^dense bf16 "}
LINES_OF_A_STEP = 12  # in the summary

PASSED, FAILED, UNFINISHED, KILLED, NO_TIME = "passed", "failed", "time over", "killed", "no time"
# The exit status of tests that stop because their time is over: that of pytest where it is interrupted.
INTERRUPTED = 2


@dataclass(frozen=True)
class Step:
    """A command, how many seconds of 560 it may take, and which lines of what it prints are for the summary."""

    name: str
    command: Sequence[str]
    seconds: float
    shows: str = "."
    environment: Mapping[str, str] = field(default_factory=dict)
    reserve: float = 0.0  # of the seconds that are left, for the steps after it; only where it takes all others


def supervised(name: str, *command: str) -> list[str]:
    """A command of tests, in processes that may hang or crash."""
    return [sys.executable, "-m", "build_tools.supervise", name, sys.executable, *command]


def steps(folder: Path, device: str) -> list[Step]:
    """All of them, in their order."""
    jobs = os.environ.get("JOBS") or str(min(os.cpu_count() or 1, 15))
    tests = {"RESULTS": str(folder / "tests"), "JOBS": jobs, "FLASH_ATTN_TEST_DEVICE": device}
    results = {"RESULTS": str(folder / "bench")}
    pytest = ("-m", "pytest", "-q", "tests/gpu")
    bench = [sys.executable, "benchmarks/bench.py", f"--device={device}", f"--only={TELLING[device]}"]
    if device == "cpu":
        bench.append("--quick")
    rest = "not sanitizer and not primitives"
    counts = r"^gpu-test: |^  (failed|hung|crashed): "
    # Ratios, and what is slower than a peer.
    ratios = r"^- |^bench: |FAILED"
    return [
        Step("device", [sys.executable, "-m", "build_tools.gpu_facts"], 20),
        *(Step(f"primitives {group}", [str(PRIMITIVES), group], 12, r"^(?!ok)") for group in GROUPS),
        Step("first cases", supervised("gpu-test", *pytest, "-k", "test_first"), 60, counts, tests),
        Step("sweep", [*bench, "--stage=1"], 90, ratios, results),
        Step("FlexAttention", [*bench, "--stage=2"], 60, ratios, results),
        Step("all cases", supervised("gpu-test", *pytest, "-k", rest), 560, counts, tests, reserve=60),
        Step("sanitizers", supervised("gpu-test", *pytest, "-k", "sanitizer"), 60, counts, tests),
    ]


@dataclass(frozen=True)
class Outcome:
    """What became of a step."""

    step: Step
    outcome: str
    seconds: float
    text: str

    def page(self) -> str:
        """Its part of the summary."""
        lines = [line.rstrip() for line in self.text.splitlines() if re.search(self.step.shows, line)]
        shown = [f"    {line[:160]}" for line in lines[-LINES_OF_A_STEP:]]
        return "\n".join([f"{self.step.name}: {self.outcome}, {self.seconds:.0f} s", *shown])


def run(step: Step, folder: Path, seconds: float) -> Outcome:
    """A step, and the end of all that it has started when its time is over."""
    started = time.monotonic()
    path = folder / f"{step.name.replace(' ', '-')}.txt"
    # Those that divide their time themselves stop a little earlier, and say what is left.
    environment = {**os.environ, **step.environment, "LIMIT": f"{max(seconds - 8, 1):.0f}", "PYTHONUNBUFFERED": "1"}
    with path.open("w") as output:
        try:
            process = subprocess.Popen(
                step.command, env=environment, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
        except OSError as error:
            return Outcome(step, FAILED, 0.0, str(error))
        try:
            status = process.wait(timeout=seconds)
            is_over = status == INTERRUPTED and "pytest" in step.command
            outcome = PASSED if status == 0 else UNFINISHED if is_over else FAILED
        except subprocess.TimeoutExpired:
            outcome = KILLED
        # supervise.py has children in sessions of their own, which it ends when it is asked to.
        process.terminate()
        try:
            process.wait(timeout=2)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return Outcome(step, outcome, time.monotonic() - started, path.read_text(errors="replace"))


def run_all(folder: Path, device: str, end: float, scale: float) -> list[Outcome]:
    """Every step, and what is known after each. scale: of the seconds of all steps."""
    outcomes = []
    for step in steps(folder, device):
        left = end - time.time()
        seconds = min(step.seconds * scale, left - step.reserve * scale)
        done = run(step, folder, seconds) if seconds > 1 else Outcome(step, NO_TIME, 0.0, "")
        outcomes.append(done)
        line = {"step": step.name, "outcome": done.outcome, "seconds": round(done.seconds, 1), "at": time.time()}
        shards.append(folder / "gpu-first.jsonl", line)
        (folder / "summary.txt").write_text("\n".join(each.page() for each in outcomes) + "\n")
        print(done.page(), flush=True)
    return outcomes


def primitives_facts() -> dict[str, str]:
    """What the tests of single instructions are compiled from."""
    nvcc = cuda_objects.nvcc_of(cuda_objects.cuda_home() or Path(cuda_objects.USUAL_HOME))
    folders = (ROOT / "csrc", ROOT / "simulator" / "primitives")
    return {**{each.name: prebuilt.fingerprint(each) for each in folders}, "nvcc": cuda_objects.cuda_version(nvcc)}


def compile_primitives() -> None:
    """The tests of single instructions, unless they are those of this code. Raises ToolError if that fails."""
    facts = primitives_facts()
    if not prebuilt.difference(PRIMITIVES.parent, facts, [PRIMITIVES]):
        return
    prebuilt.forget(PRIMITIVES.parent)
    PRIMITIVES.unlink(missing_ok=True)
    nvcc = cuda_objects.nvcc_of(cuda_objects.cuda_home() or Path(cuda_objects.USUAL_HOME))
    command = ["make", "-s", "-f", "simulator/Makefile", "SIM_GPU=90a", f"NVCC={nvcc}", "primitives-device"]
    if subprocess.run(command, cwd=ROOT, check=False).returncode != 0:
        raise cuda_objects.ToolError("compiling the tests of single instructions failed")
    prebuilt.note(PRIMITIVES.parent, facts)


def pack() -> int:
    """What takes nvcc long, in one file to be unpacked in the same place of another tree."""
    status = cuda_objects.main()
    compile_primitives()
    folders = (cuda_objects.FOLDER, PRIMITIVES.parent)
    files = [path for folder in folders for path in sorted(folder.glob("*")) if path.is_file()]
    packed = ROOT / "build" / "gpu-first.tgz"
    with tarfile.open(packed, "w:gz") as archive:
        for path in files:
            archive.add(path, path.relative_to(ROOT))
    size = packed.stat().st_size
    print(f"{packed}: {len(files)} files, {size / 1e6:.1f} MB")
    return status or int(size > LARGEST_PACK)


def main() -> int:
    """What the command line asks for; exit status 1 if a step has failed or had to be killed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rehearse", action="store_true", help="without a GPU: tests and benchmark on the CPU")
    parser.add_argument("--pack", action="store_true", help="compile beforehand, run nothing")
    arguments = parser.parse_args()
    limit = float(os.environ.get("LIMIT") or LIMIT)
    end = float(os.environ.get("START") or time.time()) + limit
    try:
        if arguments.pack:
            return pack()
        if not arguments.rehearse:
            compile_primitives()
    except cuda_objects.ToolError as error:
        print(f"gpu-first: {error}", flush=True)
    folder = Path(os.environ.get("RESULTS") or ROOT / "build" / "gpu-first").resolve()
    folder.mkdir(parents=True, exist_ok=True)
    device = "cpu" if arguments.rehearse else "cuda"
    outcomes = run_all(folder, device, end, limit / LIMIT)
    print(f"\nwrote {folder}/summary.txt, and what every step printed")
    return int(any(each.outcome in (FAILED, KILLED) for each in outcomes))


if __name__ == "__main__":
    sys.exit(main())
