"""The cases that kernels run on the simulator, one line of key=value each, from the tables in tests/support/cases.py.

    export PYTHONPATH=tests/support:tests/kernels
    python3 -m list_cases                 every case
    python3 -m list_cases --table race    a shorter table, for ThreadSanitizer
    python3 -m list_cases --sample 50     some of them, and every kernel among them; --summary counts them

Keys are the fields of a Case, left out at their defaults, and those of Sim: which check is made of the case, how its
tensors are laid out, and how much shared memory the device has.
"""

import argparse
import dataclasses
import itertools
from collections.abc import Sequence

import caches
import shards
import variants
from build_tools import cuda_objects
from cases import (
    BATCHES,
    LENGTHS,
    MASKS,
    SCORES,
    Case,
    batch_lengths,
    edge_cases,
    paged_cases,
    pairwise,
    shard_cases,
    used_key_cases,
)
from cases import HEAD_DIMS as COMMON_DIMS
from sampling import sample
from sim_case import LARGE_SMEM, SMALL_SMEM, Row, Sim, line_of

DTYPES = ["bfloat16", "float16"]
MAX_HEAD_DIM = cuda_objects.all_head_dims()[-1]


def round_up(head_dim: int) -> int:
    """To what the kernels for Hopper take: multiples of 8."""
    return -(-head_dim // 8) * 8


# With those of kernels that no case of the common table reaches.
HEAD_DIMS = [*COMMON_DIMS, *((d, d) for d in cuda_objects.all_head_dims() if d not in map(max, COMMON_DIMS))]
AXES: dict[str, list] = {
    "dtype": DTYPES,
    "heads": [(1, 1), (2, 2), (4, 2), (3, 1)],
    "dims": HEAD_DIMS,
    "lengths": [*LENGTHS, (31, 31), (32, 32), (33, 33), (512, 512)],
    "mask": MASKS,
    "score": SCORES,
    "alibi": ["", "heads", "batch"],
    "dropout_p": [0.0, 0.17],
    "batch": BATCHES,
    "keys": ["", "used", "left", "both"],
    "lse_grad": [False, True],
    "layout": ["rows", "heads", "gaps"],
    "smem": [LARGE_SMEM, SMALL_SMEM],
    "deterministic": [False, True],
}
HOPPER_AXES: dict[str, list] = {
    **{name: values for name, values in AXES.items() if name not in ("dims", "smem", "layout")},
    "dims": list(dict.fromkeys((round_up(d), round_up(d_v)) for d, d_v in HEAD_DIMS)),  # others are not taken
    "layout": ["rows", "heads", "chunks"],
    "compute_capability": [90],
}
PAGED_AXES: dict[str, list] = {
    **{
        name: AXES[name] for name in ("dtype", "heads", "mask", "score", "alibi", "dropout_p", "keys", "layout", "smem")
    },
    "dims": [(13, 40), (64, 64), (128, 128), (192, 128), (256, 256)],
    "lengths": [(1, 300), (5, 64), (70, 129), (129, 17), (33, 0), (300, 300)],
    "page_size": [1, 3, 16, 37, 64, 256],
    "uneven": [False, True],
}


def used_keys(kind: str, seqlens_k: tuple[int, ...]) -> dict:
    """seqused_k, leftpad_k or both, different for each sequence."""
    used = tuple(n * (b + 2) // (b + 3) for b, n in enumerate(seqlens_k))
    left = tuple(min(n // 3 + b, 70) for b, n in enumerate(seqlens_k))
    values = {"seqused_k": used, "leftpad_k": left}
    names = {"": [], "used": ["seqused_k"], "left": ["leftpad_k"], "both": ["seqused_k", "leftpad_k"]}[kind]
    return {name: values[name] for name in names}


def case_of(row: dict, seed: int, lengths: dict, **rest) -> Case:
    """The Case of one row of a table of axes."""
    named = {key: row[key] for key in ("dtype", "alibi", "dropout_p", "lse_grad", "page_size") if key in row}
    dims = {"head_dim": row["dims"][0], "head_dim_v": row["dims"][1]}
    heads = {"num_heads": row["heads"][0], "num_heads_k": row["heads"][1]}
    keys = used_keys(row.get("keys", ""), lengths["seqlens_k"])
    return Case(**lengths, **keys, **dims, **heads, **row["mask"], **row["score"], **named, **rest, seed=seed)


def sim_of(row: dict) -> Sim:
    names = [field.name for field in dataclasses.fields(Sim)]
    return Sim(**{name: row[name] for name in names if name in row})


def main_table(axes: dict[str, list] = AXES) -> list[Row]:
    """Forward, backward and weights: every pair of values of any two axes."""
    rows = []
    for seed, row in enumerate(pairwise(axes)):
        batch = dict(row["batch"])
        lengths = batch_lengths(row["lengths"], batch.pop("batch"), batch.pop("uneven", False))
        rows.append((case_of(row, seed, lengths, **batch), sim_of(row)))
    return rows


def paged_table() -> list[Row]:
    """Keys and values in pages: forward and weights only."""
    rows = []
    for seed, row in enumerate(pairwise(PAGED_AXES)):
        lengths = batch_lengths(row["lengths"], 2, row["uneven"])
        rows.append((case_of(row, seed, lengths, packed=True), sim_of(row)))
    return rows


def shared_cases() -> list[Row]:
    """What the tables of the other backends have and the axes above have not, in the types that kernels take."""
    cases = [
        *(dataclasses.replace(c, dtype=DTYPES[i // 2 % 2]) for i, c in enumerate(edge_cases())),
        *(c for c in (*used_key_cases(), *paged_cases(), *shard_cases()) if c.dtype in DTYPES),
    ]
    fitting = [c for c in cases if max(c.head_dim, c.head_dim_v) <= MAX_HEAD_DIM]
    return [(c, Sim(deterministic=i % 2 == 0)) for i, c in enumerate(dict.fromkeys(fitting))]


UNEVEN = Case((70, 0, 131, 64), (33, 9, 200, 64), "bfloat16", 4, 2, packed=True)
SMALL = Case((150,), (150,), "bfloat16", 1, 1, 6, 5, lse_grad=True)
FEW_MASKS: list[dict] = [{}, {"causal": True}, {"window_size": (20, 3)}, {"attention_chunk": 50}]


def batch_checks() -> list[Row]:
    cases = [
        dataclasses.replace(UNEVEN, dtype=dtype, **mask, **score, alibi="batch" if score else "")
        for dtype, mask, score in itertools.product(DTYPES, FEW_MASKS, SCORES[:3:2])
    ]
    # The one of 256 columns, and long ones among those that have tiles of another shape when they are alone.
    cases += [
        dataclasses.replace(UNEVEN, head_dim=dim, head_dim_v=dim, seqlens_q=lengths, seqlens_k=lengths, causal=True)
        for dim, lengths in ((256, (300, 20, 400)), (64, (300, 20, 1000)))
    ]
    return [(case, Sim("batch")) for case in cases]


def invalid_length_checks() -> list[Row]:
    rows = []
    for dtype, dim, page_size in itertools.product(DTYPES, [64, 128, 256], [0, 16]):
        dims = {"head_dim": dim, "head_dim_v": dim, "causal": dim == 128, "num_heads": 2, "num_heads_k": 1}
        keys = {"seqused_k": (20, 9, 150, 64), "leftpad_k": (1, 0, 70, 0)}
        case = dataclasses.replace(UNEVEN, dtype=dtype, page_size=page_size, **dims, **keys)
        # Sequences that share tiles of dQ share their semaphores too.
        rows += [(case, Sim("invalid_lengths", deterministic=d)) for d in (False, not page_size)]
    rows += [(dataclasses.replace(caches.CACHE, page_size=n), Sim("invalid_lengths", seqlen_new=2)) for n in (0, 16)]
    return list(dict.fromkeys(rows))


def special_numbers() -> list[Row]:
    rows = []
    for dtype, mask in itertools.product(DTYPES, [*FEW_MASKS, {"window_size": (0, 0)}]):
        rows.append((dataclasses.replace(SMALL, dtype=dtype, **mask), Sim("nonfinite")))
    for dtype in DTYPES:
        rows.append((covered_nonfinite(dtype), Sim("nonfinite")))
        long = dataclasses.replace(SMALL, dtype=dtype, seqlens_q=(70, 70), seqlens_k=(200, 200))
        rows.append((long, Sim("marked")))
        rows.append((dataclasses.replace(long, causal=True, seqlens_k=(40, 40)), Sim("marked")))
    large = Case((129,), (200,), "float16")
    return [*rows, *((dataclasses.replace(large, causal=causal), Sim("large")) for causal in (False, True))]


def covered_nonfinite(dtype: str) -> Case:
    """Many keys that no query is denied, tiles of them."""
    return dataclasses.replace(SMALL, dtype=dtype, seqlens_k=(400,), causal=True)


def wide_nonfinite(head_dim: int) -> Case:
    """Keys that are cleared and restored for one tile of queries after another."""
    return dataclasses.replace(SMALL, head_dim=head_dim, head_dim_v=head_dim, window_size=(20, 3))


def hidden_nonfinite(dim: int, dtype: str = "bfloat16") -> list[Row]:
    """NaN and infinity in V that some rows of some tiles see."""
    case = Case((300, 0, 150, 400), (300, 9, 200, 130), dtype, 4, 2, dim, dim, packed=True)
    masks = [{"causal": True}, {"window_size": (40, 30), "softcap": 2.0, "alibi": "batch"}, {"attention_chunk": 70}]
    # A tile of keys that all see, and before it one that some see.
    masks.append({"seqlens_q": (128,), "seqlens_k": (400,), "window_size": (150, -1)})
    return [(dataclasses.replace(case, **mask), Sim("hidden")) for mask in masks]


def threshold_case() -> Case:
    """Eight random numbers equal the threshold of dropout, 8900 of 65536, so that they are kept but hardly."""
    return Case((128,), (256,), "bfloat16", dropout_p=8900 / 65536)


def far_offsets() -> list[Row]:
    """Dense, packed and in pages."""
    rows = []
    for dtype in DTYPES:
        case = Case((20, 30), (40, 17), dtype, 2, 1, packed=True, causal=True)
        rows.append(
            (dataclasses.replace(case, packed=False, seqlens_q=(30, 30), seqlens_k=(40, 40)), Sim(layout="far"))
        )
        rows.append((case, Sim(layout="far")))
        rows.append((dataclasses.replace(case, page_size=16), Sim(layout="far")))
    return rows


def long_rows() -> list[Row]:
    """Many tiles after the one with the maximum: what each of them adds to the error of softmax_lse adds up."""
    return [(Case((64,), (3000,), "bfloat16", 1, 1, dim, dim), Sim()) for dim in (64, 128)]


def other_checks() -> list[Row]:
    """What a comparison with the reference does not show; each check is explained in runner/check.h. And caches."""
    rows = [*batch_checks(), *invalid_length_checks(), *special_numbers(), *far_offsets(), *long_rows()]
    rows += caches.table()
    hidden = [row for dtype in DTYPES for dim in cuda_objects.all_head_dims() for row in hidden_nonfinite(dim, dtype)]
    return [*rows, *hidden, (threshold_case(), Sim())]


def other_tables() -> list[Row]:
    return [*shared_cases(), *other_checks(), *shards.table(), *variants.table()]


def race_table(dims: Sequence[tuple[int, int]] = ((13, 40), (64, 64), *HEAD_DIMS[-5:])) -> list[Row]:
    """Fewer and smaller cases that still reach every path of every kernel.

    Of one element type: the other one differs in conversions and in one operand of mma.sync.
    """
    axes = {
        **AXES,
        "dtype": DTYPES[:1],
        "heads": [(2, 2), (2, 1)],
        "dims": list(dims),
        "lengths": [(129, 129), (17, 200), (200, 64), (64, 1)],
        "mask": [*MASKS[:4:3], *MASKS[1:2], MASKS[-1], {"attention_chunk": 50}],
        "score": SCORES[::2],
        "batch": BATCHES[::3],
        "keys": ["", "both"],
        "layout": ["rows", "gaps"],
    }
    nonfinite = [row for row in special_numbers() if row[1].check == "nonfinite"]
    others = [row for row in (*paged_table()[::4], *nonfinite[1:3]) if row[0].dtype == DTYPES[0]]
    others += [*(row for dim in (64, 256) for row in hidden_nonfinite(dim)), *caches.table()[1:3]]
    long = [
        (Case((400,), (700,), "bfloat16", head_dim=dim, head_dim_v=dim, window_size=(300, -1)), Sim())
        for dim in (64, 128)
    ]
    rows = [*main_table(axes), *others, *shards.few(), *variants.few()]
    return [*rows, *on_hopper([*rows, *long, (wide_nonfinite(256), Sim("nonfinite"))])]


def sanitizer_table() -> list[Row]:
    """The same for sanitizers, with invalid lengths and tables, in fewer head_dims."""
    dims = [(13, 40), (64, 64), (96, 96), (256, 256)]
    kept = {*dims, (6, 5), (200, 256)}
    rows = [*race_table(dims), *invalid_length_checks()]
    return [row for row in rows if row[0].dtype == DTYPES[0] and (row[0].head_dim, row[0].head_dim_v) in kept]


def on_hopper(rows: list[Row]) -> list[Row]:
    """The same for the kernels for compute capability 9.0, where they take the case, in a layout that they take."""
    changed = []
    for case, sim in rows:
        if case.page_size or (sim.layout == "far" and not case.packed):
            continue
        # TMA stores no results in fp32.
        layout = "chunks" if sim.layout == "gaps" and not case.float_results else sim.layout
        fitting = dataclasses.replace(case, head_dim=round_up(case.head_dim), head_dim_v=round_up(case.head_dim_v))
        changed.append((fitting, dataclasses.replace(sim, compute_capability=90, smem=LARGE_SMEM, layout=layout)))
    return list(dict.fromkeys(changed))


def hopper_table() -> list[Row]:
    return on_hopper([*main_table(HOPPER_AXES), *other_tables()])


def mutant_table() -> list[Row]:
    """Few cases that detect many mutants, the cheapest first, for each of their head_dims. One element type."""
    tiles = Case((128, 1, 150), (128, 300, 200), "bfloat16", 2, 1, packed=True)
    modified = {"softcap": 2.0, "alibi": "batch", "dropout_p": 0.17, "lse_grad": True}
    odd = {"head_dim": 13, "head_dim_v": 40}
    # With seed 93 slopes of ALiBi are near -1: of the zeros in rows past a sequence they would make infinity.
    used = {"seqused_k": (64, 33, 199), "leftpad_k": (3, 0, 65)}
    rows = [
        (dataclasses.replace(tiles, num_heads_k=2, seqlens_q=(64, 1, 70), seqlens_k=(64, 64, 200)), Sim()),
        (dataclasses.replace(tiles, seqlens_q=(64, 64), seqlens_k=(64, 64)), Sim()),  # dQ tiles: one more than needed
        (dataclasses.replace(tiles, causal=True, **odd, **modified), Sim(layout="gaps", deterministic=True)),
        (dataclasses.replace(tiles, window_size=(40, 30), unused_rows=3), Sim(deterministic=True)),
        *((dataclasses.replace(tiles, attention_chunk=n, causal=n < 64), Sim(deterministic=n < 64)) for n in (60, 64)),
        (dataclasses.replace(tiles, **used, **modified, seed=93), Sim(smem=SMALL_SMEM)),
        (Case((256, 256), (128, 128), "bfloat16", 1, 1, causal=True, lse_grad=True), Sim(deterministic=True)),
        (Case((64,), (500,), "bfloat16"), Sim(deterministic=True)),
        # Rows that are multiples of 16 bytes apart, and begin at none.
        (Case((70,), (40,), "bfloat16", 7, 7), Sim(layout="gaps")),
        # The last head begins at a multiple of 16 bytes, and its second row does not.
        (Case((20,), (16,), "bfloat16", 8, 8), Sim(layout="gaps")),
        (threshold_case(), Sim()),
        # Scores near zero, which a softcap must leave as exact as they are.
        (Case((32,), (32,), "bfloat16", 1, 1, 1, 1, window_size=(0, 0), softcap=20.0, softmax_scale=0.9), Sim()),
        (Case((64,), (190,), "bfloat16", window_size=(188, 0)), Sim()),
        (dataclasses.replace(tiles, page_size=16, causal=True, **modified), Sim()),
        (dataclasses.replace(tiles, head_dim=40, head_dim_v=24, page_size=37), Sim(layout="heads")),
        (dataclasses.replace(SMALL, window_size=(20, 3)), Sim("nonfinite")),
        (covered_nonfinite("bfloat16"), Sim("nonfinite")),
        (dataclasses.replace(SMALL, seqlens_q=(70, 70), seqlens_k=(200, 200)), Sim("marked")),
        (dataclasses.replace(SMALL, seqlens_q=(70, 70), seqlens_k=(40, 40), causal=True), Sim("marked")),
        (Case((20, 0, 31), (33, 9, 40), "bfloat16", 2, 1, packed=True, page_size=16), Sim("invalid_lengths")),
        *(row for part in (shards, variants) for row in part.few()),
    ]
    for dim, smem in ((96, LARGE_SMEM), (192, LARGE_SMEM), (256, SMALL_SMEM), (256, LARGE_SMEM)):
        dims = {"head_dim": dim, "head_dim_v": dim, "seqlens_q": (64, 1, 70), "seqlens_k": (64, 64, 100)}
        case = dataclasses.replace(tiles, causal=True, **dims, **modified)
        rows.append((case, Sim(smem=smem, deterministic=True, layout="gaps")))
        rows.append((wide_nonfinite(dim), Sim("nonfinite", smem=smem)))
    # Many tiles of keys, the first of them seen by all; tiles of queries without any key; several tiles per block.
    hopper = [
        # Three of the numbers that are drawn for keys as rows equal the threshold.
        (Case((512,), (16,), "bfloat16", dropout_p=17503 / 65536), Sim()),
        (Case((400,), (700,), "bfloat16", 1, 1, window_size=(300, -1)), Sim(deterministic=True)),
        (Case((500,), (130,), "bfloat16", 4, 1, causal=True), Sim()),
        (Case((400, 400), (300, 300), "bfloat16", 1, 1), Sim(deterministic=True)),
        (Case((300,), (300,), "bfloat16", 2, 2, 256, 256), Sim(deterministic=True)),
        # Rows that end where their tensor ends, and before the tile does.
        *((wide_nonfinite(dim), Sim("nonfinite")) for dim in (8, 136)),
        *(row for dim in (64, 256) for row in hidden_nonfinite(dim)),
        # Sections of two heads in the forward pass, of which the last has one.
        (Case((200,), (90,), "bfloat16", 3, 3, causal=True), Sim()),
    ]
    return [*rows, *on_hopper([*rows, *hopper])]


TABLES = {
    "main": main_table,
    "paged": paged_table,
    "shared": shared_cases,
    "other": other_checks,
    "race": race_table,
    "sanitize": sanitizer_table,
    "mutants": mutant_table,
    "shards": lambda: [*shards.table(), *on_hopper(shards.table())],
    "variants": lambda: [*variants.table(), *on_hopper(variants.table())],
    "hopper": hopper_table,
    "all": lambda: [*main_table(), *paged_table(), *other_tables(), *hopper_table()],
}


def coverage(axes: dict[str, list]) -> str:
    """Counted in the rows, beside how many there are."""
    places = [{name: axes[name].index(value) for name, value in row.items()} for row in pairwise(axes)]
    values = {item for row in places for item in row.items()}
    pairs = {pair for row in places for pair in itertools.combinations(sorted(row.items()), 2)}
    sizes = [len(axis) for axis in axes.values()]
    all_pairs = sum(a * b for a, b in itertools.combinations(sizes, 2))
    return f"{len(axes)} axes, {len(values)} of {sum(sizes)} values, {len(pairs)} of {all_pairs} pairs of values"


def summary() -> str:
    covered = {
        "main": AXES,
        "paged": PAGED_AXES,
        "hopper": HOPPER_AXES,
        "shards": shards.AXES,
        "variants": variants.AXES,
    }
    lines = [f"{name}: {len(table())} cases" for name, table in TABLES.items()]
    return "\n".join([*lines, *(f"{name}: {coverage(axes)}" for name, axes in covered.items())])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", choices=TABLES, default="all")
    parser.add_argument("--summary", action="store_true", help="how many cases, values and pairs")
    parser.add_argument("--sample", type=int, help="how many cases")
    parser.add_argument("--seed", type=int, default=0, help="which cases")
    parser.add_argument("--shard", default="0/1", help="I/N: every Nth case, from the Ith on, counted from 0")
    arguments = parser.parse_args()
    rows = TABLES[arguments.table]()
    if arguments.sample:
        rows = sample(rows, arguments.sample, arguments.seed)
    first, step = map(int, arguments.shard.split("/"))
    lines = [summary()] if arguments.summary else map(line_of, rows[first::step])
    print(*lines, sep="\n")


if __name__ == "__main__":
    main()
