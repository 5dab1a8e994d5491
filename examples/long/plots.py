"""The figure of train_long.py."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt

OURS, THEORY = "tab:orange", "0.6"


def plot_memory(peaks: Sequence[Sequence[float]], title: str, path: Path) -> None:
    """Peak memory of every rank, in MB, against the number of ranks; `peaks` has one entry for each run."""
    figure, axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    runs = sorted(peaks, key=len)
    sizes = [len(ranks) for ranks in runs]
    most = [max(ranks) for ranks in runs]
    whole = most[0] * sizes[0]
    axes.plot(sizes, [whole / size for size in sizes], ls="--", color=THEORY, label="in proportion to 1 / ranks")
    axes.plot(sizes, most, color=OURS, lw=1)
    every = [(len(ranks), peak) for ranks in runs for peak in ranks]
    axes.plot(*zip(*every, strict=True), "o", color=OURS, ms=6, label="each rank, measured")
    for size, peak in zip(sizes, most, strict=True):
        axes.annotate(f"{peak:,.0f} MB", (size, peak), textcoords="offset points", xytext=(8, 6))
    axes.set(xlabel="ranks that share a sequence", ylabel="peak memory of training, MB per rank", xticks=sizes)
    axes.set_ylim(0, 1.15 * max(most))
    axes.margins(x=0.15)
    axes.grid(True, alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    axes.set_title(title)
    figure.savefig(path, dpi=150)
    plt.close(figure)
