"""Test cases: a frozen description of each attention problem, and tables of them.

A Case does not depend on torch, so other backends can use the same tables. `inputs.py` makes the tensors of a Case.
"""

import dataclasses
import itertools
import random
from dataclasses import dataclass

DTYPES = ("float32", "float64", "bfloat16", "float16")


@dataclass(frozen=True)
class Case:
    """One attention problem: a dense batch of sequences of equal length or, if packed, concatenated sequences."""

    seqlens_q: tuple[int, ...]
    seqlens_k: tuple[int, ...]
    dtype: str = "float32"
    num_heads: int = 2
    num_heads_k: int = 2
    head_dim: int = 64
    head_dim_v: int = 64
    packed: bool = False
    causal: bool = False
    window_size: tuple[int, int] = (-1, -1)
    attention_chunk: int = 0
    softcap: float = 0.0
    softmax_scale: float | None = None
    alibi: str = ""  # "heads": (num_heads,), "batch": (batch_size, num_heads)
    dropout_p: float = 0.0
    s_aux: str = ""  # sinks: "all" heads have one, or "some", all but the first
    key_ranges: str = ""  # one of key_ranges.PATTERNS
    max_logits: bool = False
    seqused_k: tuple[int, ...] | None = None
    leftpad_k: tuple[int, ...] | None = None
    page_size: int = 0  # 0: keys and values are not paged
    unused_rows: int = 0  # rows of the packed tensors after the last sequence
    q_starts: tuple[int, ...] | None = None  # of shards: positions of the first query and key of each sequence
    k_starts: tuple[int, ...] | None = None
    head_start: int = 0  # the heads are head_start, ... of total_heads heads
    total_heads: int = 0  # 0: there are no others
    float_results: bool = False  # out, dq, dk and dv are not rounded to dtype
    lse_grad: bool = False  # whether softmax_lse gets a gradient
    seqlen_k_if_empty: int = 0  # seqlen_k of a dense batch of size 0
    seqlen_q_if_empty: int = 0
    seed: int = 0

    @property
    def batch_size(self) -> int:
        return len(self.seqlens_q)

    @property
    def seqlen_q(self) -> int:
        """Length of the longest query sequence."""
        return max(self.seqlens_q, default=self.seqlen_q_if_empty)

    @property
    def seqlen_k(self) -> int:
        """Length of the longest key sequence."""
        return max(self.seqlens_k, default=self.seqlen_k_if_empty)

    @property
    def window(self) -> tuple[int, int]:
        """The effective window: causal sets right to 0."""
        return (self.window_size[0], 0) if self.causal else self.window_size

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5 if self.softmax_scale is None else self.softmax_scale

    @property
    def only_in_op(self) -> bool:
        """Whether only the op, not the public functions, has arguments for this case."""
        only_shards = self.head_start > 0 or self.total_heads > 0
        return self.seqused_k is not None or self.leftpad_k is not None or only_shards

    def places(self, index: int) -> tuple[int, int] | None:
        """Positions of the first query and key of a sequence; None: it is not part of a longer one."""
        if self.q_starts is None and self.k_starts is None:
            return None
        return (self.q_starts[index] if self.q_starts else 0, self.k_starts[index] if self.k_starts else 0)

    @property
    def name(self) -> str:
        """All fields with non-default values."""
        parts = [self.dtype, f"q{_lengths(self.seqlens_q)}", f"k{_lengths(self.seqlens_k)}"]
        parts += [f"h{self.num_heads}/{self.num_heads_k}", f"d{self.head_dim}/{self.head_dim_v}"]
        shown = {"seqlens_q", "seqlens_k", "dtype", "num_heads", "num_heads_k", "head_dim", "head_dim_v", "seed"}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name not in shown and value != field.default:
                parts.append(field.name if value is True else f"{field.name}={value}".replace(" ", ""))
        return "-".join(parts)


