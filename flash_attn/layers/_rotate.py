"""Rotation of pairs of elements by position-dependent angles, out of place or in place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flash_attn._checks import reject


def check_shapes(function: str, x: Tensor, cos: Tensor, sin: Tensor, is_varlen: bool, max_seqlen: int | None) -> None:
    reasons = []
    if x.dim() != (3 if is_varlen else 4):
        shape = "(total, num_heads, head_dim)" if is_varlen else "(batch_size, seqlen, num_heads, head_dim)"
        reasons.append(f"x: expected shape {shape}, got {tuple(x.shape)}")
    if cos.dim() != 2 or 2 * cos.shape[-1] > x.shape[-1]:
        limit = f"rotary_dim <= head_dim={x.shape[-1]}"
        reasons.append(f"cos: expected shape (seqlen_rotary, rotary_dim / 2) with {limit}, got {tuple(cos.shape)}")
    if sin.shape != cos.shape:
        reasons.append(f"sin: expected the shape of cos, {tuple(cos.shape)}, got {tuple(sin.shape)}")
    if is_varlen and max_seqlen is None:
        reasons.append("max_seqlen: expected the length of the longest sequence, as cu_seqlens is given, got None")
    if reasons:
        reject(ValueError, function, reasons)


def _select_rows(function: str, tables: tuple[Tensor, Tensor], positions: Tensor) -> list[Tensor]:
    """Rows of cos and sin at the positions. Out of range: ValueError on the CPU, clamped on other devices."""
    seqlen_rotary = tables[0].shape[0]
    if positions.device.type != "cpu":
        positions = positions.clamp(0, max(seqlen_rotary - 1, 0))
    try:
        rows = [table.index_select(0, positions.flatten()) for table in tables]
    except IndexError:
        got = f"positions {int(positions.min())} to {int(positions.max())}"
        reject(
            ValueError, function, [f"cos: expected a row for every position (seqlen_rotary={seqlen_rotary}), got {got}"]
        )
    return [row.unflatten(0, positions.shape) for row in rows]


def rows_of(
    function: str,
    x: Tensor,
    tables: tuple[Tensor, Tensor],
    seqlen_offsets: int | Tensor,
    cu_seqlens: Tensor | None,
) -> list[Tensor]:
    """cos, sin for every row of x: (seqlen, d), (batch_size, seqlen, d) or, packed, (total, d); d = rotary_dim / 2."""
    seqlen_rotary = tables[0].shape[0]
    rows = torch.arange(x.shape[-3], device=x.device)
    if cu_seqlens is not None:
        sequence = torch.searchsorted(cu_seqlens, rows, right=True) - 1
        is_used = rows < cu_seqlens[-1]
        sequence = torch.where(is_used, sequence, 0)
        positions = rows - cu_seqlens[sequence]
        offsets = seqlen_offsets
        if isinstance(seqlen_offsets, Tensor):
            offsets = seqlen_offsets.expand(cu_seqlens.shape[0] - 1)[sequence]
        return _select_rows(function, tables, torch.where(is_used, positions + offsets, 0))
    if isinstance(seqlen_offsets, Tensor):
        return _select_rows(function, tables, rows + seqlen_offsets.reshape(-1, 1))
    end = seqlen_offsets + x.shape[-3]
    if seqlen_offsets < 0 or end > seqlen_rotary:
        got = f"positions {seqlen_offsets} to {end - 1}"
        reject(
            ValueError, function, [f"cos: expected a row for every position (seqlen_rotary={seqlen_rotary}), got {got}"]
        )
    return [table[seqlen_offsets:end] for table in tables]


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotate x (..., heads, rotary_dim) by the angles with the given cos and sin, (..., rotary_dim / 2)."""
    compute_dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    pairs = x.to(compute_dtype).unflatten(-1, (-1, 2) if interleaved else (2, -1))
    first, second = pairs.unbind(-1 if interleaved else -2)
    cos, sin = cos.to(compute_dtype).unsqueeze(-2), sin.to(compute_dtype).unsqueeze(-2)
    rotated = (torch.addcmul(first * cos, second, sin, value=-1), torch.addcmul(first * sin, second, cos))
    return torch.stack(rotated, dim=-1 if interleaved else -2).flatten(-2).to(x.dtype)


# Index of a part of a tensor, and cos and sin for the rows of that part.
Rotation = tuple[tuple[Any, ...], Tensor, Tensor]


def _write_rotated(x: Tensor, rotations: Sequence[Rotation], interleaved: bool) -> None:
    for index, cos, sin in rotations:
        part = x[index][..., : 2 * cos.shape[-1]]
        part.copy_(rotate(part, cos, sin, interleaved))


class _GuardedRotation(torch.autograd.Function):
    """In-place rotation of tensors that autograd protects against writes; the returned tensor has the right gradient.

    The gradient of the input tensor itself ignores the rotation, as in flash_attn 2.8.3.
    """

    @staticmethod
    def forward(x: Tensor, interleaved: bool, indices: Sequence[tuple[Any, ...]], *tables: Tensor) -> Tensor:
        _write_rotated(x, list(zip(indices, tables[::2], tables[1::2], strict=True)), interleaved)
        return x

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.interleaved, ctx.indices, *tables = inputs
        ctx.save_for_backward(*tables)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        """Rotate the gradient by the opposite angles."""
        dx, tables = dout.clone(), ctx.saved_tensors
        rotations = [(i, cos, -sin) for i, cos, sin in zip(ctx.indices, tables[::2], tables[1::2], strict=True)]
        _write_rotated(dx, rotations, ctx.interleaved)
        return dx, None, None, *(None for _ in tables)


def rotate_in_place(x: Tensor, rotations: Sequence[Rotation], interleaved: bool) -> Tensor:
    """Rotate parts of x in place; returns x."""
    try:
        _write_rotated(x, rotations, interleaved)
    except RuntimeError:
        if not (torch.is_grad_enabled() and x.requires_grad):
            raise
        # A leaf, a view of a leaf, or one of several views: autograd raised before anything was written.
        tables = [table for _, cos, sin in rotations for table in (cos, sin)]
        return _GuardedRotation.apply(x, interleaved, [index for index, _, _ in rotations], *tables)
    return x


def rotate_parts(
    function: str, x: Tensor, parts: Sequence[Rotation], seqlen_offsets: int | Tensor, interleaved: bool
) -> Tensor:
    """Rotate parts of x, each (batch_size, seqlen, heads, head_dim), in place; returns x."""
    rotations = []
    for index, cos, sin in parts:
        check_shapes(function, x[index], cos, sin, is_varlen=False, max_seqlen=None)
        rows = rows_of(function, x[index], (cos, sin), seqlen_offsets, cu_seqlens=None)
        rotations.append((index, rows[0], rows[1]))
    return rotate_in_place(x, rotations, interleaved)
