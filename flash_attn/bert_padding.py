"""Between batches with padding and packed sequences, as the models that use flash_attn_varlen_func do it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from flash_attn._checks import reject


def index_first_axis(input: Tensor, indices: Tensor) -> Tensor:
    """The rows of input, (first_axis_dim, ...), that indices, (num_selected,), names: (num_selected, ...)."""
    return input.index_select(0, indices)


def index_put_first_axis(values: Tensor, indices: Tensor, first_axis_dim: int) -> Tensor:
    """The reverse of index_first_axis: (first_axis_dim, ...) with values, (num_selected, ...), at indices, else 0."""
    return values.new_zeros(first_axis_dim, *values.shape[1:]).index_copy(0, indices, values)


def _cumulative(seqlens: Tensor) -> Tensor:
    return F.pad(seqlens.cumsum(0, dtype=torch.int32), (1, 0))


def _longest(seqlens: Tensor) -> int:
    return int(seqlens.max()) if seqlens.numel() > 0 else 0


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """Pack the tokens that a mask keeps.

    Args:
        hidden_states: (batch_size, seqlen, ...).
        attention_mask: (batch_size, seqlen), bool or integer, 1 for the tokens to keep.
        unused_mask: (batch_size, seqlen), bool or integer, 1 for tokens that are allocated but not used: they are
            packed too, and count in all of the results but seqused.

    Returns:
        hidden_states: (total, ...), the tokens that are kept, in order.
        indices: (total,), their places in the flattened batch, for pad_input.
        cu_seqlens: (batch_size + 1,), int32, where each sequence starts.
        max_seqlen: the length of the longest sequence, an int.
        seqused: (batch_size,), int32, the number of tokens per sequence that attention_mask keeps.
    """
    masks = {"attention_mask": attention_mask} | ({} if unused_mask is None else {"unused_mask": unused_mask})
    rows = tuple(hidden_states.shape[:2])
    wrong = [name for name, mask in masks.items() if mask.shape != rows]
    if wrong:
        expected = f"expected shape (batch_size, seqlen) = {rows}"
        reject(ValueError, "unpad_input", [f"{name}: {expected}, got {tuple(masks[name].shape)}" for name in wrong])
    keep = attention_mask != 0
    seqused = keep.sum(dim=-1, dtype=torch.int32)
    seqlens = seqused
    if unused_mask is not None:
        keep = keep | (unused_mask != 0)
        seqlens = keep.sum(dim=-1, dtype=torch.int32)
    indices = keep.flatten().nonzero().flatten()
    packed = index_first_axis(rearrange(hidden_states, "b s ... -> (b s) ..."), indices)
    return packed, indices, _cumulative(seqlens), _longest(seqlens), seqused


def unpad_input_for_concatenated_sequences(
    hidden_states: Tensor, attention_mask_in_length: Tensor
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Pack rows that each hold several sequences one after the other.

    Args:
        hidden_states: (batch_size, seqlen, ...).
        attention_mask_in_length: (batch_size, seqlen), integer: the lengths of the sequences of each row and then
            zeros. [[2, 3, 0, 0, 0, 0]] is a row of six tokens: a sequence of two, one of three, one token of padding.

    Returns:
        hidden_states (total, ...), indices (total,), cu_seqlens (num_sequences + 1,) and max_seqlen, as unpad_input.
    """
    columns = torch.arange(hidden_states.shape[1], device=attention_mask_in_length.device)
    keep = columns < attention_mask_in_length.sum(dim=-1, keepdim=True)
    lengths = attention_mask_in_length.flatten()
    seqlens = lengths[lengths != 0].to(torch.int32)
    indices = keep.flatten().nonzero().flatten()
    packed = index_first_axis(rearrange(hidden_states, "b s ... -> (b s) ..."), indices)
    return packed, indices, _cumulative(seqlens), _longest(seqlens)


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """The reverse of unpad_input: (batch, seqlen, ...) with the packed rows, (total, ...), at indices, else 0."""
    padded = index_put_first_axis(hidden_states, indices, batch * seqlen)
    return rearrange(padded, "(b s) ... -> b s ...", b=batch, s=seqlen)
