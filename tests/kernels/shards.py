"""Rows of shards: queries and keys at places of longer sequences, heads of many more, results in fp32."""

import dataclasses
import itertools

from cases import SCORES, Case, batch_lengths, pairwise
from sim_case import LARGE_SMEM, SMALL_SMEM, Row, Sim

MASKS: list[dict] = [
    {"causal": True},
    {},
    {"window_size": (100, 0)},
    {"window_size": (40, 30)},
    {"causal": True, "window_size": (16, 50)},
    {"attention_chunk": 100},
    {"attention_chunk": 64, "causal": True},
]
# Of the first query and key: on the diagonal, all keys before and after all queries, and in between.
PLACES = [(256, 256), (640, 128), (128, 640), (224, 160), (160, 224), (0, 32)]
AXES: dict[str, list] = {
    "dtype": ["bfloat16", "float16"],
    "heads": [(2, 2), (4, 2), (3, 1)],
    "dims": [(64, 64), (128, 128), (256, 256), (40, 24), (192, 128)],
    "lengths": [(128, 128), (129, 300), (300, 129), (64, 1), (1, 200)],
    "place": PLACES,
    "mask": MASKS,
    "score": SCORES[::2],
    "alibi": ["", "batch"],
    "dropout_p": [0.0, 0.17],
    "head_start": [0, 5],
    "batch": [1, 2, 3],
    "float_results": [True, False],
    "lse_grad": [False, True],
    "layout": ["rows", "gaps"],
    "smem": [LARGE_SMEM, SMALL_SMEM],
    "deterministic": [False, True],
}
SMALL = Case((150,), (150,), "bfloat16", 1, 1, 6, 5, lse_grad=True, float_results=True)
UNEVEN = Case(
    (70, 0, 131, 64), (33, 9, 200, 64), "bfloat16", 4, 2, packed=True, float_results=True,
    q_starts=(0, 32, 96, 500), k_starts=(10, 32, 0, 450),
)  # fmt: skip


def starts(place: tuple[int, int], batch: int, step: int) -> dict:
    """Those of every sequence, in a packed batch each at a place of its own; multiples of `step`."""
    step *= batch > 2
    q_starts = tuple(place[0] + 2 * step * b for b in range(batch))
    return {"q_starts": q_starts, "k_starts": tuple(place[1] + step * b for b in range(batch))}


def row_of(row: dict, seed: int) -> Row:
    batch, heads = row["batch"], row["heads"]
    # Blocks of random numbers begin at multiples of 32.
    placed = starts(row["place"], batch, 32 if row["dropout_p"] else 7)
    case = Case(
        **batch_lengths(row["lengths"], batch, uneven=batch > 2),
        **placed,
        **row["mask"],
        **row["score"],
        **{name: row[name] for name in ("dtype", "alibi", "dropout_p", "head_start", "float_results", "lse_grad")},
        num_heads=heads[0],
        num_heads_k=heads[1],
        head_dim=row["dims"][0],
        head_dim_v=row["dims"][1],
        total_heads=row["head_start"] and 11,
        packed=batch > 2,
        seed=seed,
    )
    return case, Sim(**{name: row[name] for name in ("layout", "smem", "deterministic")})


def table() -> list[Row]:
    """Every pair of values of any two axes, and what a comparison with the reference does not show."""
    return [*(row_of(row, seed) for seed, row in enumerate(pairwise(AXES))), *edges(), *checks()]


def edges() -> list[Row]:
    """The ends of what positions may be; one start given and the other not; no queries or no keys."""
    last = 2**30 - 200
    case = Case((70,), (200,), "bfloat16", 2, 1, causal=True, float_results=True)
    changes: list[dict] = [
        {"q_starts": (last + 130,), "k_starts": (last,)},
        {"q_starts": (last,), "k_starts": (0,), "window_size": (last, 0)},
        {"q_starts": (0,), "k_starts": (last,), "causal": False, "window_size": (-1, last)},
        {"q_starts": (last + 100,), "k_starts": (last,), "causal": False, "attention_chunk": 77},
        {"q_starts": (150,)},
        {"k_starts": (20,)},
        {"q_starts": (64,), "k_starts": (32,), "seqlens_k": (0,)},
        {"seqused_k": (170,), "q_starts": (96,), "k_starts": (32,)},
    ]
    return [(dataclasses.replace(case, **each), Sim(deterministic=True)) for each in changes]


