"""torch's scaled_dot_product_attention, each of its backends, on dense batches and on packed ones."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from harness.cases import DTYPES, Case
from harness.provider import Call, Problem, Provider, visibility

MATH = "torch math"
BACKENDS = {
    "torch flash": SDPBackend.FLASH_ATTENTION,
    MATH: SDPBackend.MATH,
    "torch cudnn": SDPBackend.CUDNN_ATTENTION,
    "torch efficient": SDPBackend.EFFICIENT_ATTENTION,
}
ON_GPUS_ONLY = ("torch cudnn", "torch efficient")
KNOW_LOWER_RIGHT = ("torch flash", "torch efficient")  # the causal mask of fewer queries than keys, without a matrix
MATH_LIMIT = 4096**2  # larger matrices need too much memory and time


def attention(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """scaled_dot_product_attention of transposed views of (batch, seqlen, heads, head_dim) tensors."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1], **options).transpose(1, 2)


def _dense_mask(problem: Problem) -> Tensor | None:
    """What has to be told as attn_mask; None where is_causal says it or all is visible."""
    case = problem.case
    if problem.alibi_slopes is not None:
        query = torch.arange(case.seqlen_q, device=case.device)[:, None] + case.seqlen_k - case.seqlen_q
        key = torch.arange(case.seqlen_k, device=case.device)[None, :]
        bias = -problem.alibi_slopes[:, None, None] * (query - key).abs()
        return bias.masked_fill(~visibility(case), -math.inf).to(DTYPES[case.dtype])[None]
    if case.window is not None or case.prefix is not None or (case.causal and 1 < case.seqlen_q != case.seqlen_k):
        return visibility(case)
    return None


def _dense(problem: Problem, backend: str) -> Call:
    """With the cheapest mask that the backend takes."""
    case, mask, name = problem.case, _dense_mask(problem), backend
    if mask is not None:
        hides_later_keys_only = case.window is None and case.prefix is None and not case.alibi
        knows = case.device == "cuda" and backend in KNOW_LOWER_RIGHT and hides_later_keys_only
        name, mask = (name, causal_lower_right(*mask.shape)) if knows else (f"{name} + mask", mask)
    causal = case.causal and case.seqlen_q == case.seqlen_k and mask is None

    def forward() -> Tensor:
        return attention(*problem.inputs, attn_mask=mask, dropout_p=case.dropout_p, is_causal=causal)

    return Call(forward, problem.inputs, problem.dout, name)


def _padded(problem: Problem) -> Call:
    """Every sequence filled up to the longest; the mask hides the filling from the queries."""
    case = problem.case
    lengths = torch.tensor(case.seqlens, device=case.device)
    real = torch.arange(case.seqlen_k, device=case.device) < lengths[:, None]  # (batch, seqlen), True = not filling
    mask = visibility(case) & real[:, None, None, :]

    def pad(tensor: Tensor) -> Tensor:
        padded = torch.zeros(*real.shape, *tensor.shape[1:], dtype=tensor.dtype, device=case.device)
        padded[real] = tensor.detach()
        return padded.requires_grad_(tensor.requires_grad)

    q, k, v = (pad(tensor) for tensor in problem.inputs)
    return Call(lambda: attention(q, k, v, attn_mask=mask), (q, k, v), pad(problem.dout), packed=lambda out: out[real])


def _loop(problem: Problem) -> Call:
    """One call per sequence, from Python."""
    lengths = list(problem.case.seqlens)

    def forward() -> Tensor:
        sequences = zip(*(tensor[None].split(lengths, dim=1) for tensor in problem.inputs), strict=True)
        return torch.cat([attention(*each, is_causal=problem.case.causal)[0] for each in sequences])

    return Call(forward, problem.inputs, problem.dout)


def _makes_large_matrix(case: Case) -> str:
    is_large = case.seqlen_q * case.seqlen_k > MATH_LIMIT
    return f"makes the whole matrix, here of {case.seqlen_q} x {case.seqlen_k}" if is_large else ""


def _providers(backend: str) -> list[Provider]:
    common: dict[str, Any] = {"context": functools.partial(sdpa_kernel, BACKENDS[backend])}
    if backend in ON_GPUS_ONLY:
        common["devices"] = ("cuda",)
    if backend == MATH:
        common["why_not"] = _makes_large_matrix
    dense = functools.partial(_dense, backend=backend)
    return [  # there are neither softcap nor sinks
        Provider(backend, dense, lambda case: not case.seqlens and not case.softcap and not case.sinks, **common),
        Provider(f"{backend} + mask, padded", _padded, lambda case: bool(case.seqlens), **common),
        Provider(f"{backend}, loop", _loop, lambda case: bool(case.seqlens) and backend != MATH, **common),
    ]


PROVIDERS = tuple(provider for backend in BACKENDS for provider in _providers(backend))
