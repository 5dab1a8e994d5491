"""Draws the pictures of docs/masks.md: what every query sees, asked of the package itself.

The values are the identity matrix, so that the result of attention is its weights: a key that a query does not see has
weight 0. All scores are 0, but for the biases of ALiBi, so shades are what the mask and the bias alone make of them.

    python examples/draw_masks.py            # writes docs/masks/*.svg
    python examples/draw_masks.py --check    # fails if they are not what the package computes today
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from flash_attn import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "masks"
CELL, MARGIN = 14, 22  # pixels
LENGTH = 12
DOCUMENTS = (5, 3, 4)
LONG, SHORT = torch.zeros(1, LENGTH, 1, 8), torch.zeros(1, LENGTH // 2, 1, 8)


def identity(length: int) -> Tensor:
    """Values (1, length, 1, length) whose weighted sum is the weights."""
    return torch.eye(length)[None, :, None]


def weights(q: Tensor, k: Tensor, **options: Any) -> Tensor:
    """(seqlen_q, seqlen_k), of one sequence and one head."""
    return flash_attn_func(q, k, identity(k.shape[1]), **options)[0, :, 0]


def cumulative(lengths: tuple[int, ...]) -> Tensor:
    """cu_seqlens of packed sequences."""
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def ranges_of(first: Tensor, end: Tensor) -> Tensor:
    """key_ranges (1, seqlen_q, 2)."""
    return torch.stack([first, end], -1)[None].to(torch.int32)


def prefix_lm() -> Tensor:
    """The first five tokens see each other, the others what is before them."""
    end = (torch.arange(LENGTH) + 1).clamp(min=5)
    return weights(LONG, LONG, key_ranges=ranges_of(torch.zeros(LENGTH), end))


def documents() -> Tensor:
    """Each query sees its document, up to itself."""
    cu_seqlens = cumulative(DOCUMENTS)
    own = torch.repeat_interleave(torch.arange(len(DOCUMENTS)), torch.tensor(DOCUMENTS))
    return weights(LONG, LONG, causal=True, key_ranges=ranges_of(cu_seqlens[own], cu_seqlens[own + 1]))


def shards() -> Tensor:
    """Queries 6 to 11 and keys 4 to 9 of a sequence of 12, which is drawn; causal."""
    whole = torch.full((LENGTH, LENGTH), torch.nan)
    whole[6:, 4:10] = weights(SHORT, SHORT, causal=True, q_start=6, k_start=4)
    return whole


def packed() -> Tensor:
    """Three packed sequences of unlike numbers of queries and keys, causal."""
    lengths_q = (2, 3, 4)
    q, k = torch.zeros(sum(lengths_q), 1, 8), LONG[0]
    where = cumulative(lengths_q), cumulative(DOCUMENTS), max(lengths_q), max(DOCUMENTS)
    return flash_attn_varlen_func(q, k, identity(LENGTH)[0], *where, causal=True)[:, 0]


def leftpad() -> Tensor:
    """Two new queries and a cache of twelve keys, of which the first three are padding."""
    skipped = torch.tensor([3], dtype=torch.int32)
    cache = LONG, identity(LENGTH)
    out = flash_attn_with_kvcache(LONG[:, :2], *cache, cache_seqlens=LENGTH, cache_leftpad=skipped, causal=True)
    return cast(Tensor, out)[0, :, 0]


def sinks() -> Tensor:
    """The first column is the weight of the sink: what the keys leave."""
    of_keys = weights(LONG, LONG, causal=True, s_aux=torch.ones(1))
    return torch.cat([1 - of_keys.sum(-1, keepdim=True), torch.full((LENGTH, 1), torch.nan), of_keys], -1)


def dropped() -> Tensor:
    """Half of the weights are dropped; the others are doubled."""
    torch.manual_seed(0)
    return weights(LONG, LONG, dropout_p=0.5)


PICTURES: dict[str, Callable[[], Tensor]] = {
    "full": lambda: weights(LONG, LONG),
    "causal": lambda: weights(LONG, LONG, causal=True),
    "causal_few_queries": lambda: weights(SHORT, LONG, causal=True),
    "causal_few_keys": lambda: weights(LONG, SHORT, causal=True),
    "window": lambda: weights(LONG, LONG, window_size=(3, 1)),
    "causal_window": lambda: weights(LONG, LONG, causal=True, window_size=(3, 0)),
    "chunks": lambda: weights(LONG, LONG, causal=True, attention_chunk=4),
    "prefix_lm": prefix_lm,
    "documents": documents,
    "shards": shards,
    "packed": packed,
    "leftpad": leftpad,
    "alibi": lambda: weights(LONG, LONG, causal=True, alibi_slopes=torch.tensor([0.5])),
    "sinks": sinks,
    "dropout": dropped,
}


def as_svg(shares: Tensor) -> str:
    """Shares of the softmax, (queries, keys), as a picture: from white, 0, to blue, the largest of the row.

    NaN: nothing is drawn.
    """
    rows, columns = shares.shape
    cells: dict[str, list[str]] = {}  # by their color
    for i, row in enumerate(shares):
        largest = row.nan_to_num().max().item()
        for j, share in enumerate(row.tolist()):
            if share != share:
                continue
            blue = round(10 * share / largest) / 10 if largest > 0 else 0
            color = "#" + "".join(f"{round(255 + (full - 255) * blue):02x}" for full in (31, 98, 175))
            corner = f"M{MARGIN + j * CELL} {MARGIN + i * CELL}"
            cells.setdefault(color, []).append(f"{corner}h{CELL}v{CELL}h-{CELL}z")
    width, height = MARGIN + columns * CELL + 1, MARGIN + rows * CELL + 1
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}">',
        '<g font-family="sans-serif" font-size="12" fill="#808080">',
        f'<text x="{MARGIN}" y="14">keys</text>',
        f'<text x="-{MARGIN}" y="14" text-anchor="end" transform="rotate(-90)">queries</text>',
        '</g><g stroke="#a0a0a0">',
        *(f'<path fill="{color}" d="{"".join(squares)}"/>' for color, squares in sorted(cells.items())),
        "</g></svg>",
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Write the pictures, or compare them; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a picture is not up to date")
    check = parser.parse_args().check
    stale = []
    for name, make in PICTURES.items():
        path, picture = FOLDER / f"{name}.svg", as_svg(make())
        if check and (not path.exists() or path.read_text() != picture):
            stale.append(path.name)
        elif not check:
            path.write_text(picture)
    if stale:
        print(f"not what the package computes: {', '.join(stale)}")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
