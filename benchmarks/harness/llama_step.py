"""A training step of a small Llama of transformers on packed sequences: flash_attn, SDPA and eager attention.

Time by turns in one process; peak memory above the model, gradients and optimizer, each in a fresh process. Needs
transformers. The sequences of a batch are laid end to end in one row, as DataCollatorWithFlattening does: flash_attn
skips what lies between them, the others get a mask of the whole row.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from harness.machine import describe, heading, save
from harness.memory import resident_bytes
from harness.timing import Timed, time_interleaved

ATTENTIONS = ("flash_attention_2", "sdpa", "eager")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
NUM_SEQUENCES, SEQLEN = 16, 256
SIZES = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 4, "num_attention_heads": 8}
QUICK_SEQUENCES, QUICK_SEQLEN = 3, 32
LARGEST_DIFFERENCE = {"fp32": 1e-3, "bf16": 3e-2}  # of the losses


def make_step(attention: str, dtype: str, device: str, quick: bool) -> Callable[[], float]:
    """A function that takes one step, always from the same weights, and returns the loss."""
    import transformers

    from flash_attn.integrations.transformers import register

    register()
    torch.manual_seed(0)
    shape: dict[str, Any] = {**SIZES, "num_hidden_layers": 1} if quick else {**SIZES}
    config = transformers.LlamaConfig(vocab_size=2048, num_key_value_heads=4, **shape)
    model = transformers.LlamaForCausalLM._from_config(config, attn_implementation=attention)
    model = model.to(device, DTYPES[dtype]).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    count, seqlen = (QUICK_SEQUENCES, QUICK_SEQLEN) if quick else (NUM_SEQUENCES, SEQLEN)
    tokens = torch.randint(0, 2048, (1, count * seqlen), device=device)
    batch = {"input_ids": tokens, "labels": tokens, "position_ids": torch.arange(seqlen, device=device).repeat(count)}
    batch["position_ids"] = batch["position_ids"][None]

    def step() -> float:
        loss = model(**batch, use_cache=False).loss
        optimizer.zero_grad(set_to_none=False)
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return step


def peak_of(attention: str, dtype: str, device: str, threads: int, quick: bool) -> int:
    """Bytes at the peak of a step above what is there between steps. Runs in its own process."""
    torch.set_num_threads(threads)
    step = make_step(attention, dtype, device, quick)
    step()
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() - before
    with contextlib.suppress(OSError):  # restarts the recording of the peak, on Linux
        Path("/proc/self/clear_refs").write_text("5")
    before = resident_bytes("VmRSS")
    step()
    return max(0, resident_bytes("VmHWM") - before)


def measure(dtype: str, arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    """By attention: seconds, how many times slower than ours in the same round, megabytes, and the loss."""
    device, quick = arguments.device, arguments.quick
    steps = {name: make_step(name, dtype, device, quick) for name in ATTENTIONS}
    losses = {name: step() for name, step in steps.items()}
    timed = {name: Timed(step, repeats=False) for name, step in steps.items()}
    time_interleaved(timed, device, arguments.budget or (0.1 if quick else 30.0), min_rounds=3)
    found = {}
    for name, each in timed.items():
        with ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn")) as pool:
            peak = pool.submit(peak_of, name, dtype, device, arguments.threads, quick).result()
        ratio = each.ratio_to(timed[ATTENTIONS[0]])
        found[name] = {"seconds": each.median(), "ratio": ratio, "megabytes": peak / 1e6, "loss": losses[name]}
    return found


def main(arguments: argparse.Namespace) -> int:
    """Measure and save; the exit status is 1 if the losses differ."""
    info = describe(arguments.device)
    results = {dtype: measure(dtype, arguments) for dtype in DTYPES}
    count, seqlen = (QUICK_SEQUENCES, QUICK_SEQLEN) if arguments.quick else (NUM_SEQUENCES, SEQLEN)
    title = f"A training step of a small Llama on {count} packed sequences of {seqlen} tokens"
    lines = [heading(title, info), "| | seconds | time / ours | peak memory of the step, MB | loss |"]
    lines.append("|---|---:|---:|---:|---:|")
    same = True
    for dtype, found in results.items():
        for name, row in found.items():
            numbers = f"{row['seconds']:.3f} | {row['ratio']:.2f} | {row['megabytes']:.0f} | {row['loss']:.5f}"
            lines.append(f"| {name} {dtype} | {numbers} |")
            same = same and abs(row["loss"] - found[ATTENTIONS[0]]["loss"]) <= LARGEST_DIFFERENCE[dtype]
    lines.append(f"\nLosses: {'the same' if same else '**different**'}.")
    stem = "quick-llama" if arguments.quick else "llama"
    save(stem, {"machine": info, "results": results, "same": same}, "\n".join(lines))
    return int(not same)
