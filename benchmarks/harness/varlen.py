"""A ragged batch: ours on packed tensors; torch on padded tensors with a mask, and in a Python loop."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from flash_attn import flash_attn_varlen_func
from harness.cases import DTYPES, Case
from harness.implementation import OURS, Implementation, random_tensor, torch_backends, visibility


def varlen_implementations(case: Case, device: str) -> list[Implementation]:
    """Ours first; every implementation gets the same numbers in its own layout."""
    total, longest = sum(case.seqlens), max(case.seqlens)
    q = random_tensor(case, device, total, case.num_heads, case.head_dim)
    k = random_tensor(case, device, total, case.num_heads_k, case.head_dim)
    v = random_tensor(case, device, total, case.num_heads_k, case.head_dim_v)
    dout = random_tensor(case, device, total, case.num_heads, case.head_dim_v, grad=False)
    offsets = [0, *itertools.accumulate(case.seqlens)]
    cu_seqlens = torch.tensor(offsets, dtype=torch.int32, device=device)

    def ours() -> Tensor:
        return flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, longest, longest, causal=case.causal)

    result = [Implementation(OURS, ours, (q, k, v), dout)]
    result += _padded(case, device, (q, k, v), dout)
    result += _loop(case, device, (q, k, v), dout)
    if device == "cuda":
        result.append(_torch_varlen(case, (q, k, v), dout, cu_seqlens))
    return result


def _padded(case: Case, device: str, packed: tuple[Tensor, Tensor, Tensor], dout: Tensor) -> Iterator[Implementation]:
    """Every sequence filled up to the longest; the dense mask hides the filling from the queries."""
    lengths = torch.tensor(case.seqlens, device=device)
    real = torch.arange(max(case.seqlens), device=device) < lengths[:, None]  # (batch, seqlen), True = not filling
    mask = visibility(case, device) & real[:, None, None, :]

    def pad(tensor: Tensor) -> Tensor:
        padded = torch.zeros(*real.shape, *tensor.shape[1:], dtype=DTYPES[case.dtype], device=device)
        padded[real] = tensor.detach()
        return padded.requires_grad_(tensor.requires_grad)

    q, k, v = (pad(tensor) for tensor in packed)

    def forward() -> Tensor:
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=mask,
            enable_gqa=case.num_heads != case.num_heads_k,
        )
        return out.transpose(1, 2)

    for name, backend in torch_backends(device).items():
        yield Implementation(
            f"{name} + mask, padded", forward, (q, k, v), pad(dout), backend, packed=lambda out: out[real]
        )


def _loop(case: Case, device: str, packed: tuple[Tensor, Tensor, Tensor], dout: Tensor) -> Iterator[Implementation]:
    """One call per sequence, from Python."""
    lengths = list(case.seqlens)

    def forward() -> Tensor:
        outs = [
            F.scaled_dot_product_attention(
                q.transpose(0, 1)[None],
                k.transpose(0, 1)[None],
                v.transpose(0, 1)[None],
                is_causal=case.causal,
                enable_gqa=case.num_heads != case.num_heads_k,
            )[0].transpose(0, 1)
            for q, k, v in zip(*(tensor.split(lengths) for tensor in packed), strict=True)
        ]
        return torch.cat(outs)

    for name, backend in torch_backends(device).items():
        if name != "torch math":
            yield Implementation(f"{name}, loop", forward, packed, dout, backend)


def _torch_varlen(
    case: Case, packed: tuple[Tensor, Tensor, Tensor], dout: Tensor, cu_seqlens: Tensor
) -> Implementation:
    """torch's own packed attention, which only GPUs have."""
    longest = max(case.seqlens)

    def forward() -> Tensor:
        from torch.nn.attention.varlen import varlen_attn

        options: dict[str, Any] = {"window_size": (-1, 0) if case.causal else (-1, -1)}
        if "is_causal" in inspect.signature(varlen_attn).parameters:  # torch 2.10
            options = {"is_causal": case.causal}
        out = varlen_attn(*packed, cu_seqlens, cu_seqlens, longest, longest, **options)
        return out[0] if isinstance(out, tuple) else out

    return Implementation("torch varlen", forward, packed, dout)
