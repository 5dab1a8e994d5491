"""Print and draw the model on paper of context parallelism (context_parallel_model.py). Nothing is measured.

    python benchmarks/plot_context_parallel.py

Needs no GPU. Writes docs/context_parallel_model.png.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from context_parallel_model import METHODS, MILLION, Cost, Layer, Machine, Method, ideal, length, table, thresholds

ROOT = Path(__file__).resolve().parent.parent
RANKS = [2**i for i in range(11)]
COLORS = {"ring": "#2b5f8a", "all_gather": "#f2a65a", "ulysses": "#5a9e6f", "ulysses + ring": "#a63d57"}
GB, GPU_MEMORY = 1e9, 80e9


def points(method: Method, layer: Layer, machine: Machine, seqlen: int) -> dict[int, Cost]:
    """Of a method, for every number of ranks that can use it."""
    costs = {num_ranks: method(layer, machine, seqlen, num_ranks) for num_ranks in RANKS}
    return {num_ranks: cost for num_ranks, cost in costs.items() if cost is not None}


def draw_time(axes: Axes, layer: Layer, machine: Machine) -> None:
    """Both passes of one layer against ranks, of a million tokens and of ten."""
    for seqlen in (MILLION, 10 * MILLION):
        times = [ideal(layer, machine, seqlen, num_ranks).seconds for num_ranks in RANKS]
        alone = "computation alone" if seqlen == MILLION else None
        axes.loglog(RANKS, times, "--", color="black", lw=1, label=alone)
        for name, method in METHODS.items():
            costs = points(method, layer, machine, seqlen)
            label = name if seqlen == MILLION else None
            axes.plot(list(costs), [cost.seconds for cost in costs.values()], color=COLORS[name], label=label)
        axes.annotate(f"{length(seqlen)} tokens", (RANKS[3], 1.4 * times[3]), color="black")
    axes.set_title("Time of a layer, forward + backward")
    axes.set_ylabel("seconds")


def draw_share(axes: Axes, layer: Layer, machine: Machine) -> None:
    """How much of the time is computation, for a million tokens."""
    for name, method in METHODS.items():
        costs = points(method, layer, machine, MILLION)
        shares = [ideal(layer, machine, MILLION, n).seconds / cost.seconds for n, cost in costs.items()]
        axes.semilogx(list(costs), shares, "o-", ms=3, color=COLORS[name], label=name)
    axes.set_ylim(0, 1.05)
    axes.set_title("Share of the time that is computation, 1M tokens")


def draw_memory(axes: Axes, layer: Layer, machine: Machine) -> None:
    """What the methods need beyond a rank's own shards, for ten million tokens."""
    for name, method in METHODS.items():
        costs = {n: cost for n, cost in points(method, layer, machine, 10 * MILLION).items() if n > 1}
        axes.loglog(
            list(costs), [cost.memory / GB for cost in costs.values()], "o-", ms=3, color=COLORS[name], label=name
        )
    axes.axhline(GPU_MEMORY / GB, color="tab:red", lw=1, ls=":")
    axes.annotate("an H100 has 80 GB", (RANKS[-1], GPU_MEMORY / GB), ha="right", va="top", color="tab:red")
    axes.set_title("Memory beyond the shards, 10M tokens")
    axes.set_ylabel("GB per GPU")


def main() -> None:
    """Print both tables, draw the figure."""
    layer, machine = Layer(), Machine()
    print(thresholds(layer, machine) + "\n\n" + table(layer, machine))
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(14, 4.4), layout="constrained")
    draw_time(left, layer, machine)
    draw_share(middle, layer, machine)
    draw_memory(right, layer, machine)
    for axes in (left, middle, right):
        axes.set_xlabel("GPUs, 8 in a node")
        axes.set_xticks(RANKS[::2], [str(num_ranks) for num_ranks in RANKS[::2]])
        axes.minorticks_off()
        axes.grid(True, which="major", alpha=0.3)
        axes.legend(frameon=False)
    figure.suptitle(
        "A model on paper, not a measurement: causal attention, 64 heads over 8 of keys, head_dim 128, H100"
    )
    target = ROOT / "docs" / "context_parallel_model.png"
    figure.savefig(target, dpi=120)
    plt.close(figure)
    print(f"\nwrote {target.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
