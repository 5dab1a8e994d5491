"""flash_attn behind torch.nn.functional.scaled_dot_product_attention and torch.nn.attention.varlen.varlen_attn.

    import flash_attn.integrations.sdpa
    torch.nn.attention.activate_flash_attention_impl("flash_attn")  # and restore_flash_attention_impl()

Importing this module only makes the name known to torch's registry. On a GPU torch chooses among its backends before
this one is asked, and prefers cuDNN on Hopper: torch.nn.attention.sdpa_kernel(SDPBackend.FLASH_ATTENTION) chooses this.
On a CPU it computes what has neither attn_mask nor dropout, which torch's own kernel still does, and varlen_attn, which
torch has for GPUs alone, works there as well.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.library import Library
from torch.nn.attention import register_flash_attention_impl

from flash_attn import _library

NAME = "flash_attn"

_fwd_out = _library.op("fwd", "out")
_bwd, _bwd_out = _library.op("bwd"), _library.op("bwd", "out")
_attn_probs = _library.op("attn_probs")

_SDPA_CPU = "_scaled_dot_product_flash_attention_for_cpu"
_SDPA_CUDA = "_scaled_dot_product_flash_attention"


def _heads_second(*tensors: Tensor) -> tuple[Tensor, ...]:
    """(batch_size, seqlen, num_heads, ...) of torch's (batch_size, num_heads, seqlen, ...), and back: views."""
    return tuple(x.transpose(1, 2) for x in tensors)


def _top_left(q: Tensor, k: Tensor, causal: bool) -> dict[str, Any]:
    """The causal mask of scaled_dot_product_attention: query i sees keys 0 to i. Ours is aligned to the last key."""
    starts = {} if q.shape[1] == k.shape[1] else {"q_start": 0, "k_start": 0}
    return {"causal": True, **starts} if causal else {}


def sdpa_on_cpu(
    query: Tensor, key: Tensor, value: Tensor, is_causal: bool = False, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """aten._scaled_dot_product_flash_attention_for_cpu without attn_mask and dropout: out and logsumexp."""
    result = torch.empty_like(query)  # its strides are those that torch's own kernel promises to compilers
    q, k, v, out = _heads_second(query, key, value, result)
    softmax_lse, _ = _fwd_out(q, k, v, softmax_scale=scale, **_top_left(q, k, is_causal), out=out)
    return result, softmax_lse.transpose(1, 2).contiguous().transpose(1, 2)


def sdpa_on_cpu_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    is_causal: bool = False,
    scale: float | None = None,
) -> tuple[Tensor, ...]:
    """aten._scaled_dot_product_flash_attention_for_cpu_backward, likewise: gradients, stored with heads second."""
    dout, q, k, v, out = _heads_second(grad_out, query, key, value, out)
    gradients = _bwd(dout, q, k, v, out, softmax_lse, softmax_scale=scale, **_top_left(q, k, is_causal))[:3]
    return _heads_second(*gradients)


def _draw(q: Tensor, dropout_p: float) -> Tensor:
    """Seed and offset of the dropout mask, (2,) int64, from torch's generator; zeros without dropout."""
    if dropout_p > 0:
        return _library.draw_rng_state(q.device)
    return torch.zeros(2, dtype=torch.int64, device=q.device)


def _dropout(dropout_p: float, rng_state: Tensor | None) -> dict[str, Any]:
    return {"dropout_p": dropout_p, "rng_state": rng_state} if dropout_p > 0 else {}


def _windows(left: int | None, right: int | None) -> dict[str, int]:
    return {"window_size_left": -1 if left is None else left, "window_size_right": -1 if right is None else right}


def flash_attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    seqused_k: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """aten._flash_attention_forward, of (batch_size, seqlen, num_heads, head_dim) or packed tensors.

    Masks are aligned bottom-right. num_splits is of no consequence: results never depend on the batch. The result is
    written to out, if given.

    Returns:
        out, softmax_lse, rng_state ((2,) uint64), unused, and S_dmask of flash_attn_func if it is asked for.
    """
    options: dict[str, Any] = {"softmax_scale": scale, "causal": is_causal, "alibi_slopes": alibi_slopes}
    options |= _windows(window_size_left, window_size_right)
    if cum_seq_q is not None:
        if block_table is not None or cum_seq_k is None:  # lengths are in seqused_k alone
            if seqused_k is None:
                raise ValueError(
                    "flash_attn: seqused_k: expected a tensor with block_table or without cum_seq_k, got None"
                )
            cum_seq_k = torch.nn.functional.pad(seqused_k.cumsum(0, dtype=torch.int32), (1, 0))
            seqused_k = None
        options |= {"cu_seqlens_q": cum_seq_q, "cu_seqlens_k": cum_seq_k, "max_seqlen_q": max_q, "max_seqlen_k": max_k}
    options |= {"seqused_k": seqused_k, "block_table": block_table}
    rng_state = _draw(query, dropout_p)
    options |= _dropout(dropout_p, rng_state)
    if out is None:
        out = torch.empty_like(query)
    softmax_lse, _ = _fwd_out(query, key, value, **options, out=out)
    debug_mask = _attn_probs(query, key, softmax_lse, **options) if return_debug_mask else query.new_empty(0)
    unused = torch.zeros((), dtype=torch.uint64, device=query.device)
    return out, softmax_lse, rng_state.view(torch.uint64), unused, debug_mask


