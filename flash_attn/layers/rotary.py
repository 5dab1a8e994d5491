"""Rotary position embeddings: Su et al., "RoFormer" (2021), section 3.2.

Each pair of elements of a query or key is rotated by an angle proportional to its position, so that scores depend only
on relative positions. A pair is (i, i + rotary_dim / 2), or (2 i, 2 i + 1) if interleaved. Computed in float32 (float64
for float64 input), rounded once, differentiable.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from flash_attn._autograd_names import autograd_name
from flash_attn._checks import describe, is_dtensor, reject
from flash_attn._constants import is_plain, may_cache
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
    """Rotate the first rotary_dim elements of every head of x; conjugate: by the opposite angles.

    The other arguments, results and errors are those of apply_rotary_emb.
    """
    check_shapes("apply_rotary", x, cos, sin, cu_seqlens is not None, max_seqlen)
    cos, sin = rows_of("apply_rotary", x, (cos, -sin if conjugate else sin), seqlen_offsets, cu_seqlens)
    if is_dtensor(x):
        from flash_attn import _sharding  # takes long to load

        cos, sin = (_sharding.replicate(table, x) for table in (cos, sin))
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
    """Rotate the first rotary_dim elements of every head of x by the angles of their positions.

    Args:
        x: (batch_size, seqlen, num_heads, head_dim), or (total, num_heads, head_dim) with cu_seqlens; floating point.
        cos, sin: (seqlen_rotary, rotary_dim / 2), one row per position; rotary_dim <= head_dim.
        interleaved: pairs are (2 i, 2 i + 1) instead of (i, i + rotary_dim / 2).
        inplace: write the result to x and return x. If autograd does not allow writing to x (a leaf that requires grad,
            a view of one, a view from unbind), only the returned tensor has the gradient of the rotated x.
        seqlen_offsets: position of the first row: an int, or (batch_size,), int32 or int64, one per sequence.
        cu_seqlens: (batch_size + 1,), int32, cumulative lengths of packed sequences; positions restart at each.
        max_seqlen: with cu_seqlens: upper bound of the sequence lengths.

    Returns:
        A tensor of the shape and dtype of x.

    Raises:
        ValueError: a shape violates the above, or (on the CPU) a position is outside the tables.
    """
    return apply_rotary(x, cos, sin, seqlen_offsets, cu_seqlens, max_seqlen, interleaved, inplace)


apply_rotary_emb_func = apply_rotary_emb


def rotate_half(x: Tensor, interleaved: bool = False) -> Tensor:
    """Map every pair (a, b) of the last dimension of x, (..., rotary_dim), to (-b, a)."""
    if interleaved:
        first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack([-second, first], dim=-1).flatten(-2)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)


def apply_rotary_emb_torch(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """The upstream reference for apply_rotary_emb, without offsets: x (batch_size, seqlen, num_heads, head_dim).

    cos and sin have one row per row of x: (seqlen, rotary_dim / 2) or (batch_size, seqlen, rotary_dim / 2).
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
    """apply_rotary_emb of the queries and keys in qkv, in place; returns qkv.

    Args:
        qkv: (batch_size, seqlen, 3, num_heads, head_dim), or (batch_size, seqlen, num_heads + 2 * num_heads_k,
            head_dim) with num_heads_q.
        cos, sin, interleaved, seqlen_offsets: as in apply_rotary_emb.
        cos_k, sin_k: tables for the keys; None: cos and sin.
        num_heads_q: number of query heads, for qkv of rank 4.

    Raises:
        ValueError: as apply_rotary_emb.
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
    """apply_rotary_emb of the keys in kv, (batch_size, seqlen, 2, num_heads_k, head_dim), in place; returns kv."""
    if kv.dim() != 5 or kv.shape[2] != 2:
        expected = "shape (batch_size, seqlen, 2, num_heads_k, head_dim)"
        reject(ValueError, "apply_rotary_emb_kv_", [f"kv: expected {expected}, got {tuple(kv.shape)}"])
    parts = [((slice(None), slice(None), 0), cos, sin)]
    return rotate_parts("apply_rotary_emb_kv_", kv, parts, seqlen_offsets, interleaved)


ApplyRotaryEmb = autograd_name("ApplyRotaryEmb", apply_rotary_emb)
ApplyRotaryEmbQKV_ = autograd_name("ApplyRotaryEmbQKV_", apply_rotary_emb_qkv_)
ApplyRotaryEmbKV_ = autograd_name("ApplyRotaryEmbKV_", apply_rotary_emb_kv_)


class _Tables(NamedTuple):
    """cos and sin of positions 0 to seqlen - 1, each (seqlen, dim / 2) or None, for queries and for keys (_k)."""

    seqlen: int
    cos: Any
    sin: Any
    cos_k: Any
    sin_k: Any


_NO_TABLES = _Tables(0, None, None, None, None)


def _of_tables(name: str) -> property:
    """A property of RotaryEmbedding that reads and writes a field of its cached tables."""

    def get(self: RotaryEmbedding) -> Any:
        return getattr(self._cached_tables, name)

    def put(self: RotaryEmbedding, value: Any) -> None:
        self._cached_tables = self._cached_tables._replace(**{name: value})

    return property(get, put)


class RotaryEmbedding(nn.Module):
    """Rotary embeddings of queries and keys. The state_dict is empty: all tables derive from the arguments.

    Tables are cached between calls and recomputed if they are too short. Under torch.compile, torch.export,
    FakeTensorMode and torch.func transforms every call computes its own.

    Args:
        dim: rotary_dim, even: number of elements of every head to rotate.
        base: pair i is rotated by position * base ** (-2 i / dim), in radians.
        interleaved: pairs are (2 i, 2 i + 1) instead of (i, i + dim / 2).
        scale_base: xPos, Sun et al., "A Length-Extrapolatable Transformer" (2022): also scales queries up and keys down
            with the position, by a factor that depends on position / scale_base. None: off.
        device: ignored; tables are created on the device of the input.

    Raises:
        ValueError: dim is not a positive even number.
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
        self._cached_tables = _NO_TABLES

    @property
    def inv_freq(self) -> Tensor:
        """Angle per position of every pair, (dim / 2,), float32: a copy. Assign to replace them."""
        return self._compute_inv_freq(self._device())

    @inv_freq.setter
    def inv_freq(self, value: Tensor) -> None:
        self._frequencies = value.tolist()
        self._cached_tables = _NO_TABLES

    @property
    def scale(self) -> Tensor | None:
        """xPos scale of every pair, (dim / 2,), float32: a copy; None without xPos."""
        return None if self.scale_base is None else self._compute_scale(self._device())

    def _device(self) -> torch.device:
        return torch.device("cpu") if self._cached_tables.cos is None else self._cached_tables.cos.device

    def _compute_inv_freq(self, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
        if self._frequencies is not None:
            return torch.tensor(self._frequencies, device=device, dtype=dtype)
        exponents = torch.arange(0, self.dim, 2, device=device, dtype=dtype) / self.dim
        return self.base**-exponents

    def _compute_scale(self, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
        return (torch.arange(0, self.dim, 2, device=device, dtype=dtype) + 0.4 * self.dim) / (1.4 * self.dim)

    def _make_tables(self, seqlen: int, device: torch.device | None, dtype: torch.dtype | None) -> _Tables:
        """Compute tables in float32 (float64 for float64): 16-bit angles would be wrong at large positions."""
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

    def _can_serve(self, cached: _Tables, seqlen: int, device: torch.device | None, dtype: torch.dtype | None) -> bool:
        if cached.cos is None:
            return False
        # xPos scales relative to the middle of the table, so the table must have exactly the requested length.
        is_long_enough = cached.seqlen >= seqlen if self.scale_base is None else cached.seqlen == seqlen
        return is_long_enough and cached.cos.device == device and cached.cos.dtype == dtype and is_plain(cached.cos)

    def _update_cos_sin_cache(
        self, seqlen: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> _Tables:
        """Ensure that cached tables cover seqlen, on this device and dtype. Subclasses then read _cos_cached."""
        found = self._cached_tables  # read once and replaced as a whole: thread-safe
        if not self._can_serve(found, seqlen, device, dtype):
            with torch.inference_mode(False):
                self._cached_tables = found = self._make_tables(seqlen, device, dtype)
        return found

    def tables(
        self, seqlen: int, like: Tensor, dtype: torch.dtype | None = None
    ) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """(cos, sin) for queries and for keys, with at least seqlen rows, for tensors like the one given.

        They are float32 (float64 for float64) unless a dtype is given, and the same tensors for both without xPos.
        """
        if dtype is None:
            dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        if type(self)._update_cos_sin_cache is not RotaryEmbedding._update_cos_sin_cache:
            # A subclass of another project overrides the computation of the tables.
            self._update_cos_sin_cache(seqlen, device=like.device, dtype=dtype)
            found = (self._cos_cached, self._sin_cached), (self._cos_k_cached, self._sin_k_cached)
            return found if found[1][0] is not None else (found[0], found[0])
        make = self._update_cos_sin_cache if may_cache() else self._make_tables
        _, cos, sin, cos_k, sin_k = make(seqlen, like.device, dtype)
        return (cos, sin), (cos_k, sin_k)

    # Attribute names under which other projects' subclasses read and write the tables.
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
            seqlen_offset: position of the first row: an int, or (batch_size,), one per sequence.
            max_seqlen: minimum length of the tables, if known to exceed seqlen + seqlen_offset.
            num_heads_q: as in apply_rotary_emb_qkv_.

        Returns:
            qkv; with kv, the tuple (qkv, kv).
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
