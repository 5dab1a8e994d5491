"""What is known of every job so far, kept in a JSON file, so that the next run goes on where this one ended."""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from harness.machine import BENCHMARKS
from harness.measure import Row

ROOT = BENCHMARKS.parent
# The files of what is measured: the first pattern is the name of the table.
FILES = {"attention": ("attention", "speedups", "throughput-*"), "decode": ("decode",)}
# What decides what is measured; the rest of the harness may change without making results worthless.
MEASURING = (
    "cases", "compare", "decode", "decode_providers", "measure", "ours", "provider", "sdpa", "timing", "torch_others",
)  # fmt: skip
SHOWN = ("machine", "code", "left", "running", "failed", "crashed", "rows")  # in the file


def fingerprint(settings: Iterable[str], builds: Iterable[Path] = ()) -> str:
    """Changes with everything that results depend on. By sources: no two compilations give the same binary."""
    digest = hashlib.sha256("\n".join([os.environ.get("FLASH_ATTN_BACKEND", ""), *settings]).encode())
    sources = [*(ROOT / "csrc").rglob("*.*"), *(ROOT / "flash_attn").rglob("*.py")]
    sources += [ROOT / "setup.py", *(ROOT / "build_tools").glob("*.py")]
    harness = [BENCHMARKS / "harness" / f"{name}.py" for name in MEASURING]
    for path in sorted([*sources, *harness, *builds]):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


class Results:
    """Of one state of the code on one machine: a row per job, or why there is none."""

    def __init__(
        self,
        folder: Path,
        machine: dict[str, Any],
        code: str,
        jobs: Sequence[str],
        quick: bool = False,
        name: str = "attention",
    ):
        self.folder, self.machine, self.code, self.jobs, self.quick = folder, machine, code, list(jobs), quick
        self.name = name
        self.rows: dict[str, Row] = {}
        self.failed: dict[str, str] = {}  # tried again by the next run
        self.crashed: dict[str, str] = {}  # took the process down; not tried again until the code changes
        self.running = ""
        folder.mkdir(parents=True, exist_ok=True)
        self._read()

    @property
    def left(self) -> int:
        """How many jobs nothing is known of."""
        return sum(job not in {**self.rows, **self.failed, **self.crashed} for job in self.jobs)

    @property
    def prefix(self) -> str:
        """Of the names of files: partial results never overwrite complete ones."""
        return "quick-" if self.quick else "" if all(job in self.rows for job in self.jobs) else "partial-"

    @property
    def stem(self) -> str:
        """The name of the files without a suffix."""
        return self.prefix + self.name

    def todo(self, jobs: Iterable[str]) -> list[str]:
        """Those of the jobs that are not done."""
        return [job for job in jobs if job not in self.rows and job not in self.crashed]

    def _read(self) -> None:
        """What earlier runs have left. ValueError if it is from another processor."""
        for stem in [f"quick-{self.name}"] if self.quick else [f"partial-{self.name}", self.name]:
            path = self.folder / f"{stem}.json"
            if not path.exists() or self.rows or self.crashed:
                continue
            found = json.loads(path.read_text())
            theirs, ours = found["machine"]["processor"], self.machine["processor"]
            if theirs != ours:
                raise ValueError(
                    f"results of {theirs} and of {ours} would mix in {self.folder}; choose another folder by RESULTS"
                )
            if found.get("code") == self.code:
                self.rows, self.failed, self.crashed = (found[name] for name in ("rows", "failed", "crashed"))
                if found["running"]:
                    self.crashed[found["running"]] = "the process ended during it"
            elif stem.startswith("partial"):
                path.replace(path.with_stem(f"replaced-{found['code']}"))

    def save(self) -> None:
        """Write the JSON file. What is no longer partial leaves no partial file."""
        content = {name: getattr(self, name) for name in SHOWN}
        path = self.folder / f"{self.stem}.json"
        path.with_suffix(".new").write_text(json.dumps(content, indent=1) + "\n")
        path.with_suffix(".new").replace(path)  # no moment is without the results
        if not self.prefix:
            for pattern in FILES[self.name]:
                for left_over in self.folder.glob(f"partial-{pattern}.*"):
                    left_over.unlink()

    def joined(self) -> list[Row]:
        """A row per case, in the order of the jobs: that of the first stage with the peers of the second."""
        rows: dict[str, Row] = {}
        for job in self.jobs:
            if job in self.rows:
                row = self.rows[job]
                rows[row["name"]] = join(rows[row["name"]], row) if row["name"] in rows else row
        return list(rows.values())


def join(row: Row, more: Row) -> Row:
    """A case in which further peers have been measured later, each beside ours. What both have is that of the first."""
    joined = copy.deepcopy(row)
    joined["absent"] |= more["absent"]
    joined["problems"] += more["problems"]
    for which, measured in more["passes"].items():
        into = joined["passes"].setdefault(which, measured)
        into["ratios"] = measured["ratios"] | into["ratios"]
        into["milliseconds"] = measured["milliseconds"] | into["milliseconds"]
        into["host_timed"] |= measured["host_timed"]
    return joined
