"""Which blocks of the attention matrix a rank computes, in which step, and what it sends and receives for them.

Ranks exchange keys and values directly: in step t a rank sends its own to rank + t, if that needs them, and receives
those of rank - t. All is known from the lengths and the mask, so every rank can tell what every other does, and sends
meet their receives without a word.

A ring that passes keys and values on from neighbour to neighbour would do the same with links to the neighbours only.
But what a rank passes on is also what it has no use for: under a causal mask, a quarter of all (zigzag) or half
(contiguous), and with windows nearly everything; and gradients would have to travel the whole way home. Direct exchange
sends what is needed, once, and every gradient in one hop. Switches of GPUs and of nodes carry either pattern at full
speed: in a step, every rank sends to one rank and receives from one.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from flash_attn.context_parallel.layout import Cut, int64, piece_of


@dataclass(frozen=True)
class Mask:
    """What hides keys by their position: key j is seen from i iff i - left <= j <= i + right, in the same chunk.

    Negative left and right are unbounded, attention_chunk = 0 is off.
    """

    left: int
    right: int
    attention_chunk: int


@dataclass(frozen=True)
class Pair:
    """A block to compute: queries of this rank's q_slot, keys of the source's k_slot.

    used: rows of the keys of each document that count, 0 where the mask hides all of them; None: all rows.
    """

    q_slot: int
    k_slot: int
    used: tuple[int, ...] | None


@dataclass(frozen=True)
class Step:
    """What a rank does in a step. Slots of `sent` go to target, slots of `received` come from source."""

    source: int
    target: int
    pairs: tuple[Pair, ...]
    received: tuple[int, ...]
    sent: tuple[int, ...]


def _used(cut: Cut, mask: Mask, queries: tuple[int, int], keys: tuple[int, int]) -> tuple[int, ...]:
    """The rows of keys that count, for each document. queries and keys are (rank, slot).

    0 only if the mask hides all of them; with chunks and windows at once, some of those are counted.
    """
    q_start, q_length = (int64(values) for values in piece_of(cut, *queries))
    k_start, k_length = (int64(values) for values in piece_of(cut, *keys))
    q_last, k_last = q_start + q_length - 1, k_start + k_length - 1
    seen = (q_length > 0) & (k_length > 0)
    if mask.right >= 0:
        seen &= k_start - q_last <= mask.right
    if mask.left >= 0:
        seen &= q_start - k_last <= mask.left
    if mask.attention_chunk > 0:
        chunk = mask.attention_chunk
        seen &= (k_start // chunk <= q_last // chunk) & (q_start // chunk <= k_last // chunk)
    return tuple(torch.where(seen, k_length, 0).tolist())


@lru_cache(maxsize=1024)
def _pairs(cut: Cut, mask: Mask, rank: int, source: int) -> tuple[Pair, ...]:
    """The blocks with queries of a rank and keys of another."""
    pairs = []
    for q_slot in cut.slots:
        for k_slot in cut.slots:
            used = _used(cut, mask, (rank, q_slot), (source, k_slot))
            if any(used):
                hides_none = used == piece_of(cut, source, k_slot)[1]
                pairs.append(Pair(q_slot, k_slot, None if hides_none else used))
    return tuple(pairs)


@lru_cache(maxsize=64)
def make_plan(cut: Cut, mask: Mask, rank: int) -> tuple[Step, ...]:
    """The steps of a rank; in step 0 its keys are its own. All ranks have the same number of steps, some are idle."""
    steps = []
    for t in range(cut.num_ranks):
        source, target = (rank - t) % cut.num_ranks, (rank + t) % cut.num_ranks
        pairs = _pairs(cut, mask, rank, source)
        received = tuple(sorted({pair.k_slot for pair in pairs})) if t > 0 else ()
        sent = tuple(sorted({pair.k_slot for pair in _pairs(cut, mask, target, rank)})) if t > 0 else ()
        steps.append(Step(source, target, pairs, received, sent))
    return tuple(steps)
