"""Which tests a run is for, and what became of them, kept so that the next run goes on where this one ended.

A run may be one of several at a time, each with its share of the tests, and may be watched by supervise.py.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# Set by supervise.py: the number of an open pipe, and whether a test has taken an earlier process of this run down.
PIPE_VARIABLE = "FLASH_ATTN_SUPERVISOR"
RESTART_VARIABLE = "FLASH_ATTN_RESTARTED"
# Of a process that records a test as crashed and ends itself, since the device is of no more use to it.
DEVICE_LOST = 70

PASSED, FAILED, SKIPPED, HUNG, CRASHED = "passed", "failed", "skipped", "hung", "crashed"
OUTCOMES = (PASSED, FAILED, HUNG, CRASHED, SKIPPED)

Line = dict[str, Any]


def parse_shard(text: str) -> tuple[int, int]:
    """(i, n) of "i/n"."""
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count)):
        raise ValueError(f"SHARD={text}: expected i/n with i from 1 to n, such as 1/3")
    return int(index), int(count)


def append(path: Path, line: Line) -> None:
    """Add a line of JSON to a file."""
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


def read_lines(path: Path) -> list[Line]:
    """The lines of JSON in a file. A run that was killed may have left half of one."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def lines_of(path: Path, fingerprint: str) -> list[Line]:
    """The lines that runs of this code have left in a file."""
    first, *lines = read_lines(path) or [{}]
    return lines if first.get("fingerprint") == fingerprint else []


def results(folder: Path, name: str, fingerprint: str) -> dict[str, Line]:
    """The last line about each test, of all shards."""
    files = folder.glob(f"{name}-*-of-*.jsonl")
    lines = [line for path in files for line in lines_of(path, fingerprint) if "test" in line]
    return {line["test"]: line for line in sorted(lines, key=lambda line: line["at"])}


def result(test: str, outcome: str, seconds: float) -> Line:
    """What became of a test, just now."""
    return {"test": test, "outcome": outcome, "seconds": round(seconds, 3), "at": round(time.time(), 3)}


class Shard:
    """One of the parts of the tests, and the file of its results: a line of JSON per test.

    What other runs of the same code have left in the folder, divided otherwise perhaps, counts as well.
    """

    def __init__(self, text: str, folder: Path, fingerprint: str, name: str = "gpu-test"):
        self.index, self.count = parse_shard(text)
        self.fingerprint = fingerprint
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"{name}-{self.index}-of-{self.count}.jsonl"
        self._pipe = os.environ.get(PIPE_VARIABLE)
        self.outcomes = {test: line["outcome"] for test, line in results(folder, name, fingerprint).items()}
        own = lines_of(self.path, fingerprint)
        whole = self.path.with_suffix(".new")  # first, so that no moment is without the results
        whole.write_text("".join(json.dumps(line) + "\n" for line in [{"fingerprint": fingerprint}, *own]))
        whole.replace(self.path)
        self._tell({"file": str(self.path)})

    def choose(self, names: Sequence[str]) -> list[str]:
        """The tests of this shard that are not done. Every n-th, so that all shards take about as long.

        What has failed is done only if this process takes the place of another. What has hung or crashed is done until
        the code changes: it would take this process down as well.
        """
        done = {PASSED, SKIPPED, HUNG, CRASHED} | ({FAILED} if os.environ.get(RESTART_VARIABLE) else set())
        own = names[self.index - 1 :: self.count]
        return [name for name in own if self.outcomes.get(name) not in done]

    def start(self, name: str, limit: float = 60) -> None:
        """Say that a test begins, and after how many seconds it counts as hung."""
        self.note({"started": name, "limit": limit})

    def record(self, name: str, outcome: str, seconds: float, **more: object) -> None:
        """Add what became of a test to the file."""
        self.outcomes[name] = outcome
        self.note({**result(name, outcome, seconds), **more})

    def note(self, line: Line) -> None:
        """Add a line to the file, and tell who watches."""
        append(self.path, line)
        self._tell({key: line[key] for key in ("started", "limit", "test") if key in line})

    def _tell(self, line: Line) -> None:
        if self._pipe and line:
            os.write(int(self._pipe), (json.dumps(line) + "\n").encode())

    def count_of(self, outcome: str) -> int:
        """How many tests ended so, in all runs together."""
        return sum(each == outcome for each in self.outcomes.values())


def fingerprint_of(paths: Iterable[Path], *more: str) -> str:
    """Changes when one of the files does."""
    digest = hashlib.sha256("\n".join(more).encode())
    for path in sorted(paths):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def code_fingerprint(*more: str, paths: Iterable[Path] = ()) -> str:
    """Changes when the code does that is under test, or another of the paths.

    Of the sources: no two compilations give the same binary.
    """
    kernels = [path for path in (ROOT / "csrc").rglob("*") if path.is_file()]
    rest = [*ROOT.glob("build_tools/cuda_*.py"), *(ROOT / "flash_attn").rglob("*.py"), ROOT / "setup.py"]
    backend = os.environ.get("FLASH_ATTN_BACKEND", "")
    return fingerprint_of([*kernels, *rest, *paths], backend, *more)


class Clock:
    """Whether there is time for another test."""

    def __init__(self, limit: float):
        self.end = time.monotonic() + limit

    def left(self) -> float:
        """Seconds, negative when it is over."""
        return self.end - time.monotonic()

    def is_over(self) -> bool:
        """Nothing more should be started."""
        return self.left() < 0
