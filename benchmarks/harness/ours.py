"""Ours: as users call it, in its variants, and other builds of it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flash_attn import build_info, flash_attn_func, flash_attn_varlen_func
from harness.cases import Case
from harness.provider import OURS, Call, Problem, Provider


def _key_ranges(case: Case) -> Tensor:
    """(1, seqlen_q, 2): a query sees the prefix, and what is before it."""
    last = torch.arange(case.seqlen_q, device=case.device) + case.seqlen_k - case.seqlen_q
    end = last.clamp(min=(case.prefix or 0) - 1) + 1
    return torch.stack([torch.zeros_like(end), end], -1)[None].to(torch.int32)


def _public_functions(problem: Problem, sinks: bool = True) -> Call:
    case, cu = problem.case, problem.cu_seqlens
    options: dict[str, Any] = {"dropout_p": case.dropout_p, "causal": case.causal, "window_size": case.window_size}
    options |= {"softcap": case.softcap, "alibi_slopes": problem.alibi_slopes}
    if case.prefix is not None:
        options |= {"causal": False, "key_ranges": _key_ranges(case)}
    if case.sinks and sinks:
        options["s_aux"] = problem.s_aux

    def forward() -> Tensor:
        if cu is None:
            return flash_attn_func(*problem.inputs, **options)
        return flash_attn_varlen_func(*problem.inputs, cu, cu, case.seqlen_q, case.seqlen_k, **options)

    return Call(forward, problem.inputs, problem.dout)


@contextlib.contextmanager
def _deterministic() -> Iterator[None]:
    """Asks for it in the way that concerns all of torch; memory is not filled for it."""
    settings: Any = torch.utils.deterministic
    fill, settings.fill_uninitialized_memory = settings.fill_uninitialized_memory, False
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        settings.fill_uninitialized_memory = fill


@contextlib.contextmanager
def _generic() -> Iterator[None]:
    """Asks for the kernels that every GPU has, which ops look for at every call."""
    os.environ["FLASH_ATTN_BACKEND"] = "sm80"
    try:
        yield
    finally:
        del os.environ["FLASH_ATTN_BACKEND"]


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


def other_build(name: str, path: Path) -> Provider:
    """Ours by the ops of another build, torch.ops.flash_attn_NAME.

    Without dropout, whose state they do not draw, and without sinks and key ranges, which older ones do not know.
    """
    torch.ops.load_library(str(path))
    fwd = getattr(torch.ops, f"flash_attn_{name}").fwd

    def make_call(problem: Problem) -> Call:
        case, cu = problem.case, problem.cu_seqlens
        options: dict[str, Any] = {"softmax_scale": case.head_dim**-0.5, "causal": case.causal, "softcap": case.softcap}
        options |= dict(zip(("window_size_left", "window_size_right"), case.window_size, strict=True))
        options["alibi_slopes"] = problem.alibi_slopes
        if cu is not None:
            options |= {"cu_seqlens_q": cu, "cu_seqlens_k": cu}
            options |= {"max_seqlen_q": case.seqlen_q, "max_seqlen_k": case.seqlen_k}
        return Call(lambda: fwd(*problem.inputs, **options)[0], problem.inputs, problem.dout)

    return Provider(
        f"{OURS}, {name}", make_call, lambda case: not case.dropout_p and not case.sinks and case.prefix is None
    )


PROVIDERS = (
    Provider(OURS, _public_functions),
    Provider(
        f"{OURS}, deterministic",
        _public_functions,
        lambda case: case.backward,
        context=_deterministic,
        passes=("backward",),
    ),
    Provider(
        f"{OURS}, without sinks", lambda problem: _public_functions(problem, sinks=False), lambda case: case.sinks
    ),
    Provider(f"{OURS}, generic", _public_functions, lambda case: runs_on_hopper(), devices=("cuda",), context=_generic),
)
