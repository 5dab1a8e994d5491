"""FLOP formulas of the operators for torch.utils.flop_counter. As for torch's own ops, masks are not discounted.

A multiply-add counts as two. Forward: the products q @ k^T and P @ v. Backward: five products.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry, register_flop_formula

from flash_attn import _library  # noqa: F401  registers the operators

# Number of products over head_dim and over head_dim_v.
_FORWARD, _BACKWARD = (1, 1), (3, 2)

_PRODUCTS = {
    "fwd": _FORWARD,
    "fwd_kvcache": _FORWARD,
    "_flash_attn_forward": _FORWARD,
    "_flash_attn_varlen_forward": _FORWARD,
    "bwd": _BACKWARD,
    "_flash_attn_backward": _BACKWARD,
    "_flash_attn_varlen_backward": _BACKWARD,
}


def _lengths(a: dict[str, Any], side: str) -> list[int]:
    """Lengths of packed sequences; max_seqlen for each of them if a tracer hides the values."""
    cu_seqlens, used = a[f"cu_seqlens_{side}"], a.get(f"seqused_{side}")
    if cu_seqlens.is_meta or type(cu_seqlens) is not Tensor:
        return [a[f"max_seqlen_{side}"]] * (cu_seqlens.shape[0] - 1)
    return (cu_seqlens.diff() if used is None else used.clamp(min=0)).tolist()


def _cached_keys(a: dict[str, Any]) -> int:
    """Number of keys of all sequences, with those that are appended; the capacity if a tracer hides the lengths."""
    batch_size, k_cache, table = a["q"].shape[0], a["k_cache"], a.get("block_table")
    capacity = k_cache.shape[1] * (1 if table is None else table.shape[1])
    lengths, leftpad, new = a.get("cache_seqlens"), a.get("cache_leftpad"), a.get("k")
    if any(x is not None and (x.is_meta or type(x) is not Tensor) for x in (lengths, leftpad)):
        return batch_size * capacity
    used = [a.get("cache_seqlen")] * batch_size if lengths is None else lengths.tolist()
    skipped = [0] * batch_size if leftpad is None else leftpad.tolist()
    appended = 0 if new is None else new.shape[1]
    ends = [capacity if n is None else n + appended if n >= 0 else 0 for n in used]
    return sum(max(end - start, 0) for end, start in zip(ends, skipped, strict=True))


def _pairs(a: dict[str, Any]) -> int:
    """Number of (query, key) pairs, summed over heads."""
    q = a["q"]
    if "k_cache" in a:
        return q.shape[1] * q.shape[2] * _cached_keys(a)
    k = a["k"]
    if a.get("cu_seqlens_q") is None:
        return q.shape[0] * q.shape[2] * q.shape[1] * k.shape[1]
    return q.shape[1] * sum(i * j for i, j in zip(_lengths(a, "q"), _lengths(a, "k"), strict=True))


def _register(name: str, over_head_dim: int, over_head_dim_v: int) -> None:
    packet = getattr(torch.ops.flash_attn, name, None)
    if packet is None or packet in flop_registry:
        return
    names = [argument.name for argument in packet.default._schema.arguments]

    @register_flop_formula(packet, get_raw=True)
    def formula(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
        a = {**dict(zip(names, args, strict=False)), **kwargs}
        v = a["v_cache"] if "v_cache" in a else a["v"]
        return 2 * _pairs(a) * (over_head_dim * a["q"].shape[-1] + over_head_dim_v * v.shape[-1])


for _name, _counts in _PRODUCTS.items():
    _register(_name, *_counts)
