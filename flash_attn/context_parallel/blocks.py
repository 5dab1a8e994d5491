"""One block of the attention matrix: queries of one slot and keys of another, at their places in the documents."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flash_attn import _library
from flash_attn.context_parallel.host_tensors import HostTensors
from flash_attn.context_parallel.layout import Cut, piece_of
from flash_attn.context_parallel.plan import Mask

_fwd = _library.op("fwd")
_bwd = _library.op("bwd")


def float_type(x: Tensor) -> torch.dtype:
    """The dtype of partial results: float32, or float64 for float64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def sink_gradient(s_aux: Tensor, dout: Tensor, out: Tensor, softmax_lse: Tensor) -> Tensor:
    """What rows contribute to the gradient of the sinks: -sum(exp(s_aux - softmax_lse) * rowsum(dout * out)).

    Args:
        s_aux: (num_heads,).
        dout, out: (..., rows, num_heads, head_dim_v).
        softmax_lse: (..., num_heads, rows), with the sinks.
    """
    dsoftmax_sum = torch.linalg.vecdot(dout.to(softmax_lse.dtype), out.to(softmax_lse.dtype)).transpose(-1, -2)
    sinks = s_aux.to(softmax_lse.dtype)[:, None]
    weights = torch.where(sinks == -torch.inf, 0, torch.exp(sinks - softmax_lse))
    return -(weights * dsoftmax_sum).movedim(-2, 0).flatten(1).sum(1).to(s_aux.dtype)


def _int32(values: Sequence[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device="cpu")


def _offsets(cut: Cut, rank: int, slot: int) -> Tensor:
    return _int32(list(itertools.accumulate(piece_of(cut, rank, slot)[1], initial=0)))


def _first_positions(cut: Cut, rank: int, slot: int) -> Tensor:
    return _int32(piece_of(cut, rank, slot)[0])


# Of the documents in a slot: cu_seqlens, and the positions of their first rows. And how many of their keys count.
_cu_seqlens, _starts = HostTensors(_offsets, maxsize=256), HostTensors(_first_positions, maxsize=256)
_seqused = HostTensors(_int32, maxsize=256)


class Block(NamedTuple):
    """A block: queries of this rank's q_slot, and keys of a cut, a rank and a slot.

    used: how many keys of each document count; None: all.
    """

    q_slot: int
    keys: tuple[Cut, int, int]
    used: tuple[int, ...] | None = None


@dataclass(frozen=True, eq=False)
class Blocks:
    """The attention of a rank, block by block.

    Attributes:
        is_packed: q is (rows, num_heads, head_dim), not (batch_size, rows, num_heads, head_dim).
        options: arguments of the ops: softmax_scale, causal, window_size_left, window_size_right, softcap,
            attention_chunk, dropout_p, rng_state, alibi_slopes, head_start, total_heads.
        s_aux: the sinks of these heads, or None.
    """

    cut: Cut
    rank: int
    is_packed: bool
    options: dict[str, Any]
    deterministic: bool
    s_aux: Tensor | None = None

    @property
    def mask(self) -> Mask:
        """What hides keys."""
        right = 0 if self.options["causal"] else self.options["window_size_right"]
        return Mask(self.options["window_size_left"], right, self.options["attention_chunk"])

    def _where(self, block: Block, q: Tensor) -> dict[str, Any]:
        sides = (self.cut, self.rank, block.q_slot), block.keys
        if not self.is_packed:
            q_start, k_start = (piece_of(*side)[0][0] for side in sides)
            return {"q_start": q_start, "k_start": k_start}
        max_seqlen_q, max_seqlen_k = (max(piece_of(*side)[1], default=0) for side in sides)
        return {
            "cu_seqlens_q": _cu_seqlens(q, *sides[0]),
            "cu_seqlens_k": _cu_seqlens(q, *sides[1]),
            "max_seqlen_q": max_seqlen_q,
            "max_seqlen_k": max_seqlen_k,
            "seqused_k": None if block.used is None else _seqused(q, block.used),
            "q_starts": _starts(q, *sides[0]),
            "k_starts": _starts(q, *sides[1]),
        }

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, block: Block, *, with_sinks: bool, float_results: bool = True
    ) -> tuple[Tensor, Tensor]:
        """out and softmax_lse of the queries of a slot, as if there were only the keys of the block.

        with_sinks: whether the sinks count here. Of the blocks that are joined, they must count in one.
        """
        s_aux = self.s_aux if with_sinks else None
        results = _fwd(q, k, v, **self._where(block, q), **self.options, s_aux=s_aux, float_results=float_results)
        return results[:2]

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor, block: Block
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What the keys of the block contribute to dq, and their dk and dv, in float_type.

        out, softmax_lse: of all keys, for the queries of the slot.
        """
        dq, dk, dv, _ = _bwd(
            *(dout, q, k, v, out, softmax_lse.contiguous(), None),
            **self._where(block, q),
            **self.options,
            deterministic=self.deterministic,
            float_results=True,
        )
        return dq, dk, dv
