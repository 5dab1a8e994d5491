"""Tables of cases of flash_attn_with_kvcache."""

import dataclasses
import random
import sys

import torch

import flash_attn
from cases import DTYPES, pairwise
from kvcache import LATENT, ONE_BUFFER, KvCase, check_kvcache

# Around the edges of tiles and of chunks of keys.
EDGES = [n + d for n in (32, 64, 128, 256, 512, 1024) for d in (-1, 0, 1)]
LENGTHS = [(n, n // 3, n - 1) for n in EDGES] + [
    (0, 0),
    (1, 0, 2),
    (-1, 5),
    (7, -1, -1),
    (-1,),
    (130, 0, 61, 3, 257, 1),
]
SEQLENS_Q = [0, 1, 1, 1, 2, 4, 5, 17, 64, 130]
SEQLENS_NEW = [None, None, 0, 1, 1, 2, 5, 40]
HEADS = [(1, 1), (3, 1), (8, 1), (32, 1), (4, 4), (6, 2), (8, 2)]
DIMS = [
    (1, 1), (8, 8), (13, 13), (32, 32), (59, 59), (64, 64), (64, 40), (80, 80), (96, 96), (128, 128), (192, 128),
    (256, 256), (512, 512),
]  # fmt: skip
ROTARY = [
    {},
    {},
    {"rotary_dim": 1.0},
    {"rotary_dim": 0.5, "interleaved": False},
    {"rotary_dim": 0.25},
    {"rotary_dim": 1.0, "interleaved": False},
]
MASKS = [
    {},
    {"causal": True},
    {"causal": True},
    {"window_size": (0, 0)},
    {"window_size": (20, 3)},
    {"window_size": (-1, 2)},
    {"window_size": (100, -1), "causal": True},
    {"attention_chunk": 24, "causal": True},
    {"attention_chunk": 64},
]
SCORES = [{}, {}, {"softmax_scale": 0.3}, {"softcap": 1.5}, {"softcap": 20.0, "softmax_scale": 0.9}]
PLACES = [{}, {}, {"shuffled": True}, *({"page_size": n} for n in (1, 4, 16, 48, 256))]
LAYOUTS = [
    "",
    "",
    ONE_BUFFER,
    "heads before rows",
    "rows before batches",
    "odd row stride",
    "a slice of every dimension",
]


def consistent(seed: int, **fields) -> KvCase:
    """The case of one value of each axis. rotary_dim is a part of head_dim; rotary embedding needs new keys."""
    (num_heads, num_heads_k), (dim, dim_v) = fields.pop("heads"), fields.pop("dims")
    lengths, padded, page_size = fields["cache_seqlens"], fields.pop("padded"), fields.get("page_size", 0)
    if fields["layout"] == ONE_BUFFER:
        dim_v = dim
    if fields["given_as"] == "int":
        lengths = lengths[:1] * 2
    if fields["given_as"] == "None":
        whole_pages = -(-max(0, *lengths) // max(page_size, 1))
        lengths = (whole_pages * max(page_size, 1),) * len(lengths)
        fields.update(seqlen_new=None, spare=0)
    fraction = 0 if fields["seqlen_new"] is None else fields.get("rotary_dim", 0)
    fields.update(
        cache_seqlens=lengths,
        leftpad=tuple(max(n, 0) // 3 + b for b, n in enumerate(lengths)) if padded else None,
        rotary_dim=int(fraction * dim) // 2 * 2,
        seqlen_q=min(fields["seqlen_q"], 2**15 // (num_heads * max(dim, 32))),  # none takes seconds
        num_heads=num_heads,
        num_heads_k=num_heads_k,
        head_dim=dim,
        head_dim_v=dim_v,
    )
    case = KvCase(**fields, seed=seed)
    # While rows are appended, more queries than the cache has rows are refused.
    is_small = case.seqlen_new is not None and case.seqlen_q > case.capacity
    return dataclasses.replace(case, spare=case.seqlen_q) if is_small else case


def merged(row: dict) -> dict:
    """Axes whose values are dicts of fields are dissolved."""
    fields = {}
    for axis, value in row.items():
        fields.update(value if isinstance(value, dict) else {axis: value})
    return fields


def table() -> list[KvCase]:
    """All pairs of values of these axes."""
    axes = {
        "cache_seqlens": LENGTHS,
        "seqlen_q": SEQLENS_Q,
        "seqlen_new": SEQLENS_NEW,
        "dtype": list(DTYPES),
        "heads": HEADS,
        "dims": DIMS,
        "rotary": ROTARY,
        "mask": MASKS,
        "score": SCORES,
        "alibi": ["", "", "heads", "batch"],
        "place": PLACES,
        "layout": LAYOUTS,
        "padded": [False, False, True],
        "given_as": ["tensor", "tensor", "tensor", "int", "None"],
        "spare": [0, 1, 3, 70],
        "num_splits": [0, 0, 1, 2, 7],
    }
    return [consistent(seed, **merged(row)) for seed, row in enumerate(pairwise(axes))]


def upstream_table() -> list[KvCase]:
    """The grid of the tests of flash_attn 2.8.3, all pairs of it, with shorter sequences where those are huge."""
    axes = {
        "lengths": [
            (1, 128), (1, 339), (3, 1024), (64, 800), (64, 256), (3, 799), (64, 2048), (16, 2000), (1, 4097),
            (16, 3001), (128, 128),
        ],
        "dtype": ["float16", "bfloat16", "float32"],
        "dims": [(32, 32), (59, 59), (64, 64), (80, 80), (128, 128), (256, 256)],
        "heads": [(6, 6), (6, 1), (6, 3)],
        "num_splits": [1, 0],
        "new": ["", "as queries", "random"],
        "alibi": ["", "batch"],
        "mask": [{}, {"causal": True}, {"window_size": "random"}, {"causal": True, "window_size": "random"}],
        "rotary": [{}, {"rotary_dim": 0.5}, {"rotary_dim": 1.0}],
        "interleaved": [False, True],
        "place": [{}, {"page_size": 256}, {"shuffled": True}],
        "padded": [False, True],
    }  # fmt: skip
    cases = []
    for seed, row in enumerate(pairwise(axes)):
        rng, fields = random.Random(seed), merged(row)
        seqlen_q, seqlen_k = fields.pop("lengths")
        new = {"": None, "as queries": seqlen_q, "random": rng.randint(1, seqlen_q)}[fields.pop("new")]
        if "window_size" in fields:
            fields["window_size"] = (rng.randint(0, seqlen_k), rng.randint(0, seqlen_k))
        lengths = tuple(rng.randint(0, seqlen_k - (new or 0)) for _ in range(2))
        shape = {"cache_seqlens": lengths, "seqlen_q": seqlen_q, "seqlen_new": new, "given_as": "tensor", "layout": ""}
        cases.append(consistent(seed, **shape, **fields))
    return cases


LATENTS = [(1, 1, "bfloat16", 16, 64), (1, None, "float32", 5, 0), (2, 2, "float16", 70, 0), (4, 3, "float64", 3, 16)]
MANY = (300, 0, 31, 1, 64, 128, 2, 65)
SELECTED = [
    # Multi-head latent attention: one head of K, whose leading columns are V; Hopper's kernels have no head_dim of 576.
    *(
        KvCase(
            (130, 64, 0, -1), q, new, dtype=dtype, num_heads=heads, num_heads_k=1, head_dim=576, head_dim_v=512,
            softmax_scale=192**-0.5, layout=LATENT, causal=True, page_size=page_size, num_splits=page_size // 16,
        )
        for q, new, dtype, heads, page_size in LATENTS
    ),
    KvCase((70, 3), 1, 2, num_heads_k=1, layout=LATENT, head_dim_v=48, seed=1),
    KvCase((9, 3), 2, 2, num_heads=3, num_heads_k=3, layout=LATENT, head_dim_v=64, page_size=4),
    # The last row of the capacity is written, and everything is full before the call.
    KvCase((60, 40), 3, 4, spare=0, causal=True),
    KvCase((60, 40), 3, 4, spare=0, page_size=16, causal=True),
    KvCase((64, 64), 3, spare=0, given_as="None", causal=True),
    KvCase((64, 64), 3, spare=0, given_as="None", page_size=16),
    KvCase((64, 64), 3, 0, spare=0, page_size=16),
    # Appended rows that no query sees: Snew > Sq + left.
    KvCase((100, 7), 2, 90, window_size=(3, 0), causal=True, rotary_dim=64),
    KvCase((100, 7), 2, 90, window_size=(3, 0), page_size=4, rotary_dim=64),
    # Several splits, and queries that see no key in any of them; keys that are fewer than the splits.
    KvCase((40, 33, 64), 60, causal=True, num_splits=4, spare=30),
    KvCase((70, 100), 9, 1, window_size=(-1, -40), num_splits=3, dtype="bfloat16", num_heads=4),
    KvCase((5, 1, 0), 2, 1, num_splits=128),
    # More rows in a group than a panel has, in several chunks; as many as one tile still has, and one more.
    *(KvCase((1190, 301), 33, num_heads=n, num_heads_k=1, head_dim=24, dtype=t) for n in (2, 3) for t in DTYPES),
    *(KvCase((700, 530), q, 1, num_heads=1, num_heads_k=1, causal=True) for q in (15, 16, 17, 65, 127, 128, 129)),
    # More queries than the cache has rows.
    KvCase((5, 2), 130, spare=0),
    KvCase((5, 2), 130, spare=0, causal=True, alibi="batch", page_size=1),
    # Empty batch; no queries, rows are appended all the same; nothing to append; an empty cache.
    KvCase((), 3, 2),
    KvCase((), 3, 2, page_size=4),
    KvCase((5, 0), 0, 3, rotary_dim=64),
    KvCase((5, 0), 3, 0, rotary_dim=64, causal=True),
    KvCase((0, 0), 3, spare=0),
    KvCase((0, 0), 3, spare=0, page_size=4),
    KvCase((0, 0), 3, spare=0, shuffled=True),
    KvCase((0, 0), 1, spare=0, shuffled=True, num_splits=1, dtype="bfloat16"),
    # Padding to the left: as long as the sequence, longer than it, within the appended rows.
    KvCase((9, 9, 9), 2, leftpad=(9, 20, 0), causal=True, spare=20),
    KvCase((9, 9, 9), 2, 2, leftpad=(2**31 - 1, 2**30, 8), page_size=4, alibi="heads"),
    KvCase((9, 9, 9), 2, 3, leftpad=(9, 11, 12), causal=True, rotary_dim=64),
    KvCase((9, 9, 9), 2, 3, leftpad=(9, 11, 40), page_size=4, rotary_dim=64),
    # Every number of heads per group in one query, and all at once.
    *(KvCase(MANY, 1, 1, num_heads=h, num_heads_k=1, dtype="bfloat16", causal=True) for h in (1, 3, 8, 32, 33)),
    *(KvCase(MANY, 5, 5, num_heads=h, num_heads_k=2, dtype="float16", causal=True) for h in (2, 6, 16)),
    # All sequences are skipped, as an int too.
    KvCase((-1, -5, -(2**31)), 2, 3),
    KvCase((-1, -1), 2, 3, given_as="int", page_size=4),
    # rotary_dim of 2, and one that is no multiple of 16.
    KvCase((5, 9), 2, 3, rotary_dim=2, head_dim=13, head_dim_v=13, causal=True),
    KvCase((5, 9), 2, 3, rotary_dim=6, head_dim=13, head_dim_v=9, interleaved=False, window_size=(-1, 5)),
    KvCase((5, 9), 2, 3, rotary_dim=40, interleaved=False, attention_chunk=4),
]  # fmt: skip


def sink_cases() -> list[KvCase]:
    """Sinks with all that a cache may have: they are merged once, into what chunks of keys have in common."""
    few = [
        KvCase((1300, 0, 64, -1), q, 1, num_heads=4, s_aux="all", num_splits=splits, causal=True, dtype=dtype)
        for q, splits, dtype in [(1, 0, "bfloat16"), (4, 7, "float32"), (17, 128, "float16"), (70, 1, "float64")]
    ]
    chosen = [*SELECTED[::3], *table()[::5]]
    return [*few, *(dataclasses.replace(case, s_aux=("all", "some")[i % 2]) for i, case in enumerate(chosen))]


def main() -> None:
    """Run tables of cases in a process of its own; prints the number of passed cases.

    kvcache_cases.py whole: all of them; kvcache_cases.py 60 7: 60 of them, chosen by the seed 7.
    """
    torch.set_num_threads(1)
    cases = [*SELECTED, *table(), *upstream_table(), *sink_cases()]
    if sys.argv[1:] != ["whole"]:
        size, seed = map(int, sys.argv[1:])
        cases = random.Random(seed).sample(cases, size)
    for case in cases:
        check_kvcache(case)
    sys.stdout.write(f"passed {len(cases)} on {flash_attn.build_info()['cpu_instruction_set']}\n")


if __name__ == "__main__":
    main()