def _lengths(seqlens: tuple[int, ...]) -> str:
    if len(seqlens) > 1 and len(set(seqlens)) == 1:
        return f"{len(seqlens)}x{seqlens[0]}"
    return ",".join(map(str, seqlens))


def pairwise(axes: dict[str, list], seed: int = 0) -> list[dict]:
    """Pairwise testing: rows in which every pair of values of any two axes occurs at least once."""
    rng = random.Random(seed)
    names = list(axes)
    left = {
        (a, i, b, j)
        for a, b in itertools.combinations(range(len(names)), 2)
        for i in range(len(axes[names[a]]))
        for j in range(len(axes[names[b]]))
    }
    queue = sorted(left)
    rng.shuffle(queue)
    rows = []
    for a, i, b, j in queue:
        if (a, i, b, j) not in left:
            continue
        row = {a: i, b: j}
        for axis in rng.sample(range(len(names)), len(names)):
            if axis not in row:
                choices = rng.sample(range(len(axes[names[axis]])), len(axes[names[axis]]))
                row[axis] = max(choices, key=lambda value: sum(_pair(axis, value, *o) in left for o in row.items()))
        left -= {_pair(*one, *two) for one, two in itertools.combinations(row.items(), 2)}
        rows.append({names[axis]: axes[names[axis]][value] for axis, value in sorted(row.items())})
    return rows


def sampled(cases: list, size: int, config) -> list:
    """At most `size` of the cases, chosen by the seed of the run of pytest; all of them with --whole."""
    whole = config.getoption("--whole") or size >= len(cases)
    return cases if whole else random.Random(config.seed).sample(cases, size)


def _pair(a: int, i: int, b: int, j: int) -> tuple[int, int, int, int]:
    return (a, i, b, j) if a < b else (b, j, a, i)


EDGES = [1, 15, 16, 17, 63, 64, 65, 127, 128, 129, 255, 300]
LENGTHS = [(n, n) for n in EDGES] + [
    (1, 300), (300, 1), (17, 129), (129, 17), (64, 255), (255, 64), (128, 127), (63, 65), (15, 300), (0, 5), (5, 0),
]  # fmt: skip
HEAD_DIMS = [
    (1, 1), (8, 8), (13, 13), (13, 40), (40, 24), (64, 64), (64, 128), (96, 96), (128, 128), (128, 64), (192, 128),
    (256, 256),
]  # fmt: skip
MASKS = [
    {},
    {"causal": True},
    {"window_size": (0, 0)},
    {"window_size": (5, 3)},
    {"window_size": (-1, 7)},
    {"window_size": (30, -1)},
    {"window_size": (100, 0)},
    {"causal": True, "window_size": (16, 50)},
]
SCORES = [{}, {"softmax_scale": 0.3}, {"softcap": 1.5}, {"softcap": 20.0, "softmax_scale": 0.9}]
BATCHES = [
    {"batch": 1},
    {"batch": 2},
    {"batch": 2, "packed": True},
    {"batch": 3, "packed": True, "uneven": True},
    {"batch": 2, "packed": True, "uneven": True, "unused_rows": 3},
]


