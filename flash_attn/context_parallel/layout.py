"""How documents are cut into shards.

Every document of the batch, or the whole sequence of a dense batch, is cut into 2 n pieces (zigzag) or n pieces
(contiguous) for n ranks. All pieces of a document have one size, a multiple of 32, but for the last ones, which are
shorter or empty: piece i of a document begins at i * size. Dropout is drawn in blocks of 32 x 32, so none straddles two
shards. Zigzag gives rank r the pieces r and 2 n - 1 - r: under a causal mask all ranks have equal work.

The local rows of a rank are those of its slots: slot 0 holds the first piece of every document, in their order, slot 1
(of zigzag) the second piece of every document.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from flash_attn.context_parallel.host_tensors import HostTensors

DROPOUT_BLOCK = 32
LAYOUTS = ("zigzag", "contiguous")


@dataclass(frozen=True)
class Cut:
    """A batch of documents, cut for a number of ranks.

    Attributes:
        lengths: rows of each document.
        sizes: rows of the pieces of each document.
    """

    lengths: tuple[int, ...]
    sizes: tuple[int, ...]
    num_ranks: int
    zigzag: bool

    @property
    def slots(self) -> range:
        """The slots of a rank."""
        return range(2 if self.zigzag else 1)

    @property
    def total(self) -> int:
        """Rows of all documents."""
        return sum(self.lengths)

    def joined(self, ranks: int) -> Cut:
        """The cut for num_ranks / ranks ranks, each of which has the rows of `ranks` consecutive ranks of this one."""
        return Cut(self.lengths, tuple(size * ranks for size in self.sizes), self.num_ranks // ranks, self.zigzag)

    def whole(self) -> Cut:
        """The cut for one rank, all rows in their order."""
        return Cut(self.lengths, self.lengths, 1, False)


def make_cut(lengths: Sequence[int], num_ranks: int, layout: str) -> Cut:
    """Cut documents of these lengths in a layout of LAYOUTS. One rank gets all rows in their order, in any layout."""
    is_zigzag = layout == "zigzag" and num_ranks > 1
    pieces = num_ranks * (2 if is_zigzag else 1)
    multiple = pieces * DROPOUT_BLOCK
    sizes = tuple(-(-length // multiple) * DROPOUT_BLOCK for length in lengths)
    return Cut(tuple(lengths), sizes, num_ranks, is_zigzag)


@lru_cache(maxsize=256)
def piece_of(cut: Cut, rank: int, slot: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The positions in their documents where the rows of a slot start, and their numbers."""
    piece = rank if slot == 0 else 2 * cut.num_ranks - 1 - rank
    starts = tuple(piece * size for size in cut.sizes)
    of_documents = zip(starts, cut.lengths, cut.sizes, strict=True)
    return starts, tuple(max(0, min(size, length - start)) for start, length, size in of_documents)


@lru_cache(maxsize=256)
def slot_lengths(cut: Cut, rank: int) -> tuple[int, ...]:
    """The rows of each slot of a rank."""
    return tuple(sum(piece_of(cut, rank, slot)[1]) for slot in cut.slots)


def local_length(cut: Cut, rank: int) -> int:
    """The rows of a rank."""
    return sum(slot_lengths(cut, rank))


def slot_of(x: Tensor, cut: Cut, rank: int, slot: int, dim: int = -3) -> Tensor:
    """The rows of a slot, a view of the local rows x."""
    lengths = slot_lengths(cut, rank)
    return x.narrow(dim, sum(lengths[:slot]), lengths[slot])


def int64(values: Sequence[int]) -> Tensor:
    """A tensor on the CPU, which the default device may not be."""
    return torch.tensor(values, dtype=torch.int64, device="cpu")


@lru_cache(maxsize=64)
def rows_of(cut: Cut, rank: int) -> Tensor:
    """(local_length,) int64: where the local rows of a rank are among all rows."""
    firsts = int64([0, *cut.lengths]).cumsum(0)[:-1]
    parts = []
    for slot in cut.slots:
        starts, lengths = (int64(values) for values in piece_of(cut, rank, slot))
        before = lengths.cumsum(0) - lengths  # rows of the slot before each document
        offsets = torch.repeat_interleave(firsts + starts - before, lengths)
        parts.append(offsets + torch.arange(len(offsets), device="cpu"))
    return torch.cat(parts)


def _order(source: tuple[tuple[Cut, int], ...], target: tuple[tuple[Cut, int], ...]) -> Tensor:
    found, wanted = (torch.cat([rows_of(cut, rank) for cut, rank in ranks]) for ranks in (source, target))
    places = torch.empty(source[0][0].total, dtype=torch.int64, device="cpu")
    places[found] = torch.arange(len(found), device="cpu")
    return places[wanted]


# order_of(x, source, target): where the rows of the target are among those of the source, on the device of x. Each is a
# tuple of (cut, rank), the rows of these ranks one after another. Both have the same rows.
order_of = HostTensors(_order, maxsize=8)


def reorder(x: Tensor, dim: int, source: tuple[tuple[Cut, int], ...], target: tuple[tuple[Cut, int], ...]) -> Tensor:
    """Bring rows along dim from the order of the source into that of the target."""
    return x if source == target else x.index_select(dim, order_of(x, source, target))


def all_ranks(cut: Cut) -> tuple[tuple[Cut, int], ...]:
    """The rows of all ranks one after another, for order_of."""
    return tuple((cut, rank) for rank in range(cut.num_ranks))
