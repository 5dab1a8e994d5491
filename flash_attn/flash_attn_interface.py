"""The public functions, with the names, argument order and defaults of flash_attn 2.8.

flash_attn_func is documented in full; the docstrings of the others say how they differ from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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
from flash_attn.autograd import SEPARATE, Sequences, attention
from flash_attn.kv_cache import flash_attn_with_kvcache
from flash_attn.packed_functions import (
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)
from flash_attn.v1_functions import (
    flash_attn_unpadded_func,
    flash_attn_unpadded_kvpacked_func,
    flash_attn_unpadded_qkvpacked_func,
)

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
    "flash_attn_unpadded_func",
    "flash_attn_unpadded_kvpacked_func",
    "flash_attn_unpadded_qkvpacked_func",
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
    q_start: int | Tensor | None = None,
    k_start: int | Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    s_aux: Tensor | None = None,
    key_ranges: Tensor | None = None,
    return_max_logits: bool = False,
) -> Any:
    """Attention, softmax(softmax_scale * q @ k^T) @ v, for a batch of sequences of equal length.

    Exact, with memory linear in the sequence length: Dao et al., "FlashAttention" (2022), algorithm 1; Dao,
    "FlashAttention-2" (2023), section 3.1. Differentiable once in q, k and v, through out and through softmax_lse.

    k and v may have fewer heads than q (grouped-query and multi-query attention): query head h uses key head
    h // (num_heads // num_heads_k).

    Masks are bottom-right aligned: the last query is at the position of the last key. Query i sees key j iff

        i + seqlen_k - seqlen_q - left <= j <= i + seqlen_k - seqlen_q + right,

    for causal=True (1 = visible):

        seqlen_q = 2, seqlen_k = 5:    seqlen_q = 5, seqlen_k = 2:
            1 1 1 1 0                      0 0
            1 1 1 1 1                      0 0
                                           0 0
                                           1 0
                                           1 1

    A query without visible keys has out = 0, softmax_lse = -inf (with s_aux: that of its head) and zero gradients.

    q, k and v may be DTensors: every rank computes its heads or its sequences, and results are DTensors. Other tensors
    may be, or are the same on all ranks. Ranks may outnumber key heads; numbers of heads that do not divide are
    gathered. With dropout, ranks that cut heads have the mask of one device, with the generator of the first rank. It
    is a ValueError if sequences are cut (flash_attn.context_parallel does that) or, with dropout, the batch.

    Args:
        q: (batch_size, seqlen_q, num_heads, head_dim), float32, float64, bfloat16 or float16. head_dim from 1 to 512.
        k: (batch_size, seqlen_k, num_heads_k, head_dim), dtype of q; num_heads_k divides num_heads.
        v: (batch_size, seqlen_k, num_heads_k, head_dim_v), dtype of q.
            q, k and v are read in place if their last dimension is contiguous (on CUDA: and rows are 16-byte aligned),
            otherwise copied. Under autocast they are cast to its dtype, except float64.
        dropout_p: probability in [0, 1) of dropping an attention weight; use 0 for evaluation. The mask is drawn from
            torch's default generator.
        softmax_scale: factor of the scores, > 0; a float or a 0-dim tensor without grad. None: head_dim ** -0.5.
        causal: mask the keys after each query: sets right to 0, whatever window_size says.
        window_size: (left, right), numbers of visible keys before and after the query's position; negative: unbounded.
        softcap: scores become softcap * tanh(score / softcap), as in Gemma 2 (2024), section 2; <= 0: off.
        alibi_slopes: (num_heads,) or (batch_size, num_heads), float32. -slope * |i + seqlen_k - seqlen_q - j| is added
            to the scores: Press et al., "Train Short, Test Long" (2022), section 3. Slopes get no gradient.
        deterministic: bitwise reproducible gradients. Always so on the CPU, and under
            torch.use_deterministic_algorithms.
        return_attn_probs: also return softmax_lse and S_dmask.
        attention_chunk: chunked attention, as in Llama 4 (2025): query i, at position p = i + seqlen_k - seqlen_q, sees
            only keys j with j // attention_chunk == p // attention_chunk (floor division); 0: off.
        q_start, k_start: positions of the first query and the first key in a longer sequence, of which q, k and v are a
            part; an int or, per sequence, (batch_size,) int32. Masks, ALiBi, chunks and dropout are then those of the
            whole sequence: query i is at position q_start + i, key j at k_start + j, and there is no shift by
            seqlen_k - seqlen_q. At least 0, all positions below 2^30 - 256; with dropout multiples of 32. None: 0 if
            the other is given. merge_attention_states joins the results of several parts of the keys.
        out_dtype: dtype of out: that of q (None), or float32 to join results without rounding each of them.
        s_aux: (num_heads,), any floating dtype, not cast by autocast: attention sinks, a learned score per head for
            nothing. exp(s_aux[h]) is added to the denominator of every row's softmax, so the weights sum to less than
            1: gpt-oss (OpenAI, 2025); Xiao et al., "Efficient Streaming Language Models with Attention Sinks" (2023).
            Not scaled, capped, biased or dropped; -inf: none. Differentiable, and reproducible bit for bit.
        key_ranges: (batch_size or 1, seqlen_q, 2), int32: query i of sequence b sees only keys j with
            key_ranges[b, i, 0] <= j < key_ranges[b, i, 1], of those that causal, window_size and attention_chunk leave.
            Ends are clamped to [0, seqlen_k]; an empty range is legal. Tiles outside of all ranges cost nothing. Keys
            are counted from the first of k, whatever k_start says.
        return_max_logits: also return max_logits, for QK-clip: Kimi K2 (Moonshot AI, 2025), section 2.1.

    Returns:
        out: (batch_size, seqlen_q, num_heads, head_dim_v), out_dtype. With return_attn_probs: (out, softmax_lse,
        S_dmask). softmax_lse: (batch_size, num_heads, seqlen_q), float32 (float64 for float64 input), the natural
        logarithm of the sum of exp(score) over the visible keys, and the sink. S_dmask, for tests, with O(N^2) memory:
        (batch_size, num_heads, seqlen_q, seqlen_k), the attention weights with the sign bit set where dropped; empty if
        dropout_p is 0. With return_max_logits, max_logits follows, after out alone too: (batch_size, num_heads), dtype
        of softmax_lse, the largest score of all visible pairs, as the softmax sees it: scaled, after softcap and ALiBi,
        without the sink. -inf if there is no such pair, NaN if a score is. Not differentiable.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a dtype, device, shape or value violates the above; lists all reasons. Nothing is computed.
        RuntimeError: the compiled extension is missing; or, in backward, second derivatives are requested.
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
        q_start=q_start,
        k_start=k_start,
        out_dtype=out_dtype,
        s_aux=s_aux,
        key_ranges=key_ranges,
        return_max_logits=return_max_logits,
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
    q_start: int | Tensor | None = None,
    k_start: int | Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    s_aux: Tensor | None = None,
    key_ranges: Tensor | None = None,
    return_max_logits: bool = False,
) -> Any:
    """flash_attn_func for sequences of different lengths, packed without padding.

    Sequence b is rows cu_seqlens[b] to cu_seqlens[b + 1] - 1. Rows after the last sequence are allowed: they get
    out = 0, softmax_lse = -inf and zero gradients.

    Args:
        q: (total_q, num_heads, head_dim).
        k: (total_k, num_heads_k, head_dim), or (num_pages, page_size, num_heads_k, head_dim) with block_table.
        v: as k, with head_dim_v.
        cu_seqlens_q, cu_seqlens_k: (batch_size + 1,), int32: cumulative lengths from 0, at most total_q, total_k.
        max_seqlen_q, max_seqlen_k: upper bounds of the sequence lengths; int or 0-dim integer tensor.
        block_table: (batch_size, max_pages), int32: row j of the keys and values of sequence b is row j % page_size of
            page block_table[b, j // page_size]. cu_seqlens_k then gives only the lengths. Any page_size >= 1. If
            gradients are needed, the pages are gathered first.
        key_ranges: (total_q, 2), int32: as in flash_attn_func, keys being counted from the first of the sequence.

    The other arguments and errors are those of flash_attn_func; results: out (total_q, num_heads, head_dim_v),
    softmax_lse (num_heads, total_q), S_dmask (batch_size, num_heads, max_seqlen_q, max_seqlen_k), max_logits
    (batch_size, num_heads).
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
        q_start=q_start,
        k_start=k_start,
        out_dtype=out_dtype,
        s_aux=s_aux,
        key_ranges=key_ranges,
        return_max_logits=return_max_logits,
    )


FlashAttnFunc = autograd_name("FlashAttnFunc", flash_attn_func)
FlashAttnKVPackedFunc = autograd_name("FlashAttnKVPackedFunc", flash_attn_kvpacked_func)
FlashAttnQKVPackedFunc = autograd_name("FlashAttnQKVPackedFunc", flash_attn_qkvpacked_func)
FlashAttnVarlenFunc = autograd_name("FlashAttnVarlenFunc", flash_attn_varlen_func)
FlashAttnVarlenKVPackedFunc = autograd_name("FlashAttnVarlenKVPackedFunc", flash_attn_varlen_kvpacked_func)
FlashAttnVarlenQKVPackedFunc = autograd_name("FlashAttnVarlenQKVPackedFunc", flash_attn_varlen_qkvpacked_func)


def maybe_contiguous(x: Tensor | None) -> Tensor | None:
    """The tensor, copied if its last dimension is not contiguous; None for None."""
    return x.contiguous() if x is not None and x.stride(-1) != 1 else x


def round_multiple(x: int, m: int) -> int:
    """The smallest multiple of m that is at least x."""
    return (x + m - 1) // m * m


def _get_block_size_n(device: torch.device, head_dim: int, is_dropout: bool, causal: bool) -> int:
    """Keys per block of S_dmask: always one dropout block, since S_dmask is not stored in tiles."""
    return 32
