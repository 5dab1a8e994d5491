"""FlashAttention and FlashMHA, the modules of flash_attn 0.x and 1.x, on top of the current functions."""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from flash_attn._checks import PAD_IT, check_padding_mask, dense_reasons, describe, dropout_reasons, integers, reject
from flash_attn.bert_padding import pad_input, unpad_input
from flash_attn.flash_attn_interface import flash_attn_qkvpacked_func, flash_attn_varlen_qkvpacked_func


def _refuse_weights(function: str, need_weights: Any) -> None:
    if need_weights is not False:
        expected = "False, for attention weights are never formed"
        reject(ValueError, function, [f"need_weights: expected {expected}, got {describe(need_weights)}"])


class FlashAttention(nn.Module):
    """Attention of packed qkv, without parameters.

    Args:
        softmax_scale: factor of the scores; None: head_dim ** -0.5.
        attention_dropout: probability of dropping an attention weight in training.
        device, dtype: ignored; accepted for compatibility.

    Raises:
        ValueError: attention_dropout is not in [0, 1).
    """

    def __init__(
        self,
        softmax_scale: float | None = None,
        attention_dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if reasons := dropout_reasons("attention_dropout", attention_dropout):
            reject(ValueError, "FlashAttention", reasons)
        self.softmax_scale = softmax_scale
        self.dropout_p = attention_dropout

    def forward(
        self,
        qkv: Tensor,
        key_padding_mask: Tensor | None = None,
        causal: bool = False,
        cu_seqlens: Tensor | None = None,
        max_s: Any = None,
        need_weights: bool = False,
        *,
        s_aux: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        """Compute attention.

        Args:
            qkv: (batch_size, seqlen, 3, num_heads, head_dim), or (total, 3, num_heads, head_dim) with cu_seqlens.
                Dtypes, devices and head_dim as in flash_attn_func.
            key_padding_mask: (batch_size, seqlen), bool, True for tokens to keep. The result is that of each sequence
                without its padding, and 0 at the padding.
            causal: apply a causal mask.
            cu_seqlens: (batch_size + 1,), int32, cumulative lengths of packed sequences.
            max_s: with cu_seqlens: upper bound of the sequence lengths.
            need_weights: must be False.
            s_aux: (num_heads,), attention sinks, as in flash_attn_func.

        Returns:
            out, (batch_size, seqlen, num_heads, head_dim) or (total, num_heads, head_dim), and None for the weights.

        Raises:
            TypeError, ValueError: key_padding_mask and cu_seqlens are both given, or as in flash_attn_qkvpacked_func.
        """
        _refuse_weights("FlashAttention", need_weights)
        options: dict[str, Any] = {
            "dropout_p": self.dropout_p if self.training else 0.0,
            "softmax_scale": self.softmax_scale,
            "causal": causal,
            "s_aux": s_aux,
        }
        if cu_seqlens is not None:
            reasons = []
            if key_padding_mask is not None:
                reasons.append("key_padding_mask: expected None, for packed sequences have no padding, got a mask")
            if max_s is None:
                reasons.append("max_s: expected the length of the longest sequence, as cu_seqlens is given, got None")
            if reasons:
                reject(ValueError, "FlashAttention", reasons)
            return flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens, max_s, **options), None
        if key_padding_mask is None:
            return flash_attn_qkvpacked_func(qkv, **options), None
        if reasons := dense_reasons({"qkv": qkv}, PAD_IT):
            reject(TypeError, "FlashAttention", reasons)
        batch_size, seqlen = qkv.shape[:2]
        keep = check_padding_mask("FlashAttention", key_padding_mask, batch_size, seqlen)
        packed, indices, cu_seqlens, max_seqlen, _ = unpad_input(qkv, keep)
        out = flash_attn_varlen_qkvpacked_func(packed, cu_seqlens, max_seqlen, **options)
        return pad_input(out, indices, batch_size, seqlen), None


class FlashMHA(nn.Module):
    """Multi-head self-attention with projections: ``out, _ = FlashMHA(embed_dim, num_heads)(x)``.

    Parameters: Wqkv, (3 * embed_dim, embed_dim), out_proj, (embed_dim, embed_dim), and s_aux with sinks. Dtypes,
    devices and head_dim are those of flash_attn_func.

    Args:
        embed_dim: width of input and output, a multiple of num_heads.
        num_heads: number of heads.
        bias: whether both projections have a bias.
        batch_first: must be True.
        attention_dropout: probability of dropping an attention weight in training.
        causal: apply a causal mask.
        device, dtype: of the parameters.
        dropout: alias of attention_dropout; if both are given they must be equal.
        sinks: learn attention sinks, s_aux of flash_attn_func: a parameter s_aux, (num_heads,), 0 at first.

    Raises:
        TypeError: unknown keyword argument.
        ValueError: embed_dim is not a multiple of num_heads; batch_first is False; the dropout arguments differ.
    """

    # torch.nn.TransformerEncoderLayer reads these attributes before its call, which __call__ then rejects.
    batch_first = True
    in_proj_bias = None
    s_aux: nn.Parameter | None

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        bias: bool = True,
        batch_first: bool = True,
        attention_dropout: float = 0.0,
        causal: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        sinks: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        dropout = kwargs.pop("dropout", attention_dropout)
        if kwargs:
            reject(TypeError, "FlashMHA", [f"{name}: expected no argument of this name, got one" for name in kwargs])
        embed_dim, num_heads = integers("FlashMHA", embed_dim=embed_dim, num_heads=num_heads)
        reasons = dropout_reasons("attention_dropout", attention_dropout) or dropout_reasons("dropout", dropout)
        if attention_dropout not in (0.0, dropout):
            reasons.append(f"dropout: expected attention_dropout={attention_dropout}, got {dropout}")
        if not batch_first:
            reasons.append(f"batch_first: expected True, got {batch_first}")
        if num_heads < 1 or embed_dim % num_heads != 0:
            reasons.append(f"embed_dim: expected a multiple of num_heads, which is {num_heads}, got {embed_dim}")
        if reasons:
            reject(ValueError, "FlashMHA", reasons)
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.head_dim = embed_dim // num_heads
        self.causal = causal
        self.Wqkv = nn.Linear(embed_dim, 3 * embed_dim, bias=bias, device=device, dtype=dtype)
        self.inner_attn = FlashAttention(attention_dropout=dropout, device=device, dtype=dtype)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias, device=device, dtype=dtype)
        s_aux = nn.Parameter(torch.zeros(num_heads, device=device, dtype=dtype)) if sinks else None
        self.register_parameter("s_aux", s_aux)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call forward; raises TypeError for calls in the style of torch.nn.MultiheadAttention."""
        unknown = [name for name in kwargs if name not in ("x", "key_padding_mask", "need_weights")]
        is_given_twice = len(args) > 1 and "key_padding_mask" in kwargs
        if unknown or is_given_twice or any(isinstance(x, Tensor) and x.dim() > 2 for x in args[1:]):
            got = f" with {', '.join(unknown)}" if unknown else ""
            raise TypeError(
                "FlashMHA: expected self-attention, attn(x) or attn(x, key_padding_mask=mask) with True = keep, "
                f"got a call like that of torch.nn.MultiheadAttention, attn(query, key, value){got}"
            )
        return super().__call__(*args, **kwargs)

    def forward(
        self, x: Tensor, key_padding_mask: Tensor | None = None, need_weights: bool = False
    ) -> tuple[Tensor, None]:
        """Compute attention, with projections.

        Args:
            x: (batch_size, seqlen, embed_dim).
            key_padding_mask: (batch_size, seqlen), bool, True for tokens to keep (the opposite of
                torch.nn.MultiheadAttention). The result is that of each sequence without its padding. At the padding,
                whose content is ignored, attention is 0 and out_proj adds its bias.
            need_weights: must be False.

        Returns:
            out, (batch_size, seqlen, embed_dim), and None for the weights.
        """
        _refuse_weights("FlashMHA", need_weights)
        if not isinstance(x, Tensor):
            reject(TypeError, "FlashMHA", [f"x: expected torch.Tensor, got {describe(x)}"])
        if reasons := dense_reasons({"x": x}, PAD_IT):
            reject(TypeError, "FlashMHA", reasons)
        if x.dim() != 3 or x.shape[-1] != self.embed_dim:
            expected = f"shape (batch_size, seqlen, embed_dim={self.embed_dim})"
            reject(ValueError, "FlashMHA", [f"x: expected {expected}, got {tuple(x.shape)}"])
        if key_padding_mask is None:
            return self.out_proj(self._attend(x)), None
        batch_size, seqlen = x.shape[:2]
        keep = check_padding_mask("FlashMHA", key_padding_mask, batch_size, seqlen)
        packed, indices, cu_seqlens, max_seqlen, _ = unpad_input(x, keep)
        context = pad_input(self._attend(packed, cu_seqlens, max_seqlen), indices, batch_size, seqlen)
        return self.out_proj(context), None

    def _attend(self, x: Tensor, cu_seqlens: Tensor | None = None, max_seqlen: int | None = None) -> Tensor:
        qkv = rearrange(self.Wqkv(x), "... (three h d) -> ... three h d", three=3, d=self.head_dim)
        options: dict[str, Any] = {"cu_seqlens": cu_seqlens, "max_s": max_seqlen, "s_aux": self.s_aux}
        context, _ = self.inner_attn(qkv, causal=self.causal, **options)
        return rearrange(context, "... h d -> ... (h d)")
