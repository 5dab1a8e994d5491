"""The results of the GPU benchmark as Markdown and figures."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from harness.gpu import PASSES
from harness.implementation import OURS
from harness.report import FLOOR

Row = dict[str, Any]


def heading(machine: dict[str, Any]) -> str:
    """What was measured on what."""
    shown = {
        "driver": "driver {}",
        "cuda": "CUDA {}",
        "cudnn": "cuDNN {}",
        "power_limit_w": "power limit {:.0f} W",
        "sm_clock_max_mhz": "SM clock up to {:.0f} MHz",
    }
    parts = [
        text.format(machine[key]) for key, text in shown.items() if isinstance(machine.get(key), (int, float, str))
    ]
    versions = f"torch {machine['torch']}, flash-attn {machine['flash_attn']}, commit {machine['commit']}"
    return f"# Attention on a GPU\n\n{', '.join([machine['processor'], *parts])}  \n{versions}, {machine['date']}\n"


def best_peer(measured: Row) -> tuple[str, float] | None:
    """The peer that comes closest or beats us by most, and its time / ours."""
    ratios = {name: ratio for name, ratio in measured["ratios"].items() if not name.startswith(OURS)}
    name = min(ratios, key=ratios.__getitem__, default=None)
    return None if name is None else (name, ratios[name])


def one_line(row: Row) -> str:
    """For the terminal, while the benchmark runs."""
    parts = []
    for which, measured in row["passes"].items():
        best = best_peer(measured)
        peer = f" {best[1]:.2f}x {best[0].removeprefix('torch ')}" if best else ""
        parts.append(f"{which} {measured['tflops']:.0f} TFLOP/s{peer}")
    return f"{row['name'].removesuffix(' fwd+bwd'):<44} {'; '.join(parts)}"


def summary(rows: list[Row]) -> str:
    """For every pass of the dense cases: the geometric mean of the ratios to the best peer, and which are under 1."""
    lines = []
    for which in PASSES:
        dense = [row for row in rows if row["case"]["group"] == "dense" and which in row["passes"]]
        found = [(row["name"], best) for row in dense if (best := best_peer(row["passes"][which])) is not None]
        if not found:
            continue
        slower = [f"{name} ({ratio:.2f} {peer})" for name, (peer, ratio) in found if ratio < 1]
        mean = statistics.geometric_mean(ratio for _, (_, ratio) in found)
        under = f"{len(slower)} under 1: {', '.join(slower)}" if slower else "none under 1"
        lines.append(f"{which}, {len(found)} dense cases: {mean:.3f} of the best peer, {under}.")
    return "\n".join(lines)


def markdown(machine: dict[str, Any], rows: list[Row]) -> str:
    """One section per group, one line per case and pass."""
    text = [heading(machine)]
    text.append(
        "TFLOP/s count the products that the mask leaves. A ratio is a peer's time / ours, the median over rounds in "
        f"which\neach was timed once: above 1 ours is quicker; under {FLOOR} in bold.\n"
    )
    text.append(f"{summary(rows)}\n")
    for group in dict.fromkeys(row["case"]["group"] for row in rows):
        text.append(f"## {group}\n")
        text.append("| case | pass | ours, ms | TFLOP/s | best of torch | ratio | others | SM MHz | W |")
        text.append("|---|---|---:|---:|---|---:|---|---:|---:|")
        text += [line for row in rows if row["case"]["group"] == group for line in table_rows(row)]
        text.append("")
    return "\n".join(text)


def table_rows(row: Row) -> list[str]:
    """The lines of one case."""
    lines = []
    name = row["name"].removeprefix(row["case"]["group"]).removesuffix("fwd+bwd").removesuffix("fwd").strip()
    for which, measured in row["passes"].items():
        best = best_peer(measured)
        others = {peer: ratio for peer, ratio in measured["ratios"].items() if best and peer != best[0]}
        ratio = "" if best is None else f"**{best[1]:.2f}**" if best[1] < FLOOR else f"{best[1]:.2f}"
        cells = [
            name,
            which,
            f"{measured['milliseconds'][OURS]:.4g}",
            f"{measured['tflops']:.0f}",
            best[0].removeprefix("torch ") if best else "none can",
            ratio,
            ", ".join(f"{peer.removeprefix('torch ')} {value:.2f}" for peer, value in others.items()),
            *(f"{measured[key]:.0f}" if key in measured else "" for key in ("sm_clock_mhz", "power_w")),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def series(rows: list[Row], which: str, head_dim: int, causal: bool) -> dict[str, list[tuple[int, float]]]:
    """TFLOP/s over sequence length, of every implementation, in the dense bf16 cases."""
    found: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        case = row["case"]
        chosen = case["group"] == "dense" and case["dtype"] == "bf16" and case["head_dim"] == case["head_dim_v"]
        if not chosen or (case["head_dim"], case["causal"]) != (head_dim, causal) or which not in row["passes"]:
            continue
        measured = row["passes"][which]
        work = measured["tflops"] * measured["milliseconds"][OURS]
        for name, milliseconds in measured["milliseconds"].items():
            found.setdefault(name, []).append((case["seqlen_q"], work / milliseconds))
    return {name: sorted(points) for name, points in found.items()}


COLORS = {
    OURS: "#c1272d", "torch cudnn": "#2b5f8a", "torch flash": "#5aa469", "torch efficient": "#f2a65a",
    "torch flex": "#8e6bbf", "torch math": "#999999",
}  # fmt: skip


def draw(folder: Path, machine: dict[str, Any], rows: list[Row]) -> list[str]:
    """One figure per pass: a panel for every head_dim and mask. Returns the names of the files."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot as plt
    except ModuleNotFoundError:
        print("no figures: there is no matplotlib")
        return []
    written = []
    for which in PASSES:
        panels = [
            (head_dim, causal, found)
            for head_dim in (64, 128, 256)
            for causal in (False, True)
            if (found := series(rows, which, head_dim, causal))
        ]
        if not panels:
            continue
        figure, axes = plt.subplots(
            1, len(panels), figsize=(3.4 * len(panels), 3.4), squeeze=False, layout="constrained"
        )
        for panel, (head_dim, causal, found) in zip(axes[0], panels, strict=True):
            for name, points in found.items():
                color = next((color for key, color in COLORS.items() if name.startswith(key)), "#bbbbbb")
                width = 2.2 if name == OURS else 1.3
                panel.plot(*zip(*points, strict=True), marker="o", markersize=3, color=color, lw=width, label=name)
            panel.set_xscale("log", base=2)
            panel.set_ylim(bottom=0)
            panel.set_title(f"head_dim {head_dim}, {'causal' if causal else 'full'}", fontsize=9)
            panel.set_xlabel("seqlen")
            panel.grid(alpha=0.3)
        axes[0][0].set_ylabel("TFLOP/s")
        handles, labels = axes[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=9)
        figure.suptitle(f"{which}, bfloat16, {machine['processor']}, torch {machine['torch']}", fontsize=10)
        figure.savefig(folder / f"gpu-{which}.png", dpi=130)
        plt.close(figure)
        written.append(f"gpu-{which}.png")
    return written
