"""Attention with a KV cache: the decoding step of generation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from flash_attn import _checks, _library

_eager_call = _library.function("attention_with_kvcache")
_fwd_kvcache = _library.op("fwd_kvcache")

_NAME = "flash_attn_with_kvcache"
_CAST_DTYPES = {torch.float32, torch.bfloat16, torch.float16}


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
    *,
    attention_chunk: int = 0,
    s_aux: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention to a cache of keys and values, to which new ones are appended first, in place.

    Sequence b has n = cache_seqlens[b] rows in the cache. Row j of k and v becomes row n + j. Then all queries attend
    to the rows from cache_leftpad[b] to n + seqlen_new - 1: these are the seqlen_k keys of flash_attn_func, with its
    masks, aligned bottom-right. Keys are split into chunks that are attended to in parallel ("Flash-Decoding", 2023);
    the chunks depend on the sequence alone, so its result has the same bits in every batch, for every capacity of the
    cache and every page size. No gradient.

    Args:
        q: (batch_size, seqlen_q, num_heads, head_dim), float32, float64, bfloat16 or float16. head_dim from 1 to 576;
            above 512, softmax_scale is required: such keys are those of multi-head latent attention (DeepSeek-V2, 2024,
            section 2.1), whose scale is that of the head_dim before absorption.
        k_cache: (batch_size_cache, seqlen_cache, num_heads_k, head_dim), or (num_pages, page_size, num_heads_k,
            head_dim) with block_table, dtype of q. The last dimension has stride 1, the others any.
        v_cache: as k_cache, with head_dim_v. It may be the leading columns of k_cache, k_cache[..., :head_dim_v]: each
            row is key and value then.
        k, v: (batch_size, seqlen_new, num_heads_k, head_dim), and with head_dim_v: rows to append. v is None, or the
            leading columns of k, if v_cache is those of k_cache. Under autocast, q, k and v are cast to the dtype of
            the caches.
        rotary_cos, rotary_sin: (seqlen_rotary, rotary_dim / 2), dtype of q, at least as many rows as the cache has room
            for: rotates k at positions n + j before it is appended, and q at positions n + i, or, without causal,
            window_size and attention_chunk, all of q at n. Su et al., "RoFormer" (2021), section 3.2.
        cache_seqlens: an int for all, or (batch_size,) int32: rows in the cache, before appending; None: all of it. A
            negative number skips the sequence: nothing is written, its out is 0, its softmax_lse -inf (or s_aux).
        cache_batch_idx: (batch_size,) int32, the batch entry of the cache of each sequence; None: the first ones.
        cache_leftpad: (batch_size,) int32, rows to skip at the start of the cache; None: 0.
        block_table: (batch_size, max_pages) int32: row j of a sequence is row j % page_size of page
            block_table[b, j // page_size]. Pages that are not in use may have any number.
        softmax_scale, causal, window_size, softcap, alibi_slopes, attention_chunk, s_aux: as in flash_attn_func.
        rotary_interleaved: pairs are (2 i, 2 i + 1) instead of (i, i + rotary_dim / 2).
        num_splits: the most chunks that the keys are split into, up to 128; 0: chosen from the length. Affects rounding
            only.
        return_softmax_lse: also return softmax_lse.

    Returns:
        out: (batch_size, seqlen_q, num_heads, head_dim_v), dtype of q; or (out, softmax_lse), with softmax_lse
        (batch_size, num_heads, seqlen_q), float32 (float64 for float64).

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a dtype, device, shape or value violates the above, or an input requires grad in grad mode; lists
            all reasons. On the CPU, and on CUDA with FLASH_ATTN_CHECK=1, also lengths past the capacity and pages
            outside the cache; otherwise such rows are not written on CUDA. Nothing is written to the caches.
    """
    if not torch.compiler.is_compiling():
        result = _eager_call(
            *(q, k_cache, v_cache, k, v, rotary_cos, rotary_sin, cache_seqlens, cache_batch_idx, cache_leftpad),
            *(block_table, softmax_scale, causal, window_size, softcap, rotary_interleaved, alibi_slopes, num_splits),
            *(return_softmax_lse, attention_chunk, s_aux),
        )
        if result is not None:
            return result
    tensors = {"q": q, "k_cache": k_cache, "v_cache": v_cache}
    optional = {
        "k": k,
        "v": v,
        "rotary_cos": rotary_cos,
        "rotary_sin": rotary_sin,
        "cache_batch_idx": cache_batch_idx,
        "cache_leftpad": cache_leftpad,
        "block_table": block_table,
        "alibi_slopes": alibi_slopes,
        "s_aux": s_aux,
    }
    scalars = {
        "cache_seqlens": cache_seqlens,
        "softmax_scale": softmax_scale,
        "causal": causal,
        "window_size": window_size,
        "softcap": softcap,
        "rotary_interleaved": rotary_interleaved,
        "num_splits": num_splits,
        "attention_chunk": attention_chunk,
    }
    out, softmax_lse = _python_call(tensors, optional, scalars)
    return (out, softmax_lse) if return_softmax_lse else out


