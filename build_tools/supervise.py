"""Runs tests on a GPU in processes that may hang or crash, and loses nothing but the test that did it.

    python -m build_tools.supervise gpu-test python3 -m pytest tests/gpu

A kernel that never ends, or an access that the GPU refuses, takes its process down: every later call fails. So this
process, which does not touch the GPU, starts the command, is told when each test begins and ends (shards.py), kills
what takes too long, and starts the command again, which then leaves that test out.

Environment: SHARD=i/n (1/1) as the command understands it; JOBS, how many processes share the tests (1), each with an
n-th of them and its output in a file beside the results; LIMIT, seconds after which no test is started (330).
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from build_tools import shards
from build_tools.shards import CRASHED, DEVICE_LOST, HUNG, Clock, Line

# Seconds for what comes before the first test and between two: importing torch, collecting, compiling nothing.
STARTING = 180.0
# A run in which this many tests take their process down has shown what there is to see.
RESTARTS = 12
POLL = 0.1


class Child:
    """One process of the command, and what it says of its tests."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], output: Path | None):
        self.lines, pipe = os.pipe()
        os.set_blocking(self.lines, False)
        self._output: IO[str] | None = output.open("a") if output else None
        self.process = subprocess.Popen(
            command,
            env={**environment, shards.PIPE_VARIABLE: str(pipe)},
            pass_fds=[pipe],
            start_new_session=True,
            stdout=self._output,
            stderr=subprocess.STDOUT if output else None,
        )
        os.close(pipe)
        self.file: Path | None = None
        self.test = ""  # that is running
        self._since, self._limit = time.monotonic(), STARTING
        self._rest = b""

    def listen(self) -> None:
        """Take in what the process has said."""
        with contextlib.suppress(BlockingIOError):
            while data := os.read(self.lines, 65536):
                self._rest += data
        *whole, self._rest = self._rest.split(b"\n")
        for line in whole:
            self._hear(json.loads(line))

    def _hear(self, line: Line) -> None:
        self._since, self._limit = time.monotonic(), float(line.get("limit", STARTING))
        if "file" in line:
            self.file = Path(line["file"])
        self.test = line.get("started", "")

    def is_stuck(self) -> bool:
        """It has taken longer than it should."""
        return time.monotonic() - self._since > self._limit

    def kill(self) -> None:
        """This process and all that it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def lose(self, outcome: str) -> None:
        """The test that was running ends so."""
        if self.file and self.test:
            with self.file.open("a") as file:
                file.write("\n")  # after the half of a line that it may have left
            shards.append(self.file, shards.result(self.test, outcome, time.monotonic() - self._since))
            print(f"supervise: {outcome}: {self.test}", flush=True)

    def close(self) -> None:
        """When it has ended."""
        os.close(self.lines)
        if self._output:
            self._output.close()


class Job:
    """A share of the tests: one child after another, until all of them are done."""

    def __init__(self, command: Sequence[str], shard: str, clock: Clock, output: Path | None):
        self.command, self.shard, self.clock, self.output = command, shard, clock, output
        self.restarts = 0
        self.status: int | None = None  # in the end
        self.child = self._start({})

    def _start(self, more: Mapping[str, str]) -> Child:
        environment = {**os.environ, "SHARD": self.shard, "LIMIT": f"{max(self.clock.left(), 0):.0f}", **more}
        return Child(self.command, environment, self.output)

    def poll(self) -> None:
        """Look after the child."""
        child = self.child
        child.listen()
        status = child.process.poll()
        stuck = status is None and child.is_stuck()
        if status is None and not stuck:
            return
        if stuck:
            child.kill()
        child.listen()
        lost_test, took_file = child.test, child.file
        if lost_test:
            child.lose(HUNG if stuck else CRASHED)
        child.close()
        go_on = took_file is not None and (lost_test or status == DEVICE_LOST)
        if not go_on:
            self.status = 1 if status is None else status
        elif self.restarts == RESTARTS or self.clock.is_over():
            self.status = 1
        else:
            self.restarts += 1
            self.child = self._start({shards.RESTART_VARIABLE: "1"})


def summary(name: str, file: Path) -> tuple[str, bool]:
    """How many tests ended how, and which did not pass; whether all that ran did. file: of one of the shards."""
    found = shards.results(file.parent, name, shards.read_lines(file)[0]["fingerprint"]).values()
    by_outcome = {outcome: [line for line in found if line["outcome"] == outcome] for outcome in shards.OUTCOMES}
    text = [f"{name}: " + ", ".join(f"{len(lines)} {outcome}" for outcome, lines in by_outcome.items())]
    bad = [line for outcome in (shards.FAILED, HUNG, CRASHED) for line in by_outcome[outcome]]
    for line in bad:
        reason = [part for part in str(line.get("text", "")).splitlines() if part.startswith("E ")]
        text.append(f"  {line['outcome']}: {line['test']}{': ' + reason[0][1:].strip()[:200] if reason else ''}")
    return "\n".join(text), not bad


def run(name: str, command: Sequence[str], jobs: int, shard: str, limit: float) -> int:
    """The command, in so many processes. Returns the exit status."""
    index, count = shards.parse_shard(shard)
    clock = Clock(limit)
    logs = Path(os.environ.get("RESULTS") or shards.ROOT / "build" / name)
    logs.mkdir(parents=True, exist_ok=True)
    # Every (n * jobs)-th test: together the jobs have every n-th.
    parts = [f"{index + count * job}/{count * jobs}" for job in range(jobs)]
    outputs = [logs / f"{name}-{part.replace('/', '-of-')}.log" if jobs > 1 else None for part in parts]
    everything = [Job(command, part, clock, output) for part, output in zip(parts, outputs, strict=True)]
    try:
        while running := [job for job in everything if job.status is None]:
            for job in running:
                job.poll()
            time.sleep(POLL)
    finally:
        for job in everything:
            if job.status is None:
                job.child.kill()
    files = [job.child.file for job in everything if job.child.file]
    passed = True
    if files:
        text, passed = summary(name, files[0])
        print(text, flush=True)
    else:
        for output in filter(None, outputs):
            print(output.read_text()[-2000:], file=sys.stderr)
    worst = max((abs(job.status or 0) for job in everything), default=0)
    return worst or int(not passed)


def main() -> int:
    """What the command line and the environment ask for."""
    name, *command = sys.argv[1:]

    def stop(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, stop)
    try:
        jobs = max(1, int(os.environ.get("JOBS") or 1))
        return run(name, command, jobs, os.environ.get("SHARD") or "1/1", float(os.environ.get("LIMIT") or 330))
    except ValueError as error:
        sys.exit(f"{name}: {error}")


if __name__ == "__main__":
    sys.exit(main())