def nonfinite_rows() -> list[Row]:
    """NaN and infinity beside the diagonal, between two windows, and where no query sees a key."""
    changes: list[dict] = [
        {"causal": True, "q_starts": (140,), "k_starts": (100,)},
        {"window_size": (20, 3), "q_starts": (30,), "k_starts": (100,)},
        {"causal": True, "q_starts": (0,), "k_starts": (150,)},
    ]
    return [(dataclasses.replace(SMALL, **each), Sim("nonfinite")) for each in changes]


def hidden_rows(dim: int) -> list[Row]:
    case = Case(
        (300, 0, 150), (300, 9, 200), "bfloat16", 4, 2, dim, dim, packed=True, causal=True, float_results=True,
        q_starts=(100, 0, 30), k_starts=(0, 0, 60),
    )  # fmt: skip
    return [(case, Sim("hidden"))]


def merged_rows() -> list[Row]:
    """Shards of queries and keys whose results are put together."""
    case = Case((200, 200), (200, 200), "bfloat16", 4, 2, causal=True, float_results=True)
    changes: list[dict] = [
        {"lse_grad": True},
        {"dropout_p": 0.17, "alibi": "batch", "softcap": 2.0, "dtype": "float16"},
        {"packed": True, "seqlens_q": (300, 64), "seqlens_k": (300, 64), "window_size": (50, 0)},
        {"packed": True, "seqlens_q": (90, 150), "seqlens_k": (160, 300), "causal": False, "attention_chunk": 70,
         "q_starts": (70, 150), "k_starts": (0, 32)},
    ]  # fmt: skip
    dims = ((64, 64), (128, 128), (256, 256))
    rows = itertools.product(changes, dims)
    return [
        (dataclasses.replace(case, **each, head_dim=dim, head_dim_v=dim_v), Sim("shards", deterministic=True))
        for each, (dim, dim_v) in rows
    ]


def checks() -> list[Row]:
    """Other checks than a comparison with the reference; each is explained in runner/check.h."""
    masks: list[dict] = [{"causal": True}, {"window_size": (40, 30)}, {"attention_chunk": 50}]
    rows = [(dataclasses.replace(UNEVEN, **mask), Sim("batch")) for mask in masks]
    rows += [(dataclasses.replace(UNEVEN, **mask), Sim("invalid_lengths", deterministic=True)) for mask in masks[:2]]
    hidden = [row for dim in (64, 256) for row in hidden_rows(dim)]
    return [*rows, *nonfinite_rows(), *hidden, *merged_rows()]


def few() -> list[Row]:
    """For slow checks: every kernel, few tiles."""
    tiles = Case((128, 1, 150), (128, 300, 200), "bfloat16", 2, 1, packed=True, causal=True, float_results=True)
    placed = {"q_starts": (224, 512, 64), "k_starts": (160, 224, 96)}
    odd = {"head_dim": 13, "head_dim_v": 40, "num_heads_k": 2}
    changes: list[dict] = [
        {},
        {**odd, "dropout_p": 0.17, "head_start": 3, "total_heads": 9},
        {"causal": False, "attention_chunk": 60, "alibi": "heads", "head_dim": 128, "head_dim_v": 128},
        {"window_size": (40, 0), "head_dim": 200, "head_dim_v": 256},
    ]
    return [
        (dataclasses.replace(tiles, **placed, **each), Sim(layout=layout, deterministic=True))
        for each, layout in zip(changes, ("rows", "gaps", "rows", "gaps"), strict=True)
    ]
