"""Self-attention with a cache of keys and values: what MHA does with inference_params.

A call writes the keys and values of its tokens to the rows of the cache from offset on. Its queries then see the rows
up to the last of these, with masks aligned bottom-right as always. So a prompt in one step, in several, or token by
token gives the rows that one pass over the whole sequence gives.

Two methods. flash_attn_with_kvcache appends, rotates and hides padding before the first token, all in place. Other
padding, and attention in torch operations, take the rows out of the cache first.
"""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from flash_attn._constants import may_cache
from flash_attn.flash_attn_interface import flash_attn_with_kvcache
from flash_attn.layers.rotary import RotaryEmbedding, apply_rotary
from flash_attn.modules.inference_step import (
    Step,
    allocate_cache,
    can_read,
    find_cache,
    of_new_rows,
    read_mask,
    read_step,
    refuse_gradients,
)
from flash_attn.modules.inner_attention import CrossAttention, FlashCrossAttention
from flash_attn.modules.padded_attention import attend_masked, check_room


def attend_cached(
    attention: FlashCrossAttention | CrossAttention,
    rotary: RotaryEmbedding | None,
    q: Tensor,
    kv: Tensor,
    params: Any,
    layer_idx: int | None,
    key_padding_mask: Tensor | None,
    causal: bool,
    s_aux: Tensor | None,
) -> Tensor:
    """Append keys and values to a layer's cache, which is allocated if need be, and attend to it.

    Args:
        attention: the module whose options hold. FlashCrossAttention: computed by flash_attn_with_kvcache.
        rotary: rotates queries and keys; None: no rotation.
        q: (batch_size, seqlen, num_heads, head_dim).
        kv: (batch_size, seqlen, 2, num_heads_k, head_dim).
        params: the inference_params of MHA.
        layer_idx: key of the cache in params.key_value_memory_dict.
        key_padding_mask: as in MHA with inference_params.
        causal: as in flash_attn_func, in place of the module's option.
        s_aux: as in flash_attn_func.

    Returns:
        out, in the shape of q; 0 at padding.

    Raises:
        TypeError, ValueError: as in MHA with inference_params. Nothing is written then.
    """
    cache = find_cache(params, layer_idx, kv)
    refuse_gradients(q, kv, cache, s_aux)
    step = read_step(params, cache, kv)
    keep, leftpad = read_mask(key_padding_mask, step, looks_back=causal or attention.window_size[1] == 0)
    is_flash = isinstance(attention, FlashCrossAttention)
    is_in_place = is_flash and (keep is None or leftpad is not None)
    if is_flash and not is_in_place:
        check_room(q.shape[-1])
    if cache is None:
        cache = allocate_cache(params.max_batch_size, step.capacity, kv.shape[3], kv.shape[4], kv.device, kv.dtype)
        params.key_value_memory_dict[layer_idx] = cache
    cache = cache[step.first : step.first + step.batch_size]
    if cache.dtype != kv.dtype:  # in an autocast region
        q, kv = q.to(cache.dtype), kv.to(cache.dtype)
    if is_in_place:
        out = _attend_in_place(attention, rotary, q, kv, cache, step, leftpad, causal, s_aux)
    else:
        out = _attend_to_rows(attention, rotary, q, kv, cache, step, keep, causal, s_aux)
    return out if keep is None else out.masked_fill(~of_new_rows(keep, step)[..., None, None], 0)


