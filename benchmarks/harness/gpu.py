"""What the GPU benchmark measures, and on what: cases, passes, clocks and power."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from flash_attn import build_info
from harness.cases import RAGGED_SEQLENS, Case
from harness.implementation import OURS, Implementation

PASSES = ("forward", "backward", "both")
TOTAL_TOKENS = 16384  # of a batch, whatever the length of its sequences
HIDDEN = 2048  # num_heads * head_dim
MATH_LIMIT = 4096  # longer sequences need too much memory and time with the whole matrix


def _case(group: str, seqlen: int, head_dim: int, **changes: Any) -> Case:
    num_heads = HIDDEN // head_dim
    defaults: dict[str, Any] = {
        "batch_size": max(1, TOTAL_TOKENS // seqlen),
        "num_heads": num_heads,
        "num_heads_k": num_heads,
        "head_dim_v": head_dim,
        "backward": True,
    }
    return Case(group, changes.pop("dtype", "bf16"), seqlen, seqlen, head_dim=head_dim, **{**defaults, **changes})


def gpu_cases() -> list[Case]:
    """Every case; the order spreads what takes long over all shards."""
    return [*_dense(), *_special(), *_decode()]


def _dense() -> Iterator[Case]:
    for dtype in ("bf16", "fp16"):
        for seqlen in (512, 1024, 2048, 4096, 8192, 16384):
            for head_dim in (64, 128, 256):
                for causal in (False, True):
                    yield _case("dense", seqlen, head_dim, causal=causal, dtype=dtype)
    for causal in (False, True):
        yield _case("dense", 4096, 96, causal=causal, num_heads=16, num_heads_k=16)
        yield _case("dense", 4096, 192, causal=causal, num_heads=16, num_heads_k=16, head_dim_v=128)


def _special() -> Iterator[Case]:
    yield _case("gqa", 8192, 128, causal=True, num_heads=64, num_heads_k=8, batch_size=2)
    yield _case("window", 8192, 128, causal=True, window=1024)
    yield _case("window", 16384, 64, causal=True, window=128)
    yield _case("alibi", 4096, 128, causal=True, alibi=True)
    yield _case("softcap", 4096, 128, causal=True, softcap=30.0)
    yield _case("dropout", 4096, 128, causal=True, dropout_p=0.1)
    yield _case("unaligned", 4096, 72, causal=True, num_heads=16, num_heads_k=16)
    seqlens = tuple(4 * n for n in RAGGED_SEQLENS)
    yield _case("varlen", max(seqlens), 128, causal=True, seqlens=seqlens)
    yield _case("short", 128, 64, causal=True, batch_size=1)


def _decode() -> Iterator[Case]:
    for batch_size, seqlen_q, seqlen_k in [(1, 1, 8192), (32, 1, 8192), (8, 16, 8192), (1, 256, 65536)]:
        yield Case(
            "decode", "bf16", seqlen_q, seqlen_k, batch_size=batch_size, num_heads=32, num_heads_k=8, head_dim=128,
            head_dim_v=128, causal=True,
        )  # fmt: skip


def quick(case: Case) -> Case:
    """The same kind of case, small enough for a rehearsal on a CPU."""
    return replace(
        case,
        seqlen_q=min(case.seqlen_q, 64),
        seqlen_k=min(case.seqlen_k, 64),
        batch_size=min(case.batch_size, 2),
        num_heads=4,
        num_heads_k=4 if case.num_heads == case.num_heads_k else 2,
        seqlens=tuple(min(n, 64) for n in case.seqlens),
        window=None if case.window is None else min(case.window, 16),
    )


def passes_of(case: Case) -> tuple[str, ...]:
    """What is timed: without a backward pass, the forward pass alone."""
    return PASSES if case.backward else PASSES[:1]


def flops(case: Case, which: str) -> float:
    """Of the products that the mask leaves: two forward, five backward."""
    forward = replace(case, backward=False).flops()
    both = replace(case, backward=True).flops()
    return {"forward": forward, "backward": both - forward, "both": both}[which]


class _Deterministic(Implementation):
    """Ours, with backward passes that add up in a fixed order."""

    @contextlib.contextmanager
    def context(self) -> Iterator[None]:
        """Asks for it in the way that concerns all of torch; memory is not filled for it."""
        settings: Any = torch.utils.deterministic
        fill, settings.fill_uninitialized_memory = settings.fill_uninitialized_memory, False
        torch.use_deterministic_algorithms(True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(False)
            settings.fill_uninitialized_memory = fill


def deterministic(ours: Implementation) -> Implementation:
    """The same, deterministic; no peer, for the price of it."""
    return _Deterministic(f"{OURS}, deterministic", ours.forward, ours.inputs, ours.dout)


class _Generic(Implementation):
    """Ours, by the kernels that every GPU has."""

    @contextlib.contextmanager
    def context(self) -> Iterator[None]:
        """What csrc/ops/cuda.cpp asks for at every call."""
        os.environ["FLASH_ATTN_GENERIC_KERNELS"] = "1"
        try:
            yield
        finally:
            del os.environ["FLASH_ATTN_GENERIC_KERNELS"]


def other_kernels(ours: Implementation) -> list[Implementation]:
    """The same by the generic kernels, where a GPU has others as well; no peer."""
    has_others = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
    if not has_others or not build_info()["hopper_kernels"]:
        return []
    return [_Generic(f"{OURS}, generic", ours.forward, ours.inputs, ours.dout)]


def function_of(implementation: Implementation, which: str) -> Callable[[], object]:
    """One pass of an implementation, as a call without arguments."""
    inputs, dout = implementation.inputs, implementation.dout
    if which == "forward":

        def forward() -> object:
            with torch.no_grad():
                return implementation.forward()

        return forward
    if which == "backward":
        with implementation.context():
            out = implementation.forward()
        return lambda: torch.autograd.grad(out, inputs, dout, retain_graph=True)
    return lambda: torch.autograd.grad(implementation.forward(), inputs, dout)


QUERIES = {
    "sm_clock_mhz": "clocks.sm",
    "sm_clock_max_mhz": "clocks.max.sm",
    "memory_clock_mhz": "clocks.mem",
    "power_w": "power.draw",
    "power_limit_w": "power.limit",
    "temperature_c": "temperature.gpu",
    "driver": "driver_version",
}


def device_state(device: str, names: tuple[str, ...] = tuple(QUERIES)) -> dict[str, Any]:
    """Clocks, power and driver, as nvidia-smi tells them at this moment; nothing where it cannot."""
    if device != "cuda":
        return {}
    query = "--query-gpu=" + ",".join(QUERIES[name] for name in names)
    command = ["nvidia-smi", "--id=0", "--format=csv,noheader,nounits", query]
    try:
        text = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(names, [_number(each) for each in text.strip().split(", ")], strict=False))


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text
