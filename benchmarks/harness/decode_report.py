"""The results of `bench.py decode` as text: a line per case for the terminal, and Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from harness.cases import Case
from harness.decode import cache_bytes
from harness.decode_providers import READ
from harness.machine import heading
from harness.measure import Row
from harness.provider import OURS
from harness.report import best_peer, best_peers, incomplete, lists
from harness.results import Results

TITLE = "New queries against a cache"
EXPLANATION = """\
GB/s are the bytes of keys and values that have to be read, once for all heads of queries that share them, by the time
of ours. "of plain read" compares with a plain read of as many bytes, a sum, or on a GPU a copy that moves as many. A
ratio is a peer's time / ours, the median over rounds in which each was timed once: above 1 ours is quicker; under 1 in
bold. Every call finds its cache cold, but in `overhead`. `folded`: torch is given the heads that share one of keys as
queries of one head; `expanded`: it is given a larger cache, with a copy of the keys for every head.
"""


def _rates(row: Row) -> tuple[float, float]:
    """GB/s of keys and values, and ours as a part of the speed of a plain read."""
    case, measured = Case(**row["case"]), row["passes"]["forward"]
    return cache_bytes(case) / measured["milliseconds"][OURS] / 1e6, measured["ratios"][READ[case.device]]


def one_line(row: Row) -> str:
    """For the terminal, while the benchmark runs."""
    parts = [f"{row['name']:<48}"]
    for measured in row["passes"].values():
        rate, part = _rates(row)
        parts.append(f"{1e3 * measured['milliseconds'][OURS]:8.1f} us {rate:6.1f} GB/s {part:4.0%} of plain read")
        best = best_peer(measured)
        parts += (
            [f"{best[1]:.2f}x {best[0].removeprefix('torch ')}{'  UNDER 1' if best[1] < 1 else ''}"] if best else []
        )
    return " ".join(parts) + ("  DISAGREES" if row["problems"] else "")


def summary(rows: Sequence[Row]) -> str:
    """Geometric means by group and type, and what of all cases is under 1."""
    members: dict[tuple[str, str], list[Row]] = {}
    for row in (row for row in rows if row["passes"]):
        members.setdefault((row["case"]["group"], row["case"]["dtype"]), []).append(row)
    lines = ["Geometric means:\n"]
    for kind, group in members.items():
        ratios = [ratio for _, _, _, ratio in best_peers(group)]
        parts = [f"{statistics.geometric_mean(_rates(row)[1] for row in group):.0%} of plain read"]
        parts += [f"{statistics.geometric_mean(ratios):.2f} times the best of torch"] if ratios else []
        lines.append(f"- {' '.join(kind)}, {len(group)} cases: {', '.join(parts)}")
    slower = [f"- {row['name']}: {ratio:.3f} of {peer}" for row, _, peer, ratio in best_peers(rows) if ratio < 1]
    return "\n".join([*lines, "", f"Under 1, of all cases: {len(slower)}", *([""] if slower else []), *slower])


def _table_row(row: Row) -> str:
    measured, best = row["passes"]["forward"], best_peer(row["passes"]["forward"])
    microseconds, (rate, part) = 1e3 * measured["milliseconds"][OURS], _rates(row)
    shown = {READ[row["case"]["device"]], best[0] if best else ""}

    def label(name: str) -> str:
        return name.removeprefix("torch ") + ("\\*" if name in measured["host_timed"] else "")

    cells = [
        row["name"].removeprefix(row["case"]["group"]).strip(),
        f"{microseconds:{',.0f' if microseconds >= 1e3 else '.1f'}}{label(OURS).removeprefix(OURS)}",
        f"{rate:.3g}",
        f"{part:.0%}",
        label(best[0]) if best else "none can",
        "" if best is None else f"**{best[1]:.3f}**" if best[1] < 1 else f"{best[1]:.3f}",
        ", ".join(f"{label(name)} {ratio:.2f}" for name, ratio in measured["ratios"].items() if name not in shown),
    ]
    return "| " + " | ".join(cells) + " |"


def markdown(results: Results) -> str:
    """All of it: one section per group, one line per case."""
    rows = results.joined()
    text = [heading(TITLE, results.machine), *incomplete(results), EXPLANATION, f"{summary(rows)}\n"]
    for group in dict.fromkeys(row["case"]["group"] for row in rows):
        text.append(f"## {group}\n")
        text.append("| case | ours, µs | GB/s | of plain read | best of torch | ratio | others |")
        text.append("|---|---:|---:|---:|---|---:|---|")
        text += [_table_row(row) for row in rows if row["passes"] and row["case"]["group"] == group]
        text.append("")
    return "\n".join([*text, *lists(results)])


def closing(rows: Sequence[Row], machine: dict[str, Any]) -> str:
    """For the terminal, at the end."""
    return summary(rows)
