"""Heads instead of rows: all-to-all gives every rank some heads of all rows, and takes the results back.

Jacobs et al., "DeepSpeed Ulysses" (2023). Together with a ring: Fang and Zhao, "USP" (2024).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flash_attn.context_parallel.blocks import float_type
from flash_attn.context_parallel.layout import Cut, local_length, reorder
from flash_attn.context_parallel.ring import Ring

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def key_heads(num_heads: int, num_heads_k: int, num_ranks: int) -> list[list[int]]:
    """The key heads that each rank needs for its num_heads / num_ranks query heads.

    Query head h uses key head h // (num_heads // num_heads_k), of all heads and of those of a rank. That needs each key
    head on one rank, or a repetition of those that the query heads of several ranks share.
    """
    group, local = num_heads // num_heads_k, num_heads // num_ranks
    shared = math.gcd(group, local)  # query heads next to each other that use the same key head, on every rank
    return [[head // group for head in range(rank * local, (rank + 1) * local, shared)] for rank in range(num_ranks)]


def _take(x: Tensor, heads: list[int]) -> Tensor:
    """Some heads of (batch, rows, num_heads_k, n): neighbours, of which some may be repeated."""
    if len(heads) == heads[-1] - heads[0] + 1:
        return x[:, :, heads[0] : heads[-1] + 1]
    return torch.cat([x[:, :, head : head + 1] for head in heads], 2)


def _join_heads(x: Tensor) -> Tensor:
    """(batch, rows, all heads, n), from (size, batch, rows, heads of a rank, n)."""
    return x.permute(1, 2, 0, 3, 4).flatten(2, 3)


class Ulysses:
    """Attention of one rank, whose heads are computed by `inner`, which has the rows of the whole ulysses group.

    cut, rank: of all ranks, those of a ulysses group having consecutive numbers.
    """

    def __init__(self, inner: Ring, cut: Cut, rank: int, group: ProcessGroup, heads: tuple[int, int]):
        self.inner, self.group = inner, group
        self.size = torch.distributed.get_world_size(group)
        first = rank - rank % self.size
        self.members = tuple((cut, first + u) for u in range(self.size))
        self.rank_in_group = rank % self.size
        self.lengths = [local_length(*member) for member in self.members]
        self.inner_rows = ((inner.cut, inner.rank),)
        self.key_heads = key_heads(*heads, self.size)
        self.key_heads_repeat = sum(map(len, self.key_heads)) > heads[1]

    def _all_to_all(self, x: Tensor, sent: list[int], received: list[int]) -> Tensor:
        if self.size == 1:
            return x
        out = x.new_empty(sum(received))
        torch.distributed.all_to_all_single(out, x, received, sent, group=self.group)
        return out

    def _to_heads(self, parts: list[Tensor]) -> Tensor:
        """(batch, rows of the group, n) of this rank's heads, from (batch, local rows, n) for the heads of each."""
        batch_size, _, width = parts[0].shape
        sizes = [batch_size * length * width for length in self.lengths]
        flat = self._all_to_all(torch.cat([part.flatten() for part in parts]), [part.numel() for part in parts], sizes)
        received = zip(flat.split(sizes), self.lengths, strict=True)
        rows = torch.cat([x.view(batch_size, length, width) for x, length in received], 1)
        return reorder(rows, 1, self.members, self.inner_rows)

    def _to_rows(self, x: Tensor) -> Tensor:
        """The reverse: (size, batch, local rows, n), what each rank has for the local rows."""
        batch_size, _, width = x.shape
        parts = reorder(x, 1, self.inner_rows, self.members).split(self.lengths, 1)
        local = self.lengths[self.rank_in_group]
        sent = [part.numel() for part in parts]
        flat = self._all_to_all(
            torch.cat([part.flatten() for part in parts]), sent, [batch_size * local * width] * self.size
        )
        return flat.view(self.size, batch_size, local, width)

    def _heads_to_rows(self, x: Tensor) -> Tensor:
        """(batch, local rows, num_heads, n), from (batch, rows of the group, local heads, n)."""
        return _join_heads(self._to_rows(x.flatten(2)).unflatten(-1, x.shape[2:]))

    def _batched(self, x: Tensor) -> Tensor:
        """Packed rows as a batch of one."""
        return x.unsqueeze(0) if self.inner.blocks.is_packed else x

    def _unbatched(self, x: Tensor) -> Tensor:
        return x.squeeze(0) if self.inner.blocks.is_packed else x

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """out, softmax_lse and what backward needs, for this rank's rows."""
        batched = [self._batched(x) for x in (q, k, v)]
        parts = []
        for queries, heads in zip(batched[0].tensor_split(self.size, 2), self.key_heads, strict=True):
            chosen = [queries, *(_take(x, heads) for x in batched[1:])]
            parts.append(torch.cat([x.flatten(2) for x in chosen], -1))
        shapes = [x.shape[2:] for x in chosen]
        rows = self._to_heads(parts).split([shape.numel() for shape in shapes], -1)
        inputs = [self._unbatched(x.unflatten(-1, shape)) for x, shape in zip(rows, shapes, strict=True)]
        out, softmax_lse, saved = self.inner.forward(*inputs)
        local_lse = self._heads_to_rows(self._batched(softmax_lse).transpose(1, 2).unsqueeze(-1))
        return (
            self._unbatched(self._heads_to_rows(self._batched(out))),
            self._unbatched(local_lse.squeeze(-1).transpose(1, 2)),
            saved,
        )

    def backward(self, dout: Tensor, *saved: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """dq, dk and dv of this rank's rows. Those of key heads that several ranks have are added in float_type."""
        parts = list(self._batched(dout).tensor_split(self.size, 2))
        rows = self._to_heads([part.flatten(2) for part in parts])
        grads = self.inner.backward(self._unbatched(rows.unflatten(-1, parts[0].shape[2:])), *saved)
        dq, dk, dv = (self._batched(x) for x in grads)
        dtype = float_type(dout) if self.key_heads_repeat else dout.dtype
        widths = [x.shape[2:].numel() for x in (dk, dv)]
        exchanged = self._to_rows(torch.cat([dk.flatten(2), dv.flatten(2)], -1).to(dtype)).split(widths, -1)
        add = self._add_heads if self.key_heads_repeat else _join_heads
        local_dk, local_dv = (add(x.unflatten(-1, like.shape[2:])) for x, like in zip(exchanged, (dk, dv), strict=True))
        local_dq = self._heads_to_rows(dq.to(dout.dtype))
        return self._unbatched(local_dq), self._unbatched(local_dk), self._unbatched(local_dv)

    def _add_heads(self, x: Tensor) -> Tensor:
        """(batch, local rows, num_heads_k, n): the sum of what (size, batch, local rows, heads of a rank, n) has."""
        total = x.new_zeros(*x.shape[1:3], 1 + max(map(max, self.key_heads)), x.shape[-1])
        for part, heads in zip(x, self.key_heads, strict=True):
            for i, head in enumerate(heads):
                total[:, :, head] += part[:, :, i]
        return total
