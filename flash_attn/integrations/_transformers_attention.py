"""The attention function that transformers calls under a name of ours."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import flash_attention_mask

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
        module: the layer; its is_causal (True if it has none) counts if the argument is None.
        query: (batch_size, num_heads, seqlen_q, head_dim).
        key, value: (batch_size, num_heads_k, seqlen_k, head_dim), value with a head_dim of its own.
        attention_mask: (batch_size, <= seqlen_k), of the keys, 1 for tokens and 0 for padding. If causal, or with a
            window, the queries are the last of them, and those at padding get zeros.
        sliding_window: number of keys that a query sees, itself included; in both directions if not causal.
        s_aux: (num_heads,): sinks.
        position_ids: (batch_size, seqlen): where they do not grow, another sequence begins, which sees no other.
        cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k: packed sequences, as in flash_attn_varlen_func.
        ignored: what concerns other implementations.

    Returns:
        (out, None): (batch_size, seqlen_q, num_heads, head_dim_v), and no attention weights.

    Raises:
        ValueError: a mask of another form, a bias or chosen keys, or tensors that flash_attn_func rejects.
    """
    for name in ("position_bias", "indices", "block_indices"):
        if ignored.get(name) is not None:
            raise ValueError(f"flash_attn: {name}: expected None, for scores have no such bias or choice of keys here")
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    q, k = q.to(v.dtype), k.to(v.dtype)  # norms and rotary embeddings may have left them in float32
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
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
    if position_ids is not None and position_ids.shape == q.shape[:2] and 1 < q.shape[1] == k.shape[1]:
        return _by_positions(q, k, v, position_ids, options), None
    return flash_attn.flash_attn_func(q, k, v, **options), None


def _unpadded(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, options: dict[str, Any]) -> Tensor:
    """Attention to the tokens alone."""
    batch_size, seqlen_q = q.shape[:2]
    seqlen_k = mask.shape[-1]
    # The mask is that of the keys alone, perhaps an encoder's. Where positions count, it is that of the queries, too.
    of_keys = not options["causal"] and "window_size" not in options
    least = 0 if of_keys else seqlen_q
    if mask.dim() != 2 or mask.shape[0] != batch_size or not least <= seqlen_k <= k.shape[1]:
        expected = f"(batch_size, seqlen) = ({batch_size}, {least} to {k.shape[1]})"
        raise ValueError(f"flash_attn: attention_mask: expected {expected}, got {tuple(mask.shape)}")
    k, v = k[:, :seqlen_k], v[:, :seqlen_k]  # a static cache is longer than what is in it
    k, indices_k, cu_seqlens_k, max_seqlen_k, _ = bert_padding.unpad_input(k, mask)
    v = bert_padding.index_first_axis(v.flatten(0, 1), indices_k)
    if of_keys:
        cu_seqlens_q = torch.arange(batch_size + 1, dtype=torch.int32, device=q.device) * seqlen_q
        lengths = (cu_seqlens_q, cu_seqlens_k, seqlen_q, max_seqlen_k)
        return flash_attn.flash_attn_varlen_func(q.flatten(0, 1), k, v, *lengths, **options).view(*q.shape[:3], -1)
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
    """Attention of rows of tokens, in which a sequence begins wherever positions do not grow."""
    batch_size, seqlen = positions.shape
    begins = torch.nn.functional.pad(positions.diff(dim=1) <= 0, (1, 0), value=True)
    rows = torch.arange(seqlen, device=positions.device)
    if torch.compiler.is_compiling():  # as ranges of keys: shapes do not depend on values
        first = torch.where(begins, rows, 0).cummax(1).values
        next_begin = torch.nn.functional.pad(torch.where(begins, rows, seqlen)[:, 1:], (0, 1), value=seqlen)
        last = next_begin.flip(1).cummin(1).values.flip(1)
        ranges = torch.stack([first, last], dim=-1).to(torch.int32)
        return flash_attn.flash_attn_func(q, k, v, key_ranges=ranges, **options)
    starts = begins.flatten().nonzero().flatten().to(torch.int32)
    if len(starts) == batch_size:  # one sequence in each row
        return flash_attn.flash_attn_func(q, k, v, **options)
    cu_seqlens = torch.nn.functional.pad(starts, (0, 1), value=batch_size * seqlen)
    max_seqlen = int(cu_seqlens.diff().max())
    return _packed(q, k, v, (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen), options)


def padding_mask(
    *, batch_size: int, kv_length: int, kv_offset: int = 0, attention_mask: Tensor | None = None, **rest: Any
) -> Tensor | None:
    """The mask of attention_forward, as AttentionMaskInterface of transformers asks for it.

    Args:
        kv_length, kv_offset: number of keys, and the position of the first of them; a static cache has more than were
            written.
        attention_mask: (batch_size, number of tokens), 0 for padding.
        rest: q_length and q_offset (transformers 5) or cache_position (4.57): where the queries are.

    Returns:
        (batch_size, number of keys that were written): which are tokens. None: all keys are.

    Raises:
        ValueError: the mask has more than causality, a window and padding.
    """
    chunk = getattr(rest.get("config"), "attention_chunk_size", None)
    is_chunked = chunk is not None and rest.get("local_size") == chunk and kv_length + kv_offset > chunk
    if is_chunked or rest.get("use_vmap"):
        kind = f"chunks of {chunk} keys" if is_chunked else "a mask function of the model's own"
        raise ValueError(f"flash_attn: expected a mask of causality, a window and padding, got {kind}")
    sizes: dict[str, Any] = {"batch_size": batch_size, "kv_length": kv_length, "kv_offset": kv_offset}
    mask: Tensor | None = flash_attention_mask(**sizes, attention_mask=attention_mask, **rest)
    position = rest.get("cache_position")
    num_queries = rest["q_length"] if position is None else len(position)
    if mask is not None or num_queries >= kv_length:
        return mask
    end = rest["q_offset"] + num_queries if position is None else position[-1] + 1
    written = int(end) - kv_offset
    if written >= kv_length:
        return None
    device = rest.get("device") if attention_mask is None else attention_mask.device
    device = position.device if device is None and position is not None else device
    return torch.ones(batch_size, written, dtype=torch.bool, device=device)
