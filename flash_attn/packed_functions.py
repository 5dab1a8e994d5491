"""The public functions whose queries, keys and values share tensors, with the signatures of flash_attn 2.8."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from flash_attn.autograd import KV_PACKED, QKV_PACKED, Sequences, attention


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    s_aux: Tensor | None = None,
) -> Any:
    """flash_attn_func with keys and values in one tensor. Their gradient is one tensor too, without concatenation.

    Args:
        q: (batch_size, seqlen_q, num_heads, head_dim).
        kv: (batch_size, seqlen_k, 2, num_heads_k, head_dim).

    The other arguments, results and errors are those of flash_attn_func.
    """
    return attention(
        "flash_attn_kvpacked_func",
        KV_PACKED,
        (q, kv),
        dropout_p=dropout_p,
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        deterministic=deterministic,
        return_attn_probs=return_attn_probs,
        s_aux=s_aux,
    )


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    s_aux: Tensor | None = None,
) -> Any:
    """flash_attn_func with queries, keys and values in one tensor. So is their gradient, without concatenation.

    Args:
        qkv: (batch_size, seqlen, 3, num_heads, head_dim).

    The other arguments, results and errors are those of flash_attn_func.
    """
    return attention(
        "flash_attn_qkvpacked_func",
        QKV_PACKED,
        (qkv,),
        dropout_p=dropout_p,
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        deterministic=deterministic,
        return_attn_probs=return_attn_probs,
        s_aux=s_aux,
    )


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | Tensor,
    max_seqlen_k: int | Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    s_aux: Tensor | None = None,
) -> Any:
    """flash_attn_varlen_func with keys and values in one tensor. Their gradient is one tensor too.

    Args:
        q: (total_q, num_heads, head_dim).
        kv: (total_k, 2, num_heads_k, head_dim).

    The other arguments, results and errors are those of flash_attn_varlen_func.
    """
    return attention(
        "flash_attn_varlen_kvpacked_func",
        KV_PACKED,
        (q, kv),
        Sequences(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k),
        dropout_p=dropout_p,
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        deterministic=deterministic,
        return_attn_probs=return_attn_probs,
        s_aux=s_aux,
    )


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int | Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    s_aux: Tensor | None = None,
) -> Any:
    """flash_attn_varlen_func with queries, keys and values in one tensor. So is their gradient.

    Args:
        qkv: (total, 3, num_heads, head_dim).
        cu_seqlens, max_seqlen: for queries and keys; (batch_size + 1,) int32, and int or 0-dim integer tensor.

    The other arguments, results and errors are those of flash_attn_varlen_func.
    """
    return attention(
        "flash_attn_varlen_qkvpacked_func",
        QKV_PACKED,
        (qkv,),
        Sequences(cu_seqlens, cu_seqlens, max_seqlen, max_seqlen),
        dropout_p=dropout_p,
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        deterministic=deterministic,
        return_attn_probs=return_attn_probs,
        s_aux=s_aux,
    )
