"""Rows of sinks, key ranges and largest scores, together with everything else that kernels know of."""

import dataclasses
import itertools

from cases import BATCHES, SCORES, Case, batch_lengths, pairwise
from sim_case import LARGE_SMEM, SMALL_SMEM, Row, Sim

PATTERNS = ["prefix", "documents", "shuffled", "random", "hostile", "shared"]
AXES: dict[str, list] = {
    "dtype": ["bfloat16", "float16"],
    "s_aux": ["", "all", "some"],
    "key_ranges": ["", *PATTERNS],
    "max_logits": [False, True],
    "heads": [(1, 1), (4, 2), (3, 1)],
    "dims": [(64, 64), (13, 40), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256)],
    "lengths": [
        (63, 63), (64, 64), (65, 65), (128, 128), (129, 300), (300, 129), (257, 257), (1, 200), (200, 40), (5, 0),
    ],
    "mask": [
        {},
        {"causal": True},
        {"window_size": (100, 0)},
        {"window_size": (40, 30)},
        {"attention_chunk": 100},
        {"attention_chunk": 64, "causal": True},
    ],
    "score": SCORES[::2],
    "alibi": ["", "batch"],
    "dropout_p": [0.0, 0.17],
    "batch": BATCHES,
    "lse_grad": [False, True],
    "layout": ["rows", "gaps"],
    "smem": [LARGE_SMEM, SMALL_SMEM],
    "deterministic": [False, True],
}  # fmt: skip
EVERYTHING = {"s_aux": "some", "max_logits": True, "lse_grad": True}
SMALL = Case((150,), (150,), "bfloat16", 1, 1, 6, 5, lse_grad=True)
UNEVEN = Case((70, 0, 131, 64), (33, 9, 200, 64), "bfloat16", 4, 2, packed=True)
MASKED = [{"key_ranges": pattern} for pattern in PATTERNS[:-1]]


def row_of(row: dict, seed: int) -> Row:
    batch = dict(row["batch"])
    lengths = batch_lengths(row["lengths"], batch.pop("batch"), batch.pop("uneven", False))
    same = ("dtype", "s_aux", "key_ranges", "max_logits", "alibi", "dropout_p", "lse_grad")
    case = Case(
        **lengths,
        **batch,
        **row["mask"],
        **row["score"],
        **{name: row[name] for name in same},
        num_heads=row["heads"][0],
        num_heads_k=row["heads"][1],
        head_dim=row["dims"][0],
        head_dim_v=row["dims"][1],
        seed=seed,
    )
    return case, Sim(**{name: row[name] for name in ("layout", "smem", "deterministic")})


def table() -> list[Row]:
    """Every pair of values of any two axes, and what they do not have."""
    return [
        *(row_of(row, seed) for seed, row in enumerate(pairwise(AXES))),
        *turns(),
        *many_queries(),
        *others(),
        *checks(),
    ]


def turns(dims: tuple[int, ...] = (64, 128, 192, 256)) -> list[Row]:
    """Thread blocks that add to dQ in turns must agree on whose turn it is, whatever the window leaves of ranges."""
    rows = []
    for dim, (i, pattern), mask in itertools.product(
        dims, enumerate(["shuffled", "hostile"]), [{}, {"causal": True}, {"window_size": (90, 5)}]
    ):
        case = Case((513,), (401,), "bfloat16", 2, 1, dim, dim, key_ranges=pattern, seed=i, **mask)
        rows.append((case, Sim(deterministic=True)))
    return rows


def many_queries() -> list[Row]:
    """More blocks of queries than a warp has lanes, in one pass over them and in two."""
    return [(Case((n,), (64,), "bfloat16", 1, 1, key_ranges="prefix"), Sim()) for n in (3000, 4200)]


