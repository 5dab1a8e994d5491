"""Attention without parameters, as modules: over the flash_attn functions, and written out with torch operations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from einops import repeat
from torch import Tensor, nn

from flash_attn._checks import check_padding_mask, dropout_reasons, reject
from flash_attn._constants import Slopes
from flash_attn.flash_attn_interface import (
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)


class _InnerAttention(nn.Module):
    """What the four modules below share: their options."""

    def __init__(
        self,
        causal: bool,
        softmax_scale: float | None,
        attention_dropout: float,
        window_size: tuple[int, int],
        alibi_slopes: Tensor | Sequence[float] | None,
        deterministic: bool,
    ) -> None:
        super().__init__()
        if reasons := dropout_reasons("attention_dropout", attention_dropout):
            reject(ValueError, type(self).__name__, reasons)
        self.causal = causal
        self.softmax_scale = softmax_scale
        self.drop = nn.Dropout(attention_dropout)
        self.window_size = window_size
        self._slopes = None if alibi_slopes is None else Slopes(type(self).__name__, alibi_slopes)
        self.deterministic = deterministic

    @property
    def alibi_slopes(self) -> Tensor | None:
        """The slopes, float32: a copy. Others can be assigned."""
        return None if self._slopes is None else self._slopes.copy()

    @alibi_slopes.setter
    def alibi_slopes(self, value: Tensor | Sequence[float] | None) -> None:
        self._slopes = None if value is None else Slopes(type(self).__name__, value)

    def _options(self, causal: bool | None, device: torch.device) -> dict[str, Any]:
        return {
            "dropout_p": self.drop.p if self.training else 0.0,
            "softmax_scale": self.softmax_scale,
            "causal": self.causal if causal is None else causal,
            "window_size": self.window_size,
            "alibi_slopes": None if self._slopes is None else self._slopes.on(device),
            "deterministic": self.deterministic,
        }


class FlashSelfAttention(_InnerAttention):
    """Attention of queries, keys and values in one tensor. The options are those of flash_attn_func.

    Dropout acts while training.
    """

    def __init__(
        self,
        causal: bool = False,
        softmax_scale: float | None = None,
        attention_dropout: float = 0.0,
        window_size: tuple[int, int] = (-1, -1),
        alibi_slopes: Tensor | Sequence[float] | None = None,
        deterministic: bool = False,
    ) -> None:
        super().__init__(causal, softmax_scale, attention_dropout, window_size, alibi_slopes, deterministic)

    def forward(
        self,
        qkv: Tensor,
        causal: bool | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: Any = None,
    ) -> Tensor:
        """Attend.

        Args:
            qkv: (batch_size, seqlen, 3, num_heads, head_dim), or (total, 3, num_heads, head_dim) with cu_seqlens.
            causal: in place of the module's own, unless None.
            cu_seqlens, max_seqlen: as in flash_attn_varlen_qkvpacked_func.

        Returns:
            The output, of the shape of qkv without the 3.
        """
        options = self._options(causal, qkv.device)
        if cu_seqlens is None:
            return flash_attn_qkvpacked_func(qkv, **options)
        return flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens, max_seqlen, **options)


class FlashCrossAttention(_InnerAttention):
    """Attention of queries, and keys and values in one tensor. The options are those of flash_attn_func.

    Dropout acts while training.
    """

    def __init__(
        self,
        causal: bool = False,
        softmax_scale: float | None = None,
        attention_dropout: float = 0.0,
        alibi_slopes: Tensor | Sequence[float] | None = None,
        window_size: tuple[int, int] = (-1, -1),
        deterministic: bool = False,
    ) -> None:
        super().__init__(causal, softmax_scale, attention_dropout, window_size, alibi_slopes, deterministic)

    def forward(
        self,
        q: Tensor,
        kv: Tensor,
        causal: bool | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: Any = None,
        cu_seqlens_k: Tensor | None = None,
        max_seqlen_k: Any = None,
    ) -> Tensor:
        """Attend.

        Args:
            q: (batch_size, seqlen_q, num_heads, head_dim), or (total_q, num_heads, head_dim) with cu_seqlens.
            kv: (batch_size, seqlen_k, 2, num_heads_k, head_dim), or (total_k, 2, num_heads_k, head_dim).
            causal: in place of the module's own, unless None.
            cu_seqlens, max_seqlen, cu_seqlens_k, max_seqlen_k: of the queries and of the keys, as in
                flash_attn_varlen_kvpacked_func. Where those of the keys are None, they are those of the queries.

        Returns:
            The output, of the shape of q.
        """
        options = self._options(causal, q.device)
        if cu_seqlens is None:
            return flash_attn_kvpacked_func(q, kv, **options)
        if cu_seqlens_k is None:
            cu_seqlens_k, max_seqlen_k = cu_seqlens, max_seqlen
        return flash_attn_varlen_kvpacked_func(q, kv, cu_seqlens, cu_seqlens_k, max_seqlen, max_seqlen_k, **options)


class CrossAttention(_InnerAttention):
    """FlashCrossAttention written out with torch operations, in memory quadratic in the sequence length.

    For batches without cu_seqlens, with the same alignment of masks.
    """

    def __init__(
        self,
        causal: bool = False,
        softmax_scale: float | None = None,
        attention_dropout: float = 0.0,
        window_size: tuple[int, int] = (-1, -1),
        alibi_slopes: Tensor | Sequence[float] | None = None,
    ) -> None:
        super().__init__(causal, softmax_scale, attention_dropout, window_size, alibi_slopes, deterministic=False)

    def forward(
        self, q: Tensor, kv: Tensor, causal: bool | None = None, key_padding_mask: Tensor | None = None
    ) -> Tensor:
        """Attend.

        Args:
            q: (batch_size, seqlen_q, num_heads, head_dim).
            kv: (batch_size, seqlen_k, 2, num_heads_k, head_dim).
            causal: in place of the module's own, unless None.
            key_padding_mask: (batch_size, seqlen_k), bool, True for the keys to keep.

        Returns:
            The output, of the shape of q.
        """
        k, v = repeat(kv, "b s two h d -> two b s (h group) d", group=q.shape[2] // kv.shape[3])
        scale = q.shape[-1] ** -0.5 if self.softmax_scale is None else self.softmax_scale
        scores = torch.einsum("b i h d, b j h d -> b h i j", q * scale, k)
        # How far each key lies to the right of the diagonal, which ends in the bottom right corner.
        rows, keys = (torch.arange(n, device=q.device) for n in scores.shape[-2:])
        distance = keys - rows[:, None] - (len(keys) - len(rows))
        exact = torch.float64 if scores.dtype == torch.float64 else torch.float32
        if self._slopes is not None:
            scores = scores.to(exact) - self._slopes.on(q.device).to(exact)[..., None, None] * distance.abs()
        left, right = self.window_size
        right = 0 if (self.causal if causal is None else causal) else right
        keep = torch.ones_like(distance, dtype=torch.bool)
        if left >= 0:
            keep = keep & (distance >= -left)
        if right >= 0:
            keep = keep & (distance <= right)
        if key_padding_mask is not None:
            mask = check_padding_mask(type(self).__name__, key_padding_mask, *kv.shape[:2])
            keep = keep & mask[:, None, None, :]
            v = v.masked_fill(~mask[:, :, None, None], 0)
        # A row that sees no key keeps its scores, for a softmax of nothing but -inf is NaN.
        hidden = ~keep & keep.any(dim=-1, keepdim=True)
        weights = scores.to(exact).masked_fill(hidden, -torch.inf).softmax(dim=-1).masked_fill(~keep, 0)
        return torch.einsum("b h i j, b j h d -> b i h d", self.drop(weights.to(v.dtype)), v)


class SelfAttention(CrossAttention):
    """FlashSelfAttention written out with torch operations, in memory quadratic in the sequence length."""

    def forward(  # type: ignore[override]
        self, qkv: Tensor, causal: bool | None = None, key_padding_mask: Tensor | None = None
    ) -> Tensor:
        """Attend.

        Args:
            qkv: (batch_size, seqlen, 3, num_heads, head_dim).
            causal: in place of the module's own, unless None.
            key_padding_mask: (batch_size, seqlen), bool, True for the keys to keep.

        Returns:
            The output, of the shape of qkv without the 3.
        """
        return super().forward(qkv[:, :, 0], qkv[:, :, 1:], causal, key_padding_mask)
