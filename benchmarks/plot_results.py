"""Draw the speed-ups that bench_attention.py measured as bars.

    python benchmarks/plot_results.py

Reads attention.json in this machine's results folder, or in the folder that --out names; writes speedups.png beside it.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

import matplotlib
import torch

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from harness.machine import add_common_arguments, describe, results_folder

COLORS = {"forward": "#f2a65a", "forward + backward": "#2b5f8a"}
Bars = dict[str, dict[str, float]]  # label -> pass -> speed-up


def label(case: dict[str, Any]) -> str | None:
    """A short name for the cases worth a bar; None for the rest."""
    seqlen, width = case["seqlen_k"], case["head_dim"]
    mask = "causal" if case["causal"] else "full"
    names = {
        "dense": f"{mask}, seqlen {seqlen}, head_dim {width}" if seqlen >= 2048 else None,
        "gqa": f"GQA {case['num_heads']}/{case['num_heads_k']}, {mask}, seqlen {seqlen}",
        "window": f"window {case['window']}, seqlen {seqlen}",
        "varlen": f"ragged batch of {len(case['seqlens'])}, {mask}",
        "alibi": f"ALiBi, {mask}, seqlen {seqlen}",
        "decode": f"{case['seqlen_q']} {'query' if case['seqlen_q'] == 1 else 'queries'}, {seqlen} keys",
    }
    return names.get(case["group"])


def bars(rows: list[dict[str, Any]], dtype: str) -> Bars:
    """Speed-up over torch's best, for every labelled case of one type."""
    result: Bars = {}
    for row in rows:
        name = label(row["case"])
        if name and row["case"]["dtype"] == dtype and row["speedup"] is not None:
            key = "forward + backward" if row["case"]["backward"] else "forward"
            result.setdefault(name, {})[key] = row["speedup"]
    return result


def draw(axes: Axes, content: Bars, title: str) -> None:
    """Horizontal bars that start at 1x, on a logarithmic axis."""
    for key, offset in (("forward", -0.2), ("forward + backward", 0.2)):
        places = [index + offset for index, values in enumerate(content.values()) if key in values]
        values = [values[key] for values in content.values() if key in values]
        axes.barh(places, [value - 1 for value in values], height=0.38, left=1, color=COLORS[key], label=key)
        for place, value in zip(places, values, strict=True):
            axes.annotate(f"{value:.2f}x" if value < 10 else f"{value:.0f}x", (max(value, 1.0), place), (3, 0),
                          textcoords="offset points", va="center", fontsize=7.5)  # fmt: skip
    axes.axvline(1, color="black", lw=1)
    axes.set_xscale("log")
    axes.set_yticks(range(len(content)), list(content), fontsize=8.5)
    axes.invert_yaxis()
    largest = max((value for values in content.values() for value in values.values()), default=2.0)
    ticks = [tick for tick in (0.5, 1, 2, 5, 10, 20, 50) if tick <= 1.5 * largest]
    axes.set_xticks(ticks, [f"{tick:g}x" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlim(right=1.6 * largest)
    axes.grid(True, axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(title, fontsize=10)


def main() -> int:
    """Read the results, write the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_arguments(parser)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    folder = results_folder(arguments, describe(arguments.device))
    if not (folder / "attention.json").exists():
        print(f"no attention.json in {folder}: run bench_attention.py first", file=sys.stderr)
        return 1
    results = json.loads((folder / "attention.json").read_text())
    machine = results["machine"]
    panels = {dtype: bars(results["rows"], dtype) for dtype in ("fp32", "bf16")}
    panels = {dtype: content for dtype, content in panels.items() if content}
    if not panels:
        print("no case to draw in attention.json", file=sys.stderr)
        return 1

    tallest = max(map(len, panels.values()))
    size = (5.6 * len(panels), 1.3 + 0.38 * tallest)
    figure, axes = plt.subplots(1, len(panels), figsize=size, squeeze=False, layout="constrained", sharey=False)
    for panel, (dtype, content) in zip(axes[0], panels.items(), strict=True):
        draw(panel, content, dtype)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    where = f"{machine['processor']}, {machine['threads']} CPU threads, torch {machine['torch']}"
    figure.suptitle(f"Speed relative to the best that torch offers for the same problem\n{where}", fontsize=11)
    figure.savefig(folder / "speedups.png", dpi=150)
    print(f"wrote {folder / 'speedups.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
