"""One block of the attention matrix: queries of one slot and keys of another, at their places in the documents."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flash_attn import _library
from flash_attn.context_parallel.layout import Cut, Place, piece_of, place_of, to_place
from flash_attn.context_parallel.plan import Mask

_fwd = _library.op("fwd")
_bwd = _library.op("bwd")


def float_type(x: Tensor) -> torch.dtype:
    """The dtype of partial results: float32, or float64 for float64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _int32(values: Any, place: Place) -> Tensor:
    return to_place(torch.tensor(values, dtype=torch.int32, device="cpu"), place)


@lru_cache(maxsize=256)
def _packing(cut: Cut, rank: int, slot: int, place: Place) -> tuple[Tensor, Tensor, int]:
    """cu_seqlens, starts and max_seqlen of a slot."""
    starts, lengths = piece_of(cut, rank, slot)
    cu_seqlens = list(itertools.accumulate(lengths, initial=0))
    return _int32(cu_seqlens, place), _int32(starts, place), max(lengths, default=0)


@lru_cache(maxsize=256)
def _seqused(used: tuple[int, ...], place: Place) -> Tensor:
    return _int32(used, place)


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
    """

    cut: Cut
    rank: int
    is_packed: bool
    options: dict[str, Any]
    deterministic: bool

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
        place = place_of(q)
        (cu_seqlens_q, q_starts, max_seqlen_q), (cu_seqlens_k, k_starts, max_seqlen_k) = (
            _packing(*side, place) for side in sides
        )
        return {
            "cu_seqlens_q": cu_seqlens_q,
            "cu_seqlens_k": cu_seqlens_k,
            "max_seqlen_q": max_seqlen_q,
            "max_seqlen_k": max_seqlen_k,
            "seqused_k": None if block.used is None else _seqused(block.used, place),
            "q_starts": q_starts,
            "k_starts": k_starts,
        }

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, block: Block, float_results: bool = True
    ) -> tuple[Tensor, Tensor]:
        """out and softmax_lse of the queries of a slot, as if there were only the keys of the block."""
        return _fwd(q, k, v, **self._where(block, q), **self.options, float_results=float_results)

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
