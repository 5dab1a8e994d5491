"""The results that runs of the GPU benchmark have left in a folder, joined."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from build_tools import shards

NAME = "gpu-bench"  # of the files
Row = dict[str, Any]


@dataclass
class Results:
    """Of one state of the code, on one kind of processor."""

    machine: dict[str, Any]
    rows: list[Row]  # in the order of `order`
    failed: dict[str, str]  # why
    left: int  # names of `order` that nothing is known of


def processors(folder: Path) -> list[str]:
    """The models that results in the folder are from."""
    lines = [line for path in sorted(folder.glob(f"{NAME}-*.jsonl")) for line in shards.read_lines(path)]
    return list(dict.fromkeys(line["machine"]["processor"] for line in lines if "machine" in line))


def refuse_mixture(folder: Path, here: str = "") -> None:
    """A ValueError if results in the folder, and those to come from here, are not all from the same model."""
    found = list(dict.fromkeys([*processors(folder), *filter(None, [here])]))
    if len(found) > 1:
        raise ValueError(f"results of {' and of '.join(found)} would mix in {folder}; choose another folder by RESULTS")


def _notes(folder: Path) -> list[dict[str, Any]]:
    """What runs have said about themselves, the latest last; each with its fingerprint."""
    notes = []
    for path in folder.glob(f"{NAME}-*.jsonl"):
        first, *lines = shards.read_lines(path) or [{}]
        notes += [{**line, "fingerprint": first.get("fingerprint")} for line in lines if "machine" in line]
    return sorted(notes, key=lambda note: note.get("at", 0))


def collect(folder: Path, order: list[str], fingerprint: str = "") -> Results | None:
    """All results of this code, or of the code that ran last; None if there are none.

    order: the names of all tests: the cases, and after them those of the second stage, which refine them.
    """
    refuse_mixture(folder)
    notes = _notes(folder)
    if not notes:
        return None
    fingerprint = fingerprint or notes[-1]["fingerprint"]
    machine = next((note["machine"] for note in reversed(notes) if note["fingerprint"] == fingerprint), None)
    if machine is None:
        return None
    found = shards.results(folder, NAME, fingerprint)
    names = [*(name for name in order if name in found), *(name for name in found if name not in order)]
    rows: dict[str, Row] = {}
    for name in names:
        if "row" in found[name]:
            row = found[name]["row"]
            rows[row["name"]] = join(rows[row["name"]], row) if row["name"] in rows else row
    failed = {name: str(line.get("text", line["outcome"])) for name in names if "row" not in (line := found[name])}
    return Results(machine, list(rows.values()), failed, sum(name not in found for name in order))


def join(row: Row, more: Row) -> Row:
    """A case in which further peers have been measured later, each in a race with ours."""
    joined = copy.deepcopy(row)
    joined["absent"] |= more["absent"]
    joined["problems"] += more["problems"]
    for which, measured in more["passes"].items():
        into = joined["passes"].setdefault(which, measured)
        into["ratios"] |= measured["ratios"]
        into["milliseconds"] |= {name: measured["milliseconds"][name] for name in measured["ratios"]}
        into["host_timed"] |= measured["host_timed"]
    return joined
