"""What a call costs that has nothing to compute, batch 1, seqlen 1, 1 head, and one that has very little.

Medians in microseconds per call, of samples of many calls, taken by turns in one process.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from flash_attn import flash_attn_func
from harness.cases import DTYPES
from harness.machine import describe, heading, save
from harness.timing import Timed, time_interleaved

SHAPES = ((1, 1, 1, 64), (2, 32, 4, 32))  # batch_size, seqlen, num_heads, head_dim; the first is the one with a target
# Of flash_attn_func, as a multiple of what F.scaled_dot_product_attention takes; by whether there is a backward pass.
ALLOWED = {False: 1.7, True: 1.25}
OURS, SDPA, OP = "flash_attn_func", "F.scaled_dot_product_attention", "torch.ops.flash_attn.fwd"


def functions(shape: Sequence[int], dtype: str, device: str, backward: bool) -> dict[str, Callable[[], object]]:
    """The same problem for everyone, each in its own layout: a transpose would cost as much as the call."""
    q, k, v, dout = (torch.randn(*shape, dtype=DTYPES[dtype], device=device) for _ in range(4))
    q_t, k_t, v_t = (x.transpose(1, 2).contiguous() for x in (q, k, v))
    if not backward:
        op = torch.ops.flash_attn.fwd.default
        return {
            OURS: lambda: flash_attn_func(q, k, v),
            SDPA: lambda: F.scaled_dot_product_attention(q_t, k_t, v_t),
            OP: lambda: op(q, k, v),
        }

    def with_backward(forward: Callable[..., Tensor], inputs: Sequence[Tensor], grad: Tensor) -> Callable[[], object]:
        leaves = [x.requires_grad_() for x in inputs]
        return lambda: torch.autograd.grad(forward(*leaves), leaves, grad)

    return {
        OURS: with_backward(flash_attn_func, (q, k, v), dout),
        SDPA: with_backward(F.scaled_dot_product_attention, (q_t, k_t, v_t), dout.transpose(1, 2).contiguous()),
    }


def main(arguments: argparse.Namespace) -> int:
    """Measure, save; with --check the exit status is 1 if a target is missed."""
    device, info = arguments.device, describe(arguments.device)
    budget = arguments.budget or (0.1 if arguments.quick else 3.0)
    rows, ratios = [], {False: 0.0, True: 0.0}
    lines = [f"| call | {OURS}, µs | {SDPA}, µs | {OP} alone, µs |", "|---|---:|---:|---:|"]
    dtypes = ("bf16",) if device == "cuda" else ("fp32", "bf16")
    for shape, dtype, backward in itertools.product(SHAPES, dtypes, (False, True)):
        timed = {name: Timed(call) for name, call in functions(shape, dtype, device, backward).items()}
        time_interleaved(timed, device, budget, min_rounds=20, max_rounds=2000)
        times = {name: 1e6 * each.median() for name, each in timed.items()}
        label = "b{} n{} h{} d{}".format(*shape)
        cells = [f"{times[column]:.1f}" if column in times else "" for column in (OURS, SDPA, OP)]
        passes = "forward + backward" if backward else "forward, no gradients"
        lines.append(f"| {label} {dtype} {passes} | {' | '.join(cells)} |")
        rows.append({"shape": label, "dtype": dtype, "backward": backward, "microseconds": times})
        if shape == SHAPES[0]:
            ratios[backward] = max(ratios[backward], times[OURS] / times[SDPA])
    met = all(ratio <= ALLOWED[backward] for backward, ratio in ratios.items())
    verdict = f"Batch 1, seqlen 1, 1 head, in times of {SDPA}: forward without gradients {ratios[False]:.2f}, "
    verdict += f"forward and backward {ratios[True]:.2f}; at most {ALLOWED[False]} and {ALLOWED[True]} wanted: "
    verdict += "met" if met else "**missed**"
    markdown = "\n".join([heading("Cost of one tiny call", info), *lines, "", verdict])
    save("quick-overhead" if arguments.quick else "overhead", {"machine": info, "rows": rows, "met": met}, markdown)
    return int(arguments.check and not met)