def flash_attention_forward_into(out: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """aten._flash_attention_forward_no_dropout_inplace: writes out, and returns softmax_lse."""
    return flash_attention_forward(*args, **kwargs, out=out)[1]


def flash_attention_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    rng_state: Tensor,
    unused: Tensor,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    gradients: tuple[Tensor, ...] | None = None,
) -> tuple[Tensor, ...]:
    """aten._flash_attention_backward: gradients, written to those given or stored as query, key and value are."""
    options: dict[str, Any] = {"softmax_scale": scale, "causal": is_causal}
    options |= _windows(window_size_left, window_size_right)
    if cum_seq_q is not None:
        options |= {"cu_seqlens_q": cum_seq_q, "cu_seqlens_k": cum_seq_k, "max_seqlen_q": max_q, "max_seqlen_k": max_k}
    options |= _dropout(dropout_p, rng_state.view(torch.int64) if dropout_p > 0 else None)
    deterministic = torch.are_deterministic_algorithms_enabled()
    inputs = (query, key, value)
    if gradients is None:
        gradients = tuple(torch.empty_like(x) for x in inputs)
    written = dict(zip(("dq", "dk", "dv"), gradients, strict=True))
    _bwd_out(grad_out, *inputs, out, softmax_lse, **options, deterministic=deterministic, **written)
    return gradients


def sdpa_on_cuda(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Any, ...]:
    """aten._scaled_dot_product_flash_attention, with dropout; is_causal for as many queries as keys."""
    result = torch.empty_like(query)
    q, k, v, out = _heads_second(query, key, value, result)
    lengths = (None, None, q.shape[1], k.shape[1])
    _, softmax_lse, *rest = flash_attention_forward(
        q, k, v, *lengths, dropout_p, is_causal, return_debug_mask, scale=scale, out=out
    )
    return result, softmax_lse, *lengths, *rest


def sdpa_on_cuda_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    rng_state: Tensor,
    unused: Tensor,
    *,
    scale: float | None = None,
) -> tuple[Tensor, ...]:
    """aten._scaled_dot_product_flash_attention_backward; philox_seed is the rng_state of the forward pass."""
    dout, q, k, v, out = _heads_second(grad_out, query, key, value, out)
    gradients = tuple(torch.empty_like(x) for x in (query, key, value))
    flash_attention_backward(
        *(dout, q, k, v, out, softmax_lse, None, None),
        *(max_q, max_k, dropout_p, is_causal, rng_state, unused),
        scale=scale,
        gradients=_heads_second(*gradients),
    )
    return gradients


class _Handle:
    """What torch's registry keeps while this implementation is active."""

    def __init__(self, libraries: list[Library]):
        self._libraries = libraries

    def remove(self) -> None:
        """Give the ops back their own kernels."""
        for library in self._libraries:
            library._destroy()
        self._libraries = []


def _unless_special(function: Callable[..., Any], op: str) -> Callable[..., Any]:
    """The kernel of an op of the CPU: the function, or torch's own kernel for what ours does not take."""
    original = torch.library.get_kernel(f"aten::{op}", "CPU")

    def kernel(keys: Any, *args: Any, attn_mask: Tensor | None = None, scale: float | None = None) -> Any:
        tensors = 6 if op.endswith("backward") else 3
        given = args[tensors:]
        dropout_p, is_causal = (given[0] if given else 0.0), (given[1] if len(given) > 1 else False)
        is_usual = scale is None or (scale > 0 and math.isfinite(scale))
        if is_usual and attn_mask is None and dropout_p == 0 and args[0].shape[-1] <= _library.MAX_HEAD_DIM:
            return function(*args[:tensors], is_causal, scale)
        return original.call_boxed(keys, *args, attn_mask=attn_mask, scale=scale)

    return kernel


def _override(device: str, kernels: dict[str, Callable[..., Any]], with_keyset: bool = False) -> Library:
    """Make these the kernels of ops of aten on a device, as long as the library is there."""
    library = Library("aten", "IMPL", device)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Warning only once for all operators")  # that kernels are overridden
        for name, kernel in kernels.items():
            library.impl(name, kernel, device, with_keyset=with_keyset, allow_override=True)
    return library


def _activate() -> _Handle:
    """Override the kernels of torch's ops of flash attention, on the CPU and, if ours are built, on CUDA."""
    dense: dict[str, Callable[..., Any]] = {_SDPA_CPU: sdpa_on_cpu, f"{_SDPA_CPU}_backward": sdpa_on_cpu_backward}
    of_cpu = {name: _unless_special(function, name) for name, function in dense.items()}
    everywhere: dict[str, Callable[..., Any]] = {
        "_flash_attention_forward": flash_attention_forward,
        "_flash_attention_forward_no_dropout_inplace": flash_attention_forward_into,  # torch 2.13
        "_flash_attention_backward": flash_attention_backward,
    }
    everywhere = {name: function for name, function in everywhere.items() if hasattr(torch.ops.aten, name)}
    libraries = [_override("CPU", of_cpu, with_keyset=True), _override("CPU", everywhere)]
    if _library.build_info()["cuda_version"] is not None:
        everywhere |= {_SDPA_CUDA: sdpa_on_cuda, f"{_SDPA_CUDA}_backward": sdpa_on_cuda_backward}
        libraries.append(_override("CUDA", everywhere))
    return _Handle(libraries)


register_flash_attention_impl(NAME, register_fn=_activate)
