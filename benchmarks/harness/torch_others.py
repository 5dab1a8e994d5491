"""torch's ways besides scaled_dot_product_attention: FlexAttention, packed attention, single operations."""

from __future__ import annotations

import functools
import inspect
import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from harness.cases import Case
from harness.provider import Call, Problem, Provider, visibility


def flex(problem: Problem) -> Call:
    """FlexAttention, compiled; the first call makes the mask, compiles, and takes seconds."""
    case, slopes = problem.case, problem.alibi_slopes
    shift, window = case.seqlen_k - case.seqlen_q, case.window
    torch.compiler.reset()  # it compiles for every case, and stops doing so after some
    compiled = torch.compile(flex_attention)

    def mask_mod(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        visible = key <= query + shift
        visible = visible if window is None else visible & (key >= query + shift - window)
        return visible if case.prefix is None else visible | (key < case.prefix)

    def score_mod(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        if case.softcap:
            score = case.softcap * torch.tanh(score / case.softcap)
        if slopes is not None:
            score = score - slopes[head] * (query + shift - key).abs()
        return score

    @functools.cache
    def block_mask() -> BlockMask | None:
        if not case.causal:
            return None
        return create_block_mask(mask_mod, None, None, case.seqlen_q, case.seqlen_k, device=case.device)

    def forward() -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in problem.inputs)
        out = compiled(
            q,
            k,
            v,
            score_mod=score_mod if case.softcap or slopes is not None else None,
            block_mask=block_mask(),
            enable_gqa=case.num_heads != case.num_heads_k,
        )
        return out.transpose(1, 2)

    return Call(forward, problem.inputs, problem.dout)


def _varlen(problem: Problem) -> Call:
    """Packed attention."""
    case, cu = problem.case, problem.cu_seqlens

    def forward() -> Tensor:
        from torch.nn.attention.varlen import varlen_attn

        options: dict[str, Any] = {"window_size": (-1, 0) if case.causal else (-1, -1)}
        if "is_causal" in inspect.signature(varlen_attn).parameters:  # torch 2.10
            options = {"is_causal": case.causal}
        assert cu is not None
        out = varlen_attn(*problem.inputs, cu, cu, case.seqlen_q, case.seqlen_k, **options)
        return out[0] if isinstance(out, tuple) else out

    return Call(forward, problem.inputs, problem.dout)


def _written_out(problem: Problem) -> Call:
    """Single operations."""
    case, hidden = problem.case, ~visibility(problem.case)

    def forward() -> Tensor:
        scores = torch.einsum("bihd,bjhd->bhij", problem.q * case.head_dim**-0.5, problem.k)
        if case.softcap:
            scores = case.softcap * torch.tanh(scores / case.softcap)
        scores = scores.masked_fill(hidden, -math.inf)
        if problem.s_aux is not None:
            sinks = problem.s_aux[:, None, None].expand(*scores.shape[:-1], 1).to(scores.dtype)
            weights = torch.cat([scores, sinks], dim=-1).softmax(dim=-1)[..., :-1]
        else:
            weights = scores.softmax(dim=-1)
        return torch.einsum("bhij,bjhd->bihd", weights, problem.v)

    return Call(forward, problem.inputs, problem.dout)


def _has_flex(case: Case) -> bool:
    return not case.seqlens and not case.dropout_p and not case.sinks


def _repeats_heads(case: Case) -> str:
    return "" if case.num_heads == case.num_heads_k else "would repeat keys for every head of queries"


PROVIDERS = (
    # Only GPUs have packed attention, and a backward pass of FlexAttention.
    Provider("torch varlen", _varlen, lambda case: bool(case.seqlens), devices=("cuda",)),
    Provider("torch flex", flex, _has_flex, devices=("cuda",), stage=2),
    Provider("torch written out", _written_out, lambda case: case.softcap > 0 or case.sinks, why_not=_repeats_heads),
)
