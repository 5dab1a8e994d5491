"""torch's FlexAttention as a peer. On a GPU only: on a CPU it has no backward."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from harness.cases import Case

FLEX = "torch flex"


def flex_forward(case: Case, q: Tensor, k: Tensor, v: Tensor, slopes: Tensor | None) -> Callable[[], Tensor]:
    """The compiled call; the first one makes the mask, compiles, and takes seconds."""
    shift = case.seqlen_k - case.seqlen_q
    window = case.window

    def mask_mod(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        visible = key <= query + shift
        return visible if window is None else visible & (key >= query + shift - window)

    def score_mod(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        if case.softcap:
            score = case.softcap * torch.tanh(score / case.softcap)
        if slopes is not None:
            score = score - slopes[head] * (query + shift - key).abs()
        return score

    compiled = torch.compile(flex_attention)
    modified = case.softcap or slopes is not None

    @functools.cache
    def block_mask() -> BlockMask | None:
        if not case.causal:
            return None
        return create_block_mask(mask_mod, None, None, case.seqlen_q, case.seqlen_k, device=q.device.type)

    def forward() -> Tensor:
        out = compiled(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            score_mod=score_mod if modified else None,
            block_mask=block_mask(),
            enable_gqa=case.num_heads != case.num_heads_k,
        )
        return out.transpose(1, 2)

    return forward
