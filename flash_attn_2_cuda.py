"""The compiled module of flash_attn 2.x by name, for programs that import it. Its functions run on every backend.

Arguments and results are in the order of the compiled module; flash_attn.flash_attn_func documents them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flash_attn import autograd
from flash_attn._kernel_interface import (
    _flash_attn_backward,
    _flash_attn_forward,
    _flash_attn_varlen_backward,
    _flash_attn_varlen_forward,
)
from flash_attn.kv_cache import flash_attn_with_kvcache

__all__ = ["bwd", "fwd", "fwd_kvcache", "varlen_bwd", "varlen_fwd"]


def _forward_with_generator(
    generator: torch.Generator,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    return_softmax: bool,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As _flash_attn_forward, with the dropout mask drawn from the generator. options: arguments of the op."""
    rng_state = torch.randint(0, 2**63 - 1, (2,), dtype=torch.int64, device=q.device, generator=generator)
    out, softmax_lse = autograd._fwd(q, k, v, **options, rng_state=rng_state)
    if not return_softmax:
        return out, softmax_lse, q.new_empty(0), rng_state
    return out, softmax_lse, autograd._attn_probs(q, k, softmax_lse, **options, rng_state=rng_state), rng_state


def _finish_forward(results: tuple[Tensor, Tensor, Tensor, Tensor], out: Tensor | None) -> list[Tensor]:
    """The results as a list, with out copied into the caller's buffer if given."""
    if out is None:
        return list(results)
    return [out.copy_(results[0]), *results[1:]]


def fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out_: Tensor | None,
    alibi_slopes_: Tensor | None,
    p_dropout: float,
    softmax_scale: float,
    is_causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    return_softmax: bool,
    gen_: torch.Generator | None,
) -> list[Tensor]:
    """Dense forward pass: [out, softmax_lse, S_dmask, rng_state]. gen_, if given, draws the dropout mask."""
    options: dict[str, Any] = {
        "dropout_p": p_dropout,
        "softmax_scale": softmax_scale,
        "causal": is_causal,
        "window_size_left": window_size_left,
        "window_size_right": window_size_right,
        "softcap": softcap,
        "alibi_slopes": alibi_slopes_,
    }
    if gen_ is not None and p_dropout > 0:
        results = _forward_with_generator(gen_, q, k, v, return_softmax, **options)
    else:
        results = _flash_attn_forward(q, k, v, **options, return_softmax=return_softmax)
    return _finish_forward(results, out_)


def varlen_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out_: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    seqused_k: Tensor | None,
    leftpad_k_: Tensor | None,
    block_table_: Tensor | None,
    alibi_slopes_: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    p_dropout: float,
    softmax_scale: float,
    zero_tensors: bool,
    is_causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    return_softmax: bool,
    gen_: torch.Generator | None,
) -> list[Tensor]:
    """Packed forward pass: [out, softmax_lse, S_dmask, rng_state]. zero_tensors is ignored."""
    options: dict[str, Any] = {
        "cu_seqlens_q": cu_seqlens_q,
        "cu_seqlens_k": cu_seqlens_k,
        "max_seqlen_q": max_seqlen_q,
        "max_seqlen_k": max_seqlen_k,
        "dropout_p": p_dropout,
        "softmax_scale": softmax_scale,
        "causal": is_causal,
        "window_size_left": window_size_left,
        "window_size_right": window_size_right,
        "softcap": softcap,
        "alibi_slopes": alibi_slopes_,
        "block_table": block_table_,
        "leftpad_k": leftpad_k_,
        "seqused_k": seqused_k,
    }
    if gen_ is not None and p_dropout > 0:
        results = _forward_with_generator(gen_, q, k, v, return_softmax, **options)
    else:
        results = _flash_attn_varlen_forward(q, k, v, **options, return_softmax=return_softmax)
    return _finish_forward(results, out_)


def _gradient_buffers(*pairs: tuple[Tensor | None, Tensor]) -> list[Tensor]:
    return [torch.empty_like(x) if gradient is None else gradient for gradient, x in pairs]


def bwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq_: Tensor | None,
    dk_: Tensor | None,
    dv_: Tensor | None,
    alibi_slopes_: Tensor | None,
    p_dropout: float,
    softmax_scale: float,
    is_causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    deterministic: bool,
    gen_: torch.Generator | None,
    rng_state: Tensor | None,
) -> list[Tensor]:
    """Dense backward pass: [dq, dk, dv, softmax_d]. rng_state gives the dropout mask; gen_ is ignored."""
    dq, dk, dv = _gradient_buffers((dq_, q), (dk_, k), (dv_, v))
    softmax_d = _flash_attn_backward(
        *(dout, q, k, v, out, softmax_lse, dq, dk, dv),
        dropout_p=p_dropout,
        softmax_scale=softmax_scale,
        causal=is_causal,
        window_size_left=window_size_left,
        window_size_right=window_size_right,
        softcap=softcap,
        alibi_slopes=alibi_slopes_,
        deterministic=deterministic,
        rng_state=rng_state,
    )
    return [dq, dk, dv, softmax_d]


def varlen_bwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq_: Tensor | None,
    dk_: Tensor | None,
    dv_: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    alibi_slopes_: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    p_dropout: float,
    softmax_scale: float,
    zero_tensors: bool,
    is_causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    deterministic: bool,
    gen_: torch.Generator | None,
    rng_state: Tensor | None,
) -> list[Tensor]:
    """Packed backward pass: [dq, dk, dv, softmax_d]. zero_tensors and gen_ are ignored."""
    dq, dk, dv = _gradient_buffers((dq_, q), (dk_, k), (dv_, v))
    softmax_d = _flash_attn_varlen_backward(
        *(dout, q, k, v, out, softmax_lse, dq, dk, dv),
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        dropout_p=p_dropout,
        softmax_scale=softmax_scale,
        causal=is_causal,
        window_size_left=window_size_left,
        window_size_right=window_size_right,
        softcap=softcap,
        alibi_slopes=alibi_slopes_,
        deterministic=deterministic,
        rng_state=rng_state,
    )
    return [dq, dk, dv, softmax_d]


def fwd_kvcache(
    q: Tensor,
    kcache: Tensor,
    vcache: Tensor,
    k_: Tensor | None,
    v_: Tensor | None,
    seqlens_k_: Tensor | None,
    rotary_cos_: Tensor | None,
    rotary_sin_: Tensor | None,
    cache_batch_idx_: Tensor | None,
    leftpad_k_: Tensor | None,
    block_table_: Tensor | None,
    alibi_slopes_: Tensor | None,
    out_: Tensor | None,
    softmax_scale: float,
    is_causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    is_rotary_interleaved: bool,
    num_splits: int,
) -> list[Tensor]:
    """Attention with a KV cache: [out, softmax_lse]. flash_attn.flash_attn_with_kvcache documents the arguments."""
    out, softmax_lse = flash_attn_with_kvcache(
        *(q, kcache, vcache, k_, v_, rotary_cos_, rotary_sin_),
        cache_seqlens=seqlens_k_,
        cache_batch_idx=cache_batch_idx_,
        cache_leftpad=leftpad_k_,
        block_table=block_table_,
        softmax_scale=softmax_scale,
        causal=is_causal,
        window_size=(window_size_left, window_size_right),
        softcap=softcap,
        rotary_interleaved=is_rotary_interleaved,
        alibi_slopes=alibi_slopes_,
        num_splits=num_splits,
        return_softmax_lse=True,
    )
    return [out if out_ is None else out_.copy_(out), softmax_lse]
