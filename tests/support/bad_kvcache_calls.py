"""Valid calls of flash_attn_with_kvcache, and for each argument the invalid values that must be rejected."""

import math

import torch

from bad_calls import ints, rows

PREFIX = "flash_attn_with_kvcache: "
BF16, F64 = torch.bfloat16, torch.float64


def plain() -> dict:
    """batch_size 2, seqlen_q 3, 4 heads of q and 2 of k, head_dim 8, head_dim_v 6; capacity 10, nothing to append."""
    caches = {"k_cache": rows(2, 10, 2, 8), "v_cache": rows(2, 10, 2, 6)}
    return {"q": rows(2, 3, 4, 8), **caches, "cache_seqlens": ints(4, 7)}


def appending() -> dict:
    """Two rows for each sequence."""
    return {**plain(), "k": rows(2, 2, 2, 8), "v": rows(2, 2, 2, 6)}


def rotary() -> dict:
    return {**appending(), "rotary_cos": rows(10, 4), "rotary_sin": rows(10, 4)}


def chosen() -> dict:
    """The sequences are rows 2 and 0 of a cache of three."""
    caches = {"k_cache": rows(3, 10, 2, 8), "v_cache": rows(3, 10, 2, 6)}
    return {**appending(), **caches, "cache_batch_idx": ints(2, 0)}


def paged() -> dict:
    """A pool of 7 pages of 4 rows; the last entry of each row of the table is not in use."""
    caches = {"k_cache": rows(7, 4, 2, 8), "v_cache": rows(7, 4, 2, 6)}
    return {**appending(), **caches, "block_table": ints([0, 1, -1], [2, 4, 5])}


def latent() -> dict:
    """Multi-head latent attention: v_cache is a part of k_cache."""
    k_cache = rows(2, 10, 1, 576)
    shared = {"k_cache": k_cache, "v_cache": k_cache[..., :512], "k": rows(2, 2, 1, 576)}
    return {**plain(), "q": rows(2, 3, 4, 576), **shared, "softmax_scale": 0.07}


CALLS = {f.__name__: f for f in (plain, appending, rotary, chosen, paged, latent)}


def overlapping(*shape):
    """Two different views that share some of their elements."""
    both = torch.ones(math.prod(shape) + 8)
    return {"k_cache": both[:-8].view(shape), "v_cache": both[8:].view(shape)}


def one_pool(page_of_keys: int):
    """Pages of keys and of values in one pool: page i of v_cache is page i + 1 of k_cache."""
    pool = torch.ones(8, 4, 2, 8)
    caches = {"k_cache": pool[:-1], "v_cache": pool[1:], "v": rows(2, 2, 2, 8), "cache_seqlens": ints(4, 1)}
    return {**caches, "block_table": ints([0, page_of_keys, -1], [6, -1, -1])}


