"""The tensors of a Case, and the rows of its sequences."""

import math
from dataclasses import dataclass
from itertools import accumulate

import torch

from cases import Case
from device import DEVICE, narrow
from key_ranges import INT32, PATTERNS


@dataclass
class Inputs:
    """The inputs of an op. k_rows and v_rows: k and v as rows, also if k and v are paged."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    k_rows: torch.Tensor
    v_rows: torch.Tensor
    dout: torch.Tensor
    dlse: torch.Tensor
    alibi_slopes: torch.Tensor | None
    cu_seqlens_q: torch.Tensor | None
    cu_seqlens_k: torch.Tensor | None
    seqused_k: torch.Tensor | None
    leftpad_k: torch.Tensor | None
    block_table: torch.Tensor | None
    rng_state: torch.Tensor | None
    s_aux: torch.Tensor | None
    key_ranges: torch.Tensor | None


@dataclass(frozen=True)
class Sequence:
    """The rows of one sequence. batch is None for packed tensors."""

    index: int
    batch: int | None
    rows_q: slice
    rows_k: slice

    def take(self, tensor: torch.Tensor, rows: slice) -> torch.Tensor:
        return tensor[rows] if self.batch is None else tensor[self.batch, rows]


def sequences(case: Case) -> list[Sequence]:
    """All sequences of a case, with the keys that remain after seqused_k and leftpad_k."""
    starts_q = [0, *accumulate(case.seqlens_q)]
    starts_k = [0, *accumulate(case.seqlens_k)]
    found = []
    for b in range(case.batch_size):
        begin = case.leftpad_k[b] if case.leftpad_k else 0
        end = case.seqused_k[b] if case.seqused_k else case.seqlens_k[b]
        begin = min(begin, end)
        if case.packed:
            rows_q = slice(starts_q[b], starts_q[b + 1])
            found.append(Sequence(b, None, rows_q, slice(starts_k[b] + begin, starts_k[b] + end)))
        else:
            found.append(Sequence(b, b, slice(0, case.seqlens_q[b]), slice(begin, end)))
    return found


def eps_of(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


def lse_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def make_inputs(case: Case, padding: float = math.nan) -> Inputs:
    """Random tensors on the device under test, in a dtype that it supports; the same values on every device.

    Rows outside all sequences are filled with `padding`, which must not affect results.
    """
    with torch.device("cpu"):
        return _make_inputs(narrow(case), padding, DEVICE)


def _make_inputs(case: Case, padding: float, device: str) -> Inputs:
    generator = torch.Generator().manual_seed(1000 + case.seed)
    dtype = getattr(torch, case.dtype)

    def rows(lengths: tuple[int, ...], length: int, *dims: int) -> torch.Tensor:
        shape = (sum(lengths) + case.unused_rows,) if case.packed else (case.batch_size, length)
        return torch.randn(*shape, *dims, generator=generator, dtype=torch.float64)

    q = rows(case.seqlens_q, case.seqlen_q, case.num_heads, case.head_dim)
    k = rows(case.seqlens_k, case.seqlen_k, case.num_heads_k, case.head_dim)
    v = rows(case.seqlens_k, case.seqlen_k, case.num_heads_k, case.head_dim_v)
    dout = rows(case.seqlens_q, case.seqlen_q, case.num_heads, case.head_dim_v)
    dlse = rows(case.seqlens_q, case.seqlen_q, case.num_heads)
    used_q, used_k = torch.zeros(q.shape[:-2], dtype=torch.bool), torch.zeros(k.shape[:-2], dtype=torch.bool)
    for s in sequences(case):
        s.take(used_q, s.rows_q)[:] = True
        s.take(used_k, s.rows_k)[:] = True
    for tensor, used in [(q, used_q), (k, used_k), (v, used_k), (dout, used_q), (dlse, used_q)]:
        tensor[~used] = padding
    dlse = dlse.transpose(-1, -2).contiguous().to(device, lse_dtype(dtype))
    q, k, v, dout = (t.to(device, dtype) for t in (q, k, v, dout))
    sinks = make_sinks(case, generator)
    k_pages, v_pages, block_table = (k, v, None) if not case.page_size else _to_pages(case, k, v, padding, generator)
    return Inputs(
        q, k_pages, v_pages, k, v, dout, dlse, _alibi_slopes(case, generator, device),
        _cu_seqlens(case, case.seqlens_q, device), _cu_seqlens(case, case.seqlens_k, device),
        _int32(case.seqused_k, device), _int32(case.leftpad_k, device), block_table,
        torch.tensor([12345 + case.seed, 64], device=device) if case.dropout_p > 0 else None,
        sinks if sinks is None else sinks.to(device), _key_ranges(case, generator, device),
    )  # fmt: skip


def _int32(values: tuple[int, ...] | None, device: str) -> torch.Tensor | None:
    return None if values is None else torch.tensor(values, dtype=torch.int32, device=device)


def _cu_seqlens(case: Case, lengths: tuple[int, ...], device: str) -> torch.Tensor | None:
    return _int32((0, *accumulate(lengths)), device) if case.packed else None


def _alibi_slopes(case: Case, generator: torch.Generator, device: str) -> torch.Tensor | None:
    if not case.alibi:
        return None
    shape = (case.num_heads,) if case.alibi == "heads" else (case.batch_size, case.num_heads)
    return (torch.rand(shape, generator=generator) * 0.3).to(device)


def make_sinks(case, generator: torch.Generator) -> torch.Tensor | None:
    """Numbers that every dtype can express, so that plain attention has the same; -inf: no sink."""
    if not case.s_aux:
        return None
    sinks = torch.randn(case.num_heads, generator=generator).mul(16).round() / 8
    if case.s_aux == "some":
        sinks[0] = -math.inf
    return sinks


def _key_ranges(case: Case, generator: torch.Generator, device: str) -> torch.Tensor | None:
    """Rows outside of sequences have ranges, too, which must not matter."""
    if not case.key_ranges:
        return None
    rows = sum(case.seqlens_q) + case.unused_rows
    shared = case.key_ranges == "shared"
    shape = (rows,) if case.packed else (1 if shared else case.batch_size, case.seqlen_q)
    ranges = torch.randint(INT32.min, INT32.max, (*shape, 2), generator=generator)
    for s in sequences(case)[: 1 if shared else None]:
        own = PATTERNS[case.key_ranges](s.rows_q.stop - s.rows_q.start, s.rows_k.stop - s.rows_k.start, generator)
        s.take(ranges, s.rows_q)[:] = own
    return ranges.to(device, torch.int32)


def _to_pages(case: Case, k: torch.Tensor, v: torch.Tensor, padding: float, generator: torch.Generator):
    """Scatter the rows of k and v into shuffled pages of a pool with two unused pages."""
    needed = [-(-n // case.page_size) for n in case.seqlens_k]
    num_pages = sum(needed) + 2
    order = torch.randperm(num_pages, generator=generator).tolist()
    block_table = torch.zeros(case.batch_size, max(needed) + 1, dtype=torch.int32)
    pools = [torch.full((num_pages, case.page_size, *t.shape[1:]), padding, dtype=t.dtype) for t in (k, v)]
    row = 0
    for b, length in enumerate(case.seqlens_k):
        for page in range(needed[b]):
            block_table[b, page] = order.pop()
            rows = min(case.page_size, length - page * case.page_size)
            for pool, tensor in zip(pools, (k, v), strict=True):
                pool[block_table[b, page], :rows] = tensor[row : row + rows].cpu()
            row += rows
    return pools[0].to(k.device), pools[1].to(k.device), block_table.to(k.device)


def random_qkv(batch_size=2, seqlen=200, num_heads=4, head_dim=64, dtype=torch.bfloat16, num_heads_k=None):
    """q, k and v on the device under test, with requires_grad."""
    shape = (batch_size, seqlen, num_heads, head_dim)
    shape_k = (batch_size, seqlen, num_heads_k or num_heads, head_dim)
    return [torch.randn(s, dtype=dtype, device=DEVICE).requires_grad_() for s in (shape, shape_k, shape_k)]
