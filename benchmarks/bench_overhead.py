"""What a call costs that has nothing to compute: batch 1, seqlen 1, 1 head; and one that has very little.

    python benchmarks/bench_overhead.py

Medians in microseconds per call, of samples of many calls, taken by turns in one process.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from flash_attn import flash_attn_func
from harness.cases import DTYPES
from harness.machine import add_common_arguments, describe, heading, results_folder, save
from harness.timing import Provider, time_interleaved

# batch_size, seqlen, num_heads, head_dim. The first is the one with a target.
SHAPES = {"b1 n1 h1 d64": (1, 1, 1, 64), "b2 n32 h4 d32": (2, 32, 4, 32)}
# Of flash_attn_func, as a multiple of what F.scaled_dot_product_attention takes; by whether there is a backward pass.
ALLOWED = {False: 1.7, True: 1.25}
OURS, SDPA, OP = "flash_attn_func", "F.scaled_dot_product_attention", "torch.ops.flash_attn.fwd"


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_arguments(parser)
    parser.add_argument("--budget", type=float, default=None, help="seconds per row (3; with --quick 0.1)")
    return parser.parse_args()


def calls(shape: tuple[int, ...], dtype: str, device: str, backward: bool) -> dict[str, Callable[[], object]]:
    """The same problem for everyone, each in its own layout: torch has heads before rows."""
    q, k, v = (torch.randn(shape, dtype=DTYPES[dtype], device=device, requires_grad=backward) for _ in range(3))
    dout = torch.randn(shape, dtype=DTYPES[dtype], device=device)
    q_t, k_t, v_t = (x.detach().transpose(1, 2).contiguous().requires_grad_(backward) for x in (q, k, v))
    their_dout = dout.transpose(1, 2).contiguous()

    def with_backward(forward: Callable[..., Tensor], inputs: Sequence[Tensor], grad: Tensor) -> Callable[[], object]:
        return lambda: torch.autograd.grad(forward(*inputs), inputs, grad)

    if backward:
        return {
            OURS: with_backward(flash_attn_func, (q, k, v), dout),
            SDPA: with_backward(F.scaled_dot_product_attention, (q_t, k_t, v_t), their_dout),
        }
    functions: dict[str, Callable[[], object]] = {
        OURS: lambda: flash_attn_func(q, k, v),
        SDPA: lambda: F.scaled_dot_product_attention(q_t, k_t, v_t),
    }
    if hasattr(torch.ops.flash_attn, "fwd"):
        op = torch.ops.flash_attn.fwd.default
        functions[OP] = lambda: op(q, k, v)
    return functions


def measure(shape: tuple[int, ...], dtype: str, device: str, backward: bool, budget: float) -> dict[str, float]:
    """Median microseconds per call."""
    providers = {name: Provider(call) for name, call in calls(shape, dtype, device, backward).items()}
    time_interleaved(providers, device, budget, min_rounds=20, max_rounds=2000)
    return {name: 1e6 * provider.median() for name, provider in providers.items()}


def main() -> int:
    """Measure, print, save."""
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    info = describe(arguments.device)
    budget = arguments.budget if arguments.budget is not None else (0.1 if arguments.quick else 3.0)
    rows, ratios = [], {False: 0.0, True: 0.0}
    lines = [f"| call | {OURS}, µs | {SDPA}, µs | {OP} alone, µs |", "|---|---:|---:|---:|"]
    dtypes = ("bf16",) if arguments.device == "cuda" else ("fp32", "bf16")
    for (name, shape), dtype, backward in itertools.product(SHAPES.items(), dtypes, (False, True)):
        times = measure(shape, dtype, arguments.device, backward, budget)
        label = f"{name} {dtype} {'forward + backward' if backward else 'forward, no gradients'}"
        cells = [f"{times[column]:.1f}" if column in times else "" for column in (OURS, SDPA, OP)]
        lines.append(f"| {label} | {' | '.join(cells)} |")
        if shape == (1, 1, 1, 64):
            ratios[backward] = max(ratios[backward], times[OURS] / times[SDPA])
        rows.append({"shape": name, "dtype": dtype, "backward": backward, "microseconds": times})

    met = all(ratio <= ALLOWED[backward] for backward, ratio in ratios.items())
    verdict = f"Batch 1, seqlen 1, 1 head, in times of {SDPA}: forward without gradients {ratios[False]:.2f}, "
    verdict += f"forward and backward {ratios[True]:.2f}; at most {ALLOWED[False]} and {ALLOWED[True]} wanted: "
    verdict += "met" if met else "**missed**"
    markdown = "\n".join([heading("Cost of one tiny call", info), *lines, "", verdict])
    print(markdown)
    save(results_folder(arguments, info), "overhead", {"machine": info, "rows": rows, "met": met}, markdown)
    return 1 if arguments.check and not met else 0


if __name__ == "__main__":
    sys.exit(main())
