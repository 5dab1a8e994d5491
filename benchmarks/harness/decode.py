"""A few new queries against a cache of keys and values: the cases of `bench.py decode`, and their data.

Such a call reads the whole cache and computes little with it. So its measure is the bytes of keys and values that have
to be read, per second, beside a plain read of as many bytes in the same run.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from harness.cases import DTYPES, Case
from harness.provider import Problem

LARGEST = {"cpu": 2**30, "cuda": 2**34}  # bytes of keys and values; what would need more is left out
COLD = 2**29  # bytes that are read before a CPU reads a cache again, more than it keeps; a GPU's L2 cache is flushed
SHORT = 512  # shorter caches are read again and again
QUICK_SEQLEN = 256


def cache_bytes(case: Case) -> int:
    """Bytes of keys and values that one call has to read."""
    rows = case.batch_size * case.seqlen_k * case.num_heads_k
    return rows * (case.head_dim + case.head_dim_v) * DTYPES[case.dtype].itemsize


def _case(device: str, group: str, dtype: str, batch_size: int, seqlen_q: int, seqlen_k: int, *shape: int) -> Case:
    heads, heads_k, width = shape
    return Case(device, group, dtype, seqlen_q, seqlen_k, batch_size, heads, heads_k, width, width, seqlen_q > 1)


def _cpu_cases() -> Iterator[Case]:
    dtypes = ("fp32", "bf16")
    for dtype in dtypes:
        yield _case("cpu", "overhead", dtype, 1, 1, 128, 8, 8, 64)
    for dtype, num_heads, seqlen in itertools.product(dtypes, (8, 32), (8192, 16384, 32768, 65536)):
        yield _case("cpu", "bandwidth", dtype, 1, 1, seqlen, num_heads, 8, 128)
    axes = (dtypes, (128, 64), (1, 4), ((8, 8), (32, 8), (32, 1)), (1, 8), (512, 4096, 32768))
    for dtype, width, queries, heads, batch, seqlen in itertools.product(*axes):
        yield _case("cpu", "grid", dtype, batch, queries, seqlen, *heads, width)


def _gpu_cases() -> Iterator[Case]:
    yield _case("cuda", "overhead", "bf16", 1, 1, 128, 8, 8, 64)
    shared = ((64, 8), (32, 8), (32, 32), (64, 1))
    axes = ((128, 64, 256), (1, 4, 16, 2, 8), shared, (32, 1, 8, 128), (8192, 2048, 32768, 131072, 512))
    for width, queries, heads, batch, seqlen in itertools.product(*axes):
        yield _case("cuda", "grid", "bf16", batch, queries, seqlen, *heads, width)


CASES = tuple(case for case in (*_cpu_cases(), *_gpu_cases()) if cache_bytes(case) <= LARGEST[case.device])


def cases_for(device: str, quick: bool = False) -> list[Case]:
    """Those for a device, those first that tell most. quick: all kinds, with short caches."""
    cases = [case for case in CASES if case.device == device]
    if not quick:
        return cases
    small = (case if case.seqlen_k < SHORT else replace(case, seqlen_k=QUICK_SEQLEN, batch_size=2) for case in cases)
    return list(dict.fromkeys(small))


def copies(case: Case, factor: int = 1) -> int:
    """How many caches are needed for each to be cold when its turn comes; factor: how much larger each is."""
    if case.device == "cuda" or case.seqlen_k < SHORT:
        return 1
    return -(-COLD // (factor * cache_bytes(case)))


@dataclass
class Cached(Problem):
    """A problem whose keys and values there are in several copies, which are read by turns."""

    caches: Tensor  # (copies, 2 for keys and values, batch, seqlen_k, num_heads_k, head_dim)
    turns: Iterator[int]  # the copies, in the order in which they are read, by whatever provider

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """q, and k and v of the next turn."""
        k, v = self.caches[next(self.turns)]
        return self.q, k, v

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of flash_attn_with_kvcache: every cache is full."""
        case = self.case
        lengths = torch.full((case.batch_size,), case.seqlen_k, dtype=torch.int32, device=case.device)
        return {"cache_seqlens": lengths, "causal": case.causal}


def make_problem(case: Case) -> Cached:
    """Normal random data, the same in every copy."""
    options: dict[str, Any] = {"dtype": DTYPES[case.dtype], "device": case.device}
    q = torch.randn(case.batch_size, case.seqlen_q, case.num_heads, case.head_dim, **options)
    shape = (2, case.batch_size, case.seqlen_k, case.num_heads_k, case.head_dim)
    caches = torch.empty(copies(case), *shape, **options)
    caches[0].normal_()
    caches[1:] = caches[0]
    k, v = caches[0]
    return Cached(case, q, k, v, q, None, None, None, caches, itertools.cycle(range(len(caches))))
