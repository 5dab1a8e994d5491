"""Rotary position embeddings: Su et al., "RoFormer" (2021), section 3.2.

Each pair of numbers of a query or key is rotated by an angle proportional to its position, so that scores depend on
distances only. A pair is (i, i + rotary_dim / 2), or (2 i, 2 i + 1) when interleaved. Everything is computed in float32
(float64 for float64 input), rounded once, and differentiable.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from flash_attn._checks import describe, reject
from flash_attn._constants import is_plain, may_keep
from flash_attn.layers._rotate import check_shapes, rotate, rotate_in_place, rotate_parts, rows_of


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
    """Rotate the first rotary_dim numbers of every head of x; with conjugate, rotate them back.

    Everything else is as in apply_rotary_emb.
    """
    check_shapes("apply_rotary", x, cos, sin, cu_seqlens is not None, max_seqlen)
    cos, sin = rows_of("apply_rotary", x, (cos, -sin if conjugate else sin), seqlen_offsets, cu_seqlens)
    if inplace:
        return rotate_in_place(x, [((), cos, sin)], interleaved)
    rotary_dim = 2 * cos.shape[-1]
    rotated = rotate(x[..., :rotary_dim], cos, sin, interleaved)
    return rotated if rotary_dim == x.shape[-1] else torch.cat([rotated, x[..., rotary_dim:]], dim=-1)


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
    """Rotate the first rotary_dim numbers of every head of x by the angles of their positions.

    Args:
        x: (batch_size, seqlen, num_heads, head_dim), or (total, num_heads, head_dim) with cu_seqlens.
        cos, sin: (seqlen_rotary, rotary_dim / 2), one row for each position; rotary_dim <= head_dim.
        interleaved: pairs are (2 i, 2 i + 1) and not (i, i + rotary_dim / 2).
        inplace: write the result into x and return x. Where autograd guards x (a leaf that requires grad, a view of
            one, one of the views of unbind), only what is returned has the gradient of the rotated x.
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


def rotate_half(x: Tensor, interleaved: bool = False) -> Tensor:
    """Every pair (a, b) of the last dimension as (-b, a)."""
    if interleaved:
        first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack([-second, first], dim=-1).flatten(-2)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)


