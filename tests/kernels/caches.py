"""Rows of KV caches."""

import dataclasses

from cases import Case
from sim_case import Row, Sim

CACHE = Case((5,) * 4, (150,) * 4, "bfloat16", 4, 2, seqused_k=(-1, 149, 64, 90), leftpad_k=(3, 10, 70, 91))


def table() -> list[Row]:
    """KV caches: dense queries, with pages and without, new rows, also past the capacity, sequences not in use."""
    wide = {"head_dim": 128, "head_dim_v": 128}
    variants = [
        (0, 1, {}, "rows"),
        (0, 5, {"causal": True, "softcap": 2.0}, "heads"),
        (16, 1, {"causal": True}, "gaps"),
        (37, 5, {"window_size": (40, 0), "alibi": "batch", "dtype": "float16", **wide}, "heads"),
        (CACHE.seqlen_k, 0, {"causal": True, "leftpad_k": None}, "rows"),  # cache_batch_idx: one page per sequence
        (CACHE.seqlen_k, 70, {"causal": True, "attention_chunk": 50, "seqlens_q": (70,) * 4}, "rows"),
        (1, 2, {"seqlens_q": (1,) * 4, **wide}, "rows"),
    ]
    return [
        (dataclasses.replace(CACHE, page_size=page_size, **changes), Sim(layout=layout, seqlen_new=seqlen_new))
        for page_size, seqlen_new, changes, layout in variants
    ]