# (call, changed arguments, [(argument, part of the expected text, part of the received text)])
SHAPES = [
    # What goes together.
    ("appending", {"v": None}, [("v", "a tensor", "None")]),
    ("appending", {"k": None}, [("k", "a tensor", "None")]),
    ("appending", {"cache_seqlens": None}, [("cache_seqlens", "", "None")]),
    ("rotary", {"rotary_sin": None}, [("rotary_sin", "a tensor", "None")]),
    ("rotary", {"rotary_cos": None}, [("rotary_cos", "a tensor", "None")]),
    ("rotary", {"k": None, "v": None}, [("rotary_cos", "None, as no k is given", "a tensor")]),
    ("paged", {"cache_batch_idx": ints(0, 1)}, [("cache_batch_idx", "None", "a tensor")]),
    ("appending", {"q": rows(2, 11, 4, 8)}, [("q", "10", "11")]),
    # q and the caches.
    ("plain", {"q": rows(2, 3, 8)}, [("q", "(batch_size, seqlen_q, num_heads, head_dim)", "(2, 3, 8)")]),
    ("plain", {"k_cache": rows(2, 10, 8)}, [("k_cache", "head_dim=8", "(2, 10, 8)")]),
    ("plain", {"k_cache": rows(2, 10, 2, 9)}, [("k_cache", "head_dim=8", "(2, 10, 2, 9)")]),
    ("plain", {"k_cache": rows(1, 10, 2, 8), "v_cache": rows(1, 10, 2, 6)}, [("k_cache", "batch_size=2", "1")]),
    ("plain", {"v_cache": rows(2, 9, 2, 6)}, [("v_cache", "10", "(2, 9, 2, 6)")]),
    ("plain", {"v_cache": rows(2, 10, 1, 6)}, [("v_cache", "num_heads_k=2", "(2, 10, 1, 6)")]),
    ("plain", {"q": rows(2, 3, 3, 8)}, [("k_cache", "divides num_heads=3", "2")]),
    ("plain", {"q": rows(2, 3, 0, 8)}, [("q", "num_heads", "0")]),
    ("plain", {"q": rows(2, 3, 4, 577), "k_cache": rows(2, 10, 2, 577), "softmax_scale": 1.0},
     [("q", "head_dim from 1 to 576", "577")]),
    ("plain", {"v_cache": rows(2, 10, 2, 577)}, [("v_cache", "head_dim_v from 1 to 576", "577")]),
    ("plain", {"q": rows(2, 3, 4, 8, dtype=BF16)},
     [("k_cache", "bfloat16", "float32"), ("v_cache", "bfloat16", "float32")]),
    ("plain", {"v_cache": rows(2, 10, 2, 6, dtype=F64)}, [("v_cache", "float32", "float64")]),
    ("plain", {name: t.int() for name, t in plain().items() if name != "cache_seqlens"},
     [("q", "dtype float32, float64, bfloat16 or float16", "int32")]),
    ("paged", {"v_cache": rows(6, 4, 2, 6)}, [("v_cache", "num_pages=7", "(6, 4, 2, 6)")]),
    ("paged", {"v_cache": rows(7, 5, 2, 6)}, [("v_cache", "page_size=4", "(7, 5, 2, 6)")]),
    ("paged", {"k_cache": rows(7, 0, 2, 8), "v_cache": rows(7, 0, 2, 6)}, [("k_cache", "page_size", "0")]),
    # New rows.
    ("appending", {"k": rows(1, 2, 2, 8)}, [("k", "batch_size=2", "(1, 2, 2, 8)")]),
    ("appending", {"k": rows(2, 2, 1, 8)}, [("k", "num_heads_k=2", "(2, 2, 1, 8)")]),
    ("appending", {"k": rows(2, 2, 2, 7)}, [("k", "head_dim=8", "(2, 2, 2, 7)")]),
    ("appending", {"k": rows(2, 2, 8)}, [("k", "head_dim=8", "(2, 2, 8)")]),
    ("appending", {"v": rows(2, 3, 2, 6)}, [("v", "seqlen_new=2", "(2, 3, 2, 6)")]),
    ("appending", {"v": rows(2, 2, 2, 8)}, [("v", "head_dim_v=6", "(2, 2, 2, 8)")]),
    ("appending", {"k": rows(2, 2, 2, 8, dtype=BF16)}, [("k", "float32", "bfloat16")]),
    ("appending", {"v": rows(2, 2, 2, 6, dtype=F64)}, [("v", "float32", "float64")]),
    # Rotary embedding.
    ("rotary", {"rotary_cos": rows(9, 4), "rotary_sin": rows(9, 4)}, [("rotary_cos", "10", "9")]),
    ("rotary", {"rotary_sin": rows(11, 4)}, [("rotary_sin", "seqlen_rotary=10", "(11, 4)")]),
    ("rotary", {"rotary_sin": rows(10, 3)}, [("rotary_sin", "rotary_dim / 2=4", "(10, 3)")]),
    ("rotary", {"rotary_cos": rows(10, 5), "rotary_sin": rows(10, 5)}, [("rotary_cos", "head_dim=8", "5")]),
    ("rotary", {"rotary_cos": rows(10, 0), "rotary_sin": rows(10, 0)}, [("rotary_cos", "from 1", "0")]),
    ("rotary", {"rotary_cos": rows(40), "rotary_sin": rows(40)}, [("rotary_cos", "rotary_dim / 2", "(40,)")]),
    ("rotary", {"rotary_cos": rows(10, 4, dtype=F64)}, [("rotary_cos", "float32", "float64")]),
    ("rotary", {"rotary_sin": rows(10, 4, dtype=BF16)}, [("rotary_sin", "float32", "bfloat16")]),
    # Lengths and tables.
    ("plain", {"cache_seqlens": ints(4, 7, 1)}, [("cache_seqlens", "(batch_size=2,)", "(3,)")]),
    ("plain", {"cache_seqlens": ints(4, 7, dtype=torch.int64)}, [("cache_seqlens", "int32", "int64")]),
    ("plain", {"cache_leftpad": ints(4)}, [("cache_leftpad", "(batch_size=2,)", "(1,)")]),
    ("plain", {"cache_leftpad": rows(2)}, [("cache_leftpad", "int32", "float32")]),
    ("chosen", {"cache_batch_idx": ints(0, 1, 2)}, [("cache_batch_idx", "(batch_size=2,)", "(3,)")]),
    ("chosen", {"cache_batch_idx": rows(2)}, [("cache_batch_idx", "int32", "float32")]),
    ("paged", {"block_table": ints([0, 1, 2])}, [("block_table", "(batch_size=2, max_pages)", "(1, 3)")]),
    ("paged", {"block_table": ints(0, 1)}, [("block_table", "(batch_size=2, max_pages)", "(2,)")]),
    ("paged", {"block_table": torch.zeros(2, 3)}, [("block_table", "int32", "float32")]),
    # Lengths given as an int are checked by the host, whatever the device.
    ("plain", {"cache_seqlens": 11}, [("cache_seqlens", "10", "11")]),
    ("appending", {"cache_seqlens": 9}, [("cache_seqlens", "8", "9")]),
    ("paged", {"cache_seqlens": 11}, [("cache_seqlens", "10", "11")]),
    # The caches are neither copied nor written more than once.
    ("plain", {"k_cache": rows(2, 10, 2, 16)[..., ::2]}, [("k_cache", "stride 1", "stride 2")]),
    ("plain", {"v_cache": rows(2, 10, 2, 1).expand(2, 10, 2, 6)}, [("v_cache", "stride 1", "stride 0")]),
    ("appending", {"k_cache": rows(1, 1, 1, 8).expand(2, 10, 2, 8)}, [("k_cache", "share memory", "expanded")]),
    ("appending", {"v_cache": rows(1, 10, 2, 6).expand(2, 10, 2, 6)}, [("v_cache", "share memory", "expanded")]),
    ("latent", {"v": rows(2, 2, 1, 512)}, [("v", "None or the leading columns of k", "another tensor")]),
    ("latent", {"rotary_cos": rows(10, 32), "rotary_sin": rows(10, 32)}, [("rotary_cos", "None", "a tensor")]),
    # Scores.
    ("latent", {"softmax_scale": None}, [("softmax_scale", "576", "None")]),
    *[("plain", {"softmax_scale": x}, [("softmax_scale", "finite", "")]) for x in (0.0, -0.1, math.nan, math.inf)],
    *[("plain", {"softcap": x}, [("softcap", "finite", "")]) for x in (math.nan, math.inf)],
    ("plain", {"attention_chunk": -1}, [("attention_chunk", "a number of keys, or 0", "-1")]),
    ("plain", {"alibi_slopes": rows(3)}, [("alibi_slopes", "(num_heads=4,) or (batch_size=2, num_heads=4)", "(3,)")]),
    ("plain", {"alibi_slopes": rows(4, dtype=F64)}, [("alibi_slopes", "float32", "float64")]),
    ("plain", {"s_aux": rows(3)}, [("s_aux", "(num_heads=4,)", "(3,)")]),
    ("plain", {"s_aux": rows(4).int()}, [("s_aux", "float32, float64, bfloat16 or float16", "int32")]),
    *[("plain", {"num_splits": n}, [("num_splits", "from 0 to 128", str(n))]) for n in (-1, 129, 10**9)],
    # Several at once.
    ("rotary", {"k": rows(2, 2, 2, 7), "rotary_sin": rows(3, 3), "num_splits": 200, "softmax_scale": -1.0},
     [("k", "head_dim=8", "(2, 2, 2, 7)"), ("rotary_sin", "seqlen_rotary=10, rotary_dim / 2=4", "(3, 3)"),
      ("num_splits", "128", "200"),
      ("softmax_scale", "finite", "-1")]),
]  # fmt: skip

