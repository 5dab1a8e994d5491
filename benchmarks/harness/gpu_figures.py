"""The results of the GPU benchmark as figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from harness.gpu import SWEEP
from harness.implementation import OURS, PASSES
from harness.results import Row


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
            for head_dim in SWEEP
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
