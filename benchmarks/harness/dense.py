"""Dense batches: ours, every backend of torch's scaled_dot_product_attention, and FlexAttention on a GPU."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.bias import causal_lower_right

from flash_attn import flash_attn_func
from harness.cases import DTYPES, Case
from harness.flex import FLEX, flex_forward
from harness.implementation import OURS, Implementation, random_tensor, torch_backends, visibility


def alibi_slopes(case: Case, device: str) -> Tensor | None:
    """The usual geometric slopes, float32 (num_heads,)."""
    if not case.alibi:
        return None
    return 2.0 ** (-8.0 / case.num_heads * torch.arange(1, case.num_heads + 1, device=device, dtype=torch.float32))


def _dense_mask(case: Case, device: str) -> Tensor | None:
    """What scaled_dot_product_attention needs as attn_mask, or None where is_causal says it or all is visible."""
    slopes = alibi_slopes(case, device)
    if slopes is not None:
        query = torch.arange(case.seqlen_q, device=device)[:, None] + case.seqlen_k - case.seqlen_q
        key = torch.arange(case.seqlen_k, device=device)[None, :]
        bias = -slopes[:, None, None] * (query - key).abs()
        return bias.masked_fill(~visibility(case, device), -math.inf).to(DTYPES[case.dtype])[None]
    if case.window is not None or (case.causal and 1 < case.seqlen_q != case.seqlen_k):
        return visibility(case, device)
    return None


def dense_implementations(case: Case, device: str) -> list[Implementation]:
    """Ours and torch's on one set of (batch, seqlen, heads, head_dim) tensors; torch sees transposed views of them."""
    q = random_tensor(case, device, case.batch_size, case.seqlen_q, case.num_heads, case.head_dim)
    k = random_tensor(case, device, case.batch_size, case.seqlen_k, case.num_heads_k, case.head_dim)
    v = random_tensor(case, device, case.batch_size, case.seqlen_k, case.num_heads_k, case.head_dim_v)
    dout = random_tensor(case, device, case.batch_size, case.seqlen_q, case.num_heads, case.head_dim_v, grad=False)
    slopes = alibi_slopes(case, device)

    def ours() -> Tensor:
        return flash_attn_func(
            q,
            k,
            v,
            dropout_p=case.dropout_p,
            causal=case.causal,
            window_size=case.window_size,
            softcap=case.softcap,
            alibi_slopes=slopes,
        )

    result = [Implementation(OURS, ours, (q, k, v), dout)]
    if case.softcap:  # scaled_dot_product_attention has no softcap
        result.append(Implementation("torch written out", lambda: _written_out(case, q, k, v), (q, k, v), dout))
    else:
        result += _backends(case, device, (q, k, v), dout)
    if device == "cuda" and not case.dropout_p:
        result.append(Implementation(FLEX, flex_forward(case, q, k, v, slopes), (q, k, v), dout))
    return result


def _backends(case: Case, device: str, inputs: tuple[Tensor, Tensor, Tensor], dout: Tensor) -> Iterator[Implementation]:
    """scaled_dot_product_attention with every backend, each with the cheapest mask that it takes."""
    q, k, v = inputs
    mask = _dense_mask(case, device)
    # Without a matrix: two backends know the mask that is aligned at the bottom right.
    aligned = mask is not None and case.window is None and not case.alibi and device == "cuda"

    def sdpa(attn_mask: Tensor | None) -> Callable[[], Tensor]:
        return lambda: F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=attn_mask,
            dropout_p=case.dropout_p,
            is_causal=case.causal and case.seqlen_q == case.seqlen_k and attn_mask is None,
            enable_gqa=case.num_heads != case.num_heads_k,
        ).transpose(1, 2)

    for name, backend in torch_backends(device).items():
        if aligned and name in ("torch flash", "torch efficient"):
            yield Implementation(name, sdpa(causal_lower_right(case.seqlen_q, case.seqlen_k)), inputs, dout, backend)
        else:
            suffix = "" if mask is None else " + mask"
            yield Implementation(name + suffix, sdpa(mask), inputs, dout, backend)


def _written_out(case: Case, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention with softcap in single torch operations."""
    scores = torch.einsum("bihd,bjhd->bhij", q * case.head_dim**-0.5, k)
    scores = case.softcap * torch.tanh(scores / case.softcap)
    weights = scores.masked_fill(~visibility(case, str(q.device)), -math.inf).softmax(dim=-1)
    return torch.einsum("bhij,bjhd->bihd", weights, v)
