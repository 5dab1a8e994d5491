"""Which tests a run is for, and what became of them, kept so that the next run goes on where this one ended."""

import hashlib
import json
import time
from pathlib import Path


class Shard:
    """One of the parts of the tests, and the file of its results: a line of JSON per test."""

    def __init__(self, text: str, folder: Path, fingerprint: str, name: str = "gpu-test"):
        index, _, count = text.partition("/")
        if not (index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count)):
            raise ValueError(f"SHARD={text}: expected i/n with i from 1 to n, such as 1/3")
        self.index, self.count, self.fingerprint = int(index), int(count), fingerprint
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"{name}-{self.index}-of-{self.count}.jsonl"
        earlier = self._earlier()
        self.outcomes = {each["test"]: each["outcome"] for each in earlier if "test" in each}
        self.path.write_text("".join(json.dumps(line) + "\n" for line in [{"fingerprint": fingerprint}, *earlier]))

    def _earlier(self) -> list[dict]:
        """The lines that earlier runs of the same code have left, each whole."""
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        if not lines or json.loads(lines[0]).get("fingerprint") != self.fingerprint:
            return []
        # A run that was killed may have left half of a line.
        return [json.loads(line) for line in lines[1:] if line.endswith("}")]

    def choose(self, names: list[str]) -> list[str]:
        """The tests of this shard that have not passed yet. Every n-th, so that all shards take about as long."""
        own = names[self.index - 1 :: self.count]
        return [name for name in own if self.outcomes.get(name) not in ("passed", "skipped")]

    def record(self, name: str, outcome: str, seconds: float, **more: object) -> None:
        """Add what became of a test to the file."""
        self.outcomes[name] = outcome
        self.note({"test": name, "outcome": outcome, "seconds": round(seconds, 3), **more})

    def note(self, line: dict) -> None:
        """Add a line to the file."""
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def count_of(self, outcome: str) -> int:
        """How many tests ended so, in all runs together."""
        return sum(each == outcome for each in self.outcomes.values())


def fingerprint_of(paths: list[Path], *more: str) -> str:
    """Changes when one of the files does."""
    digest = hashlib.sha256("\n".join(more).encode())
    for path in sorted(paths):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


class Clock:
    """Whether there is time for another test."""

    def __init__(self, limit: float):
        self.end = time.monotonic() + limit

    def is_over(self) -> bool:
        """Nothing more should be started."""
        return time.monotonic() > self.end
