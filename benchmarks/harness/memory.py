"""Peak memory of forward + backward against sequence length, above what the inputs take, each in a fresh process.

A factor of 2 per doubling of the length is linear growth, 4 is quadratic.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import multiprocessing
import resource
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import torch

from harness.cases import Case
from harness.machine import describe, heading, results_folder, save
from harness.measure import PROVIDERS
from harness.provider import OURS, make_problem
from harness.sdpa import MATH

STATUS = Path("/proc/self/status")
MEASURED = {OURS: "tab:orange", "torch flash": "tab:blue", MATH: "black"}  # and the colors in the figure
LARGEST_FACTOR = 2.2  # per doubling of the length, that still counts as linear
NUM_HEADS, HEAD_DIM = 8, 64
SEQLENS, QUICK_SEQLENS = (2048, 4096, 8192, 16384, 32768), (1024, 2048, 4096)

Series = dict[str, list[float | None]]  # megabytes; None where a point was left out


def peak_of(name: str, dtype: str, seqlen: int, device: str, threads: int) -> int:
    """Bytes at the peak above the inputs. Runs in its own process."""
    torch.set_num_threads(threads)
    provider = next(each for each in PROVIDERS if each.name == name)
    shape: dict[str, Any] = {"num_heads": NUM_HEADS, "num_heads_k": NUM_HEADS, "causal": True, "backward": True}
    cases = [Case(device, "memory", dtype, n, n, head_dim=HEAD_DIM, **shape) for n in (64, seqlen)]
    warm_up, call = (provider.build(make_problem(case)) for case in cases)
    warm_up.run()  # thread pools and libraries allocate before the baseline is taken
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call.run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with contextlib.suppress(OSError):  # restarts the recording of the peak, on Linux
        Path("/proc/self/clear_refs").write_text("5")
    before = resident_bytes("VmRSS")
    call.run()
    return max(0, resident_bytes("VmHWM") - before)


def resident_bytes(field: str) -> int:
    """On Linux from /proc: getrusage would count the parent process as well, which is larger."""
    if STATUS.exists():
        line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field + ":"))
        return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def free_bytes(device: str) -> int:
    """What can be allocated without swapping, the limit of a container included. Without /proc as much as is asked."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    found = [sys.maxsize]
    with contextlib.suppress(OSError):
        meminfo = Path("/proc/meminfo").read_text()
        found.append(int(meminfo.partition("MemAvailable:")[2].split()[0]) * 1024)
    with contextlib.suppress(OSError, ValueError):  # no limit: "max"
        group = Path("/sys/fs/cgroup")
        found.append(int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    return min(found)


def in_fresh_process(name: str, dtype: str, seqlen: int, device: str, threads: int) -> float | None:
    """Megabytes, or None where it would need half of the free memory, or ran out of it."""
    quadratic = 3.25 * NUM_HEADS * seqlen**2 * 4 if name == MATH else 0
    if quadratic > free_bytes(device) / 2:
        return None
    pool = ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn"))
    with contextlib.suppress(BrokenProcessPool), pool:
        return pool.submit(peak_of, name, dtype, seqlen, device, threads).result() / 1e6
    return None


def growth(megabytes: Sequence[float | None]) -> list[float]:
    """Factors from one length to the next, twice as long."""
    known = [value for value in megabytes if value is not None]
    return [after / before for before, after in itertools.pairwise(known)]


def table(series: Series, seqlens: Sequence[int]) -> list[str]:
    """Megabytes, and the factor to the length before."""
    columns = [f"{seqlen // 1024}k" for seqlen in seqlens]
    lines = [f"| | {' | '.join(columns)} | factor per doubling |", "|---|" + "---:|" * len(seqlens) + "---|"]
    for name, values in series.items():
        cells = ["not run" if value is None else f"{value:.1f}" for value in values]
        factors = ", ".join(f"{factor:.2f}" for factor in growth(values))
        lines.append(f"| {name}, MB | {' | '.join(cells)} | {factors} |")
    return lines


def plot(series: Series, seqlens: Sequence[int], path: Path) -> None:
    """Log-log, with a dotted line that grows linearly."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7.6, 4.4), layout="constrained")
    for label, values in series.items():
        name, dtype = label.rsplit(" ", 1)
        known = {seqlen: value for seqlen, value in zip(seqlens, values, strict=True) if value is not None}
        style = {"fp32": "-o", "bf16": "--s"}[dtype]
        axes.plot(list(known), list(known.values()), style, color=MEASURED[name], ms=4, label=label)
    start = next(value for value in next(iter(series.values())) if value is not None)
    axes.plot(seqlens, [0.6 * start * n / seqlens[0] for n in seqlens], ":", color="0.5", label="linear growth")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(seqlens, [f"{seqlen // 1024}k" for seqlen in seqlens])
    axes.set(xlabel="sequence length", ylabel="peak memory above the inputs, MB")
    axes.set_title("Causal attention, forward + backward")
    axes.grid(True, alpha=0.3)
    figure.legend(loc="outside right upper", frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(arguments: argparse.Namespace) -> int:
    """Measure, draw, save; with --check the exit status is 1 if growth is not linear."""
    device, info = arguments.device, describe(arguments.device)
    seqlens = QUICK_SEQLENS if arguments.quick else SEQLENS
    series: Series = {}
    for dtype, name in itertools.product(("bf16",) if device == "cuda" else ("fp32", "bf16"), MEASURED):
        values = [in_fresh_process(name, dtype, seqlen, device, arguments.threads) for seqlen in seqlens]
        series[f"{name} {dtype}"] = values
    worst = max(max(growth(values)) for label, values in series.items() if label.startswith(OURS))
    linear = worst <= LARGEST_FACTOR
    verdict = f"Ours grows by at most {worst:.2f}x per doubling of the length: {'' if linear else '**not** '}linear."
    stem = "quick-memory" if arguments.quick else "memory"
    shape = f"causal, batch 1, {NUM_HEADS} heads, head_dim {HEAD_DIM}"
    title = heading(f"Peak memory of forward + backward above the inputs ({shape})", info)
    plot(series, seqlens, results_folder(info) / f"{stem}.png")
    content = {"machine": info, "seqlens": seqlens, "megabytes": series, "linear": linear}
    save(stem, content, "\n".join([title, *table(series, seqlens), "", verdict, "", f"![memory]({stem}.png)"]))
    return int(arguments.check and not linear)
