"""What the next byte costs, against the length of the text so far: with a cache of keys and values, and without."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from gpt.attention_scaling import in_fresh_process, median_milliseconds
from gpt.memory import peak_memory
from gpt.model import GPT, NUM_BYTES, GPTConfig
from gpt.progress import progress_bar
from gpt.train import mixed_precision

WARM_UP = 64


@dataclass(frozen=True)
class Point:
    """One measurement, of one forward pass for the last byte of the context."""

    cached: bool
    context: int
    milliseconds: float
    cache_megabytes: float
    peak_megabytes: float  # beyond the model and the cache


def measure(config: GPTConfig, cached: bool, context: int, device: str, seconds: float) -> Point:
    """Runs in its own process. Weights and bytes are random: they do not change what a forward pass costs."""
    torch.manual_seed(0)
    model = GPT(replace(config, context=context), "flash", seed=0).to(device).eval()
    text = torch.randint(NUM_BYTES, (1, context), device=device)
    with torch.no_grad(), mixed_precision(torch.device(device)):
        cache = model.new_cache(context).normal_() if cached else None

        def step(length: int = context) -> None:
            if cache is None:
                model(text[:, :length])
            else:
                model(text[:, :1], cache, length - 1)
            if device == "cuda":
                torch.cuda.synchronize()

        step(WARM_UP)
        peak = peak_memory(step, device)
        milliseconds = median_milliseconds(step, seconds)
    return Point(cached, context, milliseconds, cache.nbytes / 1e6 if cache is not None else 0.0, peak / 1e6)


def sweep(config: GPTConfig, contexts: Sequence[int], device: str, seconds: float) -> list[Point]:
    """With and without the cache, for every length."""
    points = []
    with progress_bar(2 * len(contexts), "the next byte", "point") as bar:
        for context in contexts:
            for cached in (False, True):
                points.append(in_fresh_process(measure, config, cached, context, device, seconds))
                bar.update()
    return points


def markdown_table(points: Sequence[Point]) -> str:
    """One row per length."""
    by_key = {(point.cached, point.context): point for point in points}
    lines = [
        "| context | no cache, ms | cache, ms | speed-up | no cache, peak MB | cache, MB | cache, peak MB beyond it |",
        "|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for context in sorted({point.context for point in points}):
        without, cached = by_key[False, context], by_key[True, context]
        lines.append(
            f"| {context} | {without.milliseconds:.2f} | {cached.milliseconds:.2f} "
            f"| {without.milliseconds / cached.milliseconds:.1f}x | {without.peak_megabytes:.1f} "
            f"| {cached.cache_megabytes:.1f} | {cached.peak_megabytes:.1f} |"
        )
    return "\n".join(lines)
