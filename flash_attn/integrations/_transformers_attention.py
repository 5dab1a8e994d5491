"""The attention function that transformers calls under a name of ours."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import flash_attn
from flash_attn import bert_padding


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    s_aux: Tensor | None = None,
    position_ids: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | Tensor | None = None,
    max_length_k: int | Tensor | None = None,
    **ignored: Any,
) -> tuple[Tensor, None]:
    """Attention as AttentionInterface of transformers calls it.

    Args:
        module: the layer; its is_causal counts if the argument is None.
        query: (batch_size, num_heads, seqlen_q, head_dim).
        key, value: (batch_size, num_heads_k, seqlen_k, head_dim), value with a head_dim of its own.
        attention_mask: (batch_size, <= seqlen_k), 1 for tokens and 0 for padding; queries are the last of them.
        sliding_window: number of keys that a query sees, itself included; in both directions if not causal.
        s_aux: (num_heads,): sinks.
        position_ids: (1, seqlen): positions that begin anew are another sequence, which sees no other.
        cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k: packed sequences, as in flash_attn_varlen_func.
        ignored: what concerns other implementations.

    Returns:
        (out, None): (batch_size, seqlen_q, num_heads, head_dim_v), and no attention weights.

    Raises:
        ValueError: a mask of another form, or tensors that flash_attn_func rejects.
    """
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    q, k = q.to(v.dtype), k.to(v.dtype)  # norms and rotary embeddings may have left them in float32
    causal = bool(getattr(module, "is_causal", False) if is_causal is None else is_causal)
    options: dict[str, Any] = {
        "dropout_p": dropout,
        "softmax_scale": scaling,
        "causal": causal,
        "softcap": softcap or 0.0,
        "s_aux": s_aux,
    }
    if sliding_window is not None:
        options["window_size"] = (sliding_window - 1, 0 if causal else sliding_window - 1)
    if attention_mask is not None:
        return _unpadded(q, k, v, attention_mask, options), None
    if cu_seq_lens_q is not None and cu_seq_lens_k is not None:
        lengths = (cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k)
        return _packed(q, k, v, lengths, options), None
    if position_ids is not None and position_ids.shape == (1, q.shape[1]) and 1 < q.shape[1] == k.shape[1]:
        return _by_positions(q, k, v, position_ids[0], options), None
    return flash_attn.flash_attn_func(q, k, v, **options), None


def _unpadded(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, options: dict[str, Any]) -> Tensor:
    """Attention of the tokens alone; zeros at padding."""
    batch_size, seqlen_q = q.shape[:2]
    seqlen_k = mask.shape[-1]
    if mask.dim() != 2 or mask.shape[0] != batch_size or not seqlen_q <= seqlen_k <= k.shape[1]:
        expected = f"(batch_size, seqlen) = ({batch_size}, {seqlen_q} to {k.shape[1]})"
        raise ValueError(f"flash_attn: attention_mask: expected {expected}, got {tuple(mask.shape)}")
    k, v = k[:, :seqlen_k], v[:, :seqlen_k]  # a static cache is longer than what is in it
    k, indices_k, cu_seqlens_k, max_seqlen_k, _ = bert_padding.unpad_input(k, mask)
    v = bert_padding.index_first_axis(v.flatten(0, 1), indices_k)
    indices_q, cu_seqlens_q, max_seqlen_q = indices_k, cu_seqlens_k, max_seqlen_k
    if seqlen_q == seqlen_k:
        q = bert_padding.index_first_axis(q.flatten(0, 1), indices_q)
    else:
        q, indices_q, cu_seqlens_q, max_seqlen_q, _ = bert_padding.unpad_input(q, mask[:, -seqlen_q:])
    out = flash_attn.flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **options)
    return bert_padding.pad_input(out, indices_q, batch_size, seqlen_q)


def _packed(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[Any, ...], options: dict[str, Any]) -> Tensor:
    """Attention of sequences that follow each other, whatever the batch dimension says."""
    batch_size = q.shape[0]
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    cu_seqlens = (x.to(torch.int32) for x in lengths[:2])
    max_seqlens = (x if x is not None else rows for x, rows in zip(lengths[2:], (len(q), len(k)), strict=True))
    out = flash_attn.flash_attn_varlen_func(q, k, v, *cu_seqlens, *max_seqlens, **options)
    return out.unflatten(0, (batch_size, -1))


def _by_positions(q: Tensor, k: Tensor, v: Tensor, positions: Tensor, options: dict[str, Any]) -> Tensor:
    """Attention of one row of tokens, in which a sequence begins wherever positions do."""
    rows = torch.arange(len(positions), device=positions.device)
    is_first = positions == positions.min()
    if torch.compiler.is_compiling():  # as ranges of keys: shapes do not depend on values
        begin = torch.where(is_first, rows, 0).cummax(0).values
        next_begin = torch.where(is_first, rows, len(positions)).roll(-1)
        next_begin[-1] = len(positions)
        end = next_begin.flip(0).cummin(0).values.flip(0)
        ranges = torch.stack([begin, end], dim=-1).to(torch.int32)[None]
        return flash_attn.flash_attn_func(q, k, v, key_ranges=ranges, **options)
    if torch.equal(positions, rows + positions[0]):  # one sequence
        return flash_attn.flash_attn_func(q, k, v, **options)
    ends = rows.new_full((1,), len(positions))
    cu_seqlens = torch.cat([rows[is_first], ends]).to(torch.int32)
    max_seqlen = int(cu_seqlens.diff().max())
    return _packed(q, k, v, (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen), options)