# Values of tensors: checked only in host memory, and on a GPU with FLASH_ATTN_CHECK=1.
VALUES = [
    # Where the memory of a tensor is, a meta tensor does not know.
    ("appending", {**overlapping(2, 10, 2, 8), "v": rows(2, 2, 2, 8)}, [("v_cache", "", "overlap")]),
    ("plain", {"cache_seqlens": ints(4, 11)}, [("cache_seqlens[1]", "10", "11")]),
    ("plain", {"cache_seqlens": ints(2**31 - 1, 4)}, [("cache_seqlens[0]", "10", str(2**31 - 1))]),
    ("appending", {"cache_seqlens": ints(4, 9)}, [("cache_seqlens[1]", "8", "9")]),
    ("appending", {"cache_seqlens": ints(2**31 - 1, 4)}, [("cache_seqlens[0]", "8", str(2**31 - 1))]),
    ("appending", {"cache_seqlens": ints(9, 10)}, [("cache_seqlens[0]", "8", "9")]),
    ("paged", {"cache_seqlens": ints(4, 11)}, [("cache_seqlens[1]", "10", "11")]),
    ("plain", {"cache_leftpad": ints(0, -2)}, [("cache_leftpad[1]", "at least 0", "-2")]),
    ("paged", {"block_table": ints([0, 7, -1], [2, 4, 5])}, [("block_table[0, 1]", "num_pages=7", "7")]),
    ("paged", {"block_table": ints([0, 1, -1], [2, 4, -1])}, [("block_table[1, 2]", "num_pages=7", "-1")]),
    ("chosen", {"cache_batch_idx": ints(2, 3)}, [("cache_batch_idx[1]", "3", "3")]),
    ("chosen", {"cache_batch_idx": ints(-1, 0)}, [("cache_batch_idx[0]", "3", "-1")]),
    # Two sequences that write to the same row.
    ("chosen", {"cache_batch_idx": ints(1, 1), "cache_seqlens": ints(5, 4)},
     [("cache_batch_idx", "different rows", "sequences 1 and 0, which both append to row 5 of batch entry 1")]),
    ("paged", {"block_table": ints([0, 1, -1], [2, 1, 5]), "cache_seqlens": ints(4, 5)},
     [("block_table", "different rows", "sequences 0 and 1, which both append to row 1 of page 1")]),
    # Keys and values in one page.
    ("paged", one_pool(1), [("block_table", "apart in memory", "page 1 of k_cache where page 0 of v_cache is")]),
    # Queries at positions that rotary_cos lacks.
    ("rotary", {"cache_seqlens": ints(4, 8), "causal": True}, [("rotary_cos", "position 10", "10 rows")]),
    ("chosen", {"cache_batch_idx": ints(5, 0), "cache_seqlens": ints(1, 9), "cache_leftpad": ints(-3, 0)},
     [("cache_batch_idx[0]", "3", "5"), ("cache_seqlens[1]", "8", "9"), ("cache_leftpad[0]", "at least 0", "-3")]),
]  # fmt: skip

