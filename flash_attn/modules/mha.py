"""Multi-head attention with projections: self- and cross-attention; dense, padded and packed batches."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flash_attn._checks import PAD_IT, check_padding_mask, dense_reasons, describe, dropout_reasons, integers, reject
from flash_attn.layers.rotary import RotaryEmbedding, apply_rotary
from flash_attn.modules.cached_attention import attend_cached
from flash_attn.modules.inference_step import allocate_cache, check_call
from flash_attn.modules.inner_attention import CrossAttention, FlashCrossAttention, FlashSelfAttention, SelfAttention
from flash_attn.modules.padded_attention import attend_masked, attend_packed, is_packing_exact

__all__ = [
    "MHA",
    "CrossAttention",
    "FlashCrossAttention",
    "FlashSelfAttention",
    "SelfAttention",
    "get_alibi_slopes",
]


def get_alibi_slopes(nheads: int) -> list[float]:
    """ALiBi slopes of nheads heads, a geometric sequence: Press et al., "Train Short, Test Long" (2022), section 3.

    If nheads is not a power of two: the slopes of the next smaller power, then every other slope of twice that power,
    as in the authors' code.
    """
    power = 2 ** math.floor(math.log2(nheads))
    slopes = [2.0 ** (-8.0 * (i + 1) / power) for i in range(power)]
    between = [2.0 ** (-8.0 * (i + 0.5) / power) for i in range(nheads - power)]
    return slopes + between


class _Packing(NamedTuple):
    """cu_seqlens and max_seqlens of packed queries and keys; all None for a dense batch."""

    cu_seqlens: Tensor | None = None
    max_seqlen: int | None = None
    cu_seqlens_k: Tensor | None = None
    max_seqlen_k: int | None = None


class MHA(nn.Module):
    """Multi-head attention. Parameters: Wqkv (cross-attention: Wq and Wkv), out_proj and, with sinks, s_aux.

    Args:
        embed_dim: width of input and output, a multiple of num_heads.
        num_heads: number of query heads.
        num_heads_kv: number of key and value heads, a divisor of num_heads; None: num_heads.
        cross_attn: keys and values are projected from x_kv.
        qkv_proj_bias, out_proj_bias: whether the projections have a bias.
        dropout: probability of dropping an attention weight in training.
        softmax_scale: factor of the scores; None: head_dim ** -0.5.
        causal: apply a causal mask.
        layer_idx: key of this layer's cache in inference_params.key_value_memory_dict.
        dwconv: apply a causal depthwise convolution of width 3 to the projected rows.
        rotary_emb_dim: number of elements of every head to rotate by rotary embeddings; 0: none.
        rotary_emb_base, rotary_emb_scale_base, rotary_emb_interleaved: as in RotaryEmbedding.
        use_alibi: add the ALiBi bias to the scores (get_alibi_slopes).
        window_size: (left, right), numbers of visible keys before and after the query's position; -1: unbounded.
        fused_bias_fc: must be False.
        use_flash_attn: compute with flash_attn_func; otherwise with torch operations, in quadratic memory.
        return_residual: forward returns (out, x).
        checkpointing: recompute attention in the backward pass.
        device, dtype: of the parameters.
        sinks: learn attention sinks, s_aux of flash_attn_func: a parameter s_aux, (num_heads,), 0 at first.

    Raises:
        ValueError: head counts that do not divide; dropout outside [0, 1); fused_bias_fc=True.
    """

    s_aux: nn.Parameter | None

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_heads_kv: int | None = None,
        cross_attn: bool = False,
        qkv_proj_bias: bool = True,
        out_proj_bias: bool = True,
        dropout: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        layer_idx: int | None = None,
        dwconv: bool = False,
        rotary_emb_dim: int = 0,
        rotary_emb_base: float = 10000.0,
        rotary_emb_scale_base: float | None = None,
        rotary_emb_interleaved: bool = False,
        use_alibi: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        fused_bias_fc: bool = False,
        use_flash_attn: bool = False,
        return_residual: bool = False,
        checkpointing: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        sinks: bool = False,
    ) -> None:
        super().__init__()
        num_heads_kv = num_heads if num_heads_kv is None else num_heads_kv
        embed_dim, self.num_heads, self.num_heads_kv = integers(
            "MHA", embed_dim=embed_dim, num_heads=num_heads, num_heads_kv=num_heads_kv
        )
        self._check_options(embed_dim, dropout, fused_bias_fc)
        self.embed_dim = embed_dim
        self.head_dim = embed_dim // self.num_heads
        self.cross_attn, self.causal, self.layer_idx, self.dwconv = cross_attn, causal, layer_idx, dwconv
        self.use_alibi, self.window_size, self.rotary_emb_dim = use_alibi, tuple(window_size), rotary_emb_dim
        self.use_flash_attn, self.return_residual, self.checkpointing = use_flash_attn, return_residual, checkpointing
        self._make_projections(qkv_proj_bias, out_proj_bias, {"device": device, "dtype": dtype})
        s_aux = nn.Parameter(torch.zeros(self.num_heads, device=device, dtype=dtype)) if sinks else None
        self.register_parameter("s_aux", s_aux)
        if rotary_emb_dim > 0:
            self.rotary_emb = RotaryEmbedding(
                rotary_emb_dim, rotary_emb_base, rotary_emb_interleaved, rotary_emb_scale_base, device
            )
        options: dict[str, Any] = {
            "causal": causal,
            "softmax_scale": self.head_dim**-0.5 if softmax_scale is None else softmax_scale,
            "attention_dropout": dropout,
            "window_size": self.window_size,
            "alibi_slopes": get_alibi_slopes(self.num_heads) if use_alibi else None,
        }
        self.inner_attn = (FlashSelfAttention if use_flash_attn else SelfAttention)(**options)
        self.inner_cross_attn = (FlashCrossAttention if use_flash_attn else CrossAttention)(**options)

    def _check_options(self, embed_dim: int, dropout: float, fused_bias_fc: bool) -> None:
        reasons = dropout_reasons("dropout", dropout)
        if self.num_heads < 1 or embed_dim % self.num_heads != 0:
            reasons.append(f"embed_dim: expected a multiple of num_heads, which is {self.num_heads}, got {embed_dim}")
        if self.num_heads_kv < 1 or self.num_heads % self.num_heads_kv != 0:
            reasons.append(f"num_heads_kv: expected a divisor of num_heads={self.num_heads}, got {self.num_heads_kv}")
        if fused_bias_fc:
            reasons.append(
                "fused_bias_fc: expected False, for the fused projection is not part of this package, got True"
            )
        if reasons:
            reject(ValueError, "MHA", reasons)

    def _make_projections(self, qkv_proj_bias: bool, out_proj_bias: bool, factory: dict[str, Any]) -> None:
        q_dim, kv_dim = self.embed_dim, 2 * self.head_dim * self.num_heads_kv

        def convolution(dim: int) -> nn.Conv1d:
            return nn.Conv1d(dim, dim, kernel_size=3, padding=2, groups=dim, **factory)

        if self.cross_attn:
            self.Wq = nn.Linear(self.embed_dim, q_dim, bias=qkv_proj_bias, **factory)
            self.Wkv = nn.Linear(self.embed_dim, kv_dim, bias=qkv_proj_bias, **factory)
        else:
            self.Wqkv = nn.Linear(self.embed_dim, q_dim + kv_dim, bias=qkv_proj_bias, **factory)
        if self.dwconv and not self.cross_attn and self.num_heads_kv == self.num_heads:
            self.dwconv_qkv = convolution(q_dim + kv_dim)
        elif self.dwconv:
            self.dwconv_q, self.dwconv_kv = convolution(q_dim), convolution(kv_dim)
        self.out_proj = nn.Linear(self.embed_dim, self.embed_dim, bias=out_proj_bias, **factory)

    def forward(
        self,
        x: Tensor,
        x_kv: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        mixer_subset: Any = None,
        inference_params: Any = None,
        **kwargs: Any,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Compute attention, with projections.

        Args:
            x: (batch_size, seqlen, embed_dim), or (total, embed_dim) with cu_seqlens.
            x_kv: (batch_size, seqlen_k, embed_dim), or packed: the source of keys and values in cross-attention;
                None: x.
            key_padding_mask: bool, True for tokens to keep: (batch_size, seqlen), or (batch_size, seqlen_k) of x_kv.
                Positions and distances are those of the padded batch. The content of padding is ignored; in
                self-attention its attention output is 0, to which out_proj adds its bias. With inference_params, of all
                tokens so far, at every step where some are padding: (batch_size, seqlen_offset + seqlen); with
                lengths_per_sample, a column for each row of the cache up to the end of the longest sequence.
            cu_seqlens, max_seqlen: as in flash_attn_varlen_func; require use_flash_attn. Rotary positions restart at
                each sequence.
            mixer_subset: index of the rows of x to use as queries, such as slice(0, 1); all rows are keys. Not
                supported with options that depend on positions.
            inference_params: the cache, an object with the attributes of InferenceParams. x follows the tokens in the
                cache: its keys and values are written there, and it attends to all of them. A prompt in one call or in
                several, or token by token, gives the rows of one pass over all tokens. Self-attention only, without
                gradients, dropout, cu_seqlens, mixer_subset and dwconv.
            **kwargs: causal, overrides the module's option; cu_seqlens_k and max_seqlen_k, of packed x_kv.

        Returns:
            out, in the shape of x; with return_residual, the tuple (out, x).

        Raises:
            TypeError, ValueError: an argument has the wrong type or shape, or options cannot be combined; with
                inference_params also: x does not fit into the cache, the cache has another shape, dtype or device than
                allocate_inference_cache gives, or gradients are needed. Nothing is written then.
        """
        causal = kwargs.pop("causal", None)
        packing = _Packing(cu_seqlens, max_seqlen, kwargs.pop("cu_seqlens_k", None), kwargs.pop("max_seqlen_k", None))
        causal = self.causal if causal is None else causal
        self._check_call(x, x_kv, key_padding_mask, packing, mixer_subset, causal, kwargs)
        if inference_params is None:
            context = self._attend(x, x_kv, key_padding_mask, packing, mixer_subset, causal)
        else:
            refused = {"cu_seqlens": cu_seqlens, "mixer_subset": mixer_subset}
            context = self._attend_cached(x, key_padding_mask, inference_params, causal, refused)
        out = self.out_proj(rearrange(context, "... h d -> ... (h d)"))
        return (out, x) if self.return_residual else out

    def allocate_inference_cache(self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None) -> Tensor:
        """An uninitialised cache for inference_params.key_value_memory_dict[layer_idx].

        Args:
            batch_size: number of sequences.
            max_seqlen: number of tokens per sequence.
            dtype: None: that of the parameters.

        Returns:
            (batch_size, max_seqlen, 2, num_heads_kv, head_dim), on the device of the parameters.
        """
        weight = self.out_proj.weight
        dtype = weight.dtype if dtype is None else dtype
        return allocate_cache(batch_size, max_seqlen, self.num_heads_kv, self.head_dim, weight.device, dtype)

    def _check_call(
        self,
        x: Tensor,
        x_kv: Tensor | None,
        key_padding_mask: Tensor | None,
        packing: _Packing,
        mixer_subset: Any,
        causal: bool,
        unknown: dict[str, Any],
    ) -> None:
        if unknown:
            reject(TypeError, "MHA", [f"{name}: expected no argument of this name, got one" for name in unknown])
        sources = {"x": x} if x_kv is None else {"x": x, "x_kv": x_kv}
        wrong = [
            f"{name}: expected torch.Tensor, got {describe(y)}"
            for name, y in sources.items()
            if not isinstance(y, Tensor)
        ]
        if wrong := wrong or dense_reasons(sources, PAD_IT):
            reject(TypeError, "MHA", wrong)
        is_packed = packing.cu_seqlens is not None
        rows = ("total",) if is_packed else ("batch_size", "seqlen")
        reasons = [
            f"{name}: expected shape ({', '.join(rows)}, embed_dim={self.embed_dim}), got {tuple(y.shape)}"
            for name, y in sources.items()
            if y.dim() != len(rows) + 1 or y.shape[-1] != self.embed_dim
        ]
        if x_kv is not None and not self.cross_attn:
            reasons.append("x_kv: expected None, as cross_attn is False, got a tensor")
        if is_packed:
            reasons += self._packing_reasons(x_kv, key_padding_mask, packing, mixer_subset)
        needs_positions = causal or self.window_size != (-1, -1) or self.use_alibi or self.rotary_emb_dim > 0
        if mixer_subset is not None and (needs_positions or self.dwconv):
            expected = "None with causal, window_size, ALiBi, rotary embeddings and dwconv, which need all positions"
            reasons.append(f"mixer_subset: expected {expected}, got {mixer_subset}")
        if reasons:
            reject(ValueError, "MHA", reasons)

    def _packing_reasons(self, x_kv: Tensor | None, mask: Tensor | None, packing: _Packing, subset: Any) -> list[str]:
        lengths: dict[str, Any] = {"max_seqlen": packing.max_seqlen}
        if x_kv is not None:
            lengths |= {"cu_seqlens_k": packing.cu_seqlens_k, "max_seqlen_k": packing.max_seqlen_k}
        reasons = [
            f"{name}: expected a value, as cu_seqlens is given, got None" for name, x in lengths.items() if x is None
        ]
        for name, value in (("key_padding_mask", mask), ("mixer_subset", subset)):
            if value is not None:
                reasons.append(f"{name}: expected None, as cu_seqlens is given, got {describe(value)}")
        if not self.use_flash_attn or self.dwconv:
            reasons.append("cu_seqlens: expected None, unless with use_flash_attn=True and dwconv=False, got a tensor")
        return reasons

    def _convolve(self, name: str, x: Tensor) -> Tensor:
        """Causal depthwise convolution of width 3 along the sequence: x (batch_size, seqlen, dim)."""
        if not self.dwconv:
            return x
        mixed = getattr(self, name)(rearrange(x, "b s d -> b d s"))[..., :-2]
        return rearrange(mixed, "b d s -> b s d").contiguous()

    def _rotate(self, q: Tensor, k: Tensor, packing: _Packing) -> tuple[Tensor, Tensor]:
        """Rotate q and k, (..., heads, head_dim); out of place, since hooks may hold the inputs."""
        cu_seqlens_k, max_seqlen_k = packing.cu_seqlens_k, packing.max_seqlen_k
        if cu_seqlens_k is None:
            cu_seqlens_k, max_seqlen_k = packing.cu_seqlens, packing.max_seqlen
        if packing.max_seqlen is None or max_seqlen_k is None:
            seqlen = max(q.shape[1], k.shape[1])
        else:
            seqlen = max(int(packing.max_seqlen), int(max_seqlen_k))
        tables_q, tables_k = self.rotary_emb.tables(seqlen, like=q)
        interleaved = self.rotary_emb.interleaved
        return (
            apply_rotary(q, *tables_q, 0, packing.cu_seqlens, seqlen, interleaved=interleaved),
            apply_rotary(k, *tables_k, 0, cu_seqlens_k, seqlen, interleaved=interleaved),
        )

    def _run(self, module: nn.Module, *tensors: Tensor, **options: Any) -> Tensor:
        options["s_aux"] = self.s_aux
        if self.checkpointing:
            return checkpoint(module, *tensors, use_reentrant=False, **options)
        return module(*tensors, **options)

    def _attend(
        self,
        x: Tensor,
        x_kv: Tensor | None,
        key_padding_mask: Tensor | None,
        packing: _Packing,
        mixer_subset: Any,
        causal: bool,
    ) -> Tensor:
        """Attention of all rows of x: (batch_size, seqlen, num_heads, head_dim), or packed."""
        keys = x if x_kv is None else x_kv
        keep = None
        if key_padding_mask is not None:
            keep = check_padding_mask("MHA", key_padding_mask, *keys.shape[:2])
            keys = keys.masked_fill(~keep[..., None], 0)
        queries = keys if x_kv is None and not self.cross_attn else x
        if mixer_subset is not None:
            queries = queries[:, mixer_subset]
        is_whole = not (self.cross_attn or x_kv is not None or mixer_subset is not None)
        if is_whole and self.num_heads_kv == self.num_heads:
            context = self._attend_itself(queries, keep, packing, causal)
        else:
            context = self._attend_across(queries, keys, keep, packing, causal)
        if keep is not None and not self.cross_attn and mixer_subset is None:
            context = context.masked_fill(~keep[..., None, None], 0)
        return context

    def _attend_cached(
        self, x: Tensor, key_padding_mask: Tensor | None, params: Any, causal: bool, refused: dict[str, Any]
    ) -> Tensor:
        """Self-attention of x, which continues the tokens in the cache: (batch_size, seqlen, num_heads, head_dim)."""
        refused |= {"cross_attn": self.cross_attn, "dwconv": self.dwconv}
        check_call(params, self.layer_idx, self.inner_cross_attn, refused)
        q, kv = self.Wqkv(x).tensor_split([self.embed_dim], dim=-1)
        q = rearrange(q, "b s (h d) -> b s h d", d=self.head_dim)
        kv = rearrange(kv, "b s (two h d) -> b s two h d", two=2, d=self.head_dim)
        rotary = self.rotary_emb if self.rotary_emb_dim > 0 else None
        module, layer_idx = self.inner_cross_attn, self.layer_idx
        return attend_cached(module, rotary, q, kv, params, layer_idx, key_padding_mask, causal, self.s_aux)

    def _attend_itself(self, x: Tensor, keep: Tensor | None, packing: _Packing, causal: bool) -> Tensor:
        """Self-attention with as many key heads as query heads."""
        qkv = self._convolve("dwconv_qkv", self.Wqkv(x))
        qkv = rearrange(qkv, "... (three h d) -> ... three h d", three=3, d=self.head_dim)
        if self.rotary_emb_dim > 0:
            q, k, v = qkv.unbind(-3)
            qkv = torch.stack([*self._rotate(q, k, packing), v], dim=-3)
        if not self.use_flash_attn:
            return self._run(self.inner_attn, qkv, causal=causal, key_padding_mask=keep)
        if keep is None:
            return self._run(
                self.inner_attn, qkv, causal=causal, cu_seqlens=packing.cu_seqlens, max_seqlen=packing.max_seqlen
            )
        return self._attend_padded(qkv[..., 0, :, :], qkv[..., 1:, :, :], keep, causal, is_self=True)

    def _attend_across(
        self, queries: Tensor, keys: Tensor, keep: Tensor | None, packing: _Packing, causal: bool
    ) -> Tensor:
        """Cross-attention, and self-attention with GQA or with a subset of queries."""
        if self.cross_attn:
            q, kv = self.Wq(queries), self.Wkv(keys)
        else:
            qkv = self.Wqkv(keys)
            q, kv = qkv[..., : self.embed_dim], qkv[..., self.embed_dim :]
            if queries is not keys:
                q = self.Wqkv(queries)[..., : self.embed_dim]
        q = rearrange(self._convolve("dwconv_q", q), "... (h d) -> ... h d", d=self.head_dim)
        kv = rearrange(self._convolve("dwconv_kv", kv), "... (two h d) -> ... two h d", two=2, d=self.head_dim)
        if self.rotary_emb_dim > 0:
            k, v = kv.unbind(-3)
            q, k = self._rotate(q, k, packing)
            kv = torch.stack([k, v], dim=-3)
        if not self.use_flash_attn:
            return self._run(self.inner_cross_attn, q, kv, causal=causal, key_padding_mask=keep)
        if keep is None:
            return self._run(self.inner_cross_attn, q, kv, causal=causal, **packing._asdict())
        return self._attend_padded(q, kv, keep, causal, is_self=queries is keys and not self.cross_attn)

    def _attend_padded(self, q: Tensor, kv: Tensor, keep: Tensor, causal: bool, is_self: bool) -> Tensor:
        attend = partial(self._run, self.inner_cross_attn, causal=causal)
        looks_at_distance = self.window_size != (-1, -1) or self.use_alibi
        if is_packing_exact(keep, causal, looks_at_distance, is_self):
            return attend_packed(attend, q, kv, keep, is_self)
        return attend_masked(attend, q, kv, keep)
