"""Key ranges of a Case: which keys each query of a sequence may see, beside what masks hide."""

from collections.abc import Callable

import torch

INT32 = torch.iinfo(torch.int32)

Ranges = torch.Tensor  # (seqlen_q, 2)


def prefix(seqlen_q: int, seqlen_k: int, generator: torch.Generator) -> Ranges:
    """Prefix-LM: the first third of the keys for all queries; of the others, those before the query's own."""
    end = (torch.arange(seqlen_q) + seqlen_k - seqlen_q + 1).clamp(min=seqlen_k // 3)
    return torch.stack([torch.zeros_like(end), end], 1)


def documents(seqlen_q: int, seqlen_k: int, generator: torch.Generator) -> Ranges:
    """Up to four documents: a query sees the keys of the one that it is in."""
    cuts = torch.randint(0, seqlen_k + 1, (3,), generator=generator).sort().values
    bounds = torch.cat([torch.tensor([0]), cuts, torch.tensor([seqlen_k])])
    position = (torch.arange(seqlen_q) + seqlen_k - seqlen_q).clamp(min=0)
    own = torch.searchsorted(cuts, position, right=True)
    return torch.stack([bounds[own], bounds[own + 1]], 1)


def random(seqlen_q: int, seqlen_k: int, generator: torch.Generator) -> Ranges:
    """Any two bounds near the keys: a tenth is reversed, and some begin before the first or end after the last key."""
    bounds = torch.randint(-3, seqlen_k + 4, (seqlen_q, 2), generator=generator).sort(1).values
    reverse = torch.rand(seqlen_q, 1, generator=generator) < 0.1
    return torch.where(reverse, bounds.flip(1), bounds)


def hostile(seqlen_q: int, seqlen_k: int, generator: torch.Generator) -> Ranges:
    """Empty, reversed, huge and negative ones among ordinary ones; blocks of 64 queries that see nothing, or all."""
    odd = [
        (INT32.min, INT32.max), (INT32.max, INT32.min), (INT32.min, INT32.min), (INT32.max, INT32.max), (0, INT32.max),
        (INT32.min, seqlen_k), (INT32.min, 0), (seqlen_k, INT32.max), (seqlen_k // 2, seqlen_k // 2), (0, 0), (-7, 1),
        (seqlen_k - 1, seqlen_k + 9), (63, 64), (64, 65), (63, 65),
    ]  # fmt: skip
    ranges = random(seqlen_q, seqlen_k, generator)
    choice = torch.randint(0, 2 * len(odd), (seqlen_q,), generator=generator)
    ranges = torch.where((choice < len(odd))[:, None], torch.tensor(odd)[choice % len(odd)], ranges)
    ranges[64:128] = torch.tensor([5, 5])
    ranges[128:192] = torch.tensor([0, INT32.max])
    return ranges


PATTERNS: dict[str, Callable[[int, int, torch.Generator], Ranges]] = {
    "prefix": prefix,
    "documents": documents,
    "random": random,
    "hostile": hostile,
    "shared": random,  # the same of all sequences of a dense batch
}
