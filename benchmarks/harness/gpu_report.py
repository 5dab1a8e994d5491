"""The results of the GPU benchmark as text: a line per case for the terminal, and Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from harness.gpu import SWEEP
from harness.implementation import OURS, PASSES
from harness.published import published_table
from harness.results import Results, Row

SHOWN_CASES = 4  # of those that share a reason


def heading(machine: dict[str, Any]) -> str:
    """What was measured on what."""
    shown = {
        "driver": "driver {}",
        "cuda": "CUDA {}",
        "cudnn": "cuDNN {}",
        "power_limit_w": "power limit {:.0f} W",
        "sm_clock_max_mhz": "SM clock up to {:.0f} MHz",
        "memory_clock_mhz": "memory clock {:.0f} MHz",
    }
    parts = [text.format(machine[key]) for key, text in shown.items() if machine.get(key) is not None]
    versions = f"torch {machine['torch']}, flash-attn {machine['flash_attn']}, commit {machine['commit']}"
    return (
        f"# Attention on a GPU\n\n{', '.join([machine['processor'], *parts])}  \n"
        f"{versions}, {machine['date']}  \nOurs: {machine['kernels']}\n"
    )


def best_peer(measured: Row) -> tuple[str, float] | None:
    """The peer that comes closest or beats us by most, and its time / ours."""
    ratios = {name: ratio for name, ratio in measured["ratios"].items() if not name.startswith(OURS)}
    name = min(ratios, key=ratios.__getitem__, default=None)
    return None if name is None else (name, ratios[name])


def short_name(row: Row) -> str:
    """The case without what most cases share."""
    return str(row["name"]).removesuffix("fwd+bwd").removesuffix("fwd").strip()


def one_line(row: Row) -> str:
    """For the terminal, while the benchmark runs."""
    parts = []
    for which, measured in row["passes"].items():
        best = best_peer(measured)
        flag = "  UNDER 1" if best and best[1] < 1 else ""
        peer = f" {best[1]:.3f}x {best[0].removeprefix('torch ')}{flag}" if best else ""
        parts.append(f"{which} {measured['tflops']:.0f} TFLOP/s{peer}")
    return f"{short_name(row):<40} {'; '.join(parts)}{'  DISAGREES' if row['problems'] else ''}"


def sweep_ratios(rows: Iterable[Row], dtype: str | None = None, which: str | None = None) -> dict[str, float]:
    """Ratio to the best peer by case and pass, of the dense cases with the usual head_dims; of one dtype or pass."""
    return {
        f"{short_name(row)} {each}": best[1]
        for row in rows
        if row["case"]["group"] == "dense"
        and row["case"]["head_dim"] in SWEEP
        and dtype in (None, row["case"]["dtype"])
        for each, measured in row["passes"].items()
        if which in (None, each) and (best := best_peer(measured)) is not None
    }


def summary(rows: Sequence[Row]) -> str:
    """Geometric means over the sweep, and what of all cases is under 1."""
    head_dims = ", ".join(map(str, SWEEP))
    lines = [f"Geometric means of the ratio to the best peer, over the sweep (dense, head_dim {head_dims}):\n"]
    dtypes: list[str | None] = [*dict.fromkeys(row["case"]["dtype"] for row in rows if row["case"]["group"] == "dense")]
    for dtype in [*dtypes, None]:
        for which in (*PASSES, None):
            ratios = sweep_ratios(rows, dtype, which).values()
            if ratios:
                mean, under = statistics.geometric_mean(ratios), sum(ratio < 1 for ratio in ratios)
                what = f"{dtype or 'all'}, {which or 'all passes'}"
                lines.append(f"- {what}: {mean:.3f} ({len(ratios)} ratios, {under} under 1)")
    slower = [
        f"- {short_name(row)} {which}: {best[1]:.3f} of {best[0]}"
        for row in rows
        for which, measured in row["passes"].items()
        if (best := best_peer(measured)) is not None and best[1] < 1
    ]
    return "\n".join([*lines, "", f"Under 1, of all cases: {len(slower)}", *([""] if slower else []), *slower])


def markdown(results: Results) -> str:
    """All of it: one section per group, one line per case and pass."""
    rows = results.rows
    text = [heading(results.machine)]
    if results.left or results.failed:
        text.append(f"**Not complete: {results.left} races not run yet, {len(results.failed)} failed.**\n")
    text.append(
        "TFLOP/s count the products that the mask leaves. A ratio is a peer's time / ours, the median over rounds in "
        "which\neach was timed once: above 1 ours is quicker; under 1 in bold. Clocks and power are those during the "
        "race.\n"
    )
    text.append(f"{summary(rows)}\n")
    for group in dict.fromkeys(row["case"]["group"] for row in rows):
        members = [row for row in rows if row["case"]["group"] == group]
        text.append(f"## {group}\n")
        if any(measured["host_timed"] for row in members for measured in row["passes"].values()):
            text.append("Of calls marked \\* the host is timed as well: they could not be captured as CUDA graphs.\n")
        text.append("| case | pass | ours, ms | TFLOP/s | best of torch | ratio | others | SM MHz | W | held back by |")
        text.append("|---|---|---:|---:|---|---:|---|---:|---:|---|")
        text += [line for row in members for line in table_rows(row)]
        text.append("")
    text.append(published_table(rows, results.machine["processor"]))
    text += _lists(results)
    return "\n".join(text)


def table_rows(row: Row) -> list[str]:
    """The lines of one case."""
    lines = []
    name = short_name(row).removeprefix(row["case"]["group"]).strip()
    for which, measured in row["passes"].items():
        best = best_peer(measured)
        others = {peer: ratio for peer, ratio in measured["ratios"].items() if best and peer != best[0]}

        def label(peer: str, host_timed: dict[str, str] = measured["host_timed"]) -> str:
            return peer.removeprefix("torch ") + ("\\*" if peer in host_timed else "")

        cells = [
            name,
            which,
            f"{measured['milliseconds'][OURS]:.4g}{label(OURS).removeprefix(OURS)}",
            f"{measured['tflops']:.0f}",
            label(best[0]) if best else "none can",
            "" if best is None else f"**{best[1]:.3f}**" if best[1] < 1 else f"{best[1]:.3f}",
            ", ".join(f"{label(peer)} {value:.2f}" for peer, value in others.items()),
            *(f"{measured[key]:.0f}" if key in measured else "" for key in ("sm_clock_mhz", "power_w")),
            ", ".join(measured.get("throttles", [])),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _lists(results: Results) -> list[str]:
    """What did not work: results that differ, cases that failed, peers that are absent."""
    problems = [problem for row in results.rows for problem in row["problems"]]
    absent: dict[tuple[str, str], list[str]] = {}
    for row in results.rows:
        for name, why in row["absent"].items():
            absent.setdefault((name, why), []).append(short_name(row))
    sections = {
        "Results that differ": [f"- {problem}" for problem in problems],
        "Cases that failed": [f"- {name}: {why}" for name, why in results.failed.items()],
        "Peers that are absent": [f"- {name}: {why} ({_cases(cases)})" for (name, why), cases in absent.items()],
    }
    references = {row["reference"] for row in results.rows if row["reference"]}
    checked = f"out, dq, dk and dv of everybody are compared with those of one peer: {', '.join(sorted(references))}.\n"
    text = [f"Before a race, {checked}"] if references else []
    for title, lines in sections.items():
        if lines:
            text += [f"## {title}\n", *lines, ""]
    return text


def _cases(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN_CASES} more" if len(names) > SHOWN_CASES else ""
    return "; ".join(names[:SHOWN_CASES]) + more
