"""The results as text: a line per case for the terminal, and Markdown."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from harness.cases import SWEEP
from harness.machine import heading
from harness.measure import Row
from harness.provider import OURS
from harness.published import published_table
from harness.results import Results
from harness.targets import targets_table

TITLE = "Attention beside torch"
SHOWN_CASES = 4  # of those that share a reason
EXPLANATION = """\
TFLOP/s count the products that the mask leaves. A ratio is a peer's time / ours, the median over rounds in which each
was timed once: above 1 ours is quicker; under 1 in bold. Clocks and power are those while it was timed.
"""


def best_peer(measured: Row) -> tuple[str, float] | None:
    """The peer that comes closest or beats us by most, and its time / ours."""
    ratios = {name: ratio for name, ratio in measured["ratios"].items() if name.startswith("torch")}
    name = min(ratios, key=ratios.__getitem__, default=None)
    return None if name is None else (name, ratios[name])


def one_line(row: Row) -> str:
    """For the terminal, while the benchmark runs."""
    parts = []
    for which, measured in row["passes"].items():
        best = best_peer(measured)
        flag = "  UNDER 1" if best and best[1] < 1 else ""
        peer = f" {best[1]:.3f}x {best[0].removeprefix('torch ')}{flag}" if best else ""
        parts.append(f"{which} {measured['milliseconds'][OURS]:.4g} ms{peer}")
    return f"{row['name']:<40} {'; '.join(parts)}{'  DISAGREES' if row['problems'] else ''}"


def best_peers(rows: Iterable[Row]) -> list[tuple[Row, str, str, float]]:
    """Row, pass, the best peer of it, and its time / ours."""
    pairs = [(row, which, best_peer(measured)) for row in rows for which, measured in row["passes"].items()]
    return [(row, which, *best) for row, which, best in pairs if best is not None]


def summary(rows: Sequence[Row]) -> str:
    """Geometric means over the sweep, and what of all cases is under 1."""
    head_dims = ", ".join(map(str, SWEEP))
    lines = [f"Geometric means of the ratio to the best peer, over the sweep (dense, head_dim {head_dims}):\n"]
    sweep: dict[str, list[float]] = {}
    for row, which, _, ratio in best_peers(rows):
        if row["case"]["group"] == "dense" and row["case"]["head_dim"] in SWEEP:
            for pair in itertools.product((row["case"]["dtype"], "all"), (which, "all passes")):
                sweep.setdefault(", ".join(pair), []).append(ratio)
    for what, ratios in sorted(sweep.items()):
        mean, under = statistics.geometric_mean(ratios), sum(ratio < 1 for ratio in ratios)
        lines.append(f"- {what}: {mean:.3f} ({len(ratios)} ratios, {under} under 1)")
    slower = [f"- {row['name']} {which}: {x:.3f} of {peer}" for row, which, peer, x in best_peers(rows) if x < 1]
    return "\n".join([*lines, "", f"Under 1, of all cases: {len(slower)}", *([""] if slower else []), *slower])


def markdown(results: Results) -> str:
    """All of it: one section per group, one line per case and pass."""
    rows, machine = results.joined(), results.machine
    text = [heading(TITLE, machine), *incomplete(results), EXPLANATION, *targets_table(rows, machine)]
    text.append(f"{summary(rows)}\n")
    for group in dict.fromkeys(row["case"]["group"] for row in rows):
        members = [row for row in rows if row["case"]["group"] == group]
        text.append(f"## {group}\n")
        if any(measured["host_timed"] for row in members for measured in row["passes"].values()):
            text.append("Of calls marked \\* the host is timed as well: they could not be captured as CUDA graphs.\n")
        text.append("| case | pass | ours, ms | TFLOP/s | best of torch | ratio | others | SM MHz | W | held back by |")
        text.append("|---|---|---:|---:|---|---:|---|---:|---:|---|")
        text += [line for row in members for line in _table_rows(row)]
        text.append("")
    if machine["device"] == "cuda":
        text.append(published_table(rows, machine["processor"]))
    return "\n".join([*text, *lists(results)])


def incomplete(results: Results) -> list[str]:
    """A line that says so if cases are missing."""
    failed = len({**results.failed, **results.crashed})
    text = f"**Not complete: {results.left} cases not measured yet, {failed} failed.**\n"
    return [text] if results.left or failed else []


def closing(rows: Sequence[Row], machine: dict[str, Any]) -> str:
    """For the terminal, at the end."""
    return "\n".join([*targets_table(rows, machine), summary(rows)])


def _table_rows(row: Row) -> list[str]:
    """The lines of one case."""
    lines = []
    name = row["name"].removeprefix(row["case"]["group"]).strip()
    for which, measured in row["passes"].items():
        best = best_peer(measured)
        others = {peer: ratio for peer, ratio in measured["ratios"].items() if best and peer != best[0]}

        def label(peer: str, host_timed: dict[str, str] = measured["host_timed"]) -> str:
            return peer.removeprefix("torch ") + ("\\*" if peer in host_timed else "")

        cells = [
            name,
            which,
            f"{measured['milliseconds'][OURS]:.4g}{label(OURS).removeprefix(OURS)}",
            f"{measured['tflops']:.3g}",
            label(best[0]) if best else "none can",
            "" if best is None else f"**{best[1]:.3f}**" if best[1] < 1 else f"{best[1]:.3f}",
            ", ".join(f"{label(peer)} {value:.2f}" for peer, value in others.items()),
            *(f"{measured[key]:.0f}" if key in measured else "" for key in ("sm_clock_mhz", "power_w")),
            ", ".join(measured.get("throttles", [])),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def lists(results: Results) -> list[str]:
    """What did not work: results that differ, cases that failed, peers that are absent."""
    rows, failed = results.joined(), {**results.failed, **results.crashed}
    absent: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        for name, why in row["absent"].items():
            absent.setdefault((name, why), []).append(row["name"])

    def shown(names: Sequence[str]) -> str:
        more = f" and {len(names) - SHOWN_CASES} more" if len(names) > SHOWN_CASES else ""
        return "; ".join(names[:SHOWN_CASES]) + more

    sections = {
        "Results that differ": [f"- {problem}" for row in rows for problem in row["problems"]],
        "Cases that failed": [f"- {name}: {why}" for name, why in failed.items()],
        "Peers that are absent": [f"- {name}: {why} ({shown(cases)})" for (name, why), cases in absent.items()],
    }
    references = ", ".join(sorted({row["reference"] for row in rows if row["reference"]}))
    checked = f"Before the clock starts, all results are compared with those of one peer: {references}.\n"
    text = [checked] if references else []
    for title, lines in sections.items():
        if lines:
            text += [f"## {title}\n", *lines, ""]
    return text
