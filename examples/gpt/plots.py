"""The demo's two figures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from gpt import generation_cost
from gpt.attention_scaling import Point, estimated_plain_bytes
from gpt.train import History

OURS, PLAIN = "tab:orange", "black"


def _style(axes: Axes, xlabel: str, ylabel: str) -> None:
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.grid(True, which="major", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def plot_losses(flash: History, plain: History, tolerance: float, path: Path) -> None:
    """Validation loss of both runs (ours a wide band, plain a thin dashed line on it); below, their difference."""
    figure, (top, bottom) = plt.subplots(
        2, 1, figsize=(7, 6.2), sharex=True, height_ratios=(3, 1.2), layout="constrained"
    )
    steps = flash.eval_steps
    top.plot(range(1, len(flash.train_loss) + 1), flash.train_loss, color="0.75", lw=0.8, label="training, FlashMHA")
    top.plot(steps, flash.validation_loss, color=OURS, lw=6, alpha=0.55, label="validation, FlashMHA (ours)")
    top.plot(steps, plain.validation_loss, color=PLAIN, lw=1.2, ls="--", marker="o", ms=3.5, label="validation, plain")
    _style(top, "", "loss, nats per byte")
    top.set_title("The same GPT with two implementations of attention")
    top.legend(frameon=False)

    gaps = [abs(a - b) for a, b in zip(flash.validation_loss, plain.validation_loss, strict=True)]
    bottom.semilogy(steps, [max(gap, 1e-8) for gap in gaps], color=OURS, marker="o", ms=3.5, lw=1.2)
    bottom.axhline(tolerance, color="tab:red", lw=1, ls=":")
    bottom.annotate(f"allowed: {tolerance:g}", (steps[-1], tolerance), ha="right", va="bottom", color="tab:red")
    bottom.set_ylim(5e-9, 10 * tolerance)
    _style(bottom, "training step", "difference of\nvalidation losses")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_scaling(points: Sequence[Point], device: str, path: Path) -> None:
    """Time and memory against sequence length, both axes logarithmic; points that were not run are marked."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 4.4), layout="constrained")
    _series(left, points, lambda point: point.milliseconds)
    _series(right, points, lambda point: point.megabytes)
    _mark_not_run(left, right, points, device)
    for axes, label in ((left, "time, ms"), (right, "peak memory above the inputs, MB")):
        seqlens = sorted({point.seqlen for point in points})
        _both_logarithmic(axes, seqlens, "sequence length", label)
    figure.suptitle("Causal attention alone, forward + backward")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_generation(points: Sequence[generation_cost.Point], path: Path) -> None:
    """Time and memory of the next byte against the length of the text so far."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 4.4), layout="constrained")
    contexts = sorted({point.context for point in points})
    for cached, label, color, marker in ((False, "no cache", PLAIN, "s"), (True, "cache", OURS, "o")):
        chosen = [point for point in points if point.cached == cached]
        style = {"color": color, "marker": marker, "ms": 5, "label": label}
        left.plot(contexts, [point.milliseconds for point in chosen], **style)
        right.plot(contexts, [point.cache_megabytes + point.peak_megabytes for point in chosen], **style)
    for axes, label in ((left, "time, ms"), (right, "cache and peak memory, MB")):
        _both_logarithmic(axes, contexts, "bytes of text so far", label)
    figure.suptitle("The next byte of a generated text")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _both_logarithmic(axes: Axes, lengths: Sequence[int], xlabel: str, ylabel: str) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(lengths, [f"{length // 1024}k" if length >= 1024 else str(length) for length in lengths])
    _style(axes, xlabel, ylabel)
    axes.legend(frameon=False)


def _series(axes: Axes, points: Sequence[Point], value: Callable[[Point], float | None]) -> None:
    for attention, label, color, marker in (("plain", "plain", PLAIN, "s"), ("flash", "ours", OURS, "o")):
        measured = [(point.seqlen, value(point)) for point in points if point.attention == attention]
        kept = [(x, y) for x, y in measured if y is not None]
        axes.plot([x for x, _ in kept], [y for _, y in kept], color=color, marker=marker, ms=5, label=label)


def _mark_not_run(left: Axes, right: Axes, points: Sequence[Point], device: str) -> None:
    """Mark a point with a cross: at its estimated memory, and at the top of the time panel."""
    missing = [point for point in points if point.attention == "plain" and point.megabytes is None]
    if not missing:
        return
    seqlens = [point.seqlen for point in missing]
    needed = [estimated_plain_bytes(seqlen, device) / 1e6 for seqlen in seqlens]
    top_of_panel = left.get_xaxis_transform()
    for axes, heights, transform in ((left, [0.97] * len(missing), top_of_panel), (right, needed, right.transData)):
        axes.plot(
            seqlens,
            heights,
            transform=transform,
            color=PLAIN,
            marker="x",
            ms=7,
            ls="none",
            clip_on=False,
            label="plain: not run, too much memory",
        )