def apply_rotary_emb_torch(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """apply_rotary_emb of x, (batch_size, seqlen, num_heads, head_dim), by its original's plain form.

    cos and sin have a row for every row of x: (seqlen, rotary_dim / 2), or (batch_size, seqlen, rotary_dim / 2).
    """
    rotary_dim = 2 * cos.shape[-1]
    return torch.cat([rotate(x[..., :rotary_dim], cos, sin, interleaved), x[..., rotary_dim:]], dim=-1)


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
    q: Any
    k: Any
    if qkv.dim() == 5 and qkv.shape[2] == 3:
        q, k = 0, 1
    elif qkv.dim() == 4 and num_heads_q is not None and num_heads_q <= qkv.shape[2]:
        num_heads_k = (qkv.shape[2] - num_heads_q) // 2
        q, k = slice(num_heads_q), slice(num_heads_q, num_heads_q + num_heads_k)
    else:
        expected = "shape (batch_size, seqlen, 3, num_heads, head_dim), or of rank 4 with num_heads_q"
        reasons = [f"qkv: expected {expected}, got {tuple(qkv.shape)} and num_heads_q={num_heads_q}"]
        reject(ValueError, "apply_rotary_emb_qkv_", reasons)
    cos_k, sin_k = cos if cos_k is None else cos_k, sin if sin_k is None else sin_k
    parts = [((slice(None), slice(None), q), cos, sin), ((slice(None), slice(None), k), cos_k, sin_k)]
    return rotate_parts("apply_rotary_emb_qkv_", qkv, parts, seqlen_offsets, interleaved)


def apply_rotary_emb_kv_(
    kv: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False, seqlen_offsets: int | Tensor = 0
) -> Tensor:
    """apply_rotary_emb, in place, of the keys in kv, (batch_size, seqlen, 2, num_heads_k, head_dim); returns kv."""
    if kv.dim() != 5 or kv.shape[2] != 2:
        expected = "shape (batch_size, seqlen, 2, num_heads_k, head_dim)"
        reject(ValueError, "apply_rotary_emb_kv_", [f"kv: expected {expected}, got {tuple(kv.shape)}"])
    parts = [((slice(None), slice(None), 0), cos, sin)]
    return rotate_parts("apply_rotary_emb_kv_", kv, parts, seqlen_offsets, interleaved)


class _Tables(NamedTuple):
    """cos and sin of the positions from 0 to seqlen - 1, each (seqlen, dim / 2) or None, for queries and for keys."""

    seqlen: int
    cos: Any
    sin: Any
    cos_k: Any
    sin_k: Any


_NO_TABLES = _Tables(0, None, None, None, None)


def _of_tables(name: str) -> property:
    """An attribute of RotaryEmbedding that is a part of what it keeps."""

    def get(self: RotaryEmbedding) -> Any:
        return getattr(self._kept, name)

    def put(self: RotaryEmbedding, value: Any) -> None:
        self._kept = self._kept._replace(**{name: value})

    return property(get, put)


class RotaryEmbedding(nn.Module):
    """Rotary embeddings. All that they need follows from the numbers given here: nothing is in the state_dict.

    Tables are kept for the next call and made anew where they are too short. Under torch.compile, torch.export,
    FakeTensorMode and the transforms of torch.func every call makes its own.

    Args:
        dim: rotary_dim, even: how many numbers of every head are rotated.
        base: pair i is rotated by position * base ** (-2 i / dim).
        interleaved: pairs are (2 i, 2 i + 1) and not (i, i + dim / 2).
        scale_base: xPos, Sun et al., "A Length-Extrapolatable Transformer" (2022): queries also grow, and keys shrink,
            with the position, by a factor that depends on position / scale_base. None: off.
        device: accepted for the sake of existing code; tables are where the tensors are that they rotate.
    """

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
        self._frequencies: list[float] | None = None
        self._kept = _NO_TABLES

    @property
    def inv_freq(self) -> Tensor:
        """The angle per position of every pair, (dim / 2,), float32: a copy. Others can be assigned."""
        return self._compute_inv_freq(self._device())

    @inv_freq.setter
    def inv_freq(self, value: Tensor) -> None:
        self._frequencies = value.tolist()
        self._kept = _NO_TABLES

    @property
    def scale(self) -> Tensor | None:
        """How much pairs grow with xPos, (dim / 2,), float32: a copy; None without."""
        return None if self.scale_base is None else self._compute_scale(self._device())

    def _device(self) -> torch.device:
        return torch.device("cpu") if self._kept.cos is None else self._kept.cos.device

    def _compute_inv_freq(self, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
        if self._frequencies is not None:
            return torch.tensor(self._frequencies, device=device, dtype=dtype)
        exponents = torch.arange(0, self.dim, 2, device=device, dtype=dtype) / self.dim
        return self.base**-exponents

    def _compute_scale(self, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
        return (torch.arange(0, self.dim, 2, device=device, dtype=dtype) + 0.4 * self.dim) / (1.4 * self.dim)

    def _make_tables(self, seqlen: int, device: torch.device | None, dtype: torch.dtype | None) -> _Tables:
        """Computed in float32, or in float64 for float64: angles of large positions need it."""
        exact = {"device": device, "dtype": torch.float64} if dtype == torch.float64 else {"device": device}
        inv_freq = self._compute_inv_freq(**exact)
        positions = torch.arange(seqlen, device=device, dtype=inv_freq.dtype)
        angles = positions[:, None] * inv_freq
        cos, sin = angles.cos(), angles.sin()
        if self.scale_base is None:
            cos, sin = cos.to(dtype), sin.to(dtype)
            return _Tables(seqlen, cos, sin, cos, sin)
        factor = self._compute_scale(**exact) ** ((positions - seqlen // 2) / self.scale_base)[:, None]
        tables = (cos * factor, sin * factor, cos / factor, sin / factor)
        return _Tables(seqlen, *(table.to(dtype) for table in tables))

    def _can_serve(self, kept: _Tables, seqlen: int, device: torch.device | None, dtype: torch.dtype | None) -> bool:
        if kept.cos is None:
            return False
        # xPos grows from the middle of the tables, so that they have to be as long as asked for.
        is_long_enough = kept.seqlen >= seqlen if self.scale_base is None else kept.seqlen == seqlen
        return is_long_enough and kept.cos.device == device and kept.cos.dtype == dtype and is_plain(kept.cos)

    def _update_cos_sin_cache(
        self, seqlen: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> _Tables:
        """Keep tables at least seqlen long, on the device and in the dtype; classes elsewhere then read _cos_cached."""
        found = self._kept  # looked at once, and replaced as a whole: other threads may do the same
        if not self._can_serve(found, seqlen, device, dtype):
            with torch.inference_mode(False):
                self._kept = found = self._make_tables(seqlen, device, dtype)
        return found

    def tables(self, seqlen: int, like: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """(cos, sin) for queries and for keys, at least seqlen long, to rotate tensors like the one given."""
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        if type(self)._update_cos_sin_cache is not RotaryEmbedding._update_cos_sin_cache:
            # A class of another project makes tables of its own.
            self._update_cos_sin_cache(seqlen, device=like.device, dtype=dtype)
            found = (self._cos_cached, self._sin_cached), (self._cos_k_cached, self._sin_k_cached)
            return found if found[1][0] is not None else (found[0], found[0])
        make = self._update_cos_sin_cache if may_keep() else self._make_tables
        _, cos, sin, cos_k, sin_k = make(seqlen, like.device, dtype)
        return (cos, sin), (cos_k, sin_k)

    # The names under which classes of other projects read the tables, and set them.
    _seq_len_cached = _of_tables("seqlen")
    _cos_cached = _of_tables("cos")
    _sin_cached = _of_tables("sin")
    _cos_k_cached = _of_tables("cos_k")
    _sin_k_cached = _of_tables("sin_k")

    def forward(
        self,
        qkv: Tensor,
        kv: Tensor | None = None,
        seqlen_offset: int | Tensor = 0,
        max_seqlen: int | None = None,
        num_heads_q: int | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Rotate queries and keys in place.

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
