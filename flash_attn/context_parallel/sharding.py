"""Cutting tensors into the shards of the ranks, and joining them again, with gradients."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flash_attn import _checks
from flash_attn.context_parallel.host_tensors import HostTensors
from flash_attn.context_parallel.layout import LAYOUTS, Cut, local_length, make_cut, rows_of
from flash_attn.context_parallel.ranks import Ranks, resolve


def _find_places(cut: Cut, padded: int) -> Tensor:
    """Where each row of the whole is among the local rows of all ranks, padded to equal numbers."""
    places = torch.empty(cut.total, dtype=torch.int64, device="cpu")
    for rank in range(cut.num_ranks):
        rows = rows_of(cut, rank)
        places[rows] = torch.arange(len(rows), device="cpu") + rank * padded
    return places


_places, _rows_on = HostTensors(_find_places, maxsize=8), HostTensors(rows_of, maxsize=8)


def gather_rows(x: Tensor, cut: Cut, ranks: Ranks) -> Tensor:
    """The rows (total, ...) of the whole, in their order, from the local rows (local_length, ...) of every rank."""
    if cut.num_ranks == 1:
        return x
    padded = max(local_length(cut, rank) for rank in range(cut.num_ranks))
    sent = x if len(x) == padded else torch.cat([x, x.new_zeros(padded - len(x), *x.shape[1:])])
    gathered = ranks.all_gather(sent.reshape(-1)).view(cut.num_ranks * padded, *x.shape[1:])
    return gathered.index_select(0, _places(x, cut, padded))


class _Shard(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, cut: Cut, ranks: Ranks) -> Tensor:
        ctx.where = dim, cut, ranks
        return x.index_select(dim, _rows_on(x, cut, ranks.index))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return _Unshard.apply(grads[0], *ctx.where), None, None, None


class _Unshard(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, cut: Cut, ranks: Ranks) -> Tensor:
        ctx.where = dim, cut, ranks
        if cut.num_ranks == 1:
            return x.clone(memory_format=torch.contiguous_format)
        return gather_rows(x.movedim(dim, 0), cut, ranks).movedim(0, dim).contiguous()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return _Shard.apply(grads[0], *ctx.where), None, None, None


def lengths_reasons(cu_seqlens: Any) -> tuple[tuple[int, ...], list[str]]:
    """The lengths of the documents, which are read to the host, and the reasons to reject cu_seqlens."""
    integers = (torch.int32, torch.int64)
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dim() != 1 or cu_seqlens.dtype not in integers:
        return (), [
            f"cu_seqlens: expected a Tensor (batch_size+1,), int32 or int64, got {_checks.describe(cu_seqlens)}"
        ]
    values = cu_seqlens.tolist()
    lengths = tuple(end - start for start, end in itertools.pairwise(values))
    if not values or values[0] != 0 or min(lengths, default=0) < 0:
        shown = values if len(values) <= 16 else [*values[:16], "..."]
        return (), [f"cu_seqlens: expected values that start with 0 and never decrease, got {shown}"]
    return lengths, []


def data_reasons(name: str, x: Tensor) -> list[str]:
    """The reason to reject a tensor that cannot be sent."""
    return [f"{name}: expected a tensor with data, got one on the meta device"] if x.is_meta else []


def layout_reasons(layout: Any) -> list[str]:
    """The reasons to reject a layout."""
    known = isinstance(layout, str) and layout in LAYOUTS
    return [] if known else [f"layout: expected 'zigzag' or 'contiguous', got {_checks.describe(layout)}"]


def seqlen_reasons(function: str, seqlen: Any, lengths: tuple[int, ...] | None) -> tuple[int, list[str]]:
    """seqlen as an int, and the reasons to reject it; lengths: of cu_seqlens, if given. Raises TypeError."""
    (seqlen,) = _checks.integers(function, seqlen=seqlen)
    if lengths is not None:
        return seqlen, [f"seqlen: expected None, as cu_seqlens is given, got {seqlen}"]
    return seqlen, [] if seqlen >= 0 else [f"seqlen: expected a length of at least 0, got {seqlen}"]


def _check(function: str, x: Any, dim: Any, layout: Any, cu_seqlens: Any) -> tuple[int, tuple[int, ...] | None]:
    """dim, from 0, and the lengths of documents, if cu_seqlens is given."""
    if not isinstance(x, Tensor):
        _checks.reject(TypeError, function, [f"x: expected torch.Tensor, got {_checks.describe(x)}"])
    (dim,) = _checks.integers(function, dim=dim)
    reasons = layout_reasons(layout)
    if not -x.dim() <= dim < x.dim():
        reasons.append(f"dim: expected a dimension of x, which has {x.dim()}, got {dim}")
    lengths = None
    if cu_seqlens is not None:
        lengths, wrong = lengths_reasons(cu_seqlens)
        reasons += wrong
    if reasons:
        _checks.reject(ValueError, function, reasons)
    return dim % x.dim(), lengths


@torch.compiler.disable
def shard(x: Tensor, dim: int, group: Any, layout: str = "zigzag", cu_seqlens: Tensor | None = None) -> Tensor:
    """This rank's part of a tensor that every rank has whole.

    The sequence, or every document of cu_seqlens, is cut into 2 n pieces (zigzag) or n pieces (contiguous) for n ranks.
    All have the same number of rows, the least multiple of 32 that is enough, but for the last ones, which are shorter
    or empty. Rank r gets the pieces r and 2 n - 1 - r (zigzag), which balances the work under a causal mask, or piece r
    (contiguous): first the piece r of all documents, then the piece 2 n - 1 - r of all documents. A single rank gets
    all rows in their order. torch.compile breaks the graph here, as in unshard.

    Args:
        x: any tensor with the rows of the sequence along dim: tokens, positions, labels, q, k, v.
        dim: a dimension of x.
        group: a ProcessGroup or a 1-D DeviceMesh; for ("ulysses", "ring") a 2-D DeviceMesh or a pair of ProcessGroups,
            first ulysses, then ring. Of U ulysses ranks, rank u in ring position w has number w * U + u.
        layout: "zigzag" or "contiguous".
        cu_seqlens: (batch_size + 1,), int32 or int64, of the whole: cumulative lengths of documents along dim, from 0
            to x.shape[dim]. Read to the host: a CPU tensor costs no wait for the GPU.

    Returns:
        x with this rank's rows along dim: a copy. Some ranks may get none. The gradient of x is gathered from the
        gradients of all shards, so it is whole on every rank, as x is: in DTensor's words, x and its gradient are
        Replicate, the result and its gradient are Shard. All ranks must run backward.

    Raises:
        TypeError, ValueError: an argument violates the above; lists all reasons.
    """
    dim, lengths = _check("shard", x, dim, layout, cu_seqlens)
    ranks = resolve("shard", group)
    if lengths is not None and sum(lengths) != x.shape[dim]:
        expected = f"a last value of x.shape[{dim}] = {x.shape[dim]}"
        _checks.reject(ValueError, "shard", [f"cu_seqlens: expected {expected}, got {sum(lengths)}"])
    cut = make_cut((x.shape[dim],) if lengths is None else lengths, ranks.size, layout)
    return _Shard.apply(x, dim, cut, ranks)


def gather_lengths(length: int, ranks: Ranks, device: torch.device) -> list[int]:
    """A number of every rank: a small collective, and a wait for the GPU."""
    return ranks.all_gather(torch.tensor([length], device=device)).tolist()


def cut_of_lengths(function: str, argument: str, lengths: Sequence[int], layout: str) -> Cut:
    """The cut of one sequence whose shards have these lengths. Every rank finds the same error, if any."""
    cut = make_cut((sum(lengths),), len(lengths), layout)
    expected = [local_length(cut, rank) for rank in range(len(lengths))]
    if expected != list(lengths):
        wanted = f"the shards of a {layout} layout of {cut.total} rows, {expected}"
        _checks.reject(ValueError, function, [f"{argument}: expected {wanted} on the ranks, got {list(lengths)}"])
    return cut


@torch.compiler.disable
def unshard(
    x: Tensor,
    dim: int,
    group: Any,
    layout: str = "zigzag",
    cu_seqlens: Tensor | None = None,
    *,
    seqlen: int | None = None,
) -> Tensor:
    """The whole tensor, on every rank, from the parts that shard makes: unshard(shard(x, ...), ...) is x.

    Args:
        x: this rank's part.
        dim, group, layout, cu_seqlens: those of shard.
        seqlen: the rows of the whole, without cu_seqlens. None: the sum over all ranks, for which they communicate and
            wait.

    Returns:
        The whole, the same on every rank. Its gradient must be the same on every rank, as it is if all compute the same
        loss from it: each rank keeps its part of it. A loss computed from the shards, summed over ranks, needs no
        unshard, and gives the same gradients.

    Raises:
        TypeError, ValueError: an argument violates the above; lists all reasons.
    """
    dim, lengths = _check("unshard", x, dim, layout, cu_seqlens)
    ranks = resolve("unshard", group)
    if wrong := data_reasons("x", x):
        _checks.reject(ValueError, "unshard", wrong)
    if seqlen is not None:
        seqlen, wrong = seqlen_reasons("unshard", seqlen, lengths)
        if wrong:
            _checks.reject(ValueError, "unshard", wrong)
    if lengths is None and seqlen is None:
        cut = cut_of_lengths("unshard", "x", gather_lengths(x.shape[dim], ranks, x.device), layout)
        return _Unshard.apply(x, dim, cut, ranks)
    cut = make_cut((seqlen or 0,) if lengths is None else lengths, ranks.size, layout)
    expected = local_length(cut, ranks.index)
    if x.shape[dim] != expected:
        wanted = f"{expected} rows along dimension {dim}, those of rank {ranks.index} of {ranks.size}"
        _checks.reject(ValueError, "unshard", [f"x: expected {wanted}, got shape {tuple(x.shape)}"])
    return _Unshard.apply(x, dim, cut, ranks)