def _rotate(rotary: RotaryEmbedding, q: Tensor, k: Tensor, step: Step) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys by their positions, which are rows of the cache."""
    # Tables for the capacity in every step: xPos scales relative to the middle of a table.
    tables_q, tables_k = rotary.tables(step.capacity, like=q)
    offset = step.offset.clamp(min=0) if isinstance(step.offset, Tensor) else step.offset
    return (
        apply_rotary(q, *tables_q, offset, interleaved=rotary.interleaved),
        apply_rotary(k, *tables_k, offset, interleaved=rotary.interleaved),
    )


def _tables_for_kernel(rotary: RotaryEmbedding, q: Tensor, step: Step) -> dict[str, Any]:
    """cos and sin as flash_attn_with_kvcache takes them; empty if rotation in torch operations is better.

    That is so with xPos, whose tables for keys are others, and where tables cannot be kept, as under torch.compile,
    which then computes no more than the rows that are needed.
    """
    if rotary.scale_base is not None or not may_cache():
        return {}
    (cos, sin), _ = rotary.tables(step.capacity, like=q, dtype=q.dtype)
    return {"rotary_cos": cos, "rotary_sin": sin, "rotary_interleaved": rotary.interleaved}


def _attend_in_place(
    attention: FlashCrossAttention | CrossAttention,
    rotary: RotaryEmbedding | None,
    q: Tensor,
    kv: Tensor,
    cache: Tensor,
    step: Step,
    leftpad: Tensor | None,
    causal: bool,
    s_aux: Tensor | None,
) -> Tensor:
    """Append and attend by flash_attn_with_kvcache.

    Without a mask it rotates all queries by the position of the first.
    """
    advances = causal or attention.window_size != (-1, -1) or step.seqlen == 1
    tables = _tables_for_kernel(rotary, q, step) if rotary is not None and advances else {}
    k_cache, v_cache = cache.unbind(2)
    k, v = kv.unbind(2)
    if rotary is not None and not tables:
        q, k = _rotate(rotary, q, k, step)
    options = attention._options(causal, q.device, s_aux)
    names = ("softmax_scale", "causal", "window_size", "alibi_slopes", "s_aux")
    out = flash_attn_with_kvcache(
        q,
        k_cache,
        v_cache,
        k,
        v,
        cache_seqlens=step.offset,
        cache_leftpad=leftpad,
        **{name: options[name] for name in names},
        **tables,
    )
    return cast(Tensor, out)


def _attend_to_rows(
    attention: FlashCrossAttention | CrossAttention,
    rotary: RotaryEmbedding | None,
    q: Tensor,
    kv: Tensor,
    cache: Tensor,
    step: Step,
    keep: Tensor | None,
    causal: bool,
    s_aux: Tensor | None,
) -> Tensor:
    """Append, take the rows that are in use out of the cache, and attend to them."""
    if rotary is not None:
        k, v = kv.unbind(2)
        q, k = _rotate(rotary, q, k, step)
        kv = torch.stack([k, v], dim=2)
    rows, keep_rows = _append(kv, cache, step, keep)
    attend = partial(attention, causal=causal, s_aux=s_aux)
    if keep_rows is not None and isinstance(attention, FlashCrossAttention):
        return attend_masked(attend, q, rows, keep_rows)
    out: Tensor = attend(q, rows, key_padding_mask=keep_rows)
    return out


def _append(kv: Tensor, cache: Tensor, step: Step, keep: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Write kv to the cache.

    Returns:
        rows: (batch_size, rows, 2, num_heads_k, head_dim), the rows before the end, aligned on the right.
        keep_rows: (batch_size, rows), bool, which of them to see; None: all.
    """
    end = step.end
    if not isinstance(end, Tensor):
        cache[:, step.offset : end] = kv
        return cache[:, :end], keep
    sequence = torch.arange(step.batch_size, device=kv.device)[:, None]
    new = step.new_rows(kv.device)
    fits = (new >= 0) & (new < step.capacity)
    new = new % step.capacity  # distinct for each sequence
    cache[sequence, new] = torch.where(fits[..., None, None, None], kv, cache[sequence, new])
    longest = int(end.max()) if can_read(end) and end.numel() > 0 else step.capacity
    row = torch.arange(longest, device=kv.device) + (end - longest)
    keep_rows = row >= 0
    if keep is not None:
        keep_rows = keep_rows & keep.gather(1, row.clamp(0, keep.shape[1] - 1))
    return cache[sequence, row.clamp(min=0)], keep_rows