def _python_call(tensors: dict[str, Any], optional: dict[str, Any], scalars: dict[str, Any]) -> Any:
    """Convert the scalars and call the op; raises TypeError with all reasons."""
    scalars = _convert(tensors, optional, scalars)
    k_cache = tensors["k_cache"]
    if not k_cache.is_meta and torch.is_autocast_enabled(k_cache.device.type):
        tensors["q"] = _cast(tensors["q"], k_cache.dtype)
        new = ("k", "v", "rotary_cos", "rotary_sin")
        optional.update((name, _cast(optional[name], k_cache.dtype)) for name in new if optional[name] is not None)
    length = scalars.pop("cache_seqlens")
    optional["cache_seqlens" if isinstance(length, Tensor) else "cache_seqlen"] = length
    scalars["window_size_left"], scalars["window_size_right"] = scalars.pop("window_size")
    return _fwd_kvcache(*tensors.values(), **optional, **scalars)


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype) if {x.dtype, dtype} <= _CAST_DTYPES else x


def _convert(tensors: dict[str, Any], optional: dict[str, Any], scalars: dict[str, Any]) -> dict[str, Any]:
    """Convert the scalars to plain Python numbers; raises TypeError with all reasons."""
    reasons = [
        f"{name}: expected torch.Tensor, got {_checks.describe(x)}"
        for name, x in tensors.items()
        if not isinstance(x, Tensor)
    ]
    given = {name: x for name, x in tensors.items() if isinstance(x, Tensor)}
    reasons += _checks.dense_reasons(given, "a KV cache is one, with cache_seqlens for the lengths")
    reasons += _checks.optional_tensor_reasons(optional)
    converters: dict[str, tuple[Callable[[Any], Any], str]] = {
        "cache_seqlens": (_as_lengths, "int, an int32 tensor of shape (batch_size,) or None"),
        "softmax_scale": (_checks.as_float, "float or None (a learned scale belongs into q)"),
        "causal": (_checks.as_bool, "bool"),
        "window_size": (_checks.convert_window, "two ints (left, right)"),
        "softcap": (_checks.as_float, "float"),
        "rotary_interleaved": (_checks.as_bool, "bool"),
        "num_splits": (_checks.as_int, "int"),
        "attention_chunk": (_checks.as_int, "int"),
    }
    converted: dict[str, Any] = {}
    for name, value in scalars.items():
        convert, expected = converters[name]
        may_be_none = name in ("cache_seqlens", "softmax_scale")
        converted[name] = None if value is None and may_be_none else convert(value)
        if converted[name] is None and not (value is None and may_be_none):
            reasons.append(f"{name}: expected {expected}, got {_checks.describe(value)}")
    if reasons:
        _checks.reject(TypeError, _NAME, reasons)
    return converted


def _as_lengths(value: Any) -> Any:
    return value if isinstance(value, Tensor) else _checks.as_int(value)
