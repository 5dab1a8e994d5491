"""The results as figures: TFLOP/s over sequence length, and the speed-up over the best of torch for every case."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from harness.cases import PASSES, SWEEP
from harness.measure import Row
from harness.provider import OURS
from harness.report import best_peers

LINES = {
    OURS: "#c1272d", "torch cudnn": "#2b5f8a", "torch flash": "#5aa469", "torch efficient": "#f2a65a",
    "torch flex": "#8e6bbf", "torch math": "#999999",
}  # fmt: skip
BARS = {"forward": "#f2a65a", "backward": "#5aa469", "both": "#2b5f8a"}


def draw(folder: Path, prefix: str, machine: dict[str, Any], rows: list[Row]) -> list[str]:
    """All figures. Returns the names of the files, which begin with the prefix."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot as plt
    except ModuleNotFoundError:
        print("no figures: there is no matplotlib")
        return []
    where = f"{machine['processor']}, torch {machine['torch']}"
    figures = {f"{prefix}throughput-{which}.png": _throughput(plt, rows, which, where) for which in PASSES}
    figures[f"{prefix}speedups.png"] = _speedups(plt, rows, where)
    written = [name for name, figure in figures.items() if figure is not None]
    for name in written:
        figures[name].savefig(folder / name, dpi=130)
        plt.close(figures[name])
    return written


def series(rows: list[Row], which: str, head_dim: int, causal: bool) -> dict[str, list[tuple[int, float]]]:
    """TFLOP/s over sequence length, of every provider, in the dense bf16 cases."""
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


def _throughput(plt: Any, rows: list[Row], which: str, where: str) -> Any:
    """A panel for every head_dim and mask; None if there is nothing to draw."""
    choices = [(head_dim, causal) for head_dim in SWEEP for causal in (False, True)]
    panels = {choice: found for choice in choices if (found := series(rows, which, *choice))}
    if not panels:
        return None
    size = (3.4 * len(panels), 3.4)
    figure, axes = plt.subplots(1, len(panels), figsize=size, squeeze=False, layout="constrained")
    for panel, ((head_dim, causal), found) in zip(axes[0], panels.items(), strict=True):
        for name, points in found.items():
            color = next((color for key, color in LINES.items() if name.startswith(key)), "#bbbbbb")
            style = {"lw": 2.2 if name == OURS else 1.3, "ls": "--" if name.startswith(f"{OURS},") else "-"}
            panel.plot(*zip(*points, strict=True), marker="o", markersize=3, color=color, label=name, **style)
        panel.set_xscale("log", base=2)
        panel.set_ylim(bottom=0)
        panel.set_title(f"head_dim {head_dim}, {'causal' if causal else 'full'}", fontsize=9)
        panel.set_xlabel("seqlen")
        panel.grid(alpha=0.3)
    axes[0][0].set_ylabel("TFLOP/s")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=9)
    figure.suptitle(f"{which}, bfloat16, {where}", fontsize=10)
    return figure


def _speedups(plt: Any, rows: list[Row], where: str) -> Any:
    """A panel for every type, a bar for every pass that has a peer, on a logarithmic axis that starts at 1x."""
    bars: dict[str, dict[str, dict[str, float]]] = {}  # type -> case -> pass -> speed-up
    for row, which, _, ratio in best_peers(rows):
        if row["case"]["group"] != "dense" or row["case"]["seqlen_q"] >= 2048:
            dtype = row["case"]["dtype"]
            bars.setdefault(dtype, {}).setdefault(row["name"].replace(f" {dtype}", ""), {})[which] = ratio
    if not bars:
        return None
    size = (6.4 * len(bars), 1.3 + 0.38 * max(map(len, bars.values())))
    figure, axes = plt.subplots(1, len(bars), figsize=size, squeeze=False, layout="constrained")
    for panel, (dtype, cases) in zip(axes[0], bars.items(), strict=True):
        for place, values in enumerate(cases.values()):
            height = 0.76 / len(values)
            for number, (which, value) in enumerate(values.items()):
                at = place + (number - (len(values) - 1) / 2) * height
                bar = panel.barh(at, value - 1, height=height, left=1, color=BARS[which], label=which)
                panel.bar_label(bar, [f"{value:.2f}x" if value < 10 else f"{value:.0f}x"], padding=2, fontsize=7)
        panel.axvline(1, color="black", lw=1)
        panel.set_xscale("log")
        panel.xaxis.set_major_formatter("{x:g}x")
        panel.set_yticks(range(len(cases)), list(cases), fontsize=8)
        panel.invert_yaxis()
        panel.margins(x=0.15, y=0.01)
        panel.grid(True, axis="x", alpha=0.3)
        panel.set_title(dtype, fontsize=10)
    handles, labels = axes[0][0].get_legend_handles_labels()
    shown = dict(zip(labels, handles, strict=True))
    figure.legend(shown.values(), shown, loc="outside lower center", ncols=len(shown), frameon=False)
    figure.suptitle(f"Speed relative to the best that torch offers for the same problem\n{where}", fontsize=11)
    return figure
