"""Attention alone: time and peak memory of forward + backward against sequence length.

Every point runs in a fresh process, so that memory allocated for an earlier point cannot affect it.
"""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import TypeVar

import torch

from flash_attn import flash_attn_func
from gpt.memory import free_memory, peak_memory
from gpt.model import plain_attention
from gpt.progress import progress_bar

Result = TypeVar("Result")
BATCH_SIZE, NUM_HEADS, HEAD_DIM = 1, 4, 64


@dataclass(frozen=True)
class Point:
    """One measurement; time and memory are None if it was not run, and `note` gives the reason."""

    attention: str
    seqlen: int
    milliseconds: float | None = None
    megabytes: float | None = None
    note: str = ""


def estimated_plain_bytes(seqlen: int, device: str) -> int:
    """Peak memory of plain attention, in backward: a little over three [seqlen, seqlen] matrices per head."""
    element_size = 2 if device == "cuda" else 4
    return int(3.25 * BATCH_SIZE * NUM_HEADS * seqlen**2 * element_size)


def _step(attention: str, seqlen: int, device: str) -> Callable[[], None]:
    """A function that runs forward and backward on fixed random data."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    shape = (BATCH_SIZE, seqlen, NUM_HEADS, HEAD_DIM)
    q, k, v, dout = (torch.randn(shape, device=device, dtype=dtype) for _ in range(4))
    inputs = [tensor.requires_grad_() for tensor in (q, k, v)]

    def step() -> None:
        out = plain_attention(q, k, v) if attention == "plain" else flash_attn_func(q, k, v, causal=True)
        torch.autograd.grad(out, inputs, dout)
        if device == "cuda":
            torch.cuda.synchronize()

    return step


def measure(attention: str, seqlen: int, device: str, seconds: float) -> Point:
    """Run in its own process: peak memory of one step, then the median time of steps for about `seconds`."""
    torch.manual_seed(0)
    _step(attention, 64, device)()  # allocations of thread pools and libraries before the baseline is taken
    step = _step(attention, seqlen, device)
    peak = peak_memory(step, device)
    return Point(attention, seqlen, median_milliseconds(step, seconds), peak / 1e6)


def median_milliseconds(step: Callable[[], None], seconds: float) -> float:
    """Of calls for about `seconds`."""
    times: list[float] = []
    while sum(times) < seconds or (len(times) < 3 and sum(times) < 3 * seconds):
        started = time.perf_counter()
        step()
        times.append(time.perf_counter() - started)
    return 1e3 * statistics.median(times)


def in_fresh_process(function: Callable[..., Result], *arguments: object) -> Result:
    """Its result. BrokenProcessPool if the process was stopped."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


def sweep(seqlens: Sequence[int], device: str, seconds: float) -> list[Point]:
    """Both implementations at every length; plain attention only if it fits in half of the free memory."""
    points = []
    with progress_bar(2 * len(seqlens), "attention alone", "point") as bar:
        for seqlen in seqlens:
            for attention in ("plain", "flash"):
                bar.set_postfix_str(f"{attention}, seqlen {seqlen}")
                points.append(_measure_if_it_fits(attention, seqlen, device, seconds))
                bar.update()
    return points


def _measure_if_it_fits(attention: str, seqlen: int, device: str, seconds: float) -> Point:
    needed = estimated_plain_bytes(seqlen, device) if attention == "plain" else 0
    if needed > free_memory(device) / 2:
        return Point(attention, seqlen, note=f"not run (needs about {needed / 1e9:.0f} GB)")
    try:
        return in_fresh_process(measure, attention, seqlen, device, seconds)
    except BrokenProcessPool:
        return Point(attention, seqlen, note="not run (the process was stopped, probably out of memory)")


def markdown_table(points: Sequence[Point]) -> str:
    """One row per sequence length, including points that were not run."""
    by_key = {(point.attention, point.seqlen): point for point in points}
    lines = [
        "| seqlen | plain, ms | ours, ms | speed-up | plain, MB | ours, MB | memory saved |",
        "|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for seqlen in sorted({point.seqlen for point in points}):
        plain, ours = by_key["plain", seqlen], by_key["flash", seqlen]
        cells = [
            _cell(plain.milliseconds, plain.note),
            _cell(ours.milliseconds, ours.note),
            _ratio(plain.milliseconds, ours.milliseconds),
            _cell(plain.megabytes, plain.note),
            _cell(ours.megabytes, ours.note),
            _ratio(plain.megabytes, ours.megabytes),
        ]
        lines.append(f"| {seqlen} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(value: float | None, note: str) -> str:
    return note if value is None else f"{value:,.1f}"


def _ratio(plain: float | None, ours: float | None) -> str:
    return f"{plain / ours:.1f}x" if plain and ours else "-"