def batch_lengths(lengths: tuple[int, int], batch: int = 1, uneven: bool = False) -> dict:
    """Lengths of a batch; uneven: a shorter sequence first and an empty one in the middle."""
    pairs = [lengths] * batch
    if uneven:
        pairs[0] = (lengths[0] // 3, lengths[1] // 2)
    if uneven and batch > 2:
        pairs[1] = (0, lengths[1] // 4)
    return {"seqlens_q": tuple(q for q, _ in pairs), "seqlens_k": tuple(k for _, k in pairs)}


def table() -> list[Case]:
    """All pairs of feature values (pairwise), for the public functions, forward and backward."""
    axes = {
        "dtype": list(DTYPES),
        "heads": [(1, 1), (2, 2), (4, 2), (3, 1)],
        "dims": HEAD_DIMS,
        "lengths": LENGTHS,
        "mask": MASKS,
        "score": SCORES,
        "alibi": ["", "heads", "batch"],
        "dropout_p": [0.0, 0.0, 0.17],
        "batch": BATCHES,
        "lse_grad": [False, True],
    }
    cases = []
    for seed, row in enumerate(pairwise(axes)):
        batch = dict(row["batch"])
        lengths = batch_lengths(row["lengths"], batch.pop("batch"), batch.pop("uneven", False))
        named = {key: row[key] for key in ("dtype", "alibi", "dropout_p", "lse_grad")}
        dims = {"head_dim": row["dims"][0], "head_dim_v": row["dims"][1]}
        heads = {"num_heads": row["heads"][0], "num_heads_k": row["heads"][1]}
        cases.append(Case(**lengths, **dims, **heads, **row["mask"], **row["score"], **batch, **named, seed=seed))
    return cases


def edge_cases() -> list[Case]:
    """Sizes that the table lacks: empty batches, no rows, empty sequences anywhere, maximal sizes, many heads."""
    empty = [
        Case((), (), seqlen_q_if_empty=5, seqlen_k_if_empty=7),
        Case((0, 0), (7, 7)),
        Case((7, 7), (0, 0), causal=True),
        Case((0,), (0,)),
        Case((), (), packed=True, unused_rows=4),
        Case((), (), packed=True),
        Case((0, 0), (0, 0), packed=True),
        Case((0, 5, 9), (4, 5, 9), packed=True, causal=True),
        Case((5, 0, 9), (5, 4, 9), packed=True, causal=True, num_heads=4),
        Case((5, 9, 0), (5, 9, 4), packed=True),
        Case((4, 5, 9), (0, 5, 9), packed=True),
        Case((5, 4, 9), (5, 0, 9), packed=True, causal=True),
        Case((5, 9, 4), (5, 9, 0), packed=True, unused_rows=2),
        Case((0, 1, 0, 1), (3, 9, 0, 1), packed=True, num_heads=6),
        Case((76, 34, 146), (1, 1, 1), packed=True, causal=True, softmax_scale=1.0),
        Case((0, 0, 200), (0, 1, 333), packed=True, causal=True),
    ]
    lengths = [((33,), (70,)), ((129,), (129,))]
    large = [
        Case(q, k, dtype=dtype, head_dim=dim, head_dim_v=dim_v, causal=causal)
        for (q, k), dtype in itertools.product(lengths, DTYPES)
        for dim, dim_v, causal in [(512, 512, True), (512, 31, False), (7, 512, True)]
    ]
    heads = [
        Case((40,), (50,), num_heads=16, num_heads_k=heads_k, head_dim=16, head_dim_v=16, causal=True)
        for heads_k in (16, 8, 1)
    ]
    few = [
        Case((1, 1), (n, n), dtype=dtype, num_heads=8, num_heads_k=2, head_dim=40, head_dim_v=40, causal=True)
        for n, dtype in itertools.product((1, 2, 257, 1024), DTYPES)
    ]
    with_type = [dataclasses.replace(c, dtype=dtype) for c in empty for dtype in ("float32", "bfloat16")]
    cases = [*with_type, *large, *heads, *few, *chunk_cases()]
    return [dataclasses.replace(c, lse_grad=i % 2 == 1) for i, c in enumerate(cases)]


def chunk_cases() -> list[Case]:
    """Chunks equal to, larger and smaller than tiles, and of one key; queries before all keys; seqlen_q = seqlen_k."""
    masks = [
        {"attention_chunk": 1, "head_dim": 40},
        {"attention_chunk": 37, "causal": True, "num_heads": 4},
        {"attention_chunk": 64, "head_dim": 128, "head_dim_v": 128},
        {"attention_chunk": 128, "causal": True, "alibi": "batch", "softcap": 1.5},
        {"attention_chunk": 100, "window_size": (30, 80), "dropout_p": 0.17},
        {"attention_chunk": 1000, "head_dim": 256, "head_dim_v": 256},
    ]
    lengths = [((150, 1), (150, 1)), ((64, 256), (300, 128)), ((300, 17), (129, 17))]
    cases = []
    for (i, (q, k)), (j, mask) in itertools.product(enumerate(lengths), enumerate(masks)):
        dense = {"seqlens_q": q[:1], "seqlens_k": k[:1]}
        packed = {"seqlens_q": q, "seqlens_k": k, "packed": True}
        cases.append(Case(**(dense if i == 1 else packed), **mask, dtype=DTYPES[(i + j) % 4]))
    return cases


def used_key_cases() -> list[Case]:
    """seqused_k and leftpad_k, dense and packed, combined pairwise with all other features."""
    axes = {
        "dtype": list(DTYPES),
        "packed": [False, True],
        "keys": [
            {"seqused_k": (0, 70, 33)},
            {"seqused_k": (130, 1, 64), "leftpad_k": (3, 0, 64)},
            {"leftpad_k": (0, 129, 17)},
            {"seqused_k": (129, 128, 65), "leftpad_k": (65, 127, 1)},
        ],
        "mask": [{}, {"causal": True}, {"window_size": (20, 9)}],
        "score": SCORES[:3],
        "alibi": ["", "batch"],
        "dropout_p": [0.0, 0.25],
        "heads": [(2, 2), (4, 2)],
        "lse_grad": [False, True],
    }
    cases = []
    for seed, row in enumerate(pairwise(axes)):
        rest = {key: row[key] for key in ("dtype", "packed", "alibi", "dropout_p", "lse_grad")}
        heads = {"num_heads": row["heads"][0], "num_heads_k": row["heads"][1]}
        lengths = ((70, 70, 70), (130, 130, 130)) if not row["packed"] else ((70, 1, 140), (130, 129, 65))
        keys = {name: tuple(map(min, value, lengths[1])) for name, value in row["keys"].items()}
        dims = {"head_dim": 24, "head_dim_v": 40}
        cases.append(Case(*lengths, **keys, **row["mask"], **row["score"], **heads, **dims, **rest, seed=seed))
    return cases


def shard_cases() -> list[Case]:
    """Parts of longer sequences: before, on, across and after the diagonal, near and far; results not rounded."""
    axes = {
        "dtype": list(DTYPES),
        "lengths": [((96, 96), (128, 128)), ((65, 65), (300, 300)), ((1, 1), (129, 129)), ((200, 200), (33, 33))],
        "packed": [False, True],
        "starts": [
            {"q_starts": (0, 0)},
            {"q_starts": (128, 128), "k_starts": (128, 128)},
            {"q_starts": (96, 96), "k_starts": (160, 160)},
            {"q_starts": (512, 512), "k_starts": (64, 64)},
            {"k_starts": (32, 256)},
            {"q_starts": (1 << 29, 64), "k_starts": ((1 << 29) - 64, 0)},
        ],
        "mask": [{}, {"causal": True}, {"window_size": (300, 60)}, {"attention_chunk": 96}, {"window_size": (20, -1)}],
        "score": SCORES[:3],
        "alibi": ["", "batch"],
        "dropout_p": [0.0, 0.0, 0.25],
        "heads": [(2, 2), (4, 2), (12, 1)],
        "elsewhere": [{}, {}, {"head_start": 3, "total_heads": 24}],
        "float_results": [False, True],
        "lse_grad": [False, True],
    }
    cases = []
    for seed, row in enumerate(pairwise(axes)):
        rest = {key: row[key] for key in ("dtype", "packed", "alibi", "dropout_p", "float_results", "lse_grad")}
        heads = {"num_heads": row["heads"][0], "num_heads_k": row["heads"][1]}
        dims = {"head_dim": 40, "head_dim_v": 24}
        where = {**row["starts"], **row["elsewhere"]}
        lengths = row["lengths"]
        cases.append(Case(*lengths, **where, **row["mask"], **row["score"], **heads, **dims, **rest, seed=seed))
    odd = [
        Case((70,), (90,), q_starts=(q,), k_starts=(k,), dtype="bfloat16", float_results=True, **mask)
        for (q, k), mask in itertools.product([(17, 5), (0, 3), (101, 0)], [{"causal": True}, {"attention_chunk": 50}])
    ]
    return [*cases, *odd]


def paged_cases() -> list[Case]:
    """Paged KV, with and without seqused_k and leftpad_k; forward only."""
    axes = {
        "dtype": list(DTYPES),
        "page_size": [1, 3, 16, 37, 256],
        "lengths": [((5, 0, 70), (129, 3, 0)), ((1, 1, 1), (1, 300, 64)), ((65, 33, 2), (65, 200, 1))],
        "keys": [{}, {"seqused_k": (1, 2, 0)}, {"leftpad_k": (1, 2, 0)}],
        "mask": [{}, {"causal": True}, {"window_size": (40, 5)}],
        "alibi": ["", "heads"],
        "dropout_p": [0.0, 0.25],
        "heads": [(2, 2), (4, 1)],
    }
    cases = []
    for seed, row in enumerate(pairwise(axes)):
        rest = {key: row[key] for key in ("dtype", "page_size", "alibi", "dropout_p")}
        heads = {"num_heads": row["heads"][0], "num_heads_k": row["heads"][1]}
        dims = {"head_dim": 32, "head_dim_v": 20}
        cases.append(
            Case(*row["lengths"], **row["keys"], **row["mask"], **heads, **dims, **rest, packed=True, seed=seed)
        )
    return cases


def small_table() -> list[Case]:
    """A few cases per dtype that reach every kernel path, for runs repeated under many settings."""
    axes = {
        "dtype": list(DTYPES),
        "dims": [(64, 64), (13, 40), (128, 128), (256, 96)],
        "lengths": [((129,), (300,)), ((70, 0, 131), (33, 9, 200)), ((1,), (257,)), ((200,), (64,))],
        "mask": [{}, {"causal": True}, {"window_size": (33, 5)}],
        "score": [{}, {"softcap": 3.0, "alibi": "heads"}],
        "dropout_p": [0.0, 0.3],
        "heads": [(2, 2), (4, 2)],
    }
    cases = []
    for seed, row in enumerate(pairwise(axes)):
        dims = {"head_dim": row["dims"][0], "head_dim_v": row["dims"][1]}
        heads = {"num_heads": row["heads"][0], "num_heads_k": row["heads"][1]}
        packed = len(row["lengths"][0]) > 1
        rest = {"dtype": row["dtype"], "dropout_p": row["dropout_p"], "packed": packed, "lse_grad": seed % 2 == 0}
        cases.append(Case(*row["lengths"], **dims, **heads, **row["mask"], **row["score"], **rest, seed=seed))
    return cases


def large_cases() -> list[Case]:
    """More tiles than SMs, and many tiles per row; too slow on the CPU."""
    dims = [(64, 64), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256)]
    full = [
        Case((2048,) * 3, (2048,) * 3, dtype="bfloat16", num_heads=8, num_heads_k=8, head_dim=dim, head_dim_v=dim_v)
        for dim, dim_v in dims
    ]
    masked = [
        Case(
            (2001, 1333), (1999, 2500), dtype="float16", num_heads=8, num_heads_k=2, head_dim=dim, head_dim_v=dim_v,
            packed=True, lse_grad=True, **mask,
        )
        for (dim, dim_v), mask in itertools.product(dims, [{"causal": True}, {"window_size": (300, 100)}])
    ]  # fmt: skip
    return [*full, *masked]
