"""The packed functions of flash_attn 1: flash_attn_varlen_func and its neighbours under their first names.

Arguments, their order and the causal mask are those of version 1, in which dropout_p has no default.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from flash_attn.autograd import KV_PACKED, QKV_PACKED, SEPARATE, Sequences, attention


def flash_attn_unpadded_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | Tensor,
    max_seqlen_k: int | Tensor,
    dropout_p: float,
    softmax_scale: float | None = None,
    causal: bool = False,
    return_attn_probs: bool = False,
    deterministic: bool = False,
) -> Any:
    """flash_attn_varlen_func with the arguments of flash_attn 1.

    The causal mask is aligned top-left, as it was before 2.1: query i of a sequence sees the keys j <= i, whatever the
    lengths are. flash_attn_varlen_func aligns it bottom-right. For sequences with as many queries as keys it is the
    same.

    Args:
        q: (total_q, num_heads, head_dim), a dtype of flash_attn_varlen_func.
        k, v: (total_k, num_heads_k, head_dim), dtype of q.
        cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, return_attn_probs,
            deterministic: as in flash_attn_varlen_func.

    Returns:
        As flash_attn_varlen_func: softmax_lse is (num_heads, total_q), not padded as in version 1.

    Raises:
        TypeError, ValueError, RuntimeError: as flash_attn_varlen_func.
    """
    sequences = Sequences(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    options = (dropout_p, softmax_scale, causal, return_attn_probs, deterministic)
    return _attention("flash_attn_unpadded_func", SEPARATE, (q, k, v), sequences, *options)


def flash_attn_unpadded_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | Tensor,
    max_seqlen_k: int | Tensor,
    dropout_p: float,
    softmax_scale: float | None = None,
    causal: bool = False,
    return_attn_probs: bool = False,
    deterministic: bool = False,
) -> Any:
    """flash_attn_unpadded_func with keys and values in one tensor. Their gradient is one tensor too.

    Args:
        q: (total_q, num_heads, head_dim).
        kv: (total_k, 2, num_heads_k, head_dim).

    The other arguments, the causal mask, results and errors are those of flash_attn_unpadded_func.
    """
    sequences = Sequences(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    options = (dropout_p, softmax_scale, causal, return_attn_probs, deterministic)
    return _attention("flash_attn_unpadded_kvpacked_func", KV_PACKED, (q, kv), sequences, *options)


def flash_attn_unpadded_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int | Tensor,
    dropout_p: float,
    softmax_scale: float | None = None,
    causal: bool = False,
    return_attn_probs: bool = False,
    deterministic: bool = False,
) -> Any:
    """flash_attn_unpadded_func with queries, keys and values in one tensor. So is their gradient.

    Args:
        qkv: (total, 3, num_heads, head_dim).
        cu_seqlens, max_seqlen: for queries and keys; (batch_size + 1,) int32, and int or 0-dim integer tensor.

    The other arguments, results and errors are those of flash_attn_unpadded_func.
    """
    sequences = Sequences(cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    options = (dropout_p, softmax_scale, causal, return_attn_probs, deterministic)
    return _attention("flash_attn_unpadded_qkvpacked_func", QKV_PACKED, (qkv,), sequences, *options)


def _attention(
    function: str,
    layout: str,
    inputs: tuple[Tensor, ...],
    sequences: Sequences,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    return_attn_probs: bool,
    deterministic: bool,
) -> Any:
    # Lengths are not read. The same tensor for both says that they are equal, and then both alignments are one.
    is_top_left = causal and sequences.cu_seqlens_q is not sequences.cu_seqlens_k
    return attention(
        function,
        layout,
        inputs,
        sequences,
        dropout_p=dropout_p,
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=(-1, -1),
        softcap=0.0,
        alibi_slopes=None,
        deterministic=deterministic,
        return_attn_probs=return_attn_probs,
        q_start=0 if is_top_left else None,
        k_start=0 if is_top_left else None,
    )
