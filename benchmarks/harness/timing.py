"""Interleaved timing: every round calls each function once, so that a slow moment of the machine hits all alike."""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

SHORTEST_SAMPLE = 5e-4  # seconds; quicker calls are repeated within a sample
SLOW = 4.0  # what is this many times slower than the quickest sits out some rounds
L2_FLUSH_BYTES = 256 * 2**20
HEAD_START_CYCLES = 1_000_000  # of the GPU, which spends them waiting: half a millisecond


@dataclass
class Timed:
    """A function to time, the context it needs, and its samples (round number -> seconds per call)."""

    function: Callable[[], object]
    context: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
    calls: int = 1  # per sample
    repeats: bool = True  # called several times per sample if it is quick
    stride: int = 1  # takes part in every stride-th round
    samples: dict[int, float] = field(default_factory=dict)

    def median(self) -> float:
        """Seconds per call."""
        return statistics.median(self.samples.values())

    def ratio_to(self, other: Timed) -> float:
        """Median over common rounds of own time / the other's time: above 1 when the other is quicker."""
        return statistics.median(self.samples[n] / other.samples[n] for n in self.samples if n in other.samples)


class Stopwatch:
    """Seconds per call of a function, on a CPU by the clock and on a GPU by events.

    There the L2 cache is cold, and the host has a head start, as it has in training: what it takes to launch the work
    is not part of it.
    """

    def __init__(self, device: str):
        self.device = device
        size = L2_FLUSH_BYTES if device == "cuda" else 0
        self.flush = torch.empty(size, dtype=torch.uint8, device=device)

    def __call__(self, function: Callable[[], object], calls: int = 1) -> float:
        """Time `calls` calls in a row."""
        if self.device != "cuda":
            started = time.perf_counter()
            for _ in range(calls):
                function()
            return (time.perf_counter() - started) / calls
        self.flush.zero_()
        torch.cuda._sleep(HEAD_START_CYCLES)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / calls


def time_interleaved(
    functions: Mapping[str, Timed], device: str, budget: float, min_rounds: int = 5, max_rounds: int = 200
) -> int:
    """Time all functions by turns for about `budget` seconds, filling in their samples; returns the rounds.

    Another one begins each round, so that none always comes after the same other.
    """
    stopwatch = Stopwatch(device)
    _warm_up(functions, stopwatch)
    order = list(functions.values())
    started = time.perf_counter()
    for number in range(max_rounds):
        first = number % len(order)
        for each in order[first:] + order[:first]:
            if number % each.stride == 0:
                with each.context():
                    each.samples[number] = stopwatch(each.function, each.calls)
        spent = time.perf_counter() - started
        if (spent > budget and number + 1 >= min_rounds) or spent > 6 * budget:
            return number + 1
    return max_rounds


def _warm_up(functions: Mapping[str, Timed], stopwatch: Stopwatch) -> None:
    """Two calls of each; the second one decides how often each is called."""
    estimates = {}
    for name, each in functions.items():
        with each.context():
            stopwatch(each.function)
            estimates[name] = stopwatch(each.function)
    quickest = min(estimates.values())
    for name, each in functions.items():
        if each.repeats:
            each.calls = max(1, min(200, math.ceil(SHORTEST_SAMPLE / estimates[name])))
        each.stride = max(1, min(8, int(estimates[name] / (SLOW * quickest))))
