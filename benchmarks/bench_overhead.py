"""What one tiny call costs: batch 1, seqlen 1, 1 head, where there is nothing to compute.

    python benchmarks/bench_overhead.py

Medians in microseconds per call, of samples of many calls, taken by turns in one process.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from flash_attn import flash_attn_func
from harness.cases import DTYPES
from harness.machine import add_common_arguments, describe, heading, results_folder, save
from harness.timing import Contestant, race

HEAD_DIM = 64
ALLOWED_MICROSECONDS = 15.0  # of flash_attn_func, forward without gradients
OURS, SDPA, OP = "flash_attn_func", "F.scaled_dot_product_attention", "torch.ops.flash_attn.fwd"


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_arguments(parser)
    parser.add_argument("--budget", type=float, default=None, help="seconds per row (3; with --quick 0.1)")
    return parser.parse_args()


def calls(dtype: str, device: str, backward: bool) -> dict[str, Callable[[], object]]:
    """The same tiny problem for everyone; (1, 1, 1, head_dim) is the natural layout of all."""
    shape = (1, 1, 1, HEAD_DIM)
    q, k, v = (torch.randn(shape, dtype=DTYPES[dtype], device=device, requires_grad=backward) for _ in range(3))
    dout = torch.randn(shape, dtype=DTYPES[dtype], device=device)

    def with_backward(forward: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(forward(q, k, v), (q, k, v), dout)

    if backward:
        return {OURS: with_backward(flash_attn_func), SDPA: with_backward(F.scaled_dot_product_attention)}
    functions: dict[str, Callable[[], object]] = {
        OURS: lambda: flash_attn_func(q, k, v),
        SDPA: lambda: F.scaled_dot_product_attention(q, k, v),
    }
    if hasattr(torch.ops.flash_attn, "fwd"):
        op = torch.ops.flash_attn.fwd.default
        options = (None, None, 0, 0, None, None, None, None, None, False, -1, -1, 0.0, 0.0, None)
        functions[OP] = lambda: op(q, k, v, *options)
    return functions


def measure(dtype: str, device: str, backward: bool, budget: float) -> dict[str, float]:
    """Median microseconds per call."""
    contestants = {name: Contestant(call) for name, call in calls(dtype, device, backward).items()}
    race(contestants, device, budget, min_rounds=20, max_rounds=2000)
    return {name: 1e6 * contestant.median() for name, contestant in contestants.items()}


def main() -> int:
    """Measure, print, save."""
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    info = describe(arguments.device)
    budget = arguments.budget if arguments.budget is not None else (0.1 if arguments.quick else 3.0)
    rows, slowest = [], 0.0
    lines = [f"| call | {OURS}, µs | {SDPA}, µs | {OP} alone, µs |", "|---|---:|---:|---:|"]
    for dtype in ("bf16",) if arguments.device == "cuda" else ("fp32", "bf16"):
        for backward in (False, True):
            times = measure(dtype, arguments.device, backward, budget)
            label = f"{dtype} {'forward + backward' if backward else 'forward, no gradients'}"
            cells = [f"{times[name]:.1f}" if name in times else "" for name in (OURS, SDPA, OP)]
            lines.append(f"| {label} | {' | '.join(cells)} |")
            if not backward:
                slowest = max(slowest, times[OURS])
            rows.append({"dtype": dtype, "backward": backward, "microseconds": times})

    met = slowest <= ALLOWED_MICROSECONDS
    verdict = f"Forward without gradients: {slowest:.1f} µs, at most {ALLOWED_MICROSECONDS:g} µs wanted: "
    verdict += "met" if met else "**missed**"
    markdown = "\n".join([heading("Cost of one tiny call (batch 1, seqlen 1, 1 head)", info), *lines, "", verdict])
    print(markdown)
    save(results_folder(arguments, info), "overhead", {"machine": info, "rows": rows, "met": met}, markdown)
    return 1 if arguments.check and not met else 0


if __name__ == "__main__":
    sys.exit(main())
