"""Peak memory of forward + backward against sequence length, above what the inputs take.

    python benchmarks/bench_memory.py

Every point runs in a fresh process. A factor of 2 per doubling of the length is linear growth, 4 is quadratic.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import matplotlib
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from flash_attn import flash_attn_func
from harness.cases import DTYPES
from harness.machine import add_common_arguments, describe, heading, results_folder, save
from harness.memory import free_memory, peak_memory

matplotlib.use("Agg")
from matplotlib import pyplot as plt

NUM_HEADS, HEAD_DIM = 8, 64
BACKENDS = {"torch flash": SDPBackend.FLASH_ATTENTION, "torch math": SDPBackend.MATH}
NAMES = ("ours", *BACKENDS)
LARGEST_FACTOR = 2.2  # per doubling of the length, that still counts as linear


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_arguments(parser)
    parser.add_argument("--dtypes", nargs="+", choices=("fp32", "bf16", "fp16"), default=None)
    return parser.parse_args()


def _step(name: str, dtype: str, seqlen: int, device: str) -> Callable[[], None]:
    shape = (1, seqlen, NUM_HEADS, HEAD_DIM)
    q, k, v = (torch.randn(shape, dtype=DTYPES[dtype], device=device, requires_grad=True) for _ in range(3))
    dout = torch.randn(shape, dtype=DTYPES[dtype], device=device)

    def forward() -> torch.Tensor:
        if name == "ours":
            return flash_attn_func(q, k, v, causal=True)
        with sdpa_kernel(BACKENDS[name]):
            out = F.scaled_dot_product_attention(
                q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True
            )
        return out.transpose(1, 2)

    def step() -> None:
        torch.autograd.grad(forward(), (q, k, v), dout)

    return step


def measure(name: str, dtype: str, seqlen: int, device: str, threads: int) -> int:
    """Runs in its own process: bytes at the peak above the inputs."""
    torch.set_num_threads(threads)
    _step(name, dtype, 64, device)()  # thread pools and libraries allocate before the baseline is taken
    return peak_memory(_step(name, dtype, seqlen, device), device)


def measure_in_fresh_process(name: str, dtype: str, seqlen: int, device: str, threads: int) -> float | None:
    """Megabytes, or None when the point was left out: it would need half of the free memory, or ran out of it."""
    quadratic = 3.25 * NUM_HEADS * seqlen**2 * 4 if name == "torch math" else 0
    if quadratic > free_memory(device) / 2:
        return None
    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
            return pool.submit(measure, name, dtype, seqlen, device, threads).result() / 1e6
    except BrokenProcessPool:
        return None


def growth(megabytes: Sequence[float | None]) -> list[float]:
    """Factors from one length to the next, twice as long."""
    known = [value for value in megabytes if value is not None]
    return [after / before for before, after in itertools.pairwise(known)]


def table(series: dict[str, list[float | None]], seqlens: Sequence[int]) -> list[str]:
    """Megabytes, and the factor to the length before."""
    lines = [
        "| | " + " | ".join(f"{seqlen // 1024}k" for seqlen in seqlens) + " | factor per doubling |",
        "|---|" + "---:|" * len(seqlens) + "---|",
    ]
    for name, values in series.items():
        cells = ["not run" if value is None else f"{value:.1f}" for value in values]
        factors = ", ".join(f"{factor:.2f}" for factor in growth(values))
        lines.append(f"| {name}, MB | {' | '.join(cells)} | {factors} |")
    return lines


def plot(series: dict[str, list[float | None]], seqlens: Sequence[int], path: Path) -> None:
    """Log-log, with a dotted line that grows linearly."""
    figure, axes = plt.subplots(figsize=(7.6, 4.4), layout="constrained")
    colors = {"ours": "tab:orange", "torch flash": "tab:blue", "torch math": "black"}
    for label, values in series.items():
        name, dtype = label.rsplit(" ", 1)
        style = {"fp32": "-o", "bf16": "--s"}.get(dtype, ":^")
        known = [(seqlen, value) for seqlen, value in zip(seqlens, values, strict=True) if value is not None]
        axes.plot([x for x, _ in known], [y for _, y in known], style, color=colors[name], ms=4, label=label)
    start = next(values[0] for label, values in series.items() if label.startswith("ours"))
    if start is not None:
        linear = [0.6 * start * seqlen / seqlens[0] for seqlen in seqlens]
        axes.plot(seqlens, linear, ":", color="0.5", label="linear growth")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(seqlens, [f"{seqlen // 1024}k" for seqlen in seqlens])
    axes.set(xlabel="sequence length", ylabel="peak memory above the inputs, MB")
    axes.set_title("Causal attention, forward + backward")
    axes.grid(True, alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> int:
    """Measure, print, draw, save."""
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    device, info = arguments.device, describe(arguments.device)
    seqlens = [2048, 4096, 8192] if arguments.quick else [2048, 4096, 8192, 16384, 32768]
    dtypes = arguments.dtypes or (["bf16"] if device == "cuda" else ["fp32", "bf16"])
    series: dict[str, list[float | None]] = {}
    for dtype, name in itertools.product(dtypes, NAMES):
        values = [measure_in_fresh_process(name, dtype, seqlen, device, arguments.threads) for seqlen in seqlens]
        series[f"{name} {dtype}"] = values
        print(f"{name} {dtype}:", ", ".join("not run" if value is None else f"{value:.1f} MB" for value in values))

    worst = max(max(growth(values)) for label, values in series.items() if label.startswith("ours"))
    linear = worst <= LARGEST_FACTOR
    verdict = "linear" if linear else "**not linear**"
    summary = f"Ours grows by at most {worst:.2f}x per doubling of the length: {verdict}."
    shape = f"causal, batch 1, {NUM_HEADS} heads, head_dim {HEAD_DIM}"
    title = heading(f"Peak memory of forward + backward above the inputs ({shape})", info)
    markdown = "\n".join([title, *table(series, seqlens), "", summary, "", "![memory](memory.png)"])
    print("\n" + markdown)
    folder = results_folder(arguments, info)
    plot(series, seqlens, folder / "memory.png")
    content: dict[str, Any] = {"machine": info, "seqlens": seqlens, "megabytes": series, "linear": linear}
    save(folder, "memory", content, markdown)
    return 1 if arguments.check and not linear else 0


if __name__ == "__main__":
    sys.exit(main())
