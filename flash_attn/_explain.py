"""explain(): which backend runs an attention call, and why no better one does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flash_attn import _library
from flash_attn.autograd import SEPARATE, Extensions, Sequences, cast_for_autocast, convert_arguments, extended_options

_explain = _library.op("_explain")


@dataclass(frozen=True)
class Explanation:
    """The result of explain(). str() gives one line per backend.

    Attributes:
        backend: name of the backend of the forward pass: "sm90", "sm80" or "cpu"; "" if none can run it.
        better: (name, reason) for each better backend, best first: why it cannot run the call.
    """

    backend: str
    better: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        lines = [f"runs on {self.backend}" if self.backend else "no backend can run it"]
        return "\n".join([*lines, *(f"not on {name}: {reason}" for name, reason in self.better)])


def explain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    attention_chunk: int = 0,
    q_start: int | Tensor | None = None,
    k_start: int | Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    s_aux: Tensor | None = None,
    key_ranges: Tensor | None = None,
    return_max_logits: bool = False,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | Tensor | None = None,
    max_seqlen_k: int | Tensor | None = None,
    block_table: Tensor | None = None,
) -> Explanation:
    """Find the backend that would run the forward pass of a call, without running it.

    Args:
        q, k, v, ..., return_max_logits: as in flash_attn_func. deterministic and return_attn_probs have no effect.
        cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, block_table: as in flash_attn_varlen_func, for a packed
            call. max_seqlen_q and max_seqlen_k may be omitted: they are then computed from cu_seqlens.

    Returns:
        An Explanation.

    Raises:
        TypeError, ValueError, RuntimeError: what the call itself would raise for these arguments.
    """
    sequences = None
    if cu_seqlens_q is not None or cu_seqlens_k is not None:
        longest = (_longest(max_seqlen_q, cu_seqlens_q), _longest(max_seqlen_k, cu_seqlens_k))
        sequences = Sequences(cu_seqlens_q, cu_seqlens_k, *longest, block_table)  # type: ignore[arg-type]
    numbers = (dropout_p, softmax_scale, causal, window_size, softcap)
    sequences, dropout_p, softmax_scale, causal, window_size, softcap = convert_arguments(
        "explain", SEPARATE, (q, k, v), sequences, alibi_slopes, *numbers
    )
    if not q.is_meta and torch.is_autocast_enabled(q.device.type):
        q, k, v = cast_for_autocast((q, k, v), q.device.type)
    given = Extensions(attention_chunk, q_start, k_start, out_dtype, s_aux, key_ranges, return_max_logits)
    extended = extended_options("explain", q.dtype, given)
    where: dict[str, Any] = {} if sequences is None else sequences._asdict()
    state = torch.zeros(2, dtype=torch.int64, device=q.device) if dropout_p > 0 else None
    with torch.no_grad():
        backend, *others = _explain(
            *(q, k, v),
            **where,
            alibi_slopes=alibi_slopes,
            softmax_scale=softmax_scale,
            causal=causal,
            window_size_left=window_size[0],
            window_size_right=window_size[1],
            softcap=softcap,
            dropout_p=dropout_p,
            rng_state=state,
            **extended,
        )
    return Explanation(backend, tuple(zip(others[::2], others[1::2], strict=True)))


def _longest(given: int | Tensor | None, cu_seqlens: Tensor | None) -> Any:
    if given is not None or not isinstance(cu_seqlens, Tensor) or cu_seqlens.numel() < 2:
        return 0 if given is None else given
    return int(cu_seqlens.diff().max())
