"""The public functions, with the names, argument order and defaults of flash_attn 2.8.

flash_attn_func is documented in full; the others say in what they differ from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

import flash_attn_2_cuda as flash_attn_cuda
import flash_attn_2_cuda as flash_attn_gpu
from flash_attn._autograd_names import autograd_name
from flash_attn._kernel_interface import (
    _flash_attn_backward,
    _flash_attn_forward,
    _flash_attn_varlen_backward,
    _flash_attn_varlen_forward,
    _wrapped_flash_attn_backward,
    _wrapped_flash_attn_forward,
    _wrapped_flash_attn_varlen_backward,
    _wrapped_flash_attn_varlen_forward,
)
from flash_attn.autograd import KV_PACKED, QKV_PACKED, SEPARATE, Sequences, attention

__all__ = [
    "FlashAttnFunc",
    "FlashAttnKVPackedFunc",
    "FlashAttnQKVPackedFunc",
    "FlashAttnVarlenFunc",
    "FlashAttnVarlenKVPackedFunc",
    "FlashAttnVarlenQKVPackedFunc",
    "_flash_attn_backward",
    "_flash_attn_forward",
    "_flash_attn_varlen_backward",
    "_flash_attn_varlen_forward",
    "_wrapped_flash_attn_backward",
    "_wrapped_flash_attn_forward",
    "_wrapped_flash_attn_varlen_backward",
    "_wrapped_flash_attn_varlen_forward",
    "flash_attn_cuda",
    "flash_attn_func",
    "flash_attn_gpu",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "maybe_contiguous",
    "round_multiple",
]


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    attention_chunk: int = 0,
) -> Any:
    """Attention, softmax(softmax_scale * q @ k^T) @ v, of a batch of sequences of one length.

    Exact, in memory linear in the sequence length: Dao et al., "FlashAttention" (2022), algorithm 1; Dao,
    "FlashAttention-2" (2023), section 3.1. Differentiable once in q, k and v, through out and through softmax_lse.

    k and v may have fewer heads than q (grouped-query and multi-query attention): query head h uses key head
    h // (num_heads // num_heads_k).

    Masks are aligned to the bottom right corner: the last query faces the last key. Query i sees key j iff

        i + seqlen_k - seqlen_q - left <= j <= i + seqlen_k - seqlen_q + right,

    which for causal=True looks like this (1 = seen):

        seqlen_q = 2, seqlen_k = 5:    seqlen_q = 5, seqlen_k = 2:
            1 1 1 1 0                      0 0
            1 1 1 1 1                      0 0
                                           0 0
                                           1 0
                                           1 1

    A query that sees no key gets out = 0, softmax_lse = -inf and no gradient.

    Args:
        q: (batch_size, seqlen_q, num_heads, head_dim), float32, float64, bfloat16 or float16. head_dim from 1 to 512.
        k: (batch_size, seqlen_k, num_heads_k, head_dim), of the dtype of q; num_heads_k divides num_heads.
        v: (batch_size, seqlen_k, num_heads_k, head_dim_v), of the dtype of q.
            Any strides are read in place as long as the last dimension is contiguous. In an autocast region all three
            are cast to its dtype, float64 excepted.
        dropout_p: probability, in [0, 1), of dropping an attention weight; 0 for evaluation. The mask comes from
            torch's default generator.
        softmax_scale: factor of the scores, > 0, a float or a 0-dim tensor that needs no gradient. None:
            head_dim ** -0.5.
        causal: queries do not see later keys: right is 0, whatever window_size says.
        window_size: (left, right) numbers of keys seen beside the diagonal, both included; negative: no bound.
        softcap: scores become softcap * tanh(score / softcap), as in Gemma 2 (2024), section 2; 0 or less: off.
        alibi_slopes: (num_heads,) or (batch_size, num_heads), float32. -slope * |i + seqlen_k - seqlen_q - j| is added
            to the scores: Press et al., "Train Short, Test Long" (2022), section 3. Slopes get no gradient.
        deterministic: the backward pass gives the same bits every time. Always so on the CPU, and where
            torch.use_deterministic_algorithms is on.
        return_attn_probs: also return softmax_lse and S_dmask.
        attention_chunk: query i also sees only the keys of its chunk, as in Llama 4 (2025): with p = i + seqlen_k -
            seqlen_q, those with j // attention_chunk == p // attention_chunk, rounded down; 0: off.

    Returns:
        out, (batch_size, seqlen_q, num_heads, head_dim_v); or, with return_attn_probs, (out, softmax_lse, S_dmask):
        softmax_lse (batch_size, num_heads, seqlen_q), float32 (float64 for float64 input), is the natural logarithm of
        the sum of the exponentials of each query's scores. S_dmask is for tests and takes O(N^2) memory:
        (batch_size, num_heads, seqlen_q, seqlen_k), the attention weights with the sign bit set where dropped. It is
        empty when dropout_p is 0.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: a dtype, device, shape or value is not as said above. All reasons are listed, nothing is computed.
        RuntimeError: the compiled extension is missing; gradients of gradients are asked for.
    """
    return attention(
        "flash_attn_func",
        SEPARATE,
        (q, k, v),
        dropout_p=dropout_p,
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        deterministic=deterministic,
        return_attn_probs=return_attn_probs,
        attention_chunk=attention_chunk,
    )


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
) -> Any:
    """flash_attn_func with keys and values in one tensor, whose gradient is written in one piece.

    Args:
        q: (batch_size, seqlen_q, num_heads, head_dim).
        kv: (batch_size, seqlen_k, 2, num_heads_k, head_dim).

    Everything else is as in flash_attn_func.
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
) -> Any:
    """flash_attn_func with queries, keys and values in one tensor, whose gradient is written in one piece.

    Args:
        qkv: (batch_size, seqlen, 3, num_heads, head_dim).

    Everything else is as in flash_attn_func.
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
    )


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
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
    block_table: Tensor | None = None,
    *,
    attention_chunk: int = 0,
) -> Any:
    """flash_attn_func for sequences of different lengths, packed one after the other without padding.

    Sequence b has the rows cu_seqlens[b] up to, not including, cu_seqlens[b + 1]. Rows past the last sequence are
    allowed: their out is 0, their softmax_lse -inf and their gradients 0.

    Args:
        q: (total_q, num_heads, head_dim).
        k: (total_k, num_heads_k, head_dim), or (num_pages, page_size, num_heads_k, head_dim) with block_table.
        v: as k, with head_dim_v.
        cu_seqlens_q, cu_seqlens_k: (batch_size + 1,), int32, from 0, never decreasing, at most total_q and total_k.
        max_seqlen_q, max_seqlen_k: at least the length of the longest sequence; int or 0-dim integer tensor.
        block_table: (batch_size, max_pages), int32: row j of the keys and values of sequence b is row j % page_size of
            page block_table[b, j // page_size]. cu_seqlens_k then gives the lengths only. Any page_size >= 1. Where
            gradients are needed the pages are gathered first.

    Everything else is as in flash_attn_func, with out (total_q, num_heads, head_dim_v), softmax_lse
    (num_heads, total_q) and S_dmask (batch_size, num_heads, max_seqlen_q, max_seqlen_k).
    """
    return attention(
        "flash_attn_varlen_func",
        SEPARATE,
        (q, k, v),
        Sequences(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, block_table),
        dropout_p=dropout_p,
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        deterministic=deterministic,
        return_attn_probs=return_attn_probs,
        attention_chunk=attention_chunk,
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
) -> Any:
    """flash_attn_varlen_func with keys and values in one tensor, whose gradient is written in one piece.

    Args:
        q: (total_q, num_heads, head_dim).
        kv: (total_k, 2, num_heads_k, head_dim).

    Everything else is as in flash_attn_varlen_func.
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
) -> Any:
    """flash_attn_varlen_func with queries, keys and values in one tensor, whose gradient is written in one piece.

    Args:
        qkv: (total, 3, num_heads, head_dim).
        cu_seqlens, max_seqlen: those of queries and keys alike.

    Everything else is as in flash_attn_varlen_func.
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
    )


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> NoReturn:
    """Attention over a key-value cache. The name is there for programs that import it; the work is not done yet.

    Raises:
        NotImplementedError: always.
    """
    raise NotImplementedError(
        "flash_attn_with_kvcache: not available yet; call flash_attn_func, or flash_attn_varlen_func with block_table"
    )


FlashAttnFunc = autograd_name("FlashAttnFunc", flash_attn_func)
FlashAttnKVPackedFunc = autograd_name("FlashAttnKVPackedFunc", flash_attn_kvpacked_func)
FlashAttnQKVPackedFunc = autograd_name("FlashAttnQKVPackedFunc", flash_attn_qkvpacked_func)
FlashAttnVarlenFunc = autograd_name("FlashAttnVarlenFunc", flash_attn_varlen_func)
FlashAttnVarlenKVPackedFunc = autograd_name("FlashAttnVarlenKVPackedFunc", flash_attn_varlen_kvpacked_func)
FlashAttnVarlenQKVPackedFunc = autograd_name("FlashAttnVarlenQKVPackedFunc", flash_attn_varlen_qkvpacked_func)


def maybe_contiguous(x: Tensor | None) -> Tensor | None:
    """The tensor with a contiguous last dimension, as a copy if it has none; None for None."""
    return x.contiguous() if x is not None and x.stride(-1) != 1 else x


def round_multiple(x: int, m: int) -> int:
    """The least multiple of m that is at least x."""
    return (x + m - 1) // m * m


def _get_block_size_n(device: torch.device, head_dim: int, is_dropout: bool, causal: bool) -> int:
    """How many keys a block of S_dmask has: here always a dropout block's, for S_dmask is not stored by tiles."""
    return 32
