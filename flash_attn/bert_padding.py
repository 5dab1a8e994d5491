"""Conversion between padded batches and packed sequences, for models that call flash_attn_varlen_func."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from flash_attn._checks import describe, reject


def index_first_axis(input: Tensor, indices: Tensor) -> Tensor:
    """Select rows of input: returns (num_selected, ...). Differentiable in input.

    Args:
        input: (first_axis_dim, ...), any dtype.
        indices: (num_selected,), int32 or int64, in [0, first_axis_dim); or a mask (first_axis_dim,), bool.

    Raises:
        TypeError, ValueError, IndexError: indices has another dtype or shape, or is out of bounds.
    """
    rows = _row_numbers("index_first_axis", indices, input.shape[0])
    try:
        return input.index_select(0, rows)
    except IndexError:
        _reject_indices("index_first_axis", "(num_selected,)", indices, input.shape[0])


def index_put_first_axis(values: Tensor, indices: Tensor, first_axis_dim: int) -> Tensor:
    """The inverse of index_first_axis: returns (first_axis_dim, ...) with values at indices, zeros elsewhere.

    Args:
        values: (num_selected, ...), any dtype.
        indices: (num_selected,), int32 or int64, in [0, first_axis_dim); or a mask (first_axis_dim,), bool.
        first_axis_dim: number of rows of the result.

    Raises:
        TypeError, ValueError, IndexError: indices has another dtype or shape, or is out of bounds.
    """
    rows = _row_numbers("index_put_first_axis", indices, first_axis_dim)
    padded = values.new_zeros(first_axis_dim, *values.shape[1:])
    try:
        return padded.index_copy_(0, rows, values)
    except IndexError:
        _reject_indices("index_put_first_axis", f"({values.shape[0]},)", indices, first_axis_dim)


def index_first_axis_residual(input: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """index_first_axis and input itself, (num_selected, ...) and (first_axis_dim, ...). Their gradients are summed."""
    return index_first_axis(input, indices), input


class IndexFirstAxis:
    """index_first_axis under its 2.8.3 class name. Not an autograd.Function: torch differentiates the function."""

    @staticmethod
    def apply(input: Tensor, indices: Tensor) -> Tensor:
        """See index_first_axis."""
        return index_first_axis(input, indices)


class IndexPutFirstAxis:
    """index_put_first_axis under its 2.8.3 class name. Not an autograd.Function, like IndexFirstAxis."""

    @staticmethod
    def apply(values: Tensor, indices: Tensor, first_axis_dim: int) -> Tensor:
        """See index_put_first_axis."""
        return index_put_first_axis(values, indices, first_axis_dim)


class IndexFirstAxisResidual:
    """index_first_axis_residual under its 2.8.3 class name. Not an autograd.Function, like IndexFirstAxis."""

    @staticmethod
    def apply(input: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        """See index_first_axis_residual."""
        return index_first_axis_residual(input, indices)


def _row_numbers(function: str, indices: Tensor, first_axis_dim: int) -> Tensor:
    """Convert indices, or a bool mask, to int64 row numbers."""
    if indices.dtype is torch.int64:
        return indices
    if indices.dtype is torch.int32:
        return indices.long()
    if indices.dtype is not torch.bool:
        reject(TypeError, function, [f"indices: expected int32, int64 or bool, got {describe(indices)}"])
    if indices.shape != (first_axis_dim,):
        expected = f"expected, as bool, shape ({first_axis_dim},)"
        reject(ValueError, function, [f"indices: {expected}, got {describe(indices)}"])
    return indices.nonzero().flatten()


def _reject_indices(function: str, shape: str, indices: Tensor, first_axis_dim: int) -> NoReturn:
    values = f" with values from {indices.min()} to {indices.max()}" if indices.numel() > 0 else ""
    expected = f"shape {shape} with values from 0 to {first_axis_dim - 1}"
    reject(IndexError, function, [f"indices: expected {expected}, got {describe(indices)}{values}"])


def _cumulative(seqlens: Tensor) -> Tensor:
    return F.pad(seqlens.cumsum(0, dtype=torch.int32), (1, 0))


def _longest(seqlens: Tensor) -> Any:
    """An int; in torch.export a SymInt, which int() would refuse."""
    return seqlens.max().item() if seqlens.numel() > 0 else 0


def _check_shapes(masks: dict[str, Tensor], rows: tuple[int, ...]) -> None:
    reasons = []
    for name, mask in masks.items():
        if mask.shape != rows:
            advice = f": pass {name}.flatten(1)" if mask.dim() > 2 and mask.flatten(1).shape == rows else ""
            expected = f"expected shape (batch_size, seqlen) = {rows}"
            reasons.append(f"{name}: {expected}, got {tuple(mask.shape)}{advice}")
    if reasons:
        reject(ValueError, "unpad_input", reasons)


def _check_floats(name: str, mask: Tensor, needs_one: bool) -> None:
    """Check that a floating mask holds only 0 and 1. needs_one: at least one 1, to detect additive masks of zeros."""
    ones = mask == 1
    is_mask = (ones | (mask == 0)).all()
    if needs_one:
        is_mask = is_mask & ones.any()
    expected = f"expected 1 to keep and 0 to drop{', some 1' if needs_one else ''}"
    advice = f"if it is additive (0 keeps), pass {name} == 0, else {name} != 0"
    if torch.compiler.is_compiling():
        torch._assert_async(is_mask, f"unpad_input: {name}: {expected}: {advice}")
    elif not is_mask:
        got = f"got {mask.dtype} from {mask.min()} to {mask.max()}"
        reject(ValueError, "unpad_input", [f"{name}: {expected}, {got}: {advice}"])


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """Remove padding: pack the tokens that a mask keeps.

    Args:
        hidden_states: (batch_size, seqlen, ...), any dtype.
        attention_mask: (batch_size, seqlen), bool, integer or float: 1 for tokens to keep, 0 for padding. Additive
            masks (0 = keep) are rejected; convert them with attention_mask == 0.
        unused_mask: (batch_size, seqlen), 1 for tokens that are allocated but unused: they are packed too, and count
            in all results except seqused.

    Returns:
        hidden_states: (total, ...), the kept tokens, in order.
        indices: (total,), int64, their indices in the flattened batch, for pad_input.
        cu_seqlens: (batch_size + 1,), int32, cumulative lengths, starting at 0.
        max_seqlen: int, length of the longest sequence.
        seqused: (batch_size,), int32, number of tokens per sequence that attention_mask keeps.

    Raises:
        ValueError: a mask has the wrong shape; a float mask has values other than 0 and 1; or attention_mask is float
            and has no 1.
    """
    masks = {"attention_mask": attention_mask} | ({} if unused_mask is None else {"unused_mask": unused_mask})
    _check_shapes(masks, tuple(hidden_states.shape[:2]))
    for name, mask in masks.items():
        if mask.is_floating_point() and mask.numel() > 0:
            _check_floats(name, mask, needs_one=name == "attention_mask")
    keep = attention_mask != 0
    seqused = keep.sum(dim=-1, dtype=torch.int32)
    seqlens = seqused
    if unused_mask is not None:
        keep = keep | (unused_mask != 0)
        seqlens = keep.sum(dim=-1, dtype=torch.int32)
    indices = keep.flatten().nonzero().flatten()
    packed = index_first_axis(rearrange(hidden_states, "b s ... -> (b s) ..."), indices)
    return packed, indices, _cumulative(seqlens), _longest(seqlens), seqused


def _whole_lengths(lengths: Tensor, batch_size: int, seqlen: int) -> Tensor:
    """Check that lengths, (batch_size, seqlen), fit in rows of seqlen tokens; returns them as int64."""
    function, name = "unpad_input_for_concatenated_sequences", "attention_mask_in_length"
    if lengths.dtype is torch.bool:
        advice = "for a mask of the tokens there is unpad_input"
        reject(TypeError, function, [f"{name}: expected the lengths of sequences, got {lengths.dtype}: {advice}"])
    if lengths.dim() != 2 or lengths.shape[0] != batch_size:
        expected = f"expected shape (batch_size, seqlen) = {(batch_size, seqlen)}"
        reject(ValueError, function, [f"{name}: {expected}, got {tuple(lengths.shape)}"])
    whole = lengths.long()
    wrong = ((whole < 0) | (whole > seqlen) | (whole != lengths)).any(dim=-1) | (whole.sum(dim=-1) > seqlen)
    if wrong.any():
        row = int(wrong.nonzero()[0])
        expected = f"expected lengths, whole numbers, that add up to at most seqlen = {seqlen} in each row"
        reject(ValueError, function, [f"{name}: {expected}, got in row {row} {describe(lengths[row].tolist())}"])
    return whole


def unpad_input_for_concatenated_sequences(
    hidden_states: Tensor, attention_mask_in_length: Tensor
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Remove padding from rows that each hold several concatenated sequences.

    Args:
        hidden_states: (batch_size, seqlen, ...), any dtype.
        attention_mask_in_length: (batch_size, seqlen), integer-valued: the lengths of the sequences of each row, then
            zeros. [[2, 3, 0, 0, 0, 0]] is a row of six tokens: a sequence of 2, a sequence of 3, 1 padding token.

    Returns:
        hidden_states (total, ...), indices (total,), cu_seqlens (num_sequences + 1,), max_seqlen: as unpad_input.

    Raises:
        TypeError: attention_mask_in_length is a bool mask of tokens.
        ValueError: wrong shape, negative or fractional lengths, or lengths that add up to more than seqlen in a row.
    """
    lengths = _whole_lengths(attention_mask_in_length, hidden_states.shape[0], hidden_states.shape[1])
    columns = torch.arange(hidden_states.shape[1], device=lengths.device)
    keep = columns < lengths.sum(dim=-1, keepdim=True)
    seqlens = lengths[lengths != 0].to(torch.int32)
    indices = keep.flatten().nonzero().flatten()
    packed = index_first_axis(rearrange(hidden_states, "b s ... -> (b s) ..."), indices)
    return packed, indices, _cumulative(seqlens), _longest(seqlens)


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """The inverse of unpad_input: (total, ...) to (batch, seqlen, ...), with zeros at the padding.

    Args:
        hidden_states: (total, ...), the packed tokens.
        indices: (total,), from unpad_input.
        batch, seqlen: sizes of the padded batch.
    """
    padded = index_put_first_axis(hidden_states, indices, batch * seqlen)
    return rearrange(padded, "(b s) ... -> b s ...", b=batch, s=seqlen)
