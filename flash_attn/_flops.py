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


def _pairs(a: dict[str, Any]) -> int:
    """Number of (query, key) pairs, summed over heads."""
    q, k = a["q"], a["k"]
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
        return 2 * _pairs(a) * (over_head_dim * a["q"].shape[-1] + over_head_dim_v * a["v"].shape[-1])


for _name, _counts in _PRODUCTS.items():
    _register(_name, *_counts)
