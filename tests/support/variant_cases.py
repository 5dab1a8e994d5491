"""Cases of sinks, key ranges and the largest scores, together with everything else that attention has."""

import dataclasses
import itertools

from cases import DTYPES, MASKS, SCORES, Case, batch_lengths, pairwise
from key_ranges import PATTERNS

EVERYTHING = {"s_aux": "some", "max_logits": True, "lse_grad": True}
LENGTHS = [(n, n) for n in (1, 63, 64, 65, 127, 128, 129, 300)] + [
    (127, 129), (129, 65), (64, 200), (257, 64), (1, 300), (3, 129), (16, 65), (17, 700), (0, 5), (5, 0),
]  # fmt: skip


def variant_table() -> list[Case]:
    """All pairs of values of these axes, forward and backward, for the public functions."""
    axes = {
        "dtype": list(DTYPES),
        "heads": [(1, 1), (2, 2), (4, 2), (6, 1)],
        "dims": [(64, 64), (13, 40), (96, 24), (128, 128)],
        "lengths": LENGTHS,
        "s_aux": ["", "all", "some"],
        "key_ranges": ["", *PATTERNS],
        "max_logits": [False, True],
        "mask": [
            *MASKS[:4],
            {"window_size": (70, -1)},
            {"attention_chunk": 48},
            {"attention_chunk": 64, "causal": True},
        ],
        "score": SCORES,
        "alibi": ["", "heads", "batch"],
        "dropout_p": [0.0, 0.0, 0.17],
        "batch": [{}, {"packed": True}, {"packed": True, "uneven": True}, {"packed": True, "unused_rows": 3}],
        "starts": [{}, {}, {"q_starts": (128, 128, 128), "k_starts": (96, 96, 96)}, {"q_starts": (0, 32, 512)}],
        "float_results": [False, False, True],
        "lse_grad": [False, True],
    }
    same = ("dtype", "s_aux", "key_ranges", "max_logits", "alibi", "dropout_p", "float_results", "lse_grad")
    cases = []
    for seed, row in enumerate(pairwise(axes)):
        batch = dict(row["batch"])
        lengths = batch_lengths(row["lengths"], 3, batch.pop("uneven", False))
        dims = {"head_dim": row["dims"][0], "head_dim_v": row["dims"][1]}
        heads = {"num_heads": row["heads"][0], "num_heads_k": row["heads"][1]}
        rest = {name: row[name] for name in same}
        cases.append(Case(**lengths, **dims, **heads, **row["mask"], **row["score"], **batch, **row["starts"], **rest))
        cases[-1] = dataclasses.replace(cases[-1], seed=seed)
    return cases


def decode_cases() -> list[Case]:
    """Few queries: tiles of the heads of a group, whose keys are split into chunks, of which some see nothing."""
    shapes = [(1, 2, 1), (2, 8, 2), (7, 6, 3), (16, 1, 1), (5, 4, 1), (33, 2, 1), (9, 12, 4)]
    cases = []
    for (i, (seqlen_q, heads, heads_k)), (j, pattern) in itertools.product(
        enumerate(shapes), enumerate(["", *PATTERNS])
    ):
        fields = {**EVERYTHING, "s_aux": ("all", "", "some")[(i + j) % 3], "dtype": DTYPES[(i + 2 * j) % 4]}
        lengths = ((seqlen_q,) * 2, ((513, 1300, 257)[i % 3],) * 2)
        mask = [{}, {"causal": True}, {"window_size": (200, 3)}][(i + j) % 3]
        dims = {"head_dim": 40, "head_dim_v": 24, "num_heads": heads, "num_heads_k": heads_k}
        packed = pattern != "shared" and j % 2 == 1
        cases.append(Case(*lengths, **dims, **fields, **mask, key_ranges=pattern, packed=packed, seed=i))
    return cases


def other_variants() -> list[Case]:
    """Keys in pages and of a cache, rows that see nothing and batches without any, all features at once."""
    pages = [
        Case((5, 0, 70), (129, 3, 0), "bfloat16", packed=True, page_size=16, key_ranges="random", **EVERYTHING),
        Case((65, 1, 2), (65, 700, 1), packed=True, page_size=1, key_ranges="hostile", causal=True, **EVERYTHING),
        Case((1, 1), (600, 300), "float16", 8, 2, packed=True, page_size=256, s_aux="all", max_logits=True),
    ]
    used = {"seqused_k": (130, 1, 64), "leftpad_k": (3, 0, 64)}
    lengths = ((70, 1, 140), (130, 129, 65))
    cache = [
        Case(*lengths, dtype, packed=True, key_ranges=pattern, **used, **EVERYTHING)
        for dtype, pattern in itertools.product(DTYPES, ["prefix", "hostile"])
    ]
    nothing = [
        Case((200, 200), (70, 70), dtype, causal=causal, packed=packed, key_ranges=pattern, **EVERYTHING)
        for dtype, causal, pattern in itertools.product(DTYPES, [False, True], ["", "documents"])
        for packed in (False, True)
    ]
    empty = [
        Case((), (), seqlen_q_if_empty=5, seqlen_k_if_empty=7, key_ranges="random", **EVERYTHING),
        Case((), (), packed=True, unused_rows=4, key_ranges="random", **EVERYTHING),
        Case((0, 5, 9), (4, 5, 0), packed=True, causal=True, key_ranges="prefix", **EVERYTHING),
        Case((7, 7), (0, 0), key_ranges="shared", **EVERYTHING),
        Case((0, 0), (7, 7), key_ranges="documents", **EVERYTHING),
    ]
    everything = [
        Case(
            (150, 64), (200, 129), dtype, 4, 2, packed=True, window_size=(120, 60), softcap=2.0, alibi="batch",
            dropout_p=0.2, key_ranges=pattern, unused_rows=2, seed=5, **EVERYTHING,
        )
        for dtype, pattern in itertools.product(DTYPES, PATTERNS)
    ]  # fmt: skip
    return [*pages, *cache, *nothing, *empty, *everything]


def variant_cases() -> list[Case]:
    return [*variant_table(), *decode_cases(), *other_variants()]
