"""key_padding_mask for attention functions without one, in memory linear in the sequence length.

Two methods. Packing removes the padding and calls the varlen functions: fast, but it changes the distances between
tokens. Where a window, ALiBi or a causal mask depends on those distances, head_dim is extended by one dimension
instead: a constant in every query times -infinity (or a product of large numbers) in every masked key gives the score
-infinity; a 0 in the other keys leaves their scores unchanged.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from flash_attn._checks import is_dtensor, reject
from flash_attn._library import MAX_HEAD_DIM
from flash_attn.bert_padding import index_first_axis, pad_input, unpad_input


def is_packing_exact(keep: Tensor, causal: bool, looks_at_distance: bool, is_self: bool) -> bool:
    """Whether removing the padding leaves the result of attention unchanged.

    Args:
        keep: (batch_size, seqlen_k), bool, True for the keys to keep.
            causal: whether there is a causal mask: it depends on token order and, in cross-attention, on both lengths.
            looks_at_distance: whether there is a window or ALiBi: they depend on distances between tokens.
            is_self: self-attention: queries are packed like the keys.
    """
    if torch.compiler.is_compiling() or keep.device.type == "meta" or is_dtensor(keep):
        return False  # The mask, and with it the packed shape, is unknown here, or cut over ranks.
    if not is_self:
        return not (causal or looks_at_distance)
    if not looks_at_distance:
        return True
    starts = keep[:, 1:] & ~keep[:, :-1]
    return bool((starts.sum(dim=-1) + keep[:, :1].sum(dim=-1) <= 1).all())


def attend_packed(attend: Callable[..., Tensor], q: Tensor, kv: Tensor, keep: Tensor, is_self: bool) -> Tensor:
    """Attention without the padding; shapes as in attend_masked. Padding queries give 0."""
    packed_kv, indices, cu_seqlens_k, max_seqlen_k, _ = unpad_input(kv, keep)
    batch_size, seqlen_q = q.shape[:2]
    if is_self:
        packed_q = index_first_axis(q.flatten(0, 1), indices)
        out = attend(packed_q, packed_kv, cu_seqlens=cu_seqlens_k, max_seqlen=max_seqlen_k)
        return pad_input(out, indices, batch_size, seqlen_q)
    out = attend(
        q.flatten(0, 1),
        packed_kv,
        cu_seqlens=torch.arange(batch_size + 1, dtype=torch.int32, device=q.device) * seqlen_q,
        max_seqlen=seqlen_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_k=max_seqlen_k,
    )
    return out.unflatten(0, (batch_size, seqlen_q))


def _mask_numbers(q: Tensor) -> tuple[float, float]:
    """The constants of queries and of masked keys in the extra dimension: their product is -infinity in float32.

    Both are finite if the dtype has such numbers, because in the backward pass 0 * infinity is NaN, which anomaly
    detection reports.
    """
    dtype = q.dtype
    if dtype != torch.float64 and not q.is_meta and torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
    if dtype == torch.float16:
        return 1.0, -torch.inf
    return (2.0**600, -(2.0**600)) if dtype == torch.float64 else (2.0**100, -(2.0**100))


def check_room(head_dim: int) -> None:
    """Raise ValueError if head_dim + 1 exceeds the maximum of the kernels."""
    limit = MAX_HEAD_DIM - 1
    if head_dim > limit:
        options = "a window, ALiBi, cross attention that is causal or inference_params"
        expected = f"at most {limit} with this key_padding_mask and {options}"
        reject(ValueError, "MHA", [f"head_dim: expected {expected}, got {head_dim}"])


def attend_masked(attend: Callable[..., Tensor], q: Tensor, kv: Tensor, keep: Tensor) -> Tensor:
    """Attention with the padding mask encoded in one extra dimension of head_dim.

    Args:
        attend: attention of q and kv.
        q: (batch_size, seqlen_q, num_heads, head_dim).
        kv: (batch_size, seqlen_k, 2, num_heads_k, head_dim).
        keep: (batch_size, seqlen_k), bool, True for keys to keep.

    Returns:
        out, in the shape of q; 0 for queries whose visible keys are all masked.

    Raises:
        ValueError: head_dim + 1 exceeds the maximum of the kernels.
    """
    check_room(q.shape[-1])
    kv = kv.masked_fill(~keep[:, :, None, None, None], 0)
    of_query, of_masked_key = _mask_numbers(q)
    key_number = kv.new_zeros(keep.shape).masked_fill(~keep, of_masked_key)
    numbers = torch.stack([key_number, torch.zeros_like(key_number)], dim=-1)[..., None, None]
    wide_kv = torch.cat([kv, numbers.expand(*kv.shape[:-1], 1)], dim=-1)
    wide_q = torch.cat([q, torch.full_like(q[..., :1], of_query)], dim=-1)
    return attend(wide_q, wide_kv)[..., : q.shape[-1]]
