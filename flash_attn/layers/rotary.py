"""Rotary position embeddings: Su et al., "RoFormer" (2021), section 3.2.

Each pair of numbers of a query or key is turned by an angle proportional to its position, so that scores depend on
distances only. A pair is (i, i + rotary_dim / 2), or (2 i, 2 i + 1) when interleaved. Everything is computed in float32
(float64 for float64 input), rounded once, and differentiable.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from flash_attn._checks import describe, reject


def _check_shapes(function: str, x: Tensor, cos: Tensor, sin: Tensor, is_varlen: bool, max_seqlen: int | None) -> None:
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
    """The rows of cos and sin at positions. Beyond the tables: an error on the CPU; elsewhere the last row."""
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


def _rows_of(
    function: str,
    x: Tensor,
    tables: tuple[Tensor, Tensor],
    seqlen_offsets: int | Tensor,
    cu_seqlens: Tensor | None,
) -> list[Tensor]:
    """cos and sin for every row of x: (seqlen, d), (batch_size, seqlen, d) or, packed, (total, d)."""
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


def _turn(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """x (..., heads, rotary_dim) turned by angles whose cos and sin are (..., rotary_dim / 2)."""
    compute_dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    pairs = x.to(compute_dtype).unflatten(-1, (-1, 2) if interleaved else (2, -1))
    first, second = pairs.unbind(-1 if interleaved else -2)
    cos, sin = cos.to(compute_dtype).unsqueeze(-2), sin.to(compute_dtype).unsqueeze(-2)
    turned = (first * cos - second * sin, first * sin + second * cos)
    return torch.stack(turned, dim=-1 if interleaved else -2).flatten(-2).to(x.dtype)


def apply_rotary(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    interleaved: bool = False,
    inplace: bool = False,
    conjugate: bool = False,
) -> Tensor:
    """Turn the first rotary_dim numbers of every head of x; with conjugate, turn them back.

    Everything else is as in apply_rotary_emb.
    """
    _check_shapes("apply_rotary", x, cos, sin, cu_seqlens is not None, max_seqlen)
    cos, sin = _rows_of("apply_rotary", x, (cos, -sin if conjugate else sin), seqlen_offsets, cu_seqlens)
    rotary_dim = 2 * cos.shape[-1]
    if inplace:
        part = x[..., :rotary_dim]
        part.copy_(_turn(part, cos, sin, interleaved))
        return x
    turned = _turn(x[..., :rotary_dim], cos, sin, interleaved)
    return turned if rotary_dim == x.shape[-1] else torch.cat([turned, x[..., rotary_dim:]], dim=-1)


def apply_rotary_emb(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    inplace: bool = False,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor:
    """Turn the first rotary_dim numbers of every head of x by the angles of their positions.

    Args:
        x: (batch_size, seqlen, num_heads, head_dim), or (total, num_heads, head_dim) with cu_seqlens.
        cos, sin: (seqlen_rotary, rotary_dim / 2), one row for each position; rotary_dim <= head_dim.
        interleaved: pairs are (2 i, 2 i + 1) and not (i, i + rotary_dim / 2).
        inplace: write the result into x and return x.
        seqlen_offsets: the position of the first row: an int, or (batch_size,) for each sequence its own.
        cu_seqlens: (batch_size + 1,), int32, where each packed sequence, and its positions, start.
        max_seqlen: with cu_seqlens: at least the length of the longest sequence.

    Returns:
        A tensor of the shape and dtype of x.

    Raises:
        ValueError: a shape is not as said above; positions go beyond the tables (on the CPU).
    """
    return apply_rotary(x, cos, sin, seqlen_offsets, cu_seqlens, max_seqlen, interleaved, inplace)


apply_rotary_emb_func = apply_rotary_emb


def apply_rotary_emb_qkv_(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    cos_k: Tensor | None = None,
    sin_k: Tensor | None = None,
    interleaved: bool = False,
    seqlen_offsets: int | Tensor = 0,
    num_heads_q: int | None = None,
) -> Tensor:
    """apply_rotary_emb, in place, of the queries and keys in qkv; returns qkv.

    Args:
        qkv: (batch_size, seqlen, 3, num_heads, head_dim), or (batch_size, seqlen, num_heads + 2 * num_heads_k,
            head_dim) with num_heads_q.
        cos_k, sin_k: tables of the keys, if they have their own.
        num_heads_q: the number of query heads.
    """
    if qkv.dim() == 5 and qkv.shape[2] == 3:
        q, k = qkv[:, :, 0], qkv[:, :, 1]
    elif qkv.dim() == 4 and num_heads_q is not None and num_heads_q <= qkv.shape[2]:
        num_heads_k = (qkv.shape[2] - num_heads_q) // 2
        q, k = qkv[:, :, :num_heads_q], qkv[:, :, num_heads_q : num_heads_q + num_heads_k]
    else:
        expected = "shape (batch_size, seqlen, 3, num_heads, head_dim), or of rank 4 with num_heads_q"
        reasons = [f"qkv: expected {expected}, got {tuple(qkv.shape)} and num_heads_q={num_heads_q}"]
        reject(ValueError, "apply_rotary_emb_qkv_", reasons)
    apply_rotary(q, cos, sin, seqlen_offsets, interleaved=interleaved, inplace=True)
    cos_k, sin_k = cos if cos_k is None else cos_k, sin if sin_k is None else sin_k
    apply_rotary(k, cos_k, sin_k, seqlen_offsets, interleaved=interleaved, inplace=True)
    return qkv


def apply_rotary_emb_kv_(
    kv: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False, seqlen_offsets: int | Tensor = 0
) -> Tensor:
    """apply_rotary_emb, in place, of the keys in kv, (batch_size, seqlen, 2, num_heads_k, head_dim); returns kv."""
    if kv.dim() != 5 or kv.shape[2] != 2:
        expected = "shape (batch_size, seqlen, 2, num_heads_k, head_dim)"
        reject(ValueError, "apply_rotary_emb_kv_", [f"kv: expected {expected}, got {tuple(kv.shape)}"])
    apply_rotary(kv[:, :, 0], cos, sin, seqlen_offsets, interleaved=interleaved, inplace=True)
    return kv


class RotaryEmbedding(nn.Module):
    """Rotary embeddings with tables that grow as they are needed. Nothing of it goes into the state_dict.

    Args:
        dim: rotary_dim, even: how many numbers of every head are turned.
        base: pair i turns by position * base ** (-2 i / dim).
        interleaved: pairs are (2 i, 2 i + 1) and not (i, i + dim / 2).
        scale_base: xPos, Sun et al., "A Length-Extrapolatable Transformer" (2022): queries also grow, and keys shrink,
            with the position, by a factor that depends on position / scale_base. None: off.
        device: of the tables, until the first call says otherwise.
    """

    inv_freq: Tensor
    scale: Tensor | None

    def __init__(
        self,
        dim: int,
        base: float = 10000.0,
        interleaved: bool = False,
        scale_base: float | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if dim < 2 or dim % 2 != 0:
            reject(ValueError, "RotaryEmbedding", [f"dim: expected a positive even number, got {describe(dim)}"])
        self.dim = dim
        self.base = float(base)
        self.interleaved = interleaved
        self.scale_base = scale_base
        self.register_buffer("inv_freq", self._compute_inv_freq(device), persistent=False)
        self.register_buffer("scale", None if scale_base is None else self._compute_scale(device), persistent=False)
        self._seq_len_cached = 0
        self._cos_cached: Tensor | None = None
        self._sin_cached: Tensor | None = None
        self._cos_k_cached: Tensor | None = None
        self._sin_k_cached: Tensor | None = None

    def _compute_inv_freq(self, device: torch.device | str | None = None) -> Tensor:
        exponents = torch.arange(0, self.dim, 2, device=device, dtype=torch.float32) / self.dim
        return self.base**-exponents

    def _compute_scale(self, device: torch.device | str | None = None) -> Tensor:
        return (torch.arange(0, self.dim, 2, device=device, dtype=torch.float32) + 0.4 * self.dim) / (1.4 * self.dim)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RotaryEmbedding:
        """Compute the frequencies once the module leaves the meta device, where they have no values."""
        was_meta = self.inv_freq.is_meta
        super()._apply(fn, recurse)
        if was_meta and not self.inv_freq.is_meta:
            self.inv_freq = self._compute_inv_freq(self.inv_freq.device)
            self.scale = None if self.scale is None else self._compute_scale(self.inv_freq.device)
        return self

    def _update_cos_sin_cache(
        self, seqlen: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> None:
        """Make the tables at least seqlen long, on the device and in the dtype."""
        cached = self._cos_cached
        if (
            cached is not None
            and seqlen <= self._seq_len_cached
            and cached.device == device
            and cached.dtype == dtype
            # Tables made in inference mode cannot take part in training. (A compiler does not see the mode.)
            and (torch.compiler.is_compiling() or torch.is_inference_mode_enabled() or not cached.is_inference())
        ):
            return
        # Modules are cast as a whole; angles of large positions need float32 all the same.
        is_exact = self.inv_freq.dtype == torch.float32
        inv_freq = self.inv_freq.to(device) if is_exact else self._compute_inv_freq(device)
        positions = torch.arange(seqlen, device=device, dtype=torch.float32)
        angles = positions[:, None] * inv_freq
        cos, sin = angles.cos(), angles.sin()
        self._seq_len_cached = seqlen
        if self.scale is None or self.scale_base is None:
            self._cos_cached, self._sin_cached = cos.to(dtype), sin.to(dtype)
            return
        scale = self.scale.to(device) if is_exact else self._compute_scale(device)
        factor = scale ** ((positions - seqlen // 2) / self.scale_base)[:, None]
        self._cos_cached, self._sin_cached = (cos * factor).to(dtype), (sin * factor).to(dtype)
        self._cos_k_cached, self._sin_k_cached = (cos / factor).to(dtype), (sin / factor).to(dtype)

    def tables(self, seqlen: int, like: Tensor) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
        """(cos, sin) for queries and for keys, at least seqlen long, to turn tensors like the one given."""
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        self._update_cos_sin_cache(seqlen, device=like.device, dtype=dtype)
        cached = (self._cos_cached, self._sin_cached, self._cos_k_cached, self._sin_k_cached)
        cos, sin, cos_k, sin_k = cached[:2] * 2 if self.scale is None else cached
        return (cos, sin), (cos_k, sin_k)

    def forward(
        self,
        qkv: Tensor,
        kv: Tensor | None = None,
        seqlen_offset: int | Tensor = 0,
        max_seqlen: int | None = None,
        num_heads_q: int | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Turn queries and keys in place.

        Args:
            qkv: as in apply_rotary_emb_qkv_; or, with kv, the queries (batch_size, seqlen, num_heads, head_dim).
            kv: (batch_size, seqlen, 2, num_heads_k, head_dim).
            seqlen_offset: the position of the first row: an int, or (batch_size,) for each sequence its own.
            max_seqlen: how long the tables have to be, if that is known to be more than seqlen + seqlen_offset.
            num_heads_q: as in apply_rotary_emb_qkv_.

        Returns:
            qkv, or the pair of qkv and kv.
        """
        seqlen = qkv.shape[1] if kv is None else max(qkv.shape[1], kv.shape[1])
        if isinstance(seqlen_offset, Tensor):
            needed = max_seqlen if max_seqlen is not None else seqlen + int(seqlen_offset.max())
        else:
            needed = max(seqlen + seqlen_offset, max_seqlen or 0)
        (cos, sin), (cos_k, sin_k) = self.tables(needed, qkv)
        if kv is None:
            return apply_rotary_emb_qkv_(
                qkv, cos, sin, cos_k, sin_k, self.interleaved, seqlen_offset, num_heads_q=num_heads_q
            )
        q = apply_rotary_emb(qkv, cos, sin, self.interleaved, inplace=True, seqlen_offsets=seqlen_offset)
        return q, apply_rotary_emb_kv_(kv, cos_k, sin_k, self.interleaved, seqlen_offsets=seqlen_offset)