# What looks wrong, and is not.
FINE = [
    ("plain", {"cache_seqlens": ints(10, 0)}),
    ("plain", {"cache_seqlens": None}),
    ("plain", {"cache_seqlens": 10}),
    ("plain", {"q": rows(2, 30, 4, 8)}),
    ("plain", {"cache_leftpad": ints(20, 5)}),
    ("plain", {"k_cache": rows(3, 10, 2, 8), "v_cache": rows(3, 10, 2, 6)}),
    ("plain", {"k_cache": rows(8).expand(2, 10, 2, 8), "v_cache": rows(1, 1, 1, 6).expand(2, 10, 2, 6)}),
    ("plain", {"q": rows(0, 3, 4, 8), "cache_seqlens": ints()}),
    ("appending", {"cache_seqlens": ints(8, 8)}),
    ("appending", {"cache_seqlens": ints(-1, 8)}),
    ("appending", {"cache_seqlens": -1}),
    ("appending", {"k": rows(2, 0, 2, 8), "v": rows(2, 0, 2, 6), "cache_seqlens": ints(10, 10)}),
    ("rotary", {"rotary_cos": rows(10, 1), "rotary_sin": rows(10, 1)}),
    ("rotary", {"rotary_cos": rows(99, 3), "rotary_sin": rows(99, 3)}),
    ("rotary", {"cache_seqlens": ints(4, 8)}),
    ("rotary", {"q": rows(2, 0, 4, 8), "k": rows(2, 0, 2, 8), "v": rows(2, 0, 2, 6), "cache_seqlens": ints(10, 10)}),
    ("chosen", {"cache_batch_idx": ints(1, 1), "k": None, "v": None}),
    ("chosen", {"cache_batch_idx": ints(1, 1), "cache_seqlens": ints(4, 6)}),
    ("chosen", {"cache_batch_idx": ints(1, 1), "cache_seqlens": ints(5, -1)}),
    ("chosen", {"cache_batch_idx": ints(99, 0), "cache_seqlens": ints(-1, 5)}),
    ("paged", {"block_table": ints([0, 1, -1], [-9, -9, 99]), "cache_seqlens": ints(6, -3)}),
    ("paged", {"cache_leftpad": ints(3, 1)}),
    ("paged", one_pool(2)),
    ("paged", {**one_pool(1), "cache_leftpad": ints(4, 0)}),  # page 0 of v_cache is padding
    ("paged", {**one_pool(1), "k": None, "v": None}),
    ("paged", {"cache_leftpad": ints(4, 9), "block_table": ints([-5, 1, -1], [99, 4, 5])}),
    ("paged", {"block_table": ints([0, 1, -1], [0, 4, 5])}),
    ("latent", {}),
    *[("plain", {"num_splits": n}) for n in (0, 1, 128)],
]
