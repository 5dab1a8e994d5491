"""Attention modules without parameters, on the flash_attn functions and as plain torch operations."""

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
    """The options shared by the four modules below.

    s_aux of their forward: (num_heads,), the attention sinks, as in flash_attn_func.
    """

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
        """The slopes, float32: a copy. Assign to replace them."""
        return None if self._slopes is None else self._slopes.copy()

    @alibi_slopes.setter
    def alibi_slopes(self, value: Tensor | Sequence[float] | None) -> None:
        self._slopes = None if value is None else Slopes(type(self).__name__, value)

    def _options(self, causal: bool | None, device: torch.device, s_aux: Tensor | None = None) -> dict[str, Any]:
        return {
            "dropout_p": self.drop.p if self.training else 0.0,
            "softmax_scale": self.softmax_scale,
            "causal": self.causal if causal is None else causal,
            "window_size": self.window_size,
            "alibi_slopes": None if self._slopes is None else self._slopes.on(device),
            "deterministic": self.deterministic,
            "s_aux": s_aux,
        }


class FlashSelfAttention(_InnerAttention):
    """Self-attention of packed qkv. The options are those of flash_attn_func.

    Dropout is applied in training only.
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
        *,
        s_aux: Tensor | None = None,
    ) -> Tensor:
        """Compute attention.

        Args:
            qkv: (batch_size, seqlen, 3, num_heads, head_dim), or (total, 3, num_heads, head_dim) with cu_seqlens.
            causal: overrides the module's option unless None.
            cu_seqlens, max_seqlen: as in flash_attn_varlen_qkvpacked_func.

        Returns:
            out, (batch_size, seqlen, num_heads, head_dim) or (total, num_heads, head_dim).
        """
        options = self._options(causal, qkv.device, s_aux)
        if cu_seqlens is None:
            return flash_attn_qkvpacked_func(qkv, **options)
        return flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens, max_seqlen, **options)


class FlashCrossAttention(_InnerAttention):
    """Cross-attention of q and packed kv. The options are those of flash_attn_func.

    Dropout is applied in training only.
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
        *,
        s_aux: Tensor | None = None,
    ) -> Tensor:
        """Compute attention.

        Args:
            q: (batch_size, seqlen_q, num_heads, head_dim), or (total_q, num_heads, head_dim) with cu_seqlens.
            kv: (batch_size, seqlen_k, 2, num_heads_k, head_dim), or (total_k, 2, num_heads_k, head_dim).
            causal: overrides the module's option unless None.
            cu_seqlens, max_seqlen: of the queries, as in flash_attn_varlen_kvpacked_func.
            cu_seqlens_k, max_seqlen_k: of the keys; None: those of the queries.

        Returns:
            out, in the shape of q.
        """
        options = self._options(causal, q.device, s_aux)
        if cu_seqlens is None:
            return flash_attn_kvpacked_func(q, kv, **options)
        if cu_seqlens_k is None:
            cu_seqlens_k, max_seqlen_k = cu_seqlens, max_seqlen
        return flash_attn_varlen_kvpacked_func(q, kv, cu_seqlens, cu_seqlens_k, max_seqlen, max_seqlen_k, **options)


class CrossAttention(_InnerAttention):
    """FlashCrossAttention in plain torch operations, in memory quadratic in the sequence length.

    Dense batches only (no cu_seqlens). Masks are bottom-right aligned as well.
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
        self,
        q: Tensor,
        kv: Tensor,
        causal: bool | None = None,
        key_padding_mask: Tensor | None = None,
        *,
        s_aux: Tensor | None = None,
    ) -> Tensor:
        """Compute attention.

        Args:
            q: (batch_size, seqlen_q, num_heads, head_dim).
            kv: (batch_size, seqlen_k, 2, num_heads_k, head_dim).
            causal: overrides the module's option unless None.
            key_padding_mask: (batch_size, seqlen_k), bool, True for keys to keep.

        Returns:
            out, in the shape of q.
        """
        k, v = repeat(kv, "b s two h d -> two b s (h group) d", group=q.shape[2] // kv.shape[3])
        scale = q.shape[-1] ** -0.5 if self.softmax_scale is None else self.softmax_scale
        scores = torch.einsum("b i h d, b j h d -> b h i j", q * scale, k)
        # Distance from the query's (bottom-right aligned) position to the key, (seqlen_q, seqlen_k).
        seqlen_q, seqlen_k = scores.shape[-2:]
        rows, keys = (torch.arange(n, device=q.device) for n in (seqlen_q, seqlen_k))
        distance = keys - rows[:, None] - (seqlen_k - seqlen_q)
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
        # Fully masked rows keep their scores here: the softmax of all -inf would be NaN.
        hidden = ~keep & keep.any(dim=-1, keepdim=True)
        scores = scores.to(exact).masked_fill(hidden, -torch.inf)
        if s_aux is not None:
            sinks = s_aux.to(exact)[:, None, None].expand(*scores.shape[:-1], 1)
            weights = torch.cat([scores, sinks], dim=-1).softmax(dim=-1)[..., :-1].masked_fill(~keep, 0)
        else:
            weights = scores.softmax(dim=-1).masked_fill(~keep, 0)
        return torch.einsum("b h i j, b j h d -> b i h d", self.drop(weights.to(v.dtype)), v)


class SelfAttention(CrossAttention):
    """FlashSelfAttention in plain torch operations, in memory quadratic in the sequence length."""

    def forward(  # type: ignore[override]
        self,
        qkv: Tensor,
        causal: bool | None = None,
        key_padding_mask: Tensor | None = None,
        *,
        s_aux: Tensor | None = None,
    ) -> Tensor:
        """Compute attention.

        Args:
            qkv: (batch_size, seqlen, 3, num_heads, head_dim).
            causal: overrides the module's option unless None.
            key_padding_mask: (batch_size, seqlen), bool, True for keys to keep.

        Returns:
            out, (batch_size, seqlen, num_heads, head_dim).
        """
        return super().forward(qkv[:, :, 0], qkv[:, :, 1:], causal, key_padding_mask, s_aux=s_aux)
