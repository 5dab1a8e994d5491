"""One forward or backward pass without autograd: the private functions of flash_attn 2.8 that other projects call.

For example, context parallelism computes attention block by block and merges the results with softmax_lse. Shapes and
semantics are those of flash_attn_func and flash_attn_varlen_func. Names and argument order are those of flash_attn 2.8,
as are those of the ops that these functions call (torch.ops.flash_attn._flash_attn_forward, ...).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flash_attn import _checks
from flash_attn.autograd import _dense_backward, _dense_forward, _varlen_backward, _varlen_forward, default_scale


def _as_length(function: str, argument: str, value: Any) -> int:
    length = value if type(value) is int else _checks.as_int(value)
    if length is None:
        expected = "int or 0-dim integer tensor"
        _checks.reject(TypeError, function, [f"{argument}: expected {expected}, got {_checks.describe(value)}"])
    return length


def _as_max_seqlens(function: str, max_seqlen_q: Any, max_seqlen_k: Any) -> tuple[int, int]:
    return _as_length(function, "max_seqlen_q", max_seqlen_q), _as_length(function, "max_seqlen_k", max_seqlen_k)


def _flash_attn_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    return_softmax: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Forward pass of flash_attn_func.

    Returns:
        (out, softmax_lse, S_dmask, rng_state). S_dmask is empty unless return_softmax is set and dropout_p > 0.
        rng_state, (2,) int64, reproduces the dropout mask in the backward pass; zeros if dropout_p is 0.
    """
    scale = default_scale(q) if softmax_scale is None else softmax_scale
    return _dense_forward(
        *(q, k, v),
        dropout_p=dropout_p,
        softmax_scale=scale,
        causal=causal,
        window_size_left=window_size_left,
        window_size_right=window_size_right,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        return_softmax=return_softmax,
    )


def _flash_attn_varlen_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    return_softmax: bool = False,
    block_table: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    seqused_k: Tensor | None = None,
    zero_tensors: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Forward pass of flash_attn_varlen_func; returns the same as _flash_attn_forward.

    Args:
        leftpad_k, seqused_k: (batch_size,) int32; sequence b uses its keys from leftpad_k[b] to seqused_k[b] - 1.
        zero_tensors: ignored; all results are always written.
    """
    max_seqlen_q, max_seqlen_k = _as_max_seqlens("flash_attn_varlen_func", max_seqlen_q, max_seqlen_k)
    scale = default_scale(q) if softmax_scale is None else softmax_scale
    return _varlen_forward(
        *(q, k, v),
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        dropout_p=dropout_p,
        softmax_scale=scale,
        causal=causal,
        window_size_left=window_size_left,
        window_size_right=window_size_right,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        return_softmax=return_softmax,
        block_table=block_table,
        leftpad_k=leftpad_k,
        seqused_k=seqused_k,
        zero_tensors=zero_tensors,
    )


def _flash_attn_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    rng_state: Tensor | None = None,
) -> Tensor:
    """Backward pass of flash_attn_func: fills dq, dk and dv.

    Args:
        dq, dk, dv: output buffers in the shapes of q, k and v, possibly views; None: the gradient is discarded.
        rng_state: (2,) int64 from _flash_attn_forward; required if dropout_p > 0.

    Returns:
        softmax_d: rowsum(dout * out), float32 (float64 for float64), in the shape of softmax_lse.
    """
    scale = default_scale(q) if softmax_scale is None else softmax_scale
    return _dense_backward(
        *(dout, q, k, v, out, softmax_lse, dq, dk, dv),
        dropout_p=dropout_p,
        softmax_scale=scale,
        causal=causal,
        window_size_left=window_size_left,
        window_size_right=window_size_right,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        deterministic=deterministic or torch.are_deterministic_algorithms_enabled(),
        rng_state=rng_state,
    )


def _flash_attn_varlen_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    rng_state: Tensor | None = None,
    zero_tensors: bool = False,
) -> Tensor:
    """Backward pass of flash_attn_varlen_func; see _flash_attn_backward. zero_tensors is ignored."""
    max_seqlen_q, max_seqlen_k = _as_max_seqlens("flash_attn varlen backward", max_seqlen_q, max_seqlen_k)
    scale = default_scale(q) if softmax_scale is None else softmax_scale
    return _varlen_backward(
        *(dout, q, k, v, out, softmax_lse, dq, dk, dv),
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        dropout_p=dropout_p,
        softmax_scale=scale,
        causal=causal,
        window_size_left=window_size_left,
        window_size_right=window_size_right,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        deterministic=deterministic or torch.are_deterministic_algorithms_enabled(),
        rng_state=rng_state,
        zero_tensors=zero_tensors,
    )


_wrapped_flash_attn_forward = _flash_attn_forward
_wrapped_flash_attn_backward = _flash_attn_backward
_wrapped_flash_attn_varlen_forward = _flash_attn_varlen_forward
_wrapped_flash_attn_varlen_backward = _flash_attn_varlen_backward