def others() -> list[Row]:
    """Unused keys, pages, caches, places of shards; a mask that nothing sees; no rows."""
    used = {"seqused_k": (20, 9, 150, -1), "leftpad_k": (1, 0, 70, 0)}
    pages = {"page_size": 16, "key_ranges": "hostile", **EVERYTHING}
    starts = {"q_starts": (256, 0, 96, 500), "k_starts": (224, 32, 0, 450)}
    cases = [
        *(dataclasses.replace(UNEVEN, **used, key_ranges=p, **EVERYTHING) for p in ("prefix", "hostile")),
        dataclasses.replace(UNEVEN, **pages),
        dataclasses.replace(UNEVEN, **pages, **used, causal=True, dtype="float16"),
        *(dataclasses.replace(UNEVEN, **starts, key_ranges=p, causal=True, **EVERYTHING) for p in PATTERNS[1:3]),
        dataclasses.replace(UNEVEN, key_ranges="documents", float_results=True, **EVERYTHING),
        dataclasses.replace(SMALL, seqlens_q=(200,), seqlens_k=(40,), causal=True, **EVERYTHING),
        Case((), (), "bfloat16", seqlen_q_if_empty=5, seqlen_k_if_empty=7, key_ranges="random", **EVERYTHING),
        Case((0, 70), (64, 0), "bfloat16", packed=True, key_ranges="documents", **EVERYTHING),
    ]
    cache = Case((5,) * 4, (150,) * 4, "bfloat16", 4, 2, seqused_k=(-1, 149, 64, 90), s_aux="all", max_logits=True)
    return [*((case, Sim(deterministic=i % 2 == 0)) for i, case in enumerate(cases)), (cache, Sim(seqlen_new=2))]


def checks() -> list[Row]:
    """What a comparison with the reference does not show (runner/check.h)."""
    masked = [dataclasses.replace(UNEVEN, **mask, **EVERYTHING) for mask in MASKED[:2]]
    rows = [(case, Sim("batch")) for case in (*masked, dataclasses.replace(UNEVEN, causal=True, **EVERYTHING))]
    rows += [(dataclasses.replace(case, num_heads=2, num_heads_k=1), Sim("invalid_lengths")) for case in masked]
    rows += [(case, Sim("invalid_lengths", deterministic=True)) for case in masked[:1]]
    rows += [(dataclasses.replace(SMALL, **mask), Sim("nonfinite")) for mask in MASKED]
    rows += [
        (dataclasses.replace(SMALL, max_logits=True, s_aux="all", **mask), Sim("nonfinite"))
        for mask in ({}, {"causal": True}, *MASKED[:2])
    ]
    hidden = Case((300, 0, 150, 400), (300, 9, 200, 130), "bfloat16", 4, 2, packed=True, **EVERYTHING)
    rows += [(dataclasses.replace(hidden, **mask), Sim("hidden")) for mask in MASKED[:3]]
    few = dataclasses.replace(SMALL, seqlens_q=(70, 70), seqlens_k=(200, 200), key_ranges="documents")
    large = Case((129,), (200,), "float16", s_aux="all", max_logits=True)
    return [*rows, (few, Sim("marked")), (large, Sim("large")), (dataclasses.replace(large, causal=True), Sim("large"))]


def few() -> list[Row]:
    """Some that reach every path of every kernel; the cheapest first."""
    tiles = Case((128, 1, 150), (128, 300, 200), "bfloat16", 2, 1, packed=True, seed=1, **EVERYTHING)
    modified = {"softcap": 2.0, "alibi": "batch", "dropout_p": 0.17}
    rows = [
        (dataclasses.replace(tiles, s_aux="all"), Sim()),
        *((dataclasses.replace(tiles, key_ranges=p), Sim(deterministic=True)) for p in ("documents", "hostile")),
        (dataclasses.replace(tiles, key_ranges="prefix", causal=True, **modified), Sim(layout="gaps")),
        (Case((200, 200), (150, 150), "bfloat16", 2, 1, key_ranges="shared", max_logits=True), Sim()),
        (Case((1,), (1,), "bfloat16", 8, 8, max_logits=True), Sim()),  # the largest of negative scores
        *many_queries(),
        (dataclasses.replace(SMALL, key_ranges="documents", max_logits=True, seed=1), Sim("nonfinite")),
        (dataclasses.replace(SMALL, max_logits=True, s_aux="all"), Sim("nonfinite")),
    ]
    dims = [(dim, pattern) for dim in (96, 128, 192, 256) for pattern in ("shuffled", "hostile")]
    wide = [
        (dataclasses.replace(tiles, head_dim=d, head_dim_v=d, key_ranges=p, packed=True), Sim(deterministic=True))
        for d, p in dims
    ]
    return [*rows, *wide, *turns((64,))[::3], *turns((256,))[1:2]]
