"""What the GPU benchmark measures, and on what: cases in their order, passes, and the variants of ours."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch

from flash_attn import build_info
from harness.cases import RAGGED_SEQLENS, Case
from harness.implementation import OURS, Implementation

TOTAL_TOKENS = 16384  # of a batch, whatever the length of its sequences
HIDDEN = 2048  # num_heads * head_dim
SWEEP = (64, 128, 256)  # values of head_dim
MATH_LIMIT = 4096**2  # longer sequences need too much memory and time with the whole matrix
HOST_BOUND = ("decode", "short")  # groups in which a call takes the host longer than the GPU


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
    """Every case, those first that tell most."""
    return [*_sweep("bf16"), *_sweep("fp16"), *_more_head_dims(), *_special(), *_decode()]


def _sweep(dtype: str) -> Iterator[Case]:
    shapes = [
        *((seqlen, head_dim) for head_dim in (128, 64, 256) for seqlen in (4096, 16384, 8192)),
        *((seqlen, head_dim) for seqlen in (2048, 1024, 512) for head_dim in (128, 64, 256)),
    ]
    return _with_both_masks(_case("dense", seqlen, head_dim, dtype=dtype) for seqlen, head_dim in shapes)


def _with_both_masks(cases: Iterator[Case]) -> Iterator[Case]:
    """Full and causal, or causal and full, by turns that no shard can keep up with: every n-th case has both masks."""
    for number, case in enumerate(cases):
        first = number * (number + 1) // 2 % 2 == 1  # no, yes, yes, no, no, yes, yes, ...
        yield replace(case, causal=first)
        yield replace(case, causal=not first)


def _more_head_dims() -> Iterator[Case]:
    return _with_both_masks(
        _case("dense", 4096, head_dim, head_dim_v=head_dim_v, num_heads=16, num_heads_k=16)
        for head_dim, head_dim_v in ((192, 128), (96, 96))
    )


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


def passes_of(case: Case, passes: Sequence[str]) -> list[str]:
    """What is timed: without a backward pass, the forward pass alone."""
    return [which for which in passes if case.backward or which == "forward"]


def flops(case: Case, which: str) -> float:
    """Of the products that the mask leaves: two forward, five backward."""
    forward = replace(case, backward=False).flops()
    both = replace(case, backward=True).flops()
    return {"forward": forward, "backward": both - forward, "both": both}[which]


class _Deterministic(Implementation):
    """Ours, with backward passes that add up in a fixed order."""

    passes: ClassVar[tuple[str, ...]] = ("backward",)

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


class _Generic(Implementation):
    """Ours, by the kernels that every GPU has."""

    @contextlib.contextmanager
    def context(self) -> Iterator[None]:
        """What csrc/ops/asked_backend.h asks for at every call."""
        os.environ["FLASH_ATTN_BACKEND"] = "sm80"
        try:
            yield
        finally:
            del os.environ["FLASH_ATTN_BACKEND"]


def variants(case: Case, ours: Implementation) -> list[Implementation]:
    """Ours in other ways, for the price of them: deterministic, and by the generic kernels. None is a peer."""
    found: list[Implementation] = []
    if case.backward:
        found.append(_Deterministic(f"{OURS}, deterministic", ours.forward, ours.inputs, ours.dout))
    if runs_on_hopper():
        found.append(_Generic(f"{OURS}, generic", ours.forward, ours.inputs, ours.dout))
    return found


def runs_on_hopper() -> bool:
    """Whether the kernels for Hopper run, and not the generic ones."""
    is_hopper = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
    return is_hopper and build_info()["hopper_kernels"] and (os.environ.get("FLASH_ATTN_BACKEND") or "sm90") == "sm90"


def kernels(device: str) -> str:
    """What runs as ours, for the heading."""
    info = build_info()
    if device != "cuda":
        return f"the CPU backend, {info['cpu_instruction_set']}"
    which = "the Hopper kernels" if runs_on_hopper() else "the generic kernels"
    return f"{which}, of a build for {', '.join(info['cuda_archs'])} with CUDA {info['cuda_version']}"


def too_large(case: Case, peer: Implementation) -> str:
    """Why a peer is not even tried; empty if it is."""
    if "math" in peer.name and case.seqlen_q * case.seqlen_k > MATH_LIMIT:
        return f"makes the whole matrix, here of {case.seqlen_q} x {case.seqlen_k}"
    return ""


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


def captured(implementation: Implementation, which: str) -> Callable[[], object]:
    """The same pass as a CUDA graph, so that the time of the host is not in the samples."""
    before, stream = torch.cuda.current_stream(), torch.cuda.Stream()
    stream.wait_stream(before)
    graph = torch.cuda.CUDAGraph()
    try:
        with implementation.context():
            with torch.cuda.stream(stream):
                function = function_of(implementation, which)  # here: a backward pass runs where its forward pass ran
                for _ in range(3):
                    function()
            with torch.cuda.graph(graph, stream=stream):
                function()
    finally:
        torch.cuda.set_stream(before)  # a capture that fails does not
    graph.replay()
    torch.cuda.synchronize()

    def replay(owner: object = function) -> None:  # which owns what the graph reads
        graph.replay()

    return replay
